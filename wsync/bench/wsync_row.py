"""The row that this package is about: `wsync.Source` on the trainers, `wsync.Sink` on the engines."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import msgspec

from wsync import Sink, Source, new_key_file
from wsync.bench.engine import Engine
from wsync.bench.rows import Outcome
from wsync.bench.spans import ASSEMBLE, INSTALL, WIRE, Recorder, Span
from wsync.bench.trainer import Trainer
from wsync.bench.world import World
from wsync.session.report import PublishReport

_PHASES = {"amax": ASSEMBLE, "pack": ASSEMBLE, "flush": WIRE, "receive": WIRE, "install": INSTALL}
"""Phase of a report -> the column that it counts for; the others have none."""

REPLICA = "engine-0"


class Meeting(msgspec.Struct, frozen=True):
    """Where trainers and engines meet for one row."""

    store: str
    key_file: str


def meet(world: World, label: str) -> Meeting:
    """Trainer 0 picks a free port and makes a key; all ranks learn both."""
    fields: dict[str, str] = {}
    if world.rank == 0:
        key_file = Path(world.options.store_dir) / f"{label}.key"
        new_key_file(key_file)
        fields = {"store": f"tcp://127.0.0.1:{_free_port()}", "key_file": str(key_file)}
    return msgspec.convert(world.share(fields, 0), Meeting)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Publisher:
    """The trainers' side."""

    def __init__(self, trainer: Trainer, meeting: Meeting) -> None:
        options = trainer.world.options
        self._world = trainer.world
        self._source = Source(
            trainer.model,
            store=meeting.store,
            key_file=meeting.key_file,
            rank=trainer.world.side_rank,
            world_size=options.num_trainers,
            transport=options.transport,
            join_deadline_s=options.deadline_s,
        )

    def run(self, version: int, recorder: Recorder) -> Outcome:
        """Publish, wait until the weights may change, wait for the commit."""
        begin = time.monotonic()
        publication = self._source.publish(version, deadline_s=self._world.options.deadline_s)
        publication.wait_released()
        released = time.monotonic()
        recorder.add("publish to released", "", begin, released)
        report = publication.wait_committed()
        if self._world.side_rank != 0:
            return Outcome(released_s=released)
        return Outcome(released_s=released, wire_bytes=report.wire_bytes, remote_spans=_spans_by_rank(report))

    def tidy(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Leave."""
        self._source.close()


class Committer:
    """The engines' side."""

    def __init__(self, engine: Engine, meeting: Meeting) -> None:
        options = engine.world.options
        self._deadline_s = options.deadline_s
        self._sink = Sink(
            engine.live,
            load_weights=engine.live.load_weights,
            store=meeting.store,
            key_file=meeting.key_file,
            replica=REPLICA,
            rank=engine.world.side_rank,
            world_size=options.num_engines,
            mode="staged",
            join_deadline_s=options.deadline_s,
        )

    def run(self, version: int, recorder: Recorder) -> Outcome:
        """Stage the version while the old one serves, then commit it."""
        with recorder.span("prepare"):
            ticket = self._sink.prepare(deadline_s=self._deadline_s)
        begin = time.monotonic()
        with recorder.span("commit"):
            self._sink.commit(ticket)
        return Outcome(pause_s=time.monotonic() - begin)

    def tidy(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Leave."""
        self._sink.close()


def _spans_by_rank(report: PublishReport) -> dict[str, list[Span]]:
    return {
        rank.name.replace(REPLICA, "engine"): [
            Span(stamp.phase, _PHASES.get(stamp.phase, ""), stamp.begin_s, stamp.end_s) for stamp in rank.stamps
        ]
        for rank in report.ranks
    }
