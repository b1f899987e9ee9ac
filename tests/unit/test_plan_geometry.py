"""Boxes cut by boxes, against sets of elements."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.plan.geometry import (
    cut_leading,
    joined,
    owned_cells,
    partition,
    split_modes,
    touched_cells,
    weights_of_cells,
)
from wsync.plan.types import MODE_FUSED
from wsync.spec.box import Box
from wsync.spec.recipes import scale_grid
from wsync.testing.generators import split_evenly


def intervals(limit: int):
    return st.tuples(st.integers(0, limit), st.integers(0, limit)).map(lambda p: (min(p), max(p) - min(p)))


def boxes(ndim: int, limit: int = 7):
    axes = st.tuples(*[intervals(limit)] * ndim)
    return axes.map(lambda a: Box(tuple(o for o, _ in a), tuple(n for _, n in a)))


def elements(box: Box) -> set[tuple[int, ...]]:
    return {tuple(o + i for o, i in zip(box.offset, k, strict=True)) for k in np.ndindex(*box.shape)}


@given(st.integers(0, 3).flatmap(lambda n: st.lists(boxes(n), min_size=1, max_size=6)), st.integers(1, 63))
def test_partition_is_disjoint_complete_and_true(given_boxes, needed):
    needed &= (1 << len(given_boxes)) - 1
    expected = {}
    for i, box in enumerate(given_boxes):
        for element in elements(box):
            expected[element] = expected.get(element, 0) | 1 << i
    expected = {e: mask for e, mask in expected.items() if mask & needed}
    got = {}
    for box, mask in partition(given_boxes, needed):
        for element in elements(box):
            assert element not in got
            got[element] = mask
    assert got == expected


def test_partition_returns_maximal_boxes():
    shards = split_evenly((100, 10), 0, 4)
    found = partition([Box.whole((100, 10)), *shards], 1)
    assert [b for b, _ in found] == shards
    assert joined([(b, 0) for b, _ in found]) == [(Box.whole((100, 10)), 0)]


def test_partition_of_many_shards_and_experts_is_quick():
    rows = split_evenly((128, 4096, 64), 0, 128)
    cols = split_evenly((128, 4096, 64), 1, 256)
    found = partition([*rows, *cols], (1 << 128) - 1)
    assert len(found) == 128 * 256


@st.composite
def weight_boxes(draw):
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 400)), draw(st.integers(1, 400)))[draw(st.integers(0, 1)) :]
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return shape, Box(offset, tuple(draw(st.integers(1, n - o)) for o, n in zip(offset, shape, strict=True)))


@given(weight_boxes())
@settings(max_examples=200)
def test_fused_boxes_have_exactly_the_whole_scale_blocks(case):
    shape, box = case
    split = split_modes(box, shape, (128, 128))
    assert sum(b.num_elements for b, _ in split) == box.num_elements
    assert len(split) <= 5
    for piece, mode in split:
        assert box.contains(piece)
        cells = touched_cells(piece, (128, 128))
        for cell in [Box(e, (1,) * len(shape)) for e in sorted(elements(cells))]:
            whole = weights_of_cells(cell, shape, (128, 128))
            assert box.contains(whole) == (mode == MODE_FUSED)
            if mode == MODE_FUSED:
                assert piece.contains(whole)


@given(weight_boxes())
def test_cells_belong_to_the_box_of_their_first_element(case):
    shape, box = case
    owned, touched = elements(owned_cells(box, (128, 128))), elements(touched_cells(box, (128, 128)))
    for cell in elements(Box.whole(scale_grid(shape, (128, 128)))):
        weights = weights_of_cells(Box(cell, (1,) * len(shape)), shape, (128, 128))
        assert (cell in owned) == box.contains(Box(weights.offset, (1,) * len(shape)))
        assert (cell in touched) == (weights.intersect(box) is not None)


@given(boxes(3, 9), st.integers(1, 300), st.sampled_from([1, 4]))
def test_cuts_fill_the_room_and_lose_nothing(box, room, step):
    capacity = 300
    if box.num_elements * 2 <= room:
        return
    cut = cut_leading(box, 2, room, capacity, (step, step))
    if cut is None:
        assert room < capacity
        return
    head, rest = cut
    assert 0 < head.num_elements * 2 <= room
    parts = [head, *rest]
    assert sum(p.num_elements for p in parts) == box.num_elements
    assert set().union(*map(elements, parts)) == elements(box)
    order = [min(elements(p)) for p in parts if p.num_elements]
    assert order == sorted(order)


def test_shards_are_those_of_torch_chunk():
    torch = __import__("torch")
    for n in (1, 5, 7, 8, 100):
        for world in (1, 2, 3, 8):
            sizes = [c.shape[0] for c in torch.chunk(torch.zeros(n), world)]
            got = [b.shape[0] for b in split_evenly((n,), 0, world)]
            assert got == sizes + [0] * (world - len(sizes))
