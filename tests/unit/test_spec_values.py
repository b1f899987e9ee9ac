"""Boxes, dtypes, recipes, manifests and their encoding."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsync.errors import (
    DtypeMismatchError,
    FormatVersionError,
    ManifestError,
    RecipeError,
    WireError,
    WsyncError,
    error_from_wire,
)
from wsync.spec import (
    FORMAT_VERSION,
    ITEMSIZE,
    RECIPES,
    WHOLE,
    Box,
    RankInfo,
    SourceManifest,
    SourceRankManifest,
    TensorSpec,
    check_format,
    contiguous_strides,
    decode,
    digest_of,
    encode,
    get_recipe,
    itemsize,
    merge_source,
    recipe_parts,
    same_bytes,
    scale_grid,
)

BOXES = st.integers(0, 3).flatmap(
    lambda n: st.tuples(
        *[st.builds(Box, st.tuples(*[st.integers(0, 5)] * n), st.tuples(*[st.integers(0, 5)] * n)) for _ in range(2)]
    )
)


def cells(box: Box) -> set[tuple[int, ...]]:
    return {tuple(o + i for o, i in zip(box.offset, k, strict=True)) for k in np.ndindex(*box.shape)}


@given(BOXES)
def test_intersection_and_containment_are_those_of_sets(pair):
    a, b = pair
    common = a.intersect(b)
    assert cells(a) & cells(b) == (cells(common) if common else set())
    assert a.contains(b) == (cells(b) <= cells(a))
    assert a.num_elements == len(cells(a))
    assert a.shifted(b.offset).relative_to(Box(b.offset, b.shape)) == a


@given(st.lists(st.integers(1, 6), max_size=4))
def test_contiguous_strides_are_numpys(shape):
    expected = tuple(s // 4 for s in np.zeros(shape, np.float32).strides)
    got = contiguous_strides(tuple(shape))
    assert [g for g, n in zip(got, shape, strict=True) if n > 1] == [
        e for e, n in zip(expected, shape, strict=True) if n > 1
    ]


def test_unknown_names_list_the_known_ones():
    with pytest.raises(DtypeMismatchError, match=r"'float4'.*bfloat16"):
        itemsize("float4")
    with pytest.raises(RecipeError, match=r"'fp3'.*fp8_block128"):
        get_recipe("fp3")


def test_parts_carry_the_engines_names_and_the_grid_of_the_whole_tensor():
    weight, scale = recipe_parts("a.weight", (3, 200, 129), "float32", "fp8_block128")
    assert (weight.name, weight.dtype, weight.shape) == ("a.weight", "float8_e4m3fn", (3, 200, 129))
    assert (scale.name, scale.dtype, scale.shape) == ("a.weight_scale_inv", "float32", (3, 2, 2))
    assert scale.nbytes == 48
    assert scale_grid((128, 256), (128, 128)) == (1, 2)


@pytest.mark.parametrize(
    ("recipe", "shape", "expected"),
    [
        ("fp8_channel", (5, 7), {"": ("float8_e4m3fn", (5, 7)), "_scale": ("float32", (5, 1))}),
        ("fp8_channel", (2, 5, 7), {"": ("float8_e4m3fn", (2, 5, 7)), "_scale": ("float32", (2, 5, 1))}),
        ("fp8_tensor", (5, 7), {"": ("float8_e4m3fn", (5, 7)), "_scale": ("float32", ())}),
        ("fp8_tensor", (2, 3, 5, 7), {"": ("float8_e4m3fn", (2, 3, 5, 7)), "_scale": ("float32", (2, 3))}),
        ("mxfp8", (3, 5, 64), {"": ("float8_e4m3fn", (3, 5, 64)), "_scale": ("uint8", (3, 5, 2))}),
        (
            "nvfp4",
            (5, 48),
            {"": ("uint8", (5, 24)), "_scale": ("float8_e4m3fn", (5, 3)), "_scale_2": ("float32", (1,))},
        ),
        (
            "nvfp4",
            (2, 5, 48),
            {"": ("uint8", (2, 5, 24)), "_scale": ("float8_e4m3fn", (2, 5, 3)), "_scale_2": ("float32", (2, 1))},
        ),
    ],
)
def test_every_recipe_declares_the_parts_of_the_engines_checkpoints(recipe, shape, expected):
    parts = recipe_parts("a.weight", shape, "bfloat16", recipe)
    assert {p.name.removeprefix("a.weight"): (p.dtype, p.shape) for p in parts} == expected
    facts = get_recipe(recipe)
    assert [facts.suffix(p.role) for p in parts] == list(expected)


def test_a_block_of_whole_rows_or_of_the_whole_matrix_follows_the_shape():
    found = {(r, lv.role): lv.cell((4, 200, 96)) for r, facts in RECIPES.items() for lv in facts.levels}
    assert found == {
        ("fp8_block128", "scale"): (128, 128),
        ("fp8_block128_f32", "scale"): (128, 128),
        ("fp8_channel", "scale"): (1, 96),
        ("fp8_tensor", "scale"): (200, 96),
        ("mxfp8", "scale"): (1, 32),
        ("nvfp4", "scale"): (1, 16),
        ("nvfp4", "scale_2"): (200, 96),
    }
    assert [r for r, facts in RECIPES.items() if facts.needs_amax] == ["fp8_tensor", "nvfp4"]
    assert get_recipe("nvfp4").amax_block == (WHOLE, WHOLE)
    assert get_recipe("bf16").amax_block == get_recipe("bf16").block == (1, 1)
    with pytest.raises(RecipeError, match=r"'mxfp8'.*'scale_2'.*scale"):
        get_recipe("mxfp8").level("scale_2")


@pytest.mark.parametrize(
    ("dtype", "recipe", "shape"),
    [
        ("int64", "bf16", (4,)),
        ("bfloat16", "fp8_block128", (4,)),
        ("bfloat16", "fp8_tensor", (4,)),
        ("float64", "nvfp4", (4, 16)),
    ],
)
def test_a_recipe_refuses_what_it_cannot_encode(dtype, recipe, shape):
    with pytest.raises(RecipeError, match="'w'"):
        recipe_parts("w", shape, dtype, recipe)


@pytest.mark.parametrize(("recipe", "group", "shape"), [("mxfp8", 32, (4, 48)), ("nvfp4", 16, (2, 4, 24))])
def test_a_last_dimension_that_cuts_a_group_is_refused_with_both_values(recipe, group, shape):
    with pytest.raises(RecipeError, match=rf"multiple of {group}, but 'w' has shape {re.escape(str(shape))}"):
        recipe_parts("w", shape, "bfloat16", recipe)


ONE_TENSOR = (TensorSpec("w", (4,), "float32"),)


def rank_manifest(rank: int, world: int = 2, tensors=ONE_TENSOR) -> SourceRankManifest:
    return SourceRankManifest(rank, world, RankInfo("h", rank), tensors, ((Box((rank * 2,), (2,)),),) * len(tensors))


def test_merged_manifests_are_in_order_of_rank():
    merged = merge_source([rank_manifest(1), rank_manifest(0)])
    assert [r.pid for r in merged.ranks] == [0, 1]
    assert merged.shards[0] == ((Box((0,), (2,)),), (Box((2,), (2,)),))


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ([], "at least one rank, got 0"),
        ([rank_manifest(0)], r"ranks 0 to 1, got \[0\]"),
        ([rank_manifest(0), rank_manifest(0)], r"got \[0, 0\]"),
        ([rank_manifest(0), rank_manifest(1, tensors=(TensorSpec("w", (5,), "float32"),))], r"\(4,\).*\(5,\)"),
        ([rank_manifest(0), rank_manifest(1, tensors=())], "rank 0 has 1, rank 1 has 0"),
        ([rank_manifest(0), rank_manifest(1, world=3)], "world size 2, rank 1 says 3"),
    ],
)
def test_ranks_that_disagree_are_refused_with_both_values(ranks, says):
    with pytest.raises(ManifestError, match=says):
        merge_source(ranks)


def manifest_with(tensors, shards, rank=0, world=1) -> SourceRankManifest:
    return SourceRankManifest(rank, world, RankInfo("h"), tensors, shards)


def two_ranks(second_shards) -> list[SourceRankManifest]:
    good = ((Box((0,), (2,)),),)
    return [manifest_with(ONE_TENSOR, good, 0, 2), manifest_with(ONE_TENSOR, second_shards, 1, 2)]


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (two_ranks(()), "rank 1 lists 1 tensors, but shards of 0"),
        (two_ranks(((), ())), "rank 1 lists 1 tensors, but shards of 2"),
        (two_ranks(((Box((0, 0), (2, 1)),),)), r"'w' on trainer rank 1 has 2 dimensions.*shape is \(4,\)"),
        (two_ranks(((Box((0,), (2, 1)),),)), r"'w' on trainer rank 1 has 2 dimensions.*shape is \(4,\)"),
        (two_ranks(((Box((-1,), (2,)),),)), r"offset \(-1,\).*not inside the tensor's shape \(4,\)"),
        (two_ranks(((Box((1,), (-2,)),),)), r"shape \(-2,\)\) is not inside the tensor's shape \(4,\)"),
        (two_ranks(((Box((3,), (2,)),),)), r"offset \(3,\), shape \(2,\)\) is not inside the tensor's shape \(4,\)"),
        ([manifest_with(ONE_TENSOR, ((),), 0, 1 << 60)], f"world size {1 << 60} needs ranks"),
        ([manifest_with((TensorSpec("w", (1,) * 33, "bool"),), ((),))], "'w' has 33 dimensions, allowed are 32"),
        ([manifest_with((TensorSpec("w", (4, -1), "bool"),), ((),))], r"'w' has shape \(4, -1\)"),
        ([manifest_with((TensorSpec("w", (1 << 40, 1 << 23), "bool"),), ((),))], f"{1 << 63} bytes, allowed"),
        ([manifest_with((TensorSpec("w", (4,), "bool", kind="toy"),), ((),))], "kind 'toy', allowed are parameter"),
        ([manifest_with((TensorSpec("w", (4,), "complex64"),), ((),))], "complex64"),
    ],
)
def test_ranks_that_hold_what_cannot_be_are_refused_with_both_values(ranks, says):
    with pytest.raises(ManifestError, match=says):
        merge_source(ranks)


def test_text_that_is_not_utf8_is_refused_as_a_message_that_does_not_decode():
    data = encode(RankInfo("here"))
    bad = data.replace(b"here", b"\xff\xfe\xfd\xfc")
    assert bad != data
    with pytest.raises(WireError, match=f"{len(bad)} bytes do not decode as RankInfo.*(?i:utf-?8)"):
        decode(bad, RankInfo)


def test_only_8_bit_floats_may_lie_in_memory_of_bytes():
    pairs = {(a, b) for a in ITEMSIZE for b in ITEMSIZE if a != b and same_bytes(a, b)}
    floats = {d for d in ITEMSIZE if d.startswith("float8_")}
    assert pairs == {("uint8", f) for f in floats} | {(f, "uint8") for f in floats}
    assert all(same_bytes(d, d) for d in ITEMSIZE)


def test_encoding_is_strict():
    manifest = merge_source([rank_manifest(0), rank_manifest(1)])
    data = encode(manifest)
    assert decode(data, SourceManifest) == manifest
    assert digest_of(manifest) == digest_of(decode(data, SourceManifest))
    for bad in (data[:-1], b"", data + b"x", encode({"ranks": 1})):
        with pytest.raises(WireError, match=f"{len(bad)} bytes"):
            decode(bad, SourceManifest)
    with pytest.raises(WireError, match="over the limit of 8"):
        decode(data, SourceManifest, max_bytes=8)
    with pytest.raises(FormatVersionError, match=rf"version 9.*version {FORMAT_VERSION}"):
        check_format(9, "the file")


def test_errors_are_rebuilt_by_name_and_unknown_ones_keep_theirs():
    error = error_from_wire("RecipeError", "no", "try")
    assert isinstance(error, RecipeError)
    assert str(error) == "no\nhint: try"
    assert type(error_from_wire("FluxError", "no")) is WsyncError
    assert "FluxError" in str(error_from_wire("FluxError", "no"))
