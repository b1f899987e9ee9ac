"""Scale groups that follow from where an engine's loader puts weights."""

import pytest
import torch

from wsync.adapters.engines.grouping import fused_groups, given_groups
from wsync.adapters.engines.live import LiveMemory
from wsync.errors import ConfigError
from wsync.spec import Box, CopySpec, RankInfo, SinkRankManifest, StorageSpec

SHAPES = {0: (16, 8), 1: (4, 16, 8), 2: (512,)}


def matrix_at(storage, element):
    return f"s{storage}", (element // 128,) if len(SHAPES[storage]) > 2 else ()


def groups(*copies: tuple[str, int, tuple[int, ...], int], recipes=None):
    """Of copies (name, storage, shape of the box, first element), row major in storages of `SHAPES`."""
    names = dict.fromkeys((c[0] for c in copies), "fp8_tensor") | (recipes or {})
    specs = tuple(
        CopySpec(name, "weight", Box.whole(shape), storage, first, (128, 8, 1)[-len(shape) :])
        for name, storage, shape, first in copies
    )
    storages = tuple(StorageSpec(f"s{i}", "float8_e4m3fn", 512) for i in SHAPES)
    return fused_groups(SinkRankManifest("e", 0, 1, RankInfo("h"), names, storages, specs), matrix_at)


def test_tensors_of_one_matrix_are_a_group_and_others_are_not():
    q, k, o = ("q", 0, (8, 8), 0), ("k", 0, (8, 8), 64), ("o", 2, (8, 8), 0)
    assert groups(q, k, o) == (("q", "k"),)
    assert groups(q, k, recipes={"q": "fp8_channel", "k": "fp8_channel"}) == ()
    assert groups(q, k, recipes={"q": "nvfp4"}) == ()


def test_experts_of_a_stack_are_groups_of_their_own():
    experts = [(f"{w}.{e}", 1, (8, 8), 128 * e + 64 * i) for e in range(2) for i, w in enumerate(("w1", "w3"))]
    assert groups(*experts) == (("w1.0", "w3.0"), ("w1.1", "w3.1"))
    stacked = [("gate", 1, (4, 8, 8), 0), ("up", 1, (4, 8, 8), 64)]
    assert groups(*stacked) == (("gate", "up"),)
    assert groups(*stacked, ("w.0", 1, (8, 8), 64)) == (("gate", "up"),)


def test_matrices_of_live_memory_are_told_apart_whatever_their_strides():
    stack = torch.zeros(3, 8, 16).transpose(1, 2)  # experts stored by column
    live = LiveMemory({"experts": stack})
    assert [live.matrix_at(live.storages[0], 128 * e + i)[1] for e in range(3) for i in (0, 127)] == [
        (0,), (0,), (1,), (1,), (2,), (2,)
    ]  # fmt: skip
    flat = torch.zeros(96)
    views = LiveMemory({"flat": flat, "a": flat[:32].view(4, 8), "b": flat[32:].view(8, 8)})
    found = [views.matrix_at(views.storages[0], i)[0] for i in (0, 31, 32, 95)]
    assert found == ["a", "a", "b", "b"]


def test_given_groups_are_lists_of_names():
    assert given_groups([["a", "b"], ("c",)]) == (("a", "b"), ("c",))
    for wrong in ("ab", [["a", 1]]):
        with pytest.raises(ConfigError, match="is a list of groups of checkpoint names"):
            given_groups(wrong)
