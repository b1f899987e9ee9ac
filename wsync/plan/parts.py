"""Classes of tensors as a plan has them."""

from __future__ import annotations

import msgspec

from wsync.spec.box import Box


class PlanPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One part of every tensor of a class.

    Attributes:
        role: ``"weight"``, ``"scale"`` or ``"scale_2"``.
        suffix: appended to the tensor's name.
        dtype: on the wire.
        shape: global, in elements on the wire, with as many dimensions as the tensor: a tensor of scales that has fewer
            in the engine ends in ones here.
    """

    role: str
    suffix: str
    dtype: str
    shape: tuple[int, ...]


class PlanUnit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One box of every tensor of a class, which travels in one go unless a bucket ends within it.

    Attributes:
        part: which of the class's parts.
        box: in the part's coordinates.
        mode: MODE_COPY, MODE_FUSED or MODE_SCALED.
        step: cuts in the last two dimensions (rows, columns) fall on multiples of these.
        nbytes: on the wire as it is.
        wire_bytes: expected to travel: fewer than ``nbytes`` where it is planned as a delta.
    """

    part: int
    box: Box
    mode: int
    step: tuple[int, int]
    nbytes: int
    wire_bytes: int

    @property
    def planned(self) -> str:
        """``"delta"`` or ``"dense"``."""
        return "delta" if self.wire_bytes < self.nbytes else "dense"


class PlanClass(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tensors of one shape, placement and recipe.

    Attributes:
        recipe: how they are encoded.
        parts: the weight first, then its scales.
        units: weights first, then scales.
        members: indices of the tensors in the source manifest, ascending.
        groups: for each member its scale group in the plan, or empty where none shares its amax.
        amax: (trainer rank, shard index, box of the weight) whose amaxes are exchanged, of every member.
        grid_elements: amaxes of one member in the exchanged vector; 0 where none is exchanged.
        amax_first: element of the vector where those of the first member begin, one member behind the other. Members
            with a scale group have theirs where the group's begin.
    """

    recipe: str
    parts: tuple[PlanPart, ...]
    units: tuple[PlanUnit, ...]
    members: tuple[int, ...]
    groups: tuple[int, ...]
    amax: tuple[tuple[int, int, Box], ...]
    grid_elements: int
    amax_first: int


class ScaleGroup(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tensors that share their amaxes in one recipe.

    Attributes:
        tensors: indices in the source manifest, in order of name.
        amax_first: element of the exchanged vector where the shared amaxes begin.
    """

    tensors: tuple[int, ...]
    amax_first: int
