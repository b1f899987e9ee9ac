"""What a rank does: the steps that all ranks walk through together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from wsync.bench import faults
from wsync.bench.checkpoint import CheckpointLoader, CheckpointWriter, load_checkpoint
from wsync.bench.checkpoint import checkpoint_path as path_of
from wsync.bench.engine import Engine, Shapes, Snapshot, difference, snapshot
from wsync.bench.events import WARM_UP, Began, EventWriter, Memory, Recipe, Repeated, Started, Step, Verified
from wsync.bench.limit import num_cores
from wsync.bench.memory import PeakMemory, owned_bytes, settle
from wsync.bench.options import WSYNC, BenchOptions
from wsync.bench.rows import Row, all_parts
from wsync.bench.spans import Recorder
from wsync.bench.streams import BucketReceiver, BucketSender, PartReceiver, PartSender
from wsync.bench.trainer import NUM_CONTENTS, Trainer
from wsync.bench.world import World
from wsync.bench.wsync_row import Committer, Meeting, Publisher, meet


class Side(Protocol):
    """What differs between trainers and engines."""

    def begin_recipe(self, recipe: str, first_version: int) -> None:
        """Build what the recipe's rows need, and the references of `NUM_CONTENTS` versions."""

    def make_row(self, row: str, meeting: Meeting | None) -> Row:
        """This side of a row."""

    def set_version(self, version: int) -> None:
        """Trainers: make the weights those of ``version``."""

    def verify(self, version: int, step: Step) -> None:
        """Engines: compare live memory with the reference of ``version``."""


