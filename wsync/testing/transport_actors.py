"""Ends of a transport under remote control, each in a thread or a process of its own, as the session would drive them.

A test asks (`Actor.ask`), does other things, and takes the answer (`Actor.answer`): it decides who does what when.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from wsync.errors import CommitError, StateError
from wsync.plan.types import SinkSlice, SourceSlice
from wsync.transport.base import SinkEnd, SourceEnd

CANCELLED = "cancelled by the test"

Bytes = npt.NDArray[np.uint8]


class Command(msgspec.Struct, frozen=True):
    """What an actor shall do.

    Attributes:
        do: name of the action, see `_Stage`.
        factory: "module:function" that makes the end, for ``open_source`` and ``open_sink``.
        transport: its argument.
        slice_: msgpack of the slice.
        num_sources: trainer ranks.
        source_offers, sink_offers: for ``connect``.
        version: for ``publish``, ``receive``, ``still_valid``, ``release``.
        only: bucket positions to publish; None for all.
        vector: to exchange first; empty for none.
        deadline_s: seconds from now.
        cancel_after_s: seconds until ``cancelled`` raises; negative for never.
        close_after_s: seconds until another thread closes the end, in ``publish`` and ``receive``; negative for never.
        stop_after: leave `receive` after that many buckets; negative for all.
        share: of each bucket's bytes, the first part that is the message.
        copy_out: copy every arrived bucket to memory of the actor's own instead of hashing it.
    """

    do: str
    factory: str = ""
    transport: str = ""
    slice_: bytes = b""
    num_sources: int = 0
    source_offers: tuple[bytes, ...] = ()
    sink_offers: tuple[bytes, ...] = ()
    version: int = 0
    only: tuple[int, ...] | None = None
    vector: tuple[float, ...] = ()
    deadline_s: float = 20.0
    cancel_after_s: float = -1.0
    close_after_s: float = -1.0
    stop_after: int = -1
    share: float = 1.0
    copy_out: bool = False


class Arrival(msgspec.Struct, frozen=True):
    """A bucket as a sink found it: position, address, the sender's digest, and a hash of the bytes."""

    bucket_pos: int
    address: int
    digest: int
    sha1: str


class Answer(msgspec.Struct, frozen=True):
    """What came of a command; ``error`` is the class name of what was raised, or empty."""

    error: str = ""
    message: str = ""
    seconds: float = 0.0
    offer: bytes = b""
    arrivals: tuple[Arrival, ...] = ()
    vector: tuple[float, ...] = ()
    flag: bool = False
    number: int = 0
    lost: dict[int, str] = {}


def content(version: int, bucket_idx: int, num_bytes: int) -> Bytes:
    """The bytes that a source publishes in a bucket: random, the same in every process."""
    raw = np.random.default_rng((version, bucket_idx)).bytes(num_bytes)
    return np.frombuffer(raw, dtype=np.uint8)


def content_digest(version: int, bucket_idx: int) -> int:
    """The digest that travels with it: any 64 bits that nobody else would send."""
    seed = f"{version}/{bucket_idx}".encode()
    return int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "little")


def memory_at(address: int, num_bytes: int) -> Bytes:
    """Memory of this process as ``[num_bytes]`` u8, without a copy."""
    raw = (ctypes.c_uint8 * num_bytes).from_address(address)
    return np.frombuffer(memoryview(raw), dtype=np.uint8)


def hash_of(found: Bytes) -> str:
    """What tells two contents apart in answers."""
    return hashlib.sha1(found.tobytes()).hexdigest()


