"""The road of one tensor through a plan: who holds it, who sends it along which hops, where it lands."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from wsync.errors import UnknownTensorError
from wsync.plan.flows import LOCAL, Flow
from wsync.plan.holdings import resolve_aliases
from wsync.plan.plans import Plan, PlanClass, PlanUnit
from wsync.plan.types import MODE_COPY, MODE_FUSED, SOURCE
from wsync.spec.box import Box
from wsync.spec.manifest import HOST, CopySpec, SinkManifest, SinkRankManifest, SourceManifest


class Held(msgspec.Struct, frozen=True):
    """A box of the tensor, and the trainer ranks that have it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]


class Hop(msgspec.Struct, frozen=True):
    """One step of the road.

    Attributes:
        src, dst: as ``trainer rank 3`` or ``replica engine-0 rank 1``.
        src_host, dst_host: where they run.
        rail: which of the sender's and the receiver's NICs; -1 inside a node or NVLink domain.
        relay: the sender passes on what it received.
    """

    src: str
    src_host: str
    dst: str
    dst_host: str
    rail: int
    relay: bool


class Landing(msgspec.Struct, frozen=True):
    """Where a box is written on one engine rank.

    Attributes:
        sink, host: the rank.
        storage, dtype: the engine's own memory.
        first: element of it that the copy begins at.
        strides: elements, for each dimension of the copied box.
        relay_only: the rank passes the box on and needs nothing of it.
        in_host: until it is installed, what has arrived is in host memory.
    """

    sink: str
    host: str
    storage: str
    dtype: str
    first: int
    strides: tuple[int, ...]
    relay_only: bool = False
    in_host: bool = False


class Passage(msgspec.Struct, frozen=True):
    """One box of one part of the tensor, on one way.

    Attributes:
        part: name of the part.
        recipe: how it is encoded.
        offset, shape: the box, in elements of the part.
        nbytes: on the wire.
        planned: ``"dense"`` or ``"delta"``.
        how: what packing it does.
        sender, host: who packs it.
        offloaded: the sender has its weights in host memory.
        bucket, num_buckets: about where in the sender's flow, which is sent with the flows of all others at once.
        hops: in order.
        landings: one for each copy into engine memory.
    """

    part: str
    recipe: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    nbytes: int
    planned: str
    how: str
    sender: str
    host: str
    bucket: int
    num_buckets: int
    hops: tuple[Hop, ...]
    landings: tuple[Landing, ...]
    offloaded: bool = False


class Explanation(msgspec.Struct, frozen=True):
    """Everything about one tensor.

    Attributes:
        tensor: its name.
        travels_as: name of the tensor that it shares memory with; its own where it is no alias.
        shape, dtype: on the trainer.
        held: by box.
        shared_class: how many tensors go the same way.
        passages: of all of its parts in all recipes.
    """

    tensor: str
    travels_as: str
    shape: tuple[int, ...]
    dtype: str
    held: tuple[Held, ...]
    shared_class: int
    passages: tuple[Passage, ...]


def explain(plan: Plan, source: SourceManifest, sink: SinkManifest, name: str) -> Explanation:
    """The road of tensor ``name``.

    Raises:
        UnknownTensorError: the source has no such tensor; names the nearest.
    """
    target = resolve_aliases(source.tensors).get(name)
    if target is None:
        count = len(source.tensors)
        raise UnknownTensorError(f"the source has no tensor {name!r} among its {count}", hint=_near(name, source))
    tensor = source.tensors[target]
    passages: list[Passage] = []
    shared = 0
    for class_idx, cls in enumerate(plan.classes):
        if target in cls.members:
            shared = max(shared, len(cls.members))
            road = _Road(plan, source, sink, class_idx, cls.members.index(target))
            passages += road.passages()
    return Explanation(name, tensor.name, tensor.shape, tensor.dtype, _held(source, target), shared, tuple(passages))


def _near(name: str, source: SourceManifest) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, [t.name for t in source.tensors[:100_000]], 1, 0.5)
    return f"did you mean {close[0]}?" if close else ""


def _held(source: SourceManifest, tensor_idx: int) -> tuple[Held, ...]:
    ranks: dict[Box, list[int]] = {}
    for rank, boxes in enumerate(source.shards[tensor_idx]):
        for box in boxes:
            ranks.setdefault(box, []).append(rank)
    return tuple(
        Held(b.offset, b.shape, tuple(r), tuple(dict.fromkeys(source.ranks[i].host for i in r)))
        for b, r in sorted(ranks.items())
    )


