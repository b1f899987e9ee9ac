"""Which indices a rank holds, against torch.chunk and against layouts that other projects' code made."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.describe.intervals import Split, chunk_bounds, local_intervals, split_order

VECTORS = Path(__file__).parents[2].parent / "shared" / "vectors"


def indices(intervals):
    return [i for start, stop in intervals for i in range(start, stop)]


@given(st.integers(0, 60), st.integers(1, 9))
def test_a_chunk_is_what_torch_chunk_gives(extent, num_parts):
    chunks = [c.tolist() for c in torch.arange(extent).chunk(num_parts)]
    chunks += [[]] * (num_parts - len(chunks))
    assert [list(range(*chunk_bounds(extent, num_parts, i))) for i in range(num_parts)] == chunks


@given(st.integers(0, 60), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
@settings(max_examples=60)
def test_every_index_is_held_once_whatever_the_order_of_axes(extent, sizes, data):
    order = data.draw(st.permutations(range(len(sizes))))
    held = []
    for coordinate in np.ndindex(*sizes):
        splits = [Split(c, n) for c, n in zip(coordinate, sizes, strict=True)]
        held += indices(local_intervals(extent, splits, order))
    assert sorted(held) == list(range(extent))


@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 4))
def test_fsdp_over_tensor_parallel_chunks_by_tensor_parallel_first(extent, dp, tp):
    for d in range(dp):
        for t in range(tp):
            first, last = chunk_bounds(extent, tp, t)
            low, high = chunk_bounds(last - first, dp, d)
            held = local_intervals(extent, [Split(d, dp, tp), Split(t, tp)])
            assert indices(held) == list(range(first + low, first + high))
            assert len(held) <= 1


def test_split_factors_that_name_no_order_give_a_share_of_every_piece():
    # A fused q|k|v of 3 pieces, each halved: nothing to the right explains the factor 3.
    assert split_order([Split(0, 2, 3)]) is None
    assert local_intervals(12, [Split(0, 2, 3)]) == ((0, 2), (4, 6), (8, 10))
    assert local_intervals(12, [Split(1, 2, 3)]) == ((2, 4), (6, 8), (10, 12))


def test_split_factors_of_three_axes_name_their_order():
    assert split_order([Split(0, 4, 2), Split(0, 3, 2), Split(0, 2)]) == [2, 0, 1]
    assert split_order([Split(0, 4), Split(0, 3)]) == [0, 1]


@pytest.fixture(scope="module")
def layouts():
    if not (VECTORS / "layouts.npz").is_file():
        pytest.skip("the reference layouts are not here")
    with np.load(VECTORS / "layouts.npz") as z:
        arrays = {name: z[name] for name in z.files}
    return {case["name"]: case for case in json.loads((VECTORS / "layouts.json").read_text())}, arrays


def rows_of(layouts, name):
    cases, arrays = layouts
    found = [a for key, a in arrays.items() if key == name or key.startswith((f"{name}.", f"{name}/"))]
    assert found, sorted(arrays)
    assert name in cases
    return found


def test_fsdp_shards_are_those_of_the_reference_layouts(layouts):
    (table,) = rows_of(layouts, "fsdp2_uneven")
    for extent, world, rank, start, length in table.tolist():
        assert indices(local_intervals(extent, [Split(rank, world)])) == list(range(start, start + length))


def test_fsdp_over_tensor_parallel_shards_are_those_of_the_reference_layouts(layouts):
    (table,) = rows_of(layouts, "fsdp2_tp_strided")
    for extent, dp, tp, d, t, start, length in table.tolist():
        held = local_intervals(extent, [Split(d, dp, tp), Split(t, tp)])
        assert indices(held) == list(range(start, start + length))


def test_a_strided_shard_alone_is_that_of_the_reference_layouts(layouts):
    for table in rows_of(layouts, "stridedshard_n16_dp2_sf4"):
        ranks = table.reshape(2, 8).tolist()
        assert [indices(local_intervals(16, [Split(d, 2, 4)])) for d in range(2)] == ranks
