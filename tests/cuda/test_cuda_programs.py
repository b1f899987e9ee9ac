"""Descriptors become records, units and launches on the host, where the CUDA kernels' refusals are made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsync.errors import ConfigError, WsyncError
from wsync.native import load_extension
from wsync.plan.descriptors import (
    AMAX_DESC,
    OP_BF16,
    OP_COPY,
    OP_FP8_BLOCK128,
    OP_FP8_CHANNEL,
    OP_FP8_TENSOR,
    OP_MXFP8,
    OP_NVFP4,
    PACK_DESC,
    SRC_BF16,
    SRC_F32,
    TRANSFORM_DESC,
    TRANSFORM_REQUANT_E8M0,
    UNPACK_DESC,
    UNPACK_EXPONENT,
    UNPACK_FILL,
)

_C = load_extension()

BLOCK, CHANNEL, TENSOR, MX, NV = 0, 4, 8, 16, 20
CELLS, WORDS, COPY, FILL, DIGEST, ROUND, UNPACK_WORDS = 24, 25, 26, 27, 28, 29, 31
UNIT_DTYPE = np.dtype([("record", "<u4"), ("x", "<u4"), ("y", "<u4"), ("n", "<u4")])


def pack_desc(op=OP_FP8_BLOCK128, rows=256, cols=384, src=1 << 20, stride=None, src_dtype=SRC_BF16, elem_bytes=2):
    desc = np.zeros(1, PACK_DESC)
    desc["src"] = src
    desc["src_stride"] = (0, 0, cols, 1) if stride is None else stride
    desc["extent"] = (1, 1, rows, cols)
    desc["scales"] = 1 << 30
    desc["scale_stride"] = -(-cols // 128)
    desc["amax"] = 1 << 29
    desc["op"], desc["src_dtype"], desc["elem_bytes"] = op, src_dtype, elem_bytes
    return desc


def kernels_of(program):
    return [launch[0] for launch in program.launches]


def units_of(program, position=0):
    _, num_units, _, units = program.launches[position]
    return program.bytes[units : units + 16 * num_units].view(UNIT_DTYPE)


@pytest.mark.parametrize(
    ("op", "kernel"),
    [(OP_FP8_BLOCK128, BLOCK), (OP_FP8_CHANNEL, CHANNEL), (OP_FP8_TENSOR, TENSOR), (OP_MXFP8, MX), (OP_NVFP4, NV)],
)
def test_aligned_matrices_take_one_launch_of_vectors(op, kernel):
    assert kernels_of(_C.cuda_pack(pack_desc(op))) == [kernel]
    assert kernels_of(_C.cuda_pack(pack_desc(op, src_dtype=SRC_F32, elem_bytes=4))) == [kernel + 1]


@pytest.mark.parametrize("op", [OP_FP8_BLOCK128, OP_FP8_CHANNEL, OP_MXFP8, OP_NVFP4])
@pytest.mark.parametrize("odd", [{"src": (1 << 20) + 2}, {"stride": (0, 0, 390, 1)}, {"stride": (0, 0, 1, 256)}])
def test_odd_matrices_take_the_scales_first_and_then_words(op, odd):
    assert kernels_of(_C.cuda_pack(pack_desc(op, **odd))) == [CELLS, WORDS]


def test_scales_from_a_table_need_no_launch_of_their_own():
    assert kernels_of(_C.cuda_pack(pack_desc(OP_FP8_TENSOR, src=(1 << 20) + 2))) == [WORDS]


def test_many_small_tensors_are_one_launch_and_every_block_is_a_unit():
    descs = np.concatenate([pack_desc(rows=rows, cols=cols) for rows, cols in [(256, 384), (100, 16), (129, 128)]])
    program = _C.cuda_pack(descs)
    assert kernels_of(program) == [BLOCK]
    blocks = [(int(u["record"]), int(u["y"]), int(u["x"])) for u in units_of(program)]
    assert blocks == [(0, y, x) for y in range(2) for x in range(3)] + [(1, 0, 0), (2, 0, 0), (2, 1, 0)]


def test_blocks_follow_the_grid_of_the_tensor_and_not_of_the_box():
    desc = pack_desc(rows=128, cols=128)
    desc["row_phase"], desc["col_phase"] = 8, 16
    assert len(units_of(_C.cuda_pack(desc))) == 4
    desc["col_phase"] = 8
    assert kernels_of(_C.cuda_pack(desc)) == [CELLS, WORDS]


@pytest.mark.parametrize(
    ("cols", "rows_of_a_unit"), [(512, 8), (2048, 8), (4096, 4), (8192, 2), (16384, 1), (65536, 1)]
)
def test_longer_rows_have_more_warps(cols, rows_of_a_unit):
    units = units_of(_C.cuda_pack(pack_desc(OP_FP8_CHANNEL, rows=16, cols=cols)))
    assert list(units["n"]) == [rows_of_a_unit] * (16 // rows_of_a_unit)


def test_rows_that_a_window_would_count_beyond_31_bits_take_no_window():
    longest = 2**31 - 1 - 8 * 2048
    for cols, kernels in (((longest // 16) * 16, [CHANNEL]), ((longest // 16 + 1) * 16, [CELLS, WORDS])):
        assert kernels_of(_C.cuda_pack(pack_desc(OP_FP8_CHANNEL, rows=1, cols=cols))) == kernels


def test_units_cover_every_vector_once():
    units = units_of(_C.cuda_pack(pack_desc(OP_MXFP8, rows=1000, cols=1024)))
    ends = units["x"].astype(np.int64) + units["n"]
    assert list(units["x"]) == [0, *ends[:-1]]
    assert ends[-1] == 1000 * 1024 // 16
    assert (units["x"] % 64 == 0).all()


def test_copies_merge_dimensions_and_round_only_what_must_be():
    contiguous = pack_desc(OP_COPY)
    contiguous["extent"], contiguous["src_stride"] = (2, 3, 4, 40), (480, 160, 40, 1)
    assert kernels_of(_C.cuda_pack(contiguous)) == [COPY]
    assert kernels_of(_C.cuda_pack(pack_desc(OP_BF16))) == [COPY]
    assert kernels_of(_C.cuda_pack(pack_desc(OP_BF16, src_dtype=SRC_F32, elem_bytes=4))) == [ROUND]
    strided = pack_desc(OP_COPY, stride=(0, 0, 1, 256))
    assert kernels_of(_C.cuda_pack(strided)) == [WORDS]


def unpack_desc(rows=64, cols=64, op=0, elem_bytes=2):
    desc = np.zeros(1, UNPACK_DESC)
    desc["dst"] = 1 << 20
    desc["extent"] = (1, 1, rows, cols)
    desc["dst_stride"] = (0, 0, cols + 8, 1)
    desc["src_stride"] = (0, 0, cols, 1)
    desc["op"], desc["elem_bytes"] = op, elem_bytes
    return desc


def test_unpacking_chooses_a_kernel_by_operation_and_strides():
    assert kernels_of(_C.cuda_unpack(unpack_desc())) == [COPY]
    assert kernels_of(_C.cuda_unpack(unpack_desc(op=UNPACK_FILL))) == [FILL]
    assert kernels_of(_C.cuda_unpack(unpack_desc(op=UNPACK_EXPONENT, elem_bytes=1))) == [UNPACK_WORDS]
    broadcast = unpack_desc()
    broadcast["src_stride"] = (0, 0, 1, 0)
    assert kernels_of(_C.cuda_unpack(broadcast)) == [UNPACK_WORDS]
    rows = unpack_desc()
    rows["src_stride"] = (0, 0, 0, 1)
    assert kernels_of(_C.cuda_unpack(rows)) == [COPY]


def test_digests_leave_out_what_is_not_counted():
    descs = np.concatenate([unpack_desc(), unpack_desc()])
    descs["wire_word"][1] = 2**64 - 1
    program = _C.cuda_installed_digest(descs)
    assert kernels_of(program) == [DIGEST]
    assert list(units_of(program)["record"]) == [0]


def test_a_digest_takes_its_last_bytes_by_themselves():
    assert kernels_of(_C.cuda_digest(1 << 20, 1003, 5)) == [DIGEST, UNPACK_WORDS]
    assert kernels_of(_C.cuda_digest((1 << 20) + 4, 1003, 5)) == [UNPACK_WORDS]


def test_amaxes_and_transforms_have_a_unit_for_each_rectangle():
    desc = np.zeros(1, AMAX_DESC)
    desc["src"], desc["amax"], desc["scales"] = 1 << 20, 1 << 21, 1 << 22
    desc["src_stride"], desc["extent"] = (512, 1), (300, 512)
    desc["src_dtype"], desc["recipe_op"] = SRC_BF16, OP_FP8_BLOCK128
    assert len(units_of(_C.cuda_amax(desc))) == 12
    assert units_of(_C.cuda_scales_from_amax(desc))["n"].sum() == 12
    desc["recipe_op"] = OP_FP8_CHANNEL
    assert len(units_of(_C.cuda_amax(desc))) == 300
    assert units_of(_C.cuda_scales_from_amax(desc))["n"].sum() == 300
    requant = np.zeros(1, TRANSFORM_DESC)
    requant["codes"] = requant["dst"] = 1 << 20
    requant["scales"] = requant["dst_scales"] = 1 << 21
    requant["code_stride"], requant["dst_stride"], requant["extent"] = 512, (512, 1), (300, 512)
    requant["recipe_op"], requant["op"] = OP_FP8_BLOCK128, TRANSFORM_REQUANT_E8M0
    assert len(units_of(_C.cuda_transform(requant))) == 12


@pytest.mark.parametrize(
    ("compiler", "desc", "message"),
    [
        (_C.cuda_pack, pack_desc(src=(1 << 20) + 1), r"PACK_DESC\[0\] cannot run on a GPU: src is at 1048577"),
        (_C.cuda_pack, pack_desc(rows=1 << 20, cols=1 << 12), r"has 4294967296 elements, more than 2147483647"),
        (_C.cuda_pack, pack_desc(op=99), r"op 99 is unknown"),
        (_C.cuda_pack, np.zeros(2, PACK_DESC)[::2].view(np.uint8), r"takes a contiguous vector"),
    ],
)
def test_what_a_gpu_cannot_take_is_refused_on_the_host(compiler, desc, message):
    with pytest.raises(ConfigError, match=message):
        compiler(desc)


def test_empty_boxes_and_no_descriptors_launch_nothing():
    assert _C.cuda_pack(np.zeros(0, PACK_DESC)).launches == []
    assert _C.cuda_pack(pack_desc(rows=0)).launches == []


def test_a_bucket_or_bytes_at_null_are_refused_before_anything_is_started():
    for program in (_C.cuda_pack(pack_desc()), _C.cuda_unpack(unpack_desc())):
        with pytest.raises(ConfigError, match="the base of the bucket is null"):
            program.run(16, 0, 16, 0)
    with pytest.raises(ConfigError, match="address is null"):
        _C.cuda_digest(0, 8, 0)
    assert _C.cuda_digest(0, 0, 0).launches == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_a_gpu_is_an_error_that_says_so():
    program = _C.cuda_pack(pack_desc())
    with pytest.raises(ConfigError, match="not a multiple of 16"):
        program.run(8, 0, 16, 0)
    for ready in (program, _C.cuda_unpack(unpack_desc(op=UNPACK_FILL))):  # a fill needs no bucket
        with pytest.raises(WsyncError, match=r"failed on the GPU|cannot be opened|has no CUDA library"):
            ready.run(16, 0 if ready is not program else 16, 16, 0)