class _Road:
    """One tensor in one recipe."""

    def __init__(self, plan: Plan, source: SourceManifest, sink: SinkManifest, class_idx: int, member: int) -> None:
        self.plan = plan
        self.source = source
        self.sink = sink
        self.class_idx = class_idx
        self.cls: PlanClass = plan.classes[class_idx]
        self.member = member
        self.name = plan.names[self.cls.members[member]]
        aliases = {alias for alias, target in plan.aliases.items() if target == self.name}
        self.names = {self.name, *aliases}
        self._copies: dict[int, list[CopySpec]] = {}

    def passages(self) -> Iterator[Passage]:
        for flow in self.plan.flows:
            before = 0
            for entry in flow.entries:
                unit = self.plan.classes[entry.class_idx].units[entry.unit_idx]
                if entry.class_idx == self.class_idx and entry.first <= self.member < entry.end:
                    yield self._passage(flow, unit, before + unit.nbytes * (self.member - entry.first))
                before += unit.nbytes * (entry.end - entry.first)

    def _passage(self, flow: Flow, unit: PlanUnit, before: int) -> Passage:
        part, size = self.cls.parts[unit.part], self.plan.bucket_bytes
        tree = self.plan.trees[flow.tree_idx]
        hops = tuple(self._hop(flow, src, dst, rail) for (src, dst), rail in zip(tree.hops, tree.rails, strict=True))
        landings = [x for s in tree.sinks for x in self._landings(s, part.role, unit.box)]
        return Passage(
            part=self.name + part.suffix,
            recipe=self.cls.recipe,
            offset=unit.box.offset,
            shape=unit.box.shape,
            nbytes=unit.nbytes,
            planned=unit.planned,
            how=_how(unit),
            sender=f"trainer rank {flow.src_rank}",
            host=self.source.ranks[flow.src_rank].host,
            bucket=before // size,
            num_buckets=self.plan.num_buckets(flow),
            hops=hops,
            landings=tuple(landings),
            offloaded=self.source.ranks[flow.src_rank].memory == HOST,
        )

    def _hop(self, flow: Flow, src: int, dst: int, rail: int) -> Hop:
        if src == SOURCE:
            start, host = f"trainer rank {flow.src_rank}", self.source.ranks[flow.src_rank].host
        else:
            start, host = sink_name(self.sink.ranks[src]), self.sink.ranks[src].info.host
        end = self.sink.ranks[dst]
        return Hop(start, host, sink_name(end), end.info.host, rail, src != SOURCE and rail != LOCAL)

    def _landings(self, sink_idx: int, role: str, box: Box) -> Iterator[Landing]:
        rank = self.sink.ranks[sink_idx]
        copies = self._copies_of(rank)
        for copy in copies:
            common = _common(copy.box, box) if copy.role == role else None
            if common is None:
                continue
            storage = rank.storages[copy.storage_idx]
            first = copy.dst_offset + sum(
                (o - b) * s for o, b, s in zip(common.offset, copy.box.offset, copy.dst_strides, strict=False)
            )
            where = (storage.name, storage.dtype, first, copy.dst_strides)
            yield Landing(sink_name(rank), rank.info.host, *where, in_host=rank.info.memory == HOST)

    def _copies_of(self, rank: SinkRankManifest) -> list[CopySpec]:
        """The rank's copies of this tensor in this recipe; those of equal ranks are looked up once."""
        found = self._copies.get(id(rank.copies))
        if found is None:
            names = {n for n in self.names if rank.recipes.get(n) == self.cls.recipe}
            found = self._copies[id(rank.copies)] = [c for c in rank.copies if c.tensor in names]
        return found


def _common(copy: Box, unit: Box) -> Box | None:
    """What both have; a part of fewer dimensions in the engine ends in ones on the wire."""
    num_dims = len(copy.shape)
    return copy.intersect(Box(unit.offset[:num_dims], unit.shape[:num_dims]))


def _how(unit: PlanUnit) -> str:
    if unit.mode == MODE_COPY:
        return "scales out of the rank's table" if unit.part else "copied"
    return "quantised, scales made in the same pass" if unit.mode == MODE_FUSED else "quantised by exchanged amaxes"


def sink_name(rank: SinkRankManifest) -> str:
    """How reports name an engine rank."""
    return f"replica {rank.replica} rank {rank.rank}"
