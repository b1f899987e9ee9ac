"""Runs a probe in a child process until it ends, or hangs, or dies; what it told before counts in any case."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, Literal

import msgspec

from wsync.topo.live.child import BOOT
from wsync.topo.live.records import Answer, Doing, Done, Failure, Refusal, Request, decode, encode, spell

MAX_TOLD_BYTES = 64 << 20
"""Of one child; a machine of 16 GPUs and 300 PCIe devices tells less than 1 MB."""
MAX_LINE_BYTES = 1 << 20
KILL_WAIT_S = 0.5
"""A killed child that is still there then is stuck in the kernel; it is left behind."""

End = Literal["done", "hang", "late", "crash", "garbled"]
"""``"late"``: the deadline came while calls did return; a hang is one call that took longer than a call may."""


@dataclass
class Outcome:
    """What became of a child.

    Attributes:
        end: how it ended.
        told: answers and refusals in their order.
        doing: the call that it was in when it ended otherwise than ``"done"``.
        detail: how it ended, in words.
        failure: why nothing could be probed.
    """

    end: End = "crash"
    told: list[Answer | Refusal] = field(default_factory=list)
    doing: Doing | None = None
    detail: str = ""
    failure: Failure | None = None

    @property
    def where(self) -> str:
        """The call in words."""
        return spell(self.doing) if self.doing is not None else "starting"


def run_probe(request: Request, deadline: float, stall_s: float) -> Outcome:
    """Run one child.

    Args:
        request: what it shall do.
        deadline: of `time.monotonic`; at this time the child is killed.
        stall_s: so long one call of a GPU, or one file, may take; other calls of the driver have until the deadline.

    Returns:
        The outcome, at most `KILL_WAIT_S` after the deadline even if the child cannot be killed.
    """
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as log:
        asked.write(encode(request))
        asked.seek(0)
        try:
            child = _start(asked, log, write_end)
        except OSError as e:
            os.close(read_end)
            return Outcome(detail=f"no process could be started: {e.strerror}")
        finally:
            os.close(write_end)
        listener = _Listener(read_end, deadline, stall_s)
        try:
            listener.listen()
        finally:
            os.close(read_end)
            _stop(child, listener.outcome)
        if listener.outcome.end == "crash":
            listener.outcome.detail = _how_it_died(child, log)
        return listener.outcome


def _start(asked: IO[bytes], log: IO[bytes], write_end: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", BOOT, str(write_end), *sys.path]
    return subprocess.Popen(command, stdin=asked, stdout=log, stderr=log, pass_fds=(write_end,))


class _Listener:
    """Reads records until one ends the conversation."""

    def __init__(self, pipe: int, deadline: float, stall_s: float) -> None:
        self.outcome = Outcome()
        self._pipe = pipe
        self._deadline = deadline
        self._stall_s = stall_s
        self._rest = b""
        self._num_bytes = 0

    def listen(self) -> None:
        os.set_blocking(self._pipe, False)
        heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while True:
                doing = self.outcome.doing
                until = self._deadline
                if doing is not None and (doing.gpu >= 0 or doing.call.startswith("/")):
                    until = min(until, heard + self._stall_s)
                if not selector.select(max(0.0, until - time.monotonic())):
                    self._silent(time.monotonic() - heard)
                    return
                data = os.read(self._pipe, 1 << 16)
                heard = time.monotonic()
                if not data or self._take(data):
                    return
                if heard >= self._deadline:
                    self._silent(0.0)
                    return

    def _silent(self, waited_s: float) -> None:
        """The time is over: of this call, or of the probe."""
        if self.outcome.doing is not None and waited_s >= self._stall_s:
            self.outcome.end, self.outcome.detail = "hang", f"no answer for {waited_s:.1f} s"
        else:
            self.outcome.end, self.outcome.detail = "late", "the deadline came before the end"

    def _take(self, data: bytes) -> bool:
        """Whether these bytes were the last ones wanted."""
        self._num_bytes += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                record = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
                return self._garbled(f"a record that cannot be read ({e}): {line[:60]!r}")
            if isinstance(record, Doing):
                self.outcome.doing = record
            elif isinstance(record, Done):
                self.outcome.end, self.outcome.doing = "done", None
                return True
            elif isinstance(record, Failure):
                self.outcome.failure = record
            else:
                self.outcome.told.append(record)
        if len(self._rest) > MAX_LINE_BYTES or self._num_bytes > MAX_TOLD_BYTES:
            return self._garbled(f"{self._num_bytes} bytes, more than a machine has to tell")
        return False

    def _garbled(self, detail: str) -> bool:
        self.outcome.end, self.outcome.detail = "garbled", detail
        return True


def _stop(child: subprocess.Popen[bytes], outcome: Outcome) -> None:
    """End the child; one that is stuck inside the kernel is not waited for."""
    if outcome.end in ("done", "crash"):
        # It has closed its pipe, or says that it is at its end: let it go by itself.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(KILL_WAIT_S)
            return
    child.kill()
    try:
        child.wait(KILL_WAIT_S)
    except subprocess.TimeoutExpired:
        outcome.detail += f"; process {child.pid} is stuck in the kernel and cannot be killed"


def _how_it_died(child: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    status = child.returncode
    if status is not None and status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"the probe was killed by {name}"
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - 4096))
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return f"the probe ended with status {status}" + (f": {lines[-1][:200]}" if lines else "")
