"""What ``warm.PYTHON`` runs: it hands its arguments to the process that forks, and waits for the fork.

``warm.py`` writes it under the names of a virtual environment's programs, for a Python without packages.
It is the real Python where a process must begin anew: with other options than -u, for kernels that are
interpreted, and for torchrun's module, whose children scripts/launch.sh looks for.
"""

import binascii
import fcntl
import json
import os
import signal
import socket
import sys

SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGURG", "SIGUSR1", "SIGUSR2")
# Without these CUDA is begun at the first question whether it is there, and cannot be in a fork.
ASKS_NOT = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
MODULES = {"router-upcycle": "megatron_router_upcycling.cli", "torchrun": "torch.distributed.run"}
FOLDER = os.path.dirname(os.path.abspath(__file__))


def connect() -> socket.socket:
    """To the process that forks, started when it is asked for: one for each library that is loaded first."""
    path = f"{FOLDER}/{binascii.crc32(os.environ.get('LD_PRELOAD', '').encode())}"
    server = socket.socket(socket.AF_UNIX)
    with open(f"{path}.lock", "w") as lock, open(f"{path}.log", "a+") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            import subprocess

            process = subprocess.Popen(
                [sys.executable, f"{FOLDER}/server.py", path],
                env=os.environ | ASKS_NOT | {"TESTS_WARM_PYTHON": FOLDER},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
            assert process.stdout
            if not process.stdout.readline():
                log.seek(0)
                sys.exit(f"no process to fork from: {log.read()}")
        server.connect(path)
    return server


def main() -> None:
    name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
    if words[:1] == ["-u"]:
        del words[0]
    if name != "python":
        words = ["-m", MODULES[name], *words]
    plain = words and (words[0][:1] != "-" or words[0] in ("-m", "-c"))
    begins_anew = words[:2] == ["-m", "torch.distributed.run"] and name == "python"
    if not plain or begins_anew or "TRITON_INTERPRET" in os.environ:
        os.execv(sys.executable, [sys.executable, *words])
    with connect() as server:
        request = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
        socket.send_fds(server, [len(request).to_bytes(4)], [0, 1, 2])
        server.sendall(request)
        for number in (signal.Signals[name] for name in SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: server.send(bytes([number])))
        status = int(server.recv(10) or 1)
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
