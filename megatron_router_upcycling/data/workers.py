"""Processes that work beside this one: fed one task at a time, ended with it, their mistakes told as its own.

They are started afresh (spawn), so that nothing is shared with what this process has loaded, and import only
what their task needs.
"""

import contextlib
import ctypes
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any, Protocol

from megatron_router_upcycling.errors import UserError

PR_SET_PDEATHSIG = 1


class WorkerLost(UserError):
    """A process ended that was not told to."""


class Start(Protocol):
    """Travels to the process, and makes there what does the tasks."""

    def start(self) -> Callable[[Any], Any]: ...


class Child:
    """One such process, started at once; a context that tells it what to do, and ends it."""

    def __init__(self, start: Start) -> None:
        self._start = start
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        # Ctrl-C goes to all processes of a terminal: only this one answers.
        answer = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
        try:
            self._process.start()
        finally:
            if answer is not None:
                signal.signal(signal.SIGINT, answer)
        theirs.close()

    def send(self, task: Any) -> None:
        """Give it a task.

        Raises:
            UserError: it has ended, and why.
        """
        try:
            # send() itself would leave a buffer in the error of a broken pipe; Python 3.12 can crash over it.
            self.connection.send_bytes(pickle.dumps(task))
        except ConnectionError:
            while True:  # answers to earlier tasks, and then the reason
                self.receive()

    def receive(self) -> Any:
        """The next answer, waited for.

        Raises:
            UserError: what the process has raised, or that it was killed.
        """
        try:
            kind, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._lost() from None
        if kind == "mistake":
            raise UserError(answer)
        if kind == "failure":
            raise RuntimeError(f"a worker failed:\n{answer}")
        return answer

    def _lost(self) -> WorkerLost:
        self._process.join()
        status = self._process.exitcode or 0
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return WorkerLost(
            f"--workers: one ended {how}, perhaps since memory ran out; fewer workers, or shorter documents"
            " (--max-document-bytes), need less; the same command goes on from what is done"
        )

    def __enter__(self) -> "Child":
        try:
            # Not as an argument: starting would wait until it is read, and a child whose parent is killed
            # meanwhile would complain.
            self.send(self._start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _serve(connection: Any) -> None:
    """Be told what to do, and do it with each task until there are no more: the life of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # where there is no such call, the closed pipe ends it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            work = connection.recv().start()
            while True:
                connection.send(("answer", work(connection.recv())))
        except UserError as error:
            connection.send(("mistake", str(error)))
        except (EOFError, ConnectionError):
            raise
        except Exception:
            connection.send(("failure", traceback.format_exc()))


def spread(
    children: list[Child], tasks: Iterable[Any], wanted: Callable[[], bool]
) -> Iterator[tuple[Any, Any]]:
    """Give each task to a child that is free; yield tasks and answers as they come.

    Args:
        wanted: whether more tasks are to be given out; asked before each.

    Raises:
        UserError: see ``Child.receive``.
    """
    free, busy = list(children), dict[Any, tuple[Child, Any]]()
    todo = iter(tasks)
    ahead = next(todo, None)  # read while the children work
    while True:
        while free and ahead is not None and wanted():
            child = free.pop()
            child.send(ahead)
            busy[child.connection] = child, ahead
            ahead = next(todo, None)
        if not busy:
            return
        for connection in wait(list(busy)):
            child, task = busy.pop(connection)
            answer = child.receive()
            free.append(child)
            yield task, answer
