"""Strided maps to boxes, against element-by-element enumeration."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.adapters.engines.strided import Axis, box_runs, dense_span, subtract
from wsync.errors import RecordError
from wsync.spec.box import Box, contiguous_strides


def pairs_of(near_offset, far_offset, axes):
    """(near element, far element) of every element of a copy."""
    return sorted(
        (
            near_offset + sum(i * a.near for i, a in zip(index, axes, strict=True)),
            far_offset + sum(i * a.far for i, a in zip(index, axes, strict=True)),
        )
        for index in itertools.product(*[range(a.extent) for a in axes])
    )


def pairs_in(shape, runs):
    strides = contiguous_strides(shape)
    found = []
    for run in runs:
        for index in itertools.product(*[range(n) for n in run.box.shape]):
            near = sum((o + i) * s for o, i, s in zip(run.box.offset, index, strides, strict=True))
            found.append((near, run.offset + sum(i * s for i, s in zip(index, run.strides, strict=True))))
    return sorted(found)


@st.composite
def copies(draw):
    """Any axes that stay inside a small near side."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    room = math.prod(shape) - 1
    offset = draw(st.integers(0, room))
    room -= offset
    axes = []
    for _ in range(draw(st.integers(0, 3))):
        extent = draw(st.integers(1, 5))
        near = draw(st.integers(0, room // (extent - 1))) if extent > 1 else draw(st.integers(0, 9))
        room -= near * (extent - 1)
        axes.append(Axis(extent, near, draw(st.integers(0, 50))))
    return shape, offset, draw(st.integers(0, 100)), axes


@given(copies())
@settings(max_examples=400)
def test_boxes_of_any_strided_copy_move_the_same_elements(copy):
    shape, near, far, axes = copy
    runs = box_runs(shape, near, far, axes)
    assert pairs_in(shape, runs) == pairs_of(near, far, axes)
    for run in runs:
        assert Box.whole(shape).contains(run.box)


@pytest.mark.parametrize(
    ("shape", "near", "axes", "boxes"),
    [
        # A slice, a transpose, a flattened whole, an interleaved destination: one box.
        ((4, 6), 8, [Axis(2, 6, 10), Axis(3, 1, 1)], 1),
        ((4, 6), 0, [Axis(6, 1, 4), Axis(4, 6, 1)], 1),
        ((4, 6), 0, [Axis(24, 1, 1)], 1),
        ((4, 6), 0, [Axis(4, 6, 12), Axis(6, 1, 1)], 1),
        # Two axes that make one dimension.
        ((4, 6), 0, [Axis(4, 6, 6), Axis(3, 2, 2), Axis(2, 1, 1)], 1),
        # An interleaved source: a box for each index; a flat range off the rows: head, body, tail.
        ((8, 3), 3, [Axis(4, 6, 3), Axis(3, 1, 1)], 4),
        ((4, 6), 5, [Axis(17, 1, 1)], 3),
        ((), 0, [], 1),
        ((4, 6), 0, [Axis(0, 1, 1)], 0),
    ],
)
def test_boxes_are_as_few_as_the_layout_allows(shape, near, axes, boxes):
    runs = box_runs(shape, near, 7, axes)
    assert len(runs) == boxes
    assert pairs_in(shape, runs) == pairs_of(near, 7, axes)


def test_a_copy_that_falls_into_too_many_boxes_is_refused():
    with pytest.raises(RecordError, match="more than 100 boxes"):
        box_runs((1000, 2), 0, 0, [Axis(500, 4, 1)], limit=100)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(0, 4), st.integers(1, 4)), max_size=3))
def test_a_box_without_a_hole_and_the_hole_make_the_box(dims):
    box = Box(tuple(o for o, *_ in dims), tuple(n + m for _, n, _, m in dims))
    hole = Box(tuple(o + min(h, m) for o, _, h, m in dims), tuple(n for _, n, _, _ in dims))

    def cells(b):
        return set(itertools.product(*[range(o, e) for o, e in zip(b.offset, b.end, strict=True)]))

    left = subtract(box, hole)
    assert sum(b.num_elements for b in left) + hole.num_elements == box.num_elements
    assert set().union(cells(hole), *[cells(b) for b in left]) == cells(box)


def test_a_dense_span_is_one_interval_in_any_order():
    assert dense_span((2, 3), (3, 1)) == 6
    assert dense_span((2, 3), (1, 2)) == 6
    assert dense_span((2, 3), (4, 1)) is None
    assert dense_span((2, 3), (0, 1)) is None
    assert dense_span((1, 3), (99, 1)) == 3
    assert dense_span((), ()) == 1
