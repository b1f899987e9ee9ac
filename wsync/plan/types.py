"""What plans and slices are made of: values only, no addresses."""

from __future__ import annotations

import msgspec

from wsync.spec.box import Box

ALIGNMENT = 256
"""Every piece starts at a multiple of this many bytes in its bucket."""

MODE_COPY = 0
"""Plain bytes, bf16, or scales out of the rank's scale table."""
MODE_FUSED = 1
"""A quantised weight box whose scale blocks are all whole: packing it makes their scales."""
MODE_SCALED = 2
"""A quantised weight box whose scales are made from exchanged amaxes before it is packed: an edge cuts its blocks, or
the whole tensor has one scale."""

SOURCE = -1
"""The sender, as an endpoint of a hop."""


class WirePart(msgspec.Struct, frozen=True, array_like=True):
    """One part of one tensor in one recipe; what several sinks share is encoded once.

    Attributes:
        tensor_idx: into the source manifest's tensors (an alias is resolved to its target).
        recipe: how it is encoded.
        role: ``"weight"``, ``"scale"`` or ``"scale_2"``.
        name: checkpoint name of the part.
        dtype: on the wire.
        shape: global, in elements on the wire, with as many dimensions as the tensor: a tensor of scales that has fewer
            in the engine ends in ones here.
        group: names of the tensors that share their amaxes with this one, itself among them; empty if none does.
    """

    tensor_idx: int
    recipe: str
    role: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    group: tuple[str, ...] = ()


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One box of a part, contiguous and row major in its bucket.

    Attributes:
        part_idx: into the plan's parts.
        shard_idx: which of the sender's boxes of that tensor holds it.
        box: in the part's coordinates.
        mode: MODE_COPY, MODE_FUSED or MODE_SCALED.
        offset: bytes from the bucket's base, a multiple of ALIGNMENT.
        nbytes: bytes of the box on the wire.
    """

    part_idx: int
    shard_idx: int
    box: Box
    mode: int
    offset: int
    nbytes: int


class Bucket(msgspec.Struct, frozen=True, array_like=True):
    """A fixed-size piece of staging memory that travels as one message.

    Attributes:
        bucket_idx: in the plan, where numbers have gaps; the logical wire offset of its first byte is
            ``bucket_idx * bucket_bytes``.
        src_rank: the trainer rank that packs it.
        stage: 0 for weights, 1 for scales, which are packed after all weights of the rank.
        used_bytes: up to the end of the last piece, rounded up to ALIGNMENT; bytes between pieces are zero.
        pieces: in order of offset.
        sinks: indices of the engine ranks that need it, ascending. Each needs all of it.
        hops: the delivery tree as (from, to) sink indices in an order in which every sender has received before;
            ``SOURCE`` stands for the trainer rank.
    """

    bucket_idx: int
    src_rank: int
    stage: int
    used_bytes: int
    pieces: tuple[Piece, ...]
    sinks: tuple[int, ...]
    hops: tuple[tuple[int, int], ...]


class AmaxRegion(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A box of a weight that this rank holds and whose amaxes it exchanges with the others.

    Attributes:
        part_idx: the weight part.
        shard_idx: which of the rank's boxes holds it.
        box: in the weight part's coordinates.
        grid_offset: element of the exchanged vector where the tensor's whole scale grid begins (row major); the tensors
            of a scale group have one grid together.
    """

    part_idx: int
    shard_idx: int
    box: Box
    grid_offset: int


class SourceSlice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one trainer rank has to do.

    Attributes:
        plan_digest: of the whole plan; ranks with different digests refuse each other.
        rank: the trainer rank.
        bucket_bytes: size of every bucket.
        parts: those of the plan that this rank uses; indices of the slice count these.
        buckets: those that this rank packs, in order of packing (stage 0 first).
        amax_regions: to reduce before packing; the same vector on all ranks.
        amax_elements: f32 elements of the exchanged vector; 0 means that no rank exchanges.
    """

    plan_digest: str
    rank: int
    bucket_bytes: int
    parts: tuple[WirePart, ...]
    buckets: tuple[Bucket, ...]
    amax_regions: tuple[AmaxRegion, ...]
    amax_elements: int

    @property
    def staging_bytes(self) -> int:
        """Staging memory of this rank."""
        return len(self.buckets) * self.bucket_bytes


class SinkSlice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one engine rank receives and relays.

    Attributes:
        plan_digest: of the whole plan.
        sink_idx: index of this rank in the plan.
        bucket_bytes: size of every bucket.
        parts: those of the plan that this rank uses; indices of the slice count these.
        buckets: those that this rank needs, in the order in which their senders pack them.
        aliases: name of a tied tensor -> name of the tensor under which its bytes travel.
    """

    plan_digest: str
    sink_idx: int
    bucket_bytes: int
    parts: tuple[WirePart, ...]
    buckets: tuple[Bucket, ...]
    aliases: dict[str, str] = {}

    @property
    def staging_bytes(self) -> int:
        """Staging memory where buckets are received (shared memory holds it once for all ranks of a host)."""
        return len(self.buckets) * self.bucket_bytes


class Bound(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One cut of the cluster: no plan is faster in which engine ranks pass on only what they need themselves.

    Attributes:
        name: of the cut, such as ``ingress of node h1``.
        seconds: its bytes over its rate.
    """

    name: str
    seconds: float


class PlanOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to plan.

    Attributes:
        bucket_bytes: size of a bucket, a multiple of ALIGNMENT; None for the best of the cluster's rates, or
            `DEFAULT_BUCKET_BYTES` where no cluster is given.
        density: share of the 16-bit (or 8-bit) elements that change from one version to the next, from 0 to 1; or one
            for each prefix of a tensor's name, of which the longest counts. None: everything travels whole.
        relay: whether engine ranks may pass on what they receive to other nodes.
    """

    bucket_bytes: int | None = None
    density: float | dict[str, float] | None = None
    relay: bool = True


DEFAULT_BUCKET_BYTES = 4 << 20
MAX_BUCKET_BYTES = 1 << 40
MAX_BUCKETS = 1 << 30
"""Numbers of buckets stay below: they are message tags."""
MAX_WIRE_BYTES = (8 << 63) - 1
"""Logical wire offsets stay below: digests number the words of the whole wire by 64-bit integers."""
