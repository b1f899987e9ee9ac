"""Index lists to runs, boxes by where they lie, boxes that join: against element-by-element enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.adapters.engines.boxindex import BoxIndex
from wsync.adapters.engines.places import all_of, along, picked
from wsync.adapters.engines.runs import runs_of
from wsync.adapters.engines.strided import BoxRun, joined
from wsync.spec.box import Box, contiguous_strides

# Runs.


def pairs_in(runs, unit, other_unit):
    return [
        (r.first + row * r.step + i * unit, r.other + row * r.other_step + i * other_unit)
        for r in runs
        for row in range(r.rows)
        for i in range(r.length)
    ]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=40),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_runs_are_the_same_pairs_in_the_same_order(pairs, unit, other_unit):
    first, other = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    runs = runs_of(first, other, unit, other_unit)
    assert pairs_in(runs, unit, other_unit) == pairs
    assert all(r.rows == 1 or (r.step > 0 and r.other_step >= 0) for r in runs)


@pytest.mark.parametrize(
    ("other", "num_runs"),
    [
        (range(12), 1),
        ([*range(6, 12), *range(6)], 2),
        ([0, 2, 4, 6, 8, 10], 1),
        ([0, 1, 8, 9, 16, 17, 24, 25], 1),
        ([5, 5, 5, 5], 1),
        ([3, 2, 1, 0], 4),
        ([], 0),
    ],
)
def test_neighbours_are_rows_and_rows_of_one_distance_are_one_run(other, num_runs):
    other = np.array([*other], dtype=np.int64)
    assert len(runs_of(np.arange(len(other)), other, 1, 1)) == num_runs


def test_more_rows_than_allowed_are_refused():
    other = np.array([4, 2, 7, 1], dtype=np.int64)
    assert runs_of(np.arange(4), other, 1, 1, limit=3) is None
    assert len(runs_of(np.arange(4), other, 1, 1, limit=4)) >= 3


# Places.


@given(st.data())
def test_places_are_what_numpy_picks(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    made = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    index = []
    for n in shape:
        indexed = data.draw(st.booleans())
        index.append(
            np.array(data.draw(st.lists(st.integers(-n, n - 1), min_size=4, max_size=4)))[: math.prod(made)].reshape(
                made
            )
            if indexed
            else None
        )
    if all(e is None for e in index):
        index[0] = np.zeros(made, dtype=np.int64)
    elements = np.arange(math.prod(shape)).reshape(shape)
    # NumPy also keeps adjacent arrays in place; lists of places are compared by what they hold.
    expected = elements[tuple(slice(None) if e is None else e for e in index)]
    if made == ():
        # NumPy takes 0-d arrays as numbers, which are always adjacent.
        expected = elements[tuple(slice(None) if e is None else e[None] for e in index)]
        dims = [d for d, e in enumerate(index) if e is not None]
        expected = expected.squeeze(dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0)
    found = picked(shape, contiguous_strides(shape), index)
    assert found.shape == expected.shape
    there = all_of(contiguous_strides(found.shape), found)
    out = np.full(math.prod(found.shape), -1)
    for (k, a), rest in itertools.product(
        zip(there.offsets, found.offsets, strict=True), itertools.product(*map(range, found.rest))
    ):
        near = sum(i * s for i, s in zip(rest, found.strides, strict=True))
        out[k + sum(i * s for i, s in zip(rest, there.strides, strict=True))] = a + near
    np.testing.assert_array_equal(out.reshape(found.shape), expected)


def test_an_index_along_some_dimensions_leaves_every_dimension_where_it_is():
    elements = np.arange(24).reshape(2, 3, 4)
    index = along((2, 3, 4), {0: np.array([1, 0]), 2: np.array([3, 1])})
    np.testing.assert_array_equal(elements[tuple(index)], elements[::-1][:, :, [3, 1]])


# Boxes by where they lie.


@st.composite
def boxes(draw, rank, low=0):
    sides = [(draw(st.integers(0, 7)), draw(st.integers(low, 5))) for _ in range(rank)]
    return Box(tuple(o for o, _ in sides), tuple(n for _, n in sides))


def cells(box):
    return set(itertools.product(*[range(o, e) for o, e in zip(box.offset, box.end, strict=True)]))


@given(st.data(), st.integers(0, 2), st.sampled_from([3, 30, 120]))
@settings(max_examples=60, deadline=None)
def test_the_latest_box_over_every_element_is_found(data, rank, count):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    index, written = BoxIndex(), []
    for _ in range(count):
        offset = tuple(int(o) for o in rng.integers(0, 12, rank))
        written.append(Box(offset, tuple(int(n) for n in rng.integers(0, 4, rank))))
        index.append(written[-1])
        if rng.random() < 0.05:
            index.meeting(written[0])
    before = data.draw(st.integers(0, count))
    query = data.draw(boxes(rank, 1))
    expected = dict.fromkeys(cells(query))
    for number, box in enumerate(written[:before]):
        expected.update((c, number) for c in cells(box) & cells(query))
    found = [(c, number) for part, number in index.latest(query, before) for c in cells(part)]
    assert len(found) == len(expected)
    assert dict(found) == expected
    meeting = [n for n in range(before) if cells(written[n]) & cells(query)]
    assert index.meeting(query, before) == meeting[::-1]


# Boxes that join.


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_joined_boxes_move_the_same_elements(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    strides = tuple(data.draw(st.sampled_from([contiguous_strides(shape), tuple(range(3, 3 + len(shape)))])))
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    shuffled = data.draw(st.booleans())
    runs = []
    for corner in itertools.product(*[itertools.pairwise(c) for c in cuts]):
        offset, extent = tuple(a for a, _ in corner), tuple(b - a for a, b in corner)
        far = sum(o * s for o, s in zip(offset, strides, strict=True))
        far += 100 * data.draw(st.integers(0, 2)) if shuffled else 0
        runs.append(
            BoxRun(Box(offset, extent), far, tuple(s if n > 1 else 0 for s, n in zip(strides, extent, strict=True)))
        )
    runs = data.draw(st.permutations(runs))
    found = joined(runs)
    assert moved(found) == moved(runs)
    if not shuffled:
        assert len(found) == 1


def moved(runs):
    return sorted(
        (cell, run.offset + sum((i - o) * s for i, o, s in zip(cell, run.box.offset, run.strides, strict=True)))
        for run in runs
        for cell in cells(run.box)
    )
