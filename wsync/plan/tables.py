"""Scale tables: where a trainer rank keeps the scales that it makes, between packing weights and packing scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wsync.plan.geometry import touched_cells
from wsync.plan.grids import Grid, Grids
from wsync.plan.types import SourceSlice, WirePart
from wsync.spec.box import Box, contiguous_strides

_ALIGNMENT = 64
"""Tables begin on a cache line of their own, counted from the first table."""


class TableKey(NamedTuple):
    """Which scales a table holds."""

    tensor_idx: int
    recipe: str
    group: tuple[str, ...]
    role: str

    @classmethod
    def of(cls, part: WirePart, role: str) -> TableKey:
        """The scales of that role that belong to a part."""
        return cls(part.tensor_idx, part.recipe, part.group, role)


@dataclass(frozen=True, slots=True)
class ScaleTable:
    """The part of a tensor's scale grid that one rank writes.

    Attributes:
        first: byte of the program's scales where the table begins.
        box: of scale cells; the table is row major over it.
        elem_bytes: of one scale.
    """

    first: int
    box: Box
    elem_bytes: int

    @property
    def strides(self) -> tuple[int, ...]:
        """In scales."""
        return contiguous_strides(self.box.shape)

    def byte_of(self, cell: Sequence[int]) -> int:
        """Byte of the program's scales where the scale of ``cell`` begins."""
        steps = zip(cell, self.box.offset, self.strides, strict=True)
        return self.first + self.elem_bytes * sum((c - o) * s for c, o, s in steps)


def lay_out_tables(slice_: SourceSlice, grids: Sequence[Grids | None]) -> tuple[dict[TableKey, ScaleTable], int]:
    """A table for each tensor of scales, just as large as what this rank writes or sends, and the bytes of all.

    Args:
        slice_: of the rank.
        grids: of each of its parts; None for a part without scales.
    """
    found: dict[TableKey, tuple[Grid, Box]] = {}

    def covers(part: WirePart, grid: Grid, cells: Box) -> None:
        key = TableKey.of(part, grid.role)
        found[key] = (grid, _around(found[key][1], cells) if key in found else cells)

    for bucket in slice_.buckets:
        for piece in bucket.pieces:
            part, of_part = slice_.parts[piece.part_idx], grids[piece.part_idx]
            if of_part is None:
                continue
            if part.role == "weight":
                if of_part.packed is not None:
                    covers(part, of_part.packed, touched_cells(piece.box, of_part.packed.cell))
            else:
                covers(part, next(g for g in of_part.levels if g.role == part.role), piece.box)
    for region in slice_.amax_regions:
        of_part = grids[region.part_idx]
        if of_part is not None and of_part.shared is not None:
            cells = touched_cells(region.box, of_part.shared.cell)
            covers(slice_.parts[region.part_idx], of_part.shared, cells)
    tables, end = {}, 0
    for key, (grid, box) in found.items():
        first = -(-end // _ALIGNMENT) * _ALIGNMENT
        tables[key] = ScaleTable(first, box, grid.elem_bytes)
        end = first + grid.elem_bytes * math.prod(box.shape)
    return tables, end


def _around(a: Box, b: Box) -> Box:
    """The smallest box with both inside."""
    offset = tuple(map(min, a.offset, b.offset))
    end = tuple(map(max, a.end, b.end))
    return Box(offset, tuple(e - o for o, e in zip(offset, end, strict=True)))
