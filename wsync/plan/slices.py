"""A rank's slice of a plan, small enough to send, and the digest that all slices share."""

from __future__ import annotations

from collections.abc import Iterable

from wsync.errors import ConfigError
from wsync.plan.types import AmaxRegion, Bucket, Piece, Plan, SinkSlice, SourceSlice, WirePart
from wsync.spec.serde import digest_of


def plan_digest(plan: Plan) -> str:
    """Hex digest of the whole plan; equal plans have equal digests on every machine."""
    return digest_of(plan)


def source_slice(plan: Plan, rank: int, digest: str | None = None) -> SourceSlice:
    """What trainer rank ``rank`` does; its part indices count the slice's own parts.

    Args:
        plan: of all ranks.
        rank: of the trainer.
        digest: `plan_digest` of ``plan`` where the caller has it already.
    """
    _check_index("trainer rank", rank, plan.num_sources)
    digest = digest or plan_digest(plan)
    parts = _Parts(plan)
    buckets = tuple(parts.bucket(b) for b in plan.buckets if b.src_rank == rank)
    regions = tuple(
        AmaxRegion(parts.index(r.part_idx), r.shard_idx, r.box, r.grid_offset) for r in plan.amax_regions[rank]
    )
    return SourceSlice(digest, rank, plan.bucket_bytes, parts.used(), buckets, regions, plan.amax_elements)


def sink_slice(plan: Plan, sink_idx: int, digest: str | None = None) -> SinkSlice:
    """What sink ``sink_idx`` receives, relays and installs; its part indices count the slice's own parts.

    Args:
        plan: of all ranks.
        sink_idx: position in the sink manifest.
        digest: `plan_digest` of ``plan`` where the caller has it already.
    """
    _check_index("sink", sink_idx, plan.num_sinks)
    digest = digest or plan_digest(plan)
    parts = _Parts(plan)
    buckets = tuple(parts.bucket(b) for b in plan.buckets if sink_idx in b.sinks)
    return SinkSlice(digest, sink_idx, plan.bucket_bytes, parts.used(), buckets, plan.aliases)


def source_slices(plan: Plan) -> list[SourceSlice]:
    """The slices of all trainer ranks."""
    digest = plan_digest(plan)
    return [source_slice(plan, rank, digest) for rank in range(plan.num_sources)]


def sink_slices(plan: Plan) -> list[SinkSlice]:
    """The slices of all sinks."""
    digest = plan_digest(plan)
    return [sink_slice(plan, sink_idx, digest) for sink_idx in range(plan.num_sinks)]


def _check_index(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ConfigError(f"{what} {index} is not in a plan of {count}")


class _Parts:
    """Numbers parts in order of first use."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._index: dict[int, int] = {}

    def index(self, part_idx: int) -> int:
        return self._index.setdefault(part_idx, len(self._index))

    def bucket(self, bucket: Bucket) -> Bucket:
        return Bucket(
            bucket.bucket_idx,
            bucket.src_rank,
            bucket.stage,
            bucket.used_bytes,
            self._pieces(bucket.pieces),
            bucket.sinks,
            bucket.hops,
        )

    def _pieces(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        index = self.index
        return tuple(Piece(index(p.part_idx), p.shard_idx, p.box, p.mode, p.offset, p.nbytes) for p in pieces)

    def used(self) -> tuple[WirePart, ...]:
        return tuple(self._plan.parts[i] for i in self._index)
