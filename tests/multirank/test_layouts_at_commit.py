"""Engines whose kernels read scales swizzled or packed: the loader fills plain tensors, the commit lays them out."""

from __future__ import annotations

import pytest
import torch
from fused_engine import HIDDEN, KV, FusedEngine, Q
from test_fused_recipes import GROUPS, checkpoint, commit_all, make_weights, recipes

import wsync
from wsync.formats import quantize_reference, requantize_e8m0_reference
from wsync.plan.layouts import packed_exponents, row_major, swizzled_128x4


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """The 128 x 4 form of scale bytes ``[M, G]``, by torch's own reshaping."""
    rows, cols = (-(-n // unit) * unit for n, unit in zip(scales.shape, (128, 4), strict=True))
    padded = torch.zeros(rows, cols, dtype=torch.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    return padded.reshape(rows // 128, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def test_swizzled_scales_of_a_fused_matrix(key_file):
    weights = make_weights(8, torch.bfloat16)
    engine = FusedEngine("nvfp4", 0, 1)
    layout = swizzled_128x4((Q + 2 * KV, HIDDEN // 16))
    served = torch.full((layout.num_elements,), 0xEE, dtype=torch.uint8)
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        sink = wsync.Sink(
            engine,
            engine.load_weights,
            store=source.store,
            key_file=key_file,
            recipes=recipes("nvfp4"),
            layouts={"qkv_scale": (layout, served)},
        )
        for version in (1, 2):
            for name, fresh in make_weights(version, torch.bfloat16).items():
                weights[name].copy_(fresh)
            publication = source.publish(version, deadline_s=30)
            commit_all([sink], version)
            publication.wait_committed()
            twin = FusedEngine("nvfp4", 0, 1)
            twin.load_weights(checkpoint(weights, "nvfp4", GROUPS))
            assert torch.equal(served, swizzled(twin.qkv_scale.data))
        sink.close()


def test_requantised_scales_packed_as_exponents(key_file):
    """Block fp8 with DeepGEMM on Blackwell: codes and scales requantised, four exponents in an int32, column major."""
    shape = (300, 640)
    weights = {"w": torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()}
    parts = quantize_reference(weights["w"], "fp8_block128_f32")
    live = {"w": torch.zeros_like(parts["weight"]), "w_scale_inv": torch.zeros_like(parts["weight_scale_inv"])}
    layout = packed_exponents(tuple(live["w_scale_inv"].shape), shape[0])
    served = torch.full((layout.num_elements // 4,), -1, dtype=torch.int32)
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        sink = wsync.Sink(
            live,
            store=source.store,
            key_file=key_file,
            recipes={"w": "fp8_block128_f32"},
            transforms={"w": "requantise_e8m0"},
            layouts={"w_scale_inv": (layout, served)},
        )
        publication = source.publish(1, deadline_s=30)
        commit_all([sink], 1)
        publication.wait_committed()
        sink.close()
    codes, scales = requantize_e8m0_reference(parts["weight"], parts["weight_scale_inv"])
    assert torch.equal(live["w"].view(torch.uint8), codes.view(torch.uint8))
    exponents = (scales.view(torch.int32) >> 23).repeat_interleave(128, 0)[: shape[0]]
    packed = served.view(torch.uint8).reshape(2, 300, 4).permute(1, 0, 2).reshape(300, 8)
    assert torch.equal(packed[:, :5].to(torch.int32), exponents)
    assert not packed[:, 5:].any()


def test_scales_that_are_no_powers_of_two_are_not_packed_as_exponents(key_file):
    weights = {"w": torch.randn(256, 512, generator=torch.Generator().manual_seed(2)).bfloat16()}
    live = {"w": torch.zeros(256, 512, dtype=torch.float8_e4m3fn), "w_scale_inv": torch.zeros(2, 4)}
    served = torch.zeros(1024, dtype=torch.uint8)
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        layouts = {"w_scale_inv": (packed_exponents((2, 4), 256), served)}
        recipes = {"w": "fp8_block128_f32"}
        with wsync.Sink(live, store=source.store, key_file=key_file, recipes=recipes, layouts=layouts) as sink:
            source.publish(1, deadline_s=10)
            with pytest.raises(wsync.CommitError, match="scales of 'w_scale_inv' are no powers of two"):
                sink.commit(sink.prepare(10))
    assert not served.any()


def test_layouts_that_do_not_fit_are_named(key_file):
    weights = {"w": torch.ones(256, 128, dtype=torch.bfloat16), "ids": torch.ones(3, 5, dtype=torch.int64)}
    live = {name: torch.zeros_like(w) for name, w in weights.items()}
    room = torch.zeros(1 << 16, dtype=torch.uint8)
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        for layouts, says in [
            ({"v": (swizzled_128x4((256, 128)), room)}, "'v', none of the 2 tensors that the loader fills"),
            ({"w": (swizzled_128x4((128, 128)), room)}, r"one of \(128, 128\), but the loader fills \(256, 128\)"),
            ({"w": (swizzled_128x4((256, 128)), room[100:])}, "takes 65536 bytes of CPU memory, .* has 65436"),
            ({"w": (packed_exponents((256, 128), 32768), room)}, "those of float32, but 'w' is bfloat16"),
            ({"w": (swizzled_128x4((256, 128)), live["w"])}, "writes the memory of 'w', which the loader fills"),
            ({"ids": (row_major((3, 5), num_cols=8), room)}, "pads elements of 8 bytes, at most 4 can be filled"),
        ]:
            with pytest.raises(wsync.ConfigError, match=says):
                wsync.Sink(live, store=source.store, key_file=key_file, layouts=layouts)
