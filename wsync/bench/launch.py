"""Starts the worker processes, listens to them, and ends them all when one fails."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from wsync.bench.events import Began, Done, Event, EventReader, Failed
from wsync.bench.limit import num_cores
from wsync.bench.options import BenchOptions
from wsync.errors import DeadlineError, PeerLostError, TransportError, WsyncError, error_from_wire

_GRACE_S = 2.0
"""After the first failure the other ranks get this long to say what they saw; the best explanation wins."""
_SILENCE_FACTOR = 1.5
"""A rank raises `DeadlineError` itself; the command steps in when all are silent for this many deadlines."""
_START_S = 120.0
"""Imports take long on a busy machine: a shorter deadline does not count before every rank has begun."""
_TERM_S = 1.0
_START = "start"
"""Where a rank is before it says of its first step."""


class _Worker:
    """One process and its pipe."""

    def __init__(self, options: BenchOptions, rank: int, options_file: Path, log: Path) -> None:
        self.name = options.rank_name(rank)
        self.log = log
        self.where = _START
        self.done = False
        self.failure: Failed | None = None
        self.reader = EventReader()
        self.read_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", "wsync.bench.worker", "--rank", str(rank), "--options", str(options_file)]
        command += ["--events-fd", str(write_fd), "--parent", str(os.getpid())]
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_fd,),
                    env=_environment(log.parent),
                    start_new_session=True,
                )
        finally:
            os.close(write_fd)

    def lost(self) -> PeerLostError:
        """The error for a process that ended without a word."""
        status = self.process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        hint = f"its last words: {lines[-1]}" if lines else ""
        return PeerLostError(f"{self.name} (process {self.process.pid}) {how} ({self.where})", hint=hint)


class Workers:
    """All worker processes. A context manager: on leaving, none of them is left."""

    def __init__(self, options: BenchOptions, run_dir: Path) -> None:
        self._options = options
        self._run_dir = run_dir
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Workers:
        options_file = self._run_dir / "options.json"
        options_file.write_bytes(msgspec.json.encode(self._options))
        try:
            for rank in range(self._options.world_size):
                worker = _Worker(self._options, rank, options_file, self._run_dir / f"rank-{rank}.log")
                self._workers.append(worker)
                self._selector.register(worker.read_fd, selectors.EVENT_READ, rank)
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_all()

    def events(self) -> Iterator[tuple[int, Event]]:
        """What the ranks say, until all are done.

        Raises:
            WsyncError: a rank failed, died, or all were silent for too long.
        """
        while self._selector.get_map():
            limit_s = self._silence_s()
            heard = self._selector.select(limit_s)
            if not heard:
                raise self._silent(limit_s)
            for key, _ in heard:
                rank: int = key.data
                yield from ((rank, event) for event in self._read(rank))
            if any(self._is_lost(worker) for worker in self._workers):
                raise self._explain()

    def _read(self, rank: int) -> list[Event]:
        worker = self._workers[rank]
        data = os.read(worker.read_fd, 1 << 16)
        if not data:
            self._selector.unregister(worker.read_fd)
            return []
        events = worker.reader.feed(data)
        for event in events:
            if isinstance(event, Began):
                worker.where = str(event.step)
            elif isinstance(event, Failed):
                worker.failure = event
            elif isinstance(event, Done):
                worker.done = True
        return events

    def _is_lost(self, worker: _Worker) -> bool:
        return worker.failure is not None or (not worker.done and worker.read_fd not in self._open_fds())

    def _open_fds(self) -> set[int]:
        return {key.fd for key in self._selector.get_map().values()}

    def _silence_s(self) -> float:
        limit_s = self._options.deadline_s * _SILENCE_FACTOR
        return max(limit_s, _START_S) if any(w.where == _START for w in self._workers) else limit_s

    def _silent(self, limit_s: float) -> DeadlineError:
        places = "; ".join(f"{w.name}: {w.where}" for w in self._workers if not w.done)
        return DeadlineError(f"no process made progress for {limit_s:g} s ({places})")

    def _explain(self) -> WsyncError:
        """Wait a moment for the other ranks, then pick what explains the failure best."""
        until = time.monotonic() + _GRACE_S
        while self._selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                self._read(key.data)
        for worker in self._workers:
            if not worker.done and worker.failure is None and worker.read_fd not in self._open_fds():
                return worker.lost()
        errors = [error_from_wire(f.error, f.message, f.hint) for f in (w.failure for w in self._workers) if f]
        error = next((e for e in errors if not isinstance(e, TransportError)), errors[0])
        stuck = [f"{w.name} ({w.where})" for w in self._workers if not w.done and w.failure is None]
        if stuck and not error.hint:
            error.hint = f"still running: {', '.join(stuck)}"
        error.__notes__ = [f.trace for f in (w.failure for w in self._workers) if f and f.message == error.message]
        return error

    def _end_all(self) -> None:
        """End, reap and close everything; may be called twice."""
        for sig, patience_s in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, None)):
            running = [worker.process for worker in self._workers if worker.process.poll() is None]
            if sig == signal.SIGTERM and all(worker.done for worker in self._workers):
                _wait(running, _TERM_S)
                running = [process for process in running if process.poll() is None]
            for process in running:
                process.send_signal(sig)
            _wait(running, patience_s)
        for worker in self._workers:
            os.close(worker.read_fd)
        self._workers = []
        self._selector.close()


def _wait(processes: list[subprocess.Popen[bytes]], patience_s: float | None) -> None:
    until = time.monotonic() + (patience_s or 0.0)
    for process in processes:
        try:
            process.wait(None if patience_s is None else max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return


def _environment(run_dir: Path) -> dict[str, str]:
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(num_cores())
    environment.update(
        GLOO_SOCKET_IFNAME="lo",  # all ranks are on this machine; its host name may not resolve
        OMP_WAIT_POLICY="PASSIVE",  # there are more processes than cores: idle threads must not spin
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
        TMPDIR=str(run_dir),  # what libraries leave behind goes when the run ends
    )
    return environment
