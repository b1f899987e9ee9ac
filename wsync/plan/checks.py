"""What a decoded plan or slice must be before anything is done with it: no size or reference that cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from wsync.errors import RecipeError, WireError
from wsync.plan.flows import LOCAL, Flow, Tree
from wsync.plan.packing import bucket_room, max_buckets
from wsync.plan.parts import PlanClass, PlanUnit, ScaleGroup
from wsync.plan.types import (
    ALIGNMENT,
    MAX_BUCKET_BYTES,
    MODE_COPY,
    MODE_FUSED,
    MODE_SCALED,
    SOURCE,
)
from wsync.spec.box import Box
from wsync.spec.dtypes import ITEMSIZE
from wsync.spec.manifest import MAX_DIMS, MAX_TENSOR_BYTES
from wsync.spec.recipes import get_recipe

MAX_RANKS = 1 << 20
"""Of one side."""
MAX_BYTES = 1 << 62
"""Of anything."""


def check_range(what: str, value: int, first: int, last: int) -> None:
    """Refuse a number that is not from ``first`` to ``last``.

    Raises:
        WireError: with the value and what is allowed.
    """
    if not first <= value <= last:
        raise WireError(f"{what} is {value}, allowed are {first} to {last}")


def check_index(what: str, value: int, count: int) -> None:
    """Refuse a reference to what is not there.

    Raises:
        WireError: with the value and how many there are.
    """
    if not 0 <= value < count:
        raise WireError(f"a plan refers to {what} {value} of {count}")


def check_seconds(what: str, value: float) -> None:
    """Refuse a time that is negative, infinite or no number.

    Raises:
        WireError: with the value and what is allowed.
    """
    if not (math.isfinite(value) and value >= 0.0):
        raise WireError(f"{what} is {value!r}, allowed are finite seconds from 0")


def check_bucket_bytes(size: int) -> None:
    """Refuse a size that no bucket has.

    Raises:
        WireError: with the value and what is allowed.
    """
    if size % ALIGNMENT or not ALIGNMENT <= size <= MAX_BUCKET_BYTES:
        raise WireError(
            f"a plan's bucket_bytes is {size}, allowed are multiples of {ALIGNMENT} from {ALIGNMENT} to "
            f"{MAX_BUCKET_BYTES}"
        )


def check_trees(trees: Iterable[Tree], num_sinks: int) -> None:
    """Refuse a tree on which a rank that is not there sends, or one that has nothing, or receives twice.

    Raises:
        WireError: with both values.
    """
    for tree in trees:
        if len(tree.hops) != len(tree.rails):
            raise WireError(f"a plan's tree has {len(tree.hops)} hops, but rails of {len(tree.rails)}")
        has = {SOURCE}
        for src, dst in tree.hops:
            if src not in has or dst in has or not 0 <= dst < num_sinks:
                raise WireError(f"a plan's tree has a hop from {src} to {dst} of {num_sinks} sinks after {sorted(has)}")
            has.add(dst)
        if tree.sinks != tuple(sorted(has - {SOURCE})):
            raise WireError(f"a plan's tree is for sinks {list(tree.sinks)}, but reaches {sorted(has - {SOURCE})}")
        for rail in tree.rails:
            check_range("the rail of a hop", rail, LOCAL, MAX_BYTES)


def check_classes(
    classes: Sequence[PlanClass],
    groups: Sequence[ScaleGroup],
    *,
    tensors: Sequence[int],
    num_sources: int,
    bucket_bytes: int,
    amax_elements: int,
) -> None:
    """Refuse classes whose parts, boxes and members do not fit together.

    Args:
        classes: of a plan or slice.
        groups: of scales, that they refer to.
        tensors: indices of the tensors that are named.
        num_sources: trainer ranks.
        bucket_bytes: size of a bucket.
        amax_elements: of the exchanged vector.

    Raises:
        WireError: with both values.
    """
    check_range("amax_elements", amax_elements, 0, MAX_BYTES)
    known = tensors if isinstance(tensors, range) else frozenset(tensors)

    def check_tensors(found: Iterable[int]) -> None:
        for tensor_idx in found:
            if tensor_idx not in known:
                raise WireError(f"a plan refers to tensor {tensor_idx} of {len(known)} that it names")

    for group in groups:
        check_tensors(group.tensors)
        check_range("amax_first of a scale group", group.amax_first, 0, amax_elements)
    for cls in classes:
        check_tensors(cls.members)
        if cls.groups and len(cls.groups) != len(cls.members):
            raise WireError(f"a plan's class has {len(cls.members)} members, but scale groups of {len(cls.groups)}")
        for group_idx in cls.groups:
            check_index("scale group", group_idx, len(groups))
        _check_parts(cls)
        _check_amax(cls, groups, num_sources, amax_elements)
        for unit in cls.units:
            _check_unit(cls, unit, bucket_bytes)


def _check_parts(cls: PlanClass) -> None:
    try:
        get_recipe(cls.recipe)
    except RecipeError as e:
        raise WireError(f"a plan's class has the recipe {cls.recipe!r}: {e.message}") from e
    if not cls.parts:
        raise WireError("a plan's class has 0 parts, it needs at least 1")
    for part in cls.parts:
        if part.dtype not in ITEMSIZE:
            raise WireError(f"a plan's part has dtype {part.dtype!r}, allowed are {', '.join(ITEMSIZE)}")
        if len(part.shape) > MAX_DIMS or min(part.shape, default=0) < 0:
            raise WireError(f"a plan's part has shape {part.shape}, allowed are at most {MAX_DIMS} sizes from 0")
        if math.prod(part.shape) * ITEMSIZE[part.dtype] > MAX_TENSOR_BYTES:
            raise WireError(
                f"a plan's part of shape {part.shape} has {math.prod(part.shape) * ITEMSIZE[part.dtype]} bytes, "
                f"allowed are {MAX_TENSOR_BYTES}"
            )


def _check_amax(cls: PlanClass, groups: Sequence[ScaleGroup], num_sources: int, amax_elements: int) -> None:
    check_range("grid_elements", cls.grid_elements, 0, amax_elements)
    check_range("amax_first of a class", cls.amax_first, 0, amax_elements)
    firsts = [groups[i].amax_first for i in cls.groups]
    firsts = firsts or [cls.amax_first + max(0, len(cls.members) - 1) * cls.grid_elements]
    if max(firsts) + cls.grid_elements > amax_elements:
        raise WireError(
            f"a plan's class exchanges amaxes up to element {max(firsts) + cls.grid_elements} of {amax_elements}"
        )
    for rank, shard_idx, box in cls.amax:
        check_index("trainer rank", rank, num_sources)
        check_range("the shard of an exchanged box", shard_idx, 0, MAX_BYTES)
        _check_inside(box, cls.parts[0].shape)


def _check_inside(box: Box, shape: tuple[int, ...]) -> None:
    offset, extent = box.offset, box.shape
    if len(offset) == len(extent) == len(shape):
        for at, length, limit in zip(offset, extent, shape, strict=True):
            if at < 0 or length < 1 or at + length > limit:
                break
        else:
            return
    raise WireError(f"a plan has a box at offset {offset} of shape {extent} in a part of shape {shape}")


def _check_unit(cls: PlanClass, unit: PlanUnit, bucket_bytes: int) -> None:
    check_index("part", unit.part, len(cls.parts))
    part = cls.parts[unit.part]
    _check_inside(unit.box, part.shape)
    if unit.mode not in (MODE_COPY, MODE_FUSED, MODE_SCALED):
        raise WireError(f"a plan's unit has mode {unit.mode}, allowed are {MODE_COPY}, {MODE_FUSED} and {MODE_SCALED}")
    elem_bytes = ITEMSIZE[part.dtype]
    if unit.nbytes != unit.box.num_elements * elem_bytes:
        raise WireError(
            f"a plan's unit has {unit.nbytes} bytes, its box of shape {unit.box.shape} in {part.dtype} has "
            f"{unit.box.num_elements * elem_bytes}"
        )
    check_range("the wire_bytes of a unit", unit.wire_bytes, 0, unit.nbytes)
    rows, cols = unit.step
    if rows < 1 or cols < 1 or rows * cols * elem_bytes > bucket_bytes:
        raise WireError(
            f"a plan's unit is cut in steps of {unit.step} elements of {elem_bytes} bytes, allowed are steps from 1 "
            f"that fit into a bucket of {bucket_bytes} bytes"
        )


def check_flows(
    flows: Iterable[Flow], classes: Sequence[PlanClass], num_trees: int, num_sources: int, bucket_bytes: int
) -> None:
    """Refuse flows that refer to what is not there, or whose sizes are not those of their entries.

    Raises:
        WireError: with both values.
    """
    padded = [[-(-u.nbytes // ALIGNMENT) * ALIGNMENT for u in cls.units] for cls in classes]
    numbered, last = 0, max_buckets(bucket_bytes) - 1
    for flow in flows:
        check_index("trainer rank", flow.src_rank, num_sources)
        check_index("stage", flow.stage, 2)
        check_index("tree", flow.tree_idx, num_trees)
        if not flow.entries:
            raise WireError(f"a plan's flow at bucket {flow.first_bucket} has 0 entries, it needs at least 1")
        nbytes = 0
        for entry in flow.entries:
            check_index("class", entry.class_idx, len(classes))
            cls = classes[entry.class_idx]
            check_index("unit", entry.unit_idx, len(cls.units))
            check_index("member", entry.first, len(cls.members))
            check_index("member", entry.end - 1, len(cls.members))
            check_index("first member", entry.first, entry.end)
            check_range("the shard of an entry", entry.shard_idx, 0, MAX_BYTES)
            nbytes += padded[entry.class_idx][entry.unit_idx] * (entry.end - entry.first)
        if flow.nbytes != nbytes:
            raise WireError(f"a plan's flow has {flow.nbytes} bytes, its entries have {nbytes}")
        check_range("the delta_bytes of a flow", flow.delta_bytes, -1, flow.nbytes)
        if flow.first_bucket < numbered:
            raise WireError(f"a plan's flow begins at bucket {flow.first_bucket}, the one before ends at {numbered}")
        numbered = flow.first_bucket + bucket_room(flow.nbytes, bucket_bytes)
        check_range("the last number of a flow's buckets", numbered - 1, 0, last)
