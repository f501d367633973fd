"""Python programs that start warm: forked from a process that has imported torch and Megatron already.

Those imports are most of what a short run costs. ``PYTHON`` stands for Python on a command line, of tests
and of programs under test, whose ``sys.executable`` it is. It waits for the forked process, passes signals on
to it, ends as it does, and takes it along if killed. Otherwise it is as Python, but that the processes of a
session share the seed of string hashes. torchrun starts warm ranks where PYTHON_EXEC names ``PYTHON``.
``warm_python.py`` says what is not warm.

Run as a script, this file is the process that forks: one a session, for all processes that share its tests.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

IMPORTED = ("megatron.training.training", "megatron.training.argument_utils", "megatron.core.tokenizers.text")
IMPORTED += ("torch.utils.tensorboard",)
FOLDER = "TESTS_WARM_PYTHON"  # in the environment of a session's processes


def make_programs() -> Path:
    """The folder of the session's programs, as in a virtual environment's."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    folder = Path(tempfile.mkdtemp(prefix=f"warm-{os.getpid()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "server.py").symlink_to(__file__)
    for name in ("python", "router-upcycle", "torchrun"):
        client = Path(__file__).with_name("warm_python.py").read_text()
        (folder / name).write_text(f"#!{sys.executable} -IS\n{client}")
        (folder / name).chmod(0o755)
    os.environ[FOLDER] = str(folder)
    return folder


def serve(path: Path) -> None:
    """Fork for each program that asks at the socket ``path``, until the session ends."""
    sys.path[:1] = [os.environ["MEGATRON_LM"]] if "MEGATRON_LM" in os.environ else []
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or looking for garbage would copy this process's memory
    session = os.pidfd_open(int(path.parent.name.split("-")[1]))
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as waiting:
        listener.bind(str(path))
        listener.listen(100)
        waiting.register(listener, selectors.EVENT_READ, lambda: begin(listener.accept()[0], waiting))
        waiting.register(session, selectors.EVENT_READ, sys.exit)
        print("ready", flush=True)
        while True:
            for key, _ in waiting.select():
                if waiting.get_map().get(key.fd) is key:  # and did not end just now
                    key.data()


def begin(client: socket.socket, waiting: selectors.BaseSelector) -> None:
    """Fork for ``client``, which sends signals from then on, and gets the status at the end."""
    length, streams, *_ = socket.recv_fds(client, 4, 3)
    request = json.loads(client.recv(int.from_bytes(length), socket.MSG_WAITALL))
    worker = os.fork()
    if not worker:
        for key in [*waiting.get_map().values()]:
            os.close(key.fd)
        client.close()
        become(*request, streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(worker)

    def end() -> None:
        for descriptor in (ended, client):
            with contextlib.suppress(KeyError):
                waiting.unregister(descriptor)
        os.close(ended)
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        with contextlib.suppress(OSError), client:
            client.sendall(str(status).encode())

    def tell() -> None:
        numbers = client.recv(100)
        if not numbers:  # the client was killed
            waiting.unregister(client)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker, signal.SIGKILL)
        for number in numbers:
            os.kill(worker, number)

    waiting.register(ended, selectors.EVENT_READ, end)
    waiting.register(client, selectors.EVENT_READ, tell)


def become(words: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> NoReturn:
    """Be ``python WORDS`` (-m MODULE, -c CODE or a file) from here on."""
    os.setpgid(0, 0)
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = PYTHON
    if wanted := environment.get("PYTHONWARNINGS"):
        warnings._processoptions(wanted.split(","))  # type: ignore[attr-defined]  # as Python does at its start
    places = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [place for place in places if place and place not in sys.path]
    status = 0
    try:
        match words:
            case ["-m", module, *rest]:
                sys.path.insert(0, folder)
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["-c", code, *rest]:
                sys.path.insert(0, "")
                sys.argv = ["-c", *rest]
                exec(code, {"__name__": "__main__"})
            case [file, *rest]:
                sys.path.insert(0, str(Path(file).resolve().parent))
                sys.argv = [file, *rest]
                runpy.run_path(file, run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
            atexit._run_exitfuncs()
            sys.stdout.flush()
        os._exit(status & 255)


PROGRAMS = make_programs()
PYTHON = str(PROGRAMS / "python")

if __name__ == "__main__":
    serve(Path(sys.argv[1]))
