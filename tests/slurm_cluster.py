"""A Slurm cluster of two nodes on this machine, for as long as a test needs it."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import launch
from tests.launch import ENVIRONMENT, Output, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
# A job that is queued again waits for credentials to expire: two minutes, unless told otherwise.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=1
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if absent:
        return f"no {', '.join(absent)} here (scripts/install_test_tools.sh installs Slurm)"
    return None if os.geteuid() == 0 else "slurmd needs root"


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.environment = ENVIRONMENT | {"PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PYTHON_EXEC"] = sys.executable  # ranks that begin anew

    def run(self, *command: object) -> Output:
        return launch.run(*command, timeout=60, **self.environment)

    def jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%i %T %r").ok().text.splitlines()


def wait_until(true: Callable[[], bool], what: Callable[[], str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start munged, slurmctld and two slurmd in the foreground; end their jobs and them at the end."""
    with ExitStack() as ends:
        # Not pytest's folder: the path of a socket is limited to about a hundred characters.
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        munge = folder / "munge"
        for made in (folder, munge, folder / "state"):
            made.mkdir(exist_ok=True)
            made.chmod(0o755)  # munged insists
        (munge / "key").touch(0o600)
        (munge / "key").write_bytes(os.urandom(128))
        names = {"folder": folder, "host": socket.gethostname().partition(".")[0], "port": free_port()}
        ports = {"port1": free_port(), "port2": free_port()}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**names, **ports))
        here = Cluster(folder)

        def start(*command: str) -> None:
            with (folder / f"{command[0]}.log").open("a") as log:
                process = subprocess.Popen(command, env=here.environment, stdout=log, stderr=log)
            ends.callback(process.wait, 30)
            ends.callback(process.terminate)

        def log() -> str:
            return "".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))

        files = (f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed"))
        start("munged", "--foreground", f"--socket={munge / 'socket'}", *files)
        wait_until((munge / "socket").exists, log, 10)
        for daemon in (("slurmctld", "-D"), ("slurmd", "-D", "-N", "node1"), ("slurmd", "-D", "-N", "node2")):
            start(*daemon)
        idle = ("sinfo", "-h", "-t", "idle", "-o", "%D")
        wait_until(lambda: here.run(*idle).text.strip() == "2", log, seconds=30)
        ends.callback(lambda: wait_until(lambda: not here.jobs(), log, seconds=60))
        ends.callback(here.run, "scancel", "--state=RUNNING", "--user=root")
        ends.callback(here.run, "scancel", "--state=PENDING", "--user=root")
        yield here
