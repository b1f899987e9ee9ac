"""Run functions in fresh processes and collect what they return or raise. For tests of what happens between ranks.

A worker is ``fn(report, *args)``; ``report(value)`` sends an intermediate value to the parent. Workers are module-level
functions (they are imported by name in the child). Children are killed when the block ends, whatever happened.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from wsync.errors import DeadlineError, StateError, WsyncError


class Outcome:
    """What one process did.

    Attributes:
        value: what the worker returned, or None.
        error: class name and message of what it raised, or None.
        trace: the traceback as text.
        seconds: from start to the outcome.
    """

    def __init__(self, value: Any, error: tuple[str, str] | None, trace: str, seconds: float) -> None:
        self.value = value
        self.error = error
        self.trace = trace
        self.seconds = seconds

    def __repr__(self) -> str:
        return f"Outcome(value={self.value!r}, error={self.error!r})"


def _main(fn: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def report(value: Any) -> None:
        pipe.send(("report", value))

    try:
        pipe.send(("value", fn(report, *args)))
    except BaseException as e:
        message = e.message if isinstance(e, WsyncError) else str(e)
        pipe.send(("error", (type(e).__name__, message), traceback.format_exc()))


class Processes:
    """A set of named processes, as a context manager."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._processes: dict[str, Any] = {}
        self._pipes: dict[str, Connection] = {}
        self._began: dict[str, float] = {}
        self._outcomes: dict[str, Outcome] = {}
        self.reports: dict[str, list[Any]] = {}

    def start(self, name: str, fn: Callable[..., Any], *args: Any) -> int:
        """Start ``fn(report, *args)``; returns the process id."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_main, args=(fn, args, theirs), name=name, daemon=True)
        process.start()
        theirs.close()
        self._processes[name], self._pipes[name] = process, ours
        self._began[name] = time.monotonic()
        self.reports[name] = []
        return int(process.pid or 0)

    def kill(self, name: str, sig: int = signal.SIGKILL) -> None:
        """Send a signal, SIGKILL by default."""
        os.kill(self._processes[name].pid, sig)

    def wait_report(self, name: str, timeout_s: float = 60.0) -> Any:
        """The next value that the worker reports.

        Raises:
            DeadlineError: none came in time.
            StateError: the worker ended first.
        """
        deadline = time.monotonic() + timeout_s
        seen = len(self.reports[name])
        while time.monotonic() < deadline:
            self._pump(name, 0.1)
            if len(self.reports[name]) > seen:
                return self.reports[name][seen]
            if name in self._outcomes:
                raise StateError(f"process {name!r} ended before it reported: {self._outcomes[name]}")
        raise DeadlineError(f"process {name!r} reported nothing for {timeout_s:g} s")

    def wait(self, name: str, timeout_s: float = 60.0) -> Outcome:
        """The outcome of a process; a killed one has the error ``("Killed", ...)``.

        Raises:
            DeadlineError: it is still running.
        """
        deadline = time.monotonic() + timeout_s
        while name not in self._outcomes:
            if time.monotonic() > deadline:
                raise DeadlineError(f"process {name!r} still runs after {timeout_s:g} s")
            self._pump(name, 0.2)
        return self._outcomes[name]

    def _pump(self, name: str, timeout_s: float) -> None:
        if name in self._outcomes:
            return
        seconds = time.monotonic() - self._began[name]
        try:
            if not self._pipes[name].poll(timeout_s):
                return
            kind, *rest = self._pipes[name].recv()
        except (EOFError, OSError):
            self._processes[name].join(5)
            code = self._processes[name].exitcode
            self._outcomes[name] = Outcome(None, ("Killed", f"exit code {code}"), "", seconds)
            return
        if kind == "report":
            self.reports[name].append(rest[0])
        elif kind == "value":
            self._outcomes[name] = Outcome(rest[0], None, "", seconds)
        else:
            self._outcomes[name] = Outcome(None, rest[0], rest[1], seconds)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            if process.is_alive():
                process.kill()
            process.join(5)
        for pipe in self._pipes.values():
            pipe.close()


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
