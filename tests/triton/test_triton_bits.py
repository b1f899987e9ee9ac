"""The Triton kernels in Triton's interpreter: bit for bit the CPU kernels and the reference arithmetic."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from wsync import kernels
from wsync.errors import ConfigError, NonFiniteError
from wsync.formats import digest_bytes, quantize_reference
from wsync.plan import descriptors as d

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported to compile: run this folder in a process of its own", allow_module_level=True)

with pytest.MonkeyPatch.context() as patch:  # triton's first import decides; no other test may inherit it
    patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton.language")
    from wsync.kernels import triton as tk
    from wsync.kernels.triton import codec, quantise_kernels

RECIPES = ("bf16", "fp8_block128", "fp8_block128_f32", "fp8_channel", "fp8_tensor", "mxfp8", "nvfp4")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def weights(shape, dtype=torch.bfloat16, seed=0):
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.02)
    values.view(-1)[3:9] = torch.tensor([-0.0, 0.0, 1e-6, -1e-7, 0.25, -3.0])
    return values.to(dtype)


def pack_record(box, op, **fields):
    record = np.zeros(1, d.PACK_DESC)
    fill = d.NUM_DIMS - box.dim()
    record["src"], record["extent"] = box.data_ptr(), (1,) * fill + tuple(box.shape)
    record["src_stride"] = (0,) * fill + box.stride()
    known = {torch.bfloat16: d.SRC_BF16, torch.float16: d.SRC_F16, torch.float32: d.SRC_F32}
    record["op"], record["src_dtype"] = op, known.get(box.dtype, d.SRC_BYTES)
    record["elem_bytes"], record["wire_word"] = box.element_size(), 17
    for name, value in fields.items():
        record[name] = value
    return record


def bucket(nbytes):
    space = np.zeros(nbytes + 256, np.uint8)
    start = -space.ctypes.data % 256
    return space[start : start + nbytes]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_equals_the_reference_for_dtypes_batches_edges_and_strides(recipe):
    for dtype in DTYPES:
        for shape in ((256, 256), (130, 160), (2, 5, 96)):
            weight = weights(shape, dtype)
            for view in (
                weight,
                weight[..., :96:1][..., 1:, 32:],
                weight.transpose(-1, -2)[..., :, : shape[-2] // 32 * 32],
            ):
                if view.numel() == 0:
                    continue
                got, want = tk.quantize_triton(view, recipe), quantize_reference(view, recipe)
                assert got.keys() == want.keys()
                for name in want:
                    assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape)
                    assert torch.equal(raw(got[name]), raw(want[name])), (recipe, dtype, shape, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_finite_bf16_and_extreme_scales_equal_the_reference(recipe):
    bits = np.arange(0x10000, dtype=np.uint32)
    bits = np.where((bits & 0x7FFF) < 0x7F80, bits, 0x0080).astype(np.uint16)
    everything = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).view(512, 128)
    normal = everything[(everything.float().abs().amax(1) < 1e3)]
    for weight in (everything, normal[: len(normal) // 2 * 2], weights((128, 128)) * 1e-30, weights((128, 128)) * 1e30):
        got, want = tk.quantize_triton(weight, recipe), quantize_reference(weight, recipe)
        assert all(torch.equal(raw(got[name]), raw(want[name])) for name in want)


OPS = (d.OP_FP8_BLOCK128, d.OP_FP8_SCALED, d.OP_FP8_CHANNEL_SCALED, d.OP_FP8_CHANNEL, d.OP_MXFP8, d.OP_NVFP4)


@pytest.mark.parametrize("op", OPS)
def test_packing_many_boxes_in_one_call_equals_the_cpu(op):
    sources = [weights((200, 320), torch.float32), weights((128, 256)), weights((70, 96)).t(), weights((3, 64))[:, ::2]]
    amax = torch.tensor([2.5])
    outs = []
    for pack in (lambda r, b: kernels.pack(r, b, 1), tk.pack):
        tables, records, offset = [], [], 0
        for i, source in enumerate(sources):
            cols = source.shape[1] // 32 * 32
            box = source[:, :cols]
            phased = op in (d.OP_FP8_BLOCK128, d.OP_FP8_SCALED) and i % 2 == 0
            tables.append(torch.full((source.shape[0], 32), 0.3))
            grouped = op in (d.OP_MXFP8, d.OP_NVFP4)
            fields = {"scales": tables[-1].data_ptr(), "scale_stride": 128 if grouped else 32, "amax": amax.data_ptr()}
            phase = (40, 16 + 8 * i) if phased else (0, 0)
            records.append(pack_record(box, op, dst_offset=offset, piece_idx=i, row_phase=phase[0],
                                       col_phase=phase[1], **fields))  # fmt: skip
            offset += -(-box.numel() // 256) * 256
        out = bucket(offset)
        result = pack(np.concatenate(records), out.ctypes.data)
        assert result.bad is None
        outs.append((result.digest, out.tobytes(), [raw(t).numpy().tobytes() for t in tables]))
    assert outs[0] == outs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.uint8, torch.float64])
def test_copies_and_roundings_equal_the_cpu(dtype):
    space = (torch.randn(6, 10, 40, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    boxes = [space, space[1:3, 2:7, 8:24], space.permute(2, 0, 1), space[0, :, 3:10], space[:, 1]]
    if dtype in (torch.bfloat16, torch.float32, torch.float16):
        cases = [(box, op) for box in boxes for op in (d.OP_COPY, d.OP_BF16)]
    else:
        cases = [(box, d.OP_COPY) for box in boxes]
    exact = {torch.float32: d.SRC_F32_EXACT, torch.float64: d.SRC_F64}
    for box, op in cases:
        fields = {"src_dtype": exact[dtype]} if op == d.OP_COPY and dtype in exact else {}
        record = pack_record(box, op, **fields)
        mine, theirs = bucket(box.numel() * 8), bucket(box.numel() * 8)
        assert tk.pack(record, mine.ctypes.data) == kernels.pack(record, theirs.ctypes.data, 1)
        assert np.array_equal(mine, theirs)


def test_unpacking_copies_fills_and_exponents_equals_the_cpu():
    src = bucket(1 << 14)
    src[:] = np.random.default_rng(2).integers(0, 256, len(src))
    src[8192:12288].view(np.float32)[:] = 2.0 ** np.random.default_rng(3).integers(-20, 20, 1024)
    spaces = [torch.zeros(64, 96, dtype=torch.uint8) for _ in range(2)]
    got = []
    for unpack, installed, space in ((kernels.unpack, kernels.installed_digest, spaces[0]),
                                     (tk.unpack, tk.installed_digest, spaces[1])):  # fmt: skip
        records = np.zeros(5, d.UNPACK_DESC)
        records["extent"], records["elem_bytes"] = 1, 1
        views = (space[:16, :64], space[16:32, 1:30], space[32:40, :13], space[40:48, :24], space[48:].t())
        for record, view in zip(records, views, strict=True):
            record["dst"], record["extent"][2:], record["dst_stride"][2:] = view.data_ptr(), view.shape, view.stride()
            record["src_stride"][2:], record["wire_word"] = (view.shape[1], 1), 5
        records["op"][2:4] = d.UNPACK_FILL, d.UNPACK_EXPONENT
        records["fill"][2] = 0xAB
        records["src_offset"] = 0, 2048, 0, 8192, 4096
        records["src_stride"][3, 2:] = 0, 3
        records["wire_word"][4] = (1 << 64) - 1
        got.append((unpack(records, src.ctypes.data), installed(records), space.numpy().tobytes()))
        assert got[-1][0] == got[-1][1]
    assert got[0] == got[1]


def test_amaxes_and_scales_equal_the_cpu():
    for op, dtype in ((d.OP_FP8_BLOCK128, torch.float32), (d.OP_FP8_BLOCK128_F32, torch.bfloat16),
                      (d.OP_FP8_CHANNEL, torch.float16), (d.OP_NVFP4, torch.float32)):  # fmt: skip
        box = weights((150, 272), dtype)
        results = []
        for module in (kernels, tk):
            cells, scales = torch.zeros(160, 4), torch.zeros(160, 4)
            record = np.zeros(1, d.AMAX_DESC)
            record["src"], record["src_stride"], record["extent"] = box.data_ptr(), box.stride(), tuple(box.shape)
            record["amax"], record["scales"] = cells.data_ptr(), scales.data_ptr()
            record["amax_stride"] = record["scale_stride"] = 4
            known = {torch.bfloat16: d.SRC_BF16, torch.float16: d.SRC_F16, torch.float32: d.SRC_F32}
            record["src_dtype"], record["recipe_op"] = known[dtype], op
            if op in (d.OP_FP8_BLOCK128, d.OP_FP8_BLOCK128_F32):
                record["row_phase"], record["col_phase"] = 9, 16
            assert module.amax(record) is None
            module.scales_from_amax(record)
            results.append((raw(cells).numpy().tobytes(), raw(scales).numpy().tobytes()))
        assert results[0] == results[1]


def test_digests_equal_the_definition_at_any_address_and_length():
    data = bucket(70000)
    data[:] = np.random.default_rng(4).integers(0, 256, len(data))
    for start, nbytes in ((0, 70000), (0, 8), (16, 4099), (3, 5000), (0, 0)):
        view = data[start : start + nbytes]
        assert tk.digest(view.ctypes.data, nbytes, 1 << 63) == digest_bytes(view, 1 << 63)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_first_non_finite_element_is_named(recipe, value):
    weight = weights((2, 130, 64))
    weight[1, 3, 5] = weight[1, 129, 0] = value
    with pytest.raises(NonFiniteError, match=r"element \(1, 3, 5\)"):
        tk.quantize_triton(weight, recipe)


def test_malformed_descriptors_and_other_devices_are_refused():
    box = weights((4, 64))
    for field, value in (
        ("op", 12),
        ("src_dtype", 9),
        ("elem_bytes", 3),
        ("src", 0),
        ("scales", 0),
        ("row_phase", 128),
    ):
        record = pack_record(box, d.OP_FP8_BLOCK128, scales=1, scale_stride=1)
        record[field] = value
        with pytest.raises(ConfigError, match=field):
            tk.pack(record, 256)
    for field, value in (("dst", 4097), ("src_offset", 6), ("elem_bytes", 3), ("op", 3)):
        record = np.zeros(1, d.UNPACK_DESC)
        record["dst"], record["extent"], record["elem_bytes"] = 4096, 1, 4
        record[field] = value
        with pytest.raises(ConfigError, match=field):
            tk.unpack(record, 4096)
    for field, value in (("src", 4098), ("amax", 4097), ("scales", 4098), ("recipe_op", 8)):
        record = np.zeros(1, d.AMAX_DESC)
        record["src"], record["amax"], record["scales"], record["extent"] = 4096, 4096, 4096, 1
        record["src_dtype"], record["recipe_op"] = d.SRC_F32, d.OP_FP8_TENSOR
        record[field] = value
        with pytest.raises(ConfigError, match=field):
            tk.scales_from_amax(record)
    copies = pack_record(box, d.OP_COPY, dst_offset=3)
    with pytest.raises(ConfigError, match="dst_offset"):
        tk.pack(copies, 256)
    copies["dst_offset"] = 0
    for base, says in ((0, "dst_base is null"), (264, "dst_base is 264")):
        with pytest.raises(ConfigError, match=says):
            tk.pack(copies, base)
    with pytest.raises(ConfigError, match="meta"):
        tk.quantize_triton(torch.empty(4, 64, device="meta"), "bf16")


def test_a_wrong_rounding_constant_is_noticed(monkeypatch):
    right = codec.e4m3_pair

    def truncating(even, odd, ARCH):
        pair = right(even * 0.9999999, odd * 0.9999999, ARCH)
        return pair

    monkeypatch.setattr(quantise_kernels, "e4m3_pair", truncating)
    weight = weights((128, 128), seed=5)
    got, want = tk.quantize_triton(weight, "fp8_block128"), quantize_reference(weight, "fp8_block128")
    assert not torch.equal(raw(got["weight"]), raw(want["weight"]))


def test_importing_wsync_does_not_import_triton():
    import subprocess

    code = "import sys, wsync, wsync.kernels; sys.exit('wsync.kernels.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
