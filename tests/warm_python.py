"""What ``warm.PYTHON`` runs: it hands its arguments to the process that forks, and waits for the fork.

``warm.py`` writes it under the names of a virtual environment's programs, for a Python without packages.
torchrun is the real one, and so is Python where a process must begin anew: with other options than -u, or
kernels that are interpreted.
"""

import binascii
import fcntl
import json
import os
import signal
import socket
import sys

SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGURG", "SIGUSR1", "SIGUSR2")
FOLDER = os.path.dirname(os.path.abspath(__file__))


def connect() -> socket.socket:
    """To the process that forks: one for each library that is loaded first, started when it is asked for."""
    path = f"{FOLDER}/{binascii.crc32(os.environ.get('LD_PRELOAD', '').encode())}"
    server = socket.socket(socket.AF_UNIX)
    with open(f"{path}.lock", "w") as lock, open(f"{path}.log", "a+") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            import subprocess

            process = subprocess.Popen(
                [sys.executable, f"{FOLDER}/server.py", path], env=os.environ | {"TESTS_WARM_PYTHON": FOLDER},
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
    if words[:2] == ["-m", "torch.distributed.run"] and name == "python":
        name, words = "torchrun", words[2:]
    if name == "torchrun":
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words])
    if name == "router-upcycle":
        words = ["-m", "megatron_router_upcycling.cli", *words]
    plain = words and (words[0][:1] != "-" or words[0] in ("-m", "-c"))
    if not plain or "TRITON_INTERPRET" in os.environ:
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
