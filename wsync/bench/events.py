"""What worker processes tell the command: one JSON line each, over a pipe of their own."""

from __future__ import annotations

import os
import threading

import msgspec

from wsync.bench.spans import Span

WARM_UP = -1
"""The repeat that warms up: verified, but not timed."""


class Step(msgspec.Struct, frozen=True):
    """Where in the job a rank is."""

    recipe: str
    row: str
    repeat: int

    def __str__(self) -> str:
        which = "warm-up" if self.repeat == WARM_UP else f"repeat {self.repeat}"
        return f"{self.recipe}, {self.row}, {which}" if self.row else f"{self.recipe}, {which}"


class Started(msgspec.Struct, frozen=True, tag=True):
    """A rank holds its model. ``num_bytes``: of the tensors that it holds (trainers)."""

    num_bytes: int


class Began(msgspec.Struct, frozen=True, tag=True):
    """A rank begins something: a repeat, or (with an empty row) the references of a recipe."""

    step: Step


class Recipe(msgspec.Struct, frozen=True, tag=True):
    """An engine of a recipe is built. ``num_bytes``: of its parameters."""

    recipe: str
    num_bytes: int


class Repeated(msgspec.Struct, frozen=True, tag=True):
    """A rank finished a repeat.

    Attributes:
        step: which.
        version: that was published.
        begin_s, end_s: of this rank's part, on `time.monotonic`.
        released_s: when a trainer could write its weights again; ``end_s`` on engines.
        pause_s: seconds in which an engine could not serve; 0 on trainers.
        wire_bytes: sent by this rank, or by this rank's replica (see ``docs/measurement.md``).
        spans: what it did.
        remote_spans: what other ranks did, where this rank learns it (``trainer/0``, ``engine/1``).
    """

    step: Step
    version: int
    begin_s: float
    end_s: float
    released_s: float
    pause_s: float
    wire_bytes: int
    spans: list[Span]
    remote_spans: dict[str, list[Span]] = msgspec.field(default_factory=dict)


class Verified(msgspec.Struct, frozen=True, tag=True):
    """An engine compared its live memory with the reference. ``difference`` is empty when all bytes are equal."""

    step: Step
    num_bytes: int
    difference: str


class Memory(msgspec.Struct, frozen=True, tag=True):
    """Set-up and warm-up of a row are done: the most memory beyond what the rank had before, and their seconds."""

    recipe: str
    row: str
    extra_bytes: int
    first_s: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A rank gave up."""

    error: str
    message: str
    hint: str
    trace: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """A rank finished everything."""


Event = Started | Began | Recipe | Repeated | Verified | Memory | Failed | Done

_DECODER: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)  # type: ignore[arg-type, unused-ignore]


class EventWriter:
    """The worker's end of the pipe. Any thread may write."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, event: Event) -> None:
        """Write one line; blocks while the pipe is full."""
        line = memoryview(msgspec.json.encode(event) + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]


class EventReader:
    """The command's end: cuts what it reads into events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Event]:
        """The events that ``data`` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [_DECODER.decode(line) for line in lines if line]