def run_rank(options: BenchOptions, rank: int, events: EventWriter) -> None:
    """Everything that one rank does."""
    cores = num_cores()
    is_trainer = rank < options.num_trainers
    # Trainer 0 quantises alone, so it may use every core; the engines load at the same time and share them.
    torch.set_num_threads(cores if is_trainer else max(1, cores // options.num_engines))
    world = World(options, rank)
    side: Side = TrainerSide(world, events) if is_trainer else EngineSide(world, events)
    version = 0
    for recipe in options.recipes:
        events.send(Began(Step(recipe, "", WARM_UP)))
        side.begin_recipe(recipe, version)
        version += NUM_CONTENTS
        for row in options.rows:
            version = _run_row(world, side, events, recipe, row, version)
    world.barrier()
    world.close()


def _run_row(world: World, side: Side, events: EventWriter, recipe: str, row: str, version: int) -> int:
    settle()
    before = owned_bytes()
    began = time.monotonic()
    with PeakMemory() as memory:
        events.send(Began(Step(recipe, row, WARM_UP)))
        meeting = meet(world, f"{recipe}-{version}") if row == WSYNC else None
        way = side.make_row(row, meeting)
        version += 1
        _run_repeat(world, side, way, events, Step(recipe, row, WARM_UP), version)
    events.send(Memory(recipe, row, max(0, memory.peak_bytes - before), time.monotonic() - began))
    for repeat in range(world.options.repeats):
        version += 1
        _run_repeat(world, side, way, events, Step(recipe, row, repeat), version)
    way.close()
    del way
    world.barrier()
    return version


def _run_repeat(world: World, side: Side, way: Row, events: EventWriter, step: Step, version: int) -> None:
    events.send(Began(step))
    fault = world.options.fault
    due = faults.is_due(fault, world, step)
    side.set_version(version)
    recorder = Recorder()
    world.barrier()
    if due and fault is not None:
        faults.fail(fault)
    begin = time.monotonic()
    outcome = way.run(version, recorder)
    end = time.monotonic()
    world.barrier()
    if due and fault is not None and fault.kind == "corrupt" and isinstance(side, EngineSide):
        faults.corrupt(side.engine)
    side.verify(version, step)
    way.tidy()
    events.send(
        Repeated(
            step,
            version,
            begin,
            end,
            outcome.released_s or end,
            outcome.pause_s,
            outcome.wire_bytes,
            recorder.spans,
            outcome.remote_spans,
        )
    )


class TrainerSide:
    """A trainer rank."""

    def __init__(self, world: World, events: EventWriter) -> None:
        self.world = world
        self._trainer = Trainer(world, world.options.model)
        self._recipes: dict[str, str] = {}
        world.share(self._trainer.shapes() if world.rank == 0 else None, 0)
        events.send(Started(self._trainer.local_bytes))

    def begin_recipe(self, recipe: str, first_version: int) -> None:
        """Learn the engines' recipes, write a reference checkpoint of each content."""
        options = self.world.options
        self._recipes = self.world.share(None, options.num_trainers)
        writer = CheckpointWriter(self._trainer, self._recipes, options.tmpfs_dir, fsync=False, encode_here=True)
        for version in range(first_version, first_version + NUM_CONTENTS):
            self.set_version(version)
            writer.run(version, Recorder())
            self.world.barrier()
            writer.tidy()
        writer.close()

    def make_row(self, row: str, meeting: Meeting | None) -> Row:
        """The publishing side."""
        if meeting is not None:
            return Publisher(self._trainer, meeting)
        options = self.world.options
        encode_here = options.quantise_on == "trainer"
        recipes = self._recipes if encode_here else dict.fromkeys(self._recipes, "raw")
        if row in ("disk", "tmpfs"):
            folder = options.disk_dir if row == "disk" else options.tmpfs_dir
            return CheckpointWriter(self._trainer, self._recipes, folder, row == "disk", encode_here)
        if row == "broadcast":
            return PartSender(self._trainer, recipes, options.num_engines)
        return BucketSender(self._trainer, recipes, all_parts(self._trainer.shapes(), recipes), options.num_engines)

    def set_version(self, version: int) -> None:
        """Change the weights."""
        self._trainer.set_version(version)

    def verify(self, version: int, step: Step) -> None:
        """The engines do that."""


class EngineSide:
    """An engine rank."""

    def __init__(self, world: World, events: EventWriter) -> None:
        self.world = world
        self._events = events
        self._shapes = msgspec.convert(world.share(None, 0), Shapes)
        self._engine: Engine | None = None
        self._references: list[Snapshot] = []
        events.send(Started(0))

    @property
    def engine(self) -> Engine:
        """The engine of the current recipe."""
        if self._engine is None:
            raise RuntimeError("begin_recipe comes first")
        return self._engine

    def begin_recipe(self, recipe: str, first_version: int) -> None:
        """Build the engine, and load each content's checkpoint into a twin of it."""
        world = self.world
        self._engine = None
        self._references = []
        self._engine = Engine(world, world.options.model, recipe, self._shapes)
        world.share(self._engine.recipes if world.side_rank == 0 else None, world.options.num_trainers)
        self._events.send(Recipe(recipe, self._engine.num_bytes))
        twin = self._engine.twin()
        references: dict[int, Snapshot] = {}
        for version in range(first_version, first_version + NUM_CONTENTS):
            world.barrier()
            load_checkpoint(twin, path_of(Path(world.options.tmpfs_dir), version), encode_here=False)
            references[version % NUM_CONTENTS] = snapshot(twin)
            world.barrier()
        self._references = [references[content] for content in range(NUM_CONTENTS)]

    def make_row(self, row: str, meeting: Meeting | None) -> Row:
        """The receiving side."""
        if meeting is not None:
            return Committer(self.engine, meeting)
        options = self.world.options
        encode_here = options.quantise_on == "engine"
        if row in ("disk", "tmpfs"):
            return CheckpointLoader(self.engine, options.disk_dir if row == "disk" else options.tmpfs_dir, encode_here)
        recipes = dict.fromkeys(self.engine.recipes, "raw") if encode_here else self.engine.recipes
        parts = all_parts(self._shapes, recipes)
        return (PartReceiver if row == "broadcast" else BucketReceiver)(self.engine, parts, encode_here)

    def set_version(self, version: int) -> None:
        """The trainers do that."""

    def verify(self, version: int, step: Step) -> None:
        """Byte for byte."""
        found = difference(self.engine, self._references[version % NUM_CONTENTS])
        self._events.send(Verified(step, self.engine.num_bytes, found))