class _Stage:
    """An end, and what an actor can do with it."""

    def __init__(self) -> None:
        self._end: Any = None
        self._slice: Any = None
        self._own: Bytes = np.zeros(0, dtype=np.uint8)

    def _source(self) -> SourceEnd:
        if not isinstance(self._slice, SourceSlice):
            raise StateError("this actor is no source")
        end: SourceEnd = self._end
        return end

    def open_source(self, c: Command) -> Answer:
        self._end = _resolve(c.factory)(c.transport)
        self._slice = msgspec.msgpack.decode(c.slice_, type=SourceSlice)
        offer = self._source().prepare(self._slice, c.num_sources)
        self._own = np.full(self._slice.bucket_bytes, 7, dtype=np.uint8)
        return Answer(offer=offer)

    def open_sink(self, c: Command) -> Answer:
        self._end = _resolve(c.factory)(c.transport)
        self._slice = msgspec.msgpack.decode(c.slice_, type=SinkSlice)
        sink: SinkEnd = self._end
        self._own = np.zeros(self._slice.bucket_bytes, dtype=np.uint8)
        return Answer(offer=sink.prepare(self._slice))

    def connect(self, c: Command) -> Answer:
        deadline = time.monotonic() + c.deadline_s
        self._end.connect(list(c.source_offers), list(c.sink_offers), deadline, _cancelled(c))
        return Answer()

    def publish(self, c: Command) -> Answer:
        """A whole publish: exchange, then every bucket, then flush."""
        end, deadline, cancelled = self._source(), time.monotonic() + c.deadline_s, _cancelled(c)
        self._close_later(c)
        end.begin(c.version, deadline, cancelled)
        vector = np.array(c.vector, dtype=np.float32)
        if c.vector:
            end.exchange_max(vector, deadline, cancelled)
        for pos in range(len(self._slice.buckets)) if c.only is None else c.only:
            bucket = self._slice.buckets[pos]
            staging = memory_at(end.address(pos), bucket.used_bytes)
            if c.copy_out:
                staging[:] = self._own[: bucket.used_bytes]
            else:
                staging[:] = content(c.version, bucket.bucket_idx, bucket.used_bytes)
            num_bytes = None if c.share == 1.0 else max(1, int(c.share * bucket.used_bytes))
            end.send(pos, content_digest(c.version, bucket.bucket_idx), deadline, cancelled, num_bytes)
        end.flush(deadline, cancelled)
        return Answer(vector=tuple(float(x) for x in vector))

    def addresses(self, _: Command) -> Answer:
        """Sum of the staging addresses: equal sums mean that nothing moved."""
        return Answer(number=sum(self._source().address(pos) for pos in range(len(self._slice.buckets))))

    def receive(self, c: Command) -> Answer:
        sink: SinkEnd = self._end
        self._close_later(c)
        arrivals: list[Arrival] = []
        for staged in sink.receive(c.version, time.monotonic() + c.deadline_s, _cancelled(c)):
            num_bytes = staged.num_bytes
            found = memory_at(staged.address, num_bytes)
            if c.copy_out:
                self._own[:num_bytes] = found
            sha1 = "" if c.copy_out else hash_of(found)
            arrivals.append(Arrival(staged.bucket_pos, staged.address, staged.digest, sha1))
            if len(arrivals) == c.stop_after:
                break
        return Answer(arrivals=tuple(arrivals))

    def lost_sinks(self, _: Command) -> Answer:
        return Answer(lost=self._source().lost_sinks())

    def write_while_another_thread_closes(self, c: Command) -> Answer:
        """Fill the first bucket after the end was closed under this thread's feet, then try to send it."""
        end, deadline, cancelled = self._source(), time.monotonic() + c.deadline_s, _cancelled(c)
        end.begin(c.version, deadline, cancelled)
        staging = memory_at(end.address(0), self._slice.buckets[0].used_bytes)
        self._close_in_thread()
        staging[:] = 5
        end.send(0, 0, deadline, cancelled)
        return Answer()

    def read_while_another_thread_closes(self, c: Command) -> Answer:
        """Receive all, and look at the bytes after the end was closed under this thread's feet."""
        sink: SinkEnd = self._end
        found = list(sink.receive(c.version, time.monotonic() + c.deadline_s, _cancelled(c)))
        self._close_in_thread()
        arrivals = []
        for staged in found:
            seen = memory_at(staged.address, self._slice.buckets[staged.bucket_pos].used_bytes)
            arrivals.append(Arrival(staged.bucket_pos, staged.address, staged.digest, hash_of(seen)))
        return Answer(arrivals=tuple(arrivals))

    def _close_later(self, c: Command) -> None:
        if c.close_after_s >= 0:
            threading.Timer(c.close_after_s, self._end.close).start()

    def _close_in_thread(self) -> None:
        closer = threading.Thread(target=self._end.close)
        closer.start()
        closer.join()

    def still_valid(self, c: Command) -> Answer:
        return Answer(flag=bool(self._end.still_valid(c.version)))

    def release(self, c: Command) -> Answer:
        self._end.release(c.version)
        return Answer()

    def close(self, _: Command) -> Answer:
        if self._end is not None:
            self._end.close()
        return Answer()

    def resident(self, _: Command) -> Answer:
        """Resident bytes of this process."""
        with open("/proc/self/statm", encoding="ascii") as statm:
            return Answer(number=int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


def _resolve(path: str) -> Callable[[str], Any]:
    module, _, name = path.partition(":")
    found: Callable[[str], Any] = getattr(importlib.import_module(module), name)
    return found


def _cancelled(command: Command) -> Callable[[], None]:
    at = time.monotonic() + command.cancel_after_s if command.cancel_after_s >= 0 else float("inf")

    def check() -> None:
        if time.monotonic() >= at:
            raise CommitError(CANCELLED)

    return check


def _serve(connection: Connection) -> None:
    """An actor's life: do what comes, answer, until the line is closed."""
    stage = _Stage()
    while True:
        try:
            command = msgspec.msgpack.decode(connection.recv_bytes(), type=Command)
        except (EOFError, OSError):
            return
        began = time.monotonic()
        try:
            answer = getattr(stage, command.do)(command)
        except Exception as error:
            text = getattr(error, "message", str(error))
            answer = Answer(error=type(error).__name__, message=text)
        seconds = time.monotonic() - began
        connection.send_bytes(msgspec.msgpack.encode(msgspec.structs.replace(answer, seconds=seconds)))


class Actor:
    """The near side of an actor."""

    def __init__(self, in_process: bool) -> None:
        """``in_process``: a thread of this process instead of a process of its own."""
        self._line, far = multiprocessing.Pipe()
        if in_process:
            self._process = None
            threading.Thread(target=_serve, args=(far,), daemon=True).start()
        else:
            self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(far,), daemon=True)
            self._process.start()
            far.close()
        self._num_open = 0

    @property
    def pid(self) -> int | None:
        """Its process, or None for a thread."""
        return self._process.pid if self._process is not None else None

    @property
    def reusable(self) -> bool:
        """Whether it lives and owes no answer."""
        return self._num_open == 0 and (self._process is None or self._process.is_alive())

    def ask(self, command: Command) -> None:
        """Start doing something."""
        self._line.send_bytes(msgspec.msgpack.encode(command))
        self._num_open += 1

    def answer(self, timeout_s: float = 60.0) -> Answer:
        """What came of the first command that was not answered yet.

        Raises:
            TimeoutError: it takes too long, which a transport must never.
        """
        if not self._line.poll(timeout_s):
            raise TimeoutError(f"an actor did not answer within {timeout_s} s")
        answer = msgspec.msgpack.decode(self._line.recv_bytes(), type=Answer)
        self._num_open -= 1
        return answer

    def do(self, command: Command) -> Answer:
        """`ask` and `answer`."""
        self.ask(command)
        return self.answer()

    def kill(self) -> None:
        """End the process without a chance to clean up."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10.0)

    def hang_up(self) -> None:
        """Tell it to end."""
        self._line.close()

    def stop(self) -> None:
        """Let it end, and see to it."""
        self.hang_up()
        if self._process is not None:
            self._process.join(2.0)
            if self._process.is_alive():
                self.kill()


class ActorPool:
    """Actors that tests use one after another: starting a process costs more than a test."""

    def __init__(self, in_process: bool) -> None:
        self._in_process = in_process
        self._idle: list[Actor] = []

    def take(self, count: int) -> list[Actor]:
        """That many actors, new ones where none is idle."""
        fresh = [Actor(self._in_process) for _ in range(count - len(self._idle))]
        taken = (self._idle + fresh)[:count]
        self._idle = self._idle[count:]
        return taken

    def give_back(self, actors: Sequence[Actor]) -> None:
        """Keep those that live; end the others."""
        for actor in actors:
            if actor.reusable:
                self._idle.append(actor)
            else:
                actor.stop()

    def stop(self) -> None:
        """End all of them."""
        for actor in self._idle:
            actor.hang_up()
        for actor in self._idle:
            actor.stop()
        self._idle.clear()
