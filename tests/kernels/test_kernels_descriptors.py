"""The byte layout that Python and C++ share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import wsync._C as _C
from kernel_boxes import bucket, pack_desc, unpack_desc

from wsync import kernels
from wsync.errors import ConfigError
from wsync.plan import descriptors
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
    SRC_BYTES,
    SRC_F32,
    SRC_F64,
)


@pytest.mark.parametrize("name", ["PACK_DESC", "AMAX_DESC", "UNPACK_DESC", "TRANSFORM_DESC"])
def test_descriptors_have_the_same_bytes_in_python_and_cpp(name):
    dtype = getattr(descriptors, name)
    size, fields = _C.descriptor_layout()[name]
    assert size == dtype.itemsize
    assert list(fields) == [(field, dtype.fields[field][1], dtype.fields[field][0].itemsize) for field in dtype.names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": 10}, "op 10"),
        ({"elem_bytes": 3}, "elem_bytes is 3"),
        ({"extent": (1, 1, -2, 4)}, "extent -2"),
        ({"src": 0}, "src is null"),
        ({"op": OP_BF16, "src_dtype": SRC_BYTES}, "src_dtype 0"),
        ({"op": OP_BF16, "src_dtype": SRC_F32}, "elem_bytes is 2, but src_dtype 2 has 4"),
        ({"src_dtype": SRC_F32, "elem_bytes": 4}, "src_dtype 2 cannot be copied"),
        ({"src_dtype": SRC_F64}, "elem_bytes is 2, but src_dtype 5 has 8"),
        ({"src_dtype": 6}, "src_dtype 6 cannot be copied"),
        ({"op": OP_BF16, "src_dtype": SRC_F64, "elem_bytes": 8}, "src_dtype 5 is not one of"),
        ({"op": OP_FP8_BLOCK128}, "scales is null"),
        ({"op": OP_FP8_BLOCK128, "scales": 64, "row_phase": 128}, "phase 128"),
        ({"op": OP_FP8_BLOCK128, "scales": 64, "extent": (2, 1, 2, 4)}, "more than two dimensions"),
        ({"op": OP_FP8_CHANNEL}, "scales is null"),
        ({"op": OP_FP8_TENSOR}, "amax is null"),
        ({"op": OP_NVFP4, "scales": 64, "extent": (1, 1, 2, 16)}, "amax is null"),
        ({"op": OP_NVFP4, "scales": 64, "amax": 64}, "columns is 4, not a multiple of 16"),
        ({"op": OP_MXFP8, "scales": 64, "extent": (1, 1, 2, 48)}, "columns is 48, not a multiple of 32"),
        ({"op": OP_MXFP8, "scales": 64, "extent": (1, 1, 2, 32), "col_phase": 16}, "col_phase is 16"),
    ],
)
def test_a_malformed_descriptor_is_refused_by_name_and_writes_nothing(change, message):
    box = torch.ones(2, 4, dtype=torch.bfloat16)
    descs = np.concatenate([pack_desc(box, OP_COPY), pack_desc(box, OP_COPY, dst_offset=64)])
    for field, value in change.items():
        descs[1][field] = value
    out = bucket(256, fill=7)
    with pytest.raises(ConfigError, match=r"PACK_DESC\[1\]") as caught:
        kernels.pack(descs, out.ctypes.data)
    assert message in str(caught.value)
    assert (out == 7).all()


def test_the_amax_of_a_recipe_without_one_is_refused():
    desc = np.zeros(1, AMAX_DESC)
    desc["src_dtype"], desc["recipe_op"] = SRC_F32, OP_MXFP8
    with pytest.raises(ConfigError, match=r"AMAX_DESC\[0\]: recipe_op 8 is not OP_FP8_BLOCK128"):
        kernels.amax(desc)


def test_descriptors_of_another_dtype_are_refused():
    with pytest.raises(ConfigError, match="PACK_DESC"):
        kernels.pack(np.zeros(1, AMAX_DESC), 64)
    with pytest.raises(ConfigError, match="contiguous"):
        kernels.pack(np.zeros(4, PACK_DESC)[::2], 64)


def test_a_null_bucket_and_an_unknown_instruction_set_are_refused():
    descs = pack_desc(torch.ones(4, dtype=torch.bfloat16), OP_COPY)
    with pytest.raises(ConfigError, match="dst_base is null"):
        kernels.pack(descs, 0)
    with pytest.raises(ConfigError, match="'sse9' is unknown"):
        kernels.pack(descs, bucket(64).ctypes.data, isa="sse9")


def test_the_environment_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("WSYNC_ISA", "scalar")
    assert kernels.best_isa() == "scalar"
    assert "scalar" in kernels.isas()
    if "avx512" not in kernels.isas():
        with pytest.raises(ConfigError, match="'avx512' was asked for"):
            kernels.digest(64, 0, 0, isa="avx512")
    monkeypatch.setenv("WSYNC_ISA", "abacus")
    with pytest.raises(ConfigError, match="abacus"):
        kernels.digest(0, 0, 0)


def test_empty_boxes_and_empty_lists_do_nothing():
    empty = torch.empty(0, 5, dtype=torch.bfloat16)
    out = bucket(64, fill=3)
    assert kernels.pack(pack_desc(empty, OP_BF16), out.ctypes.data) == (0, None)
    assert kernels.pack(np.zeros(0, PACK_DESC), out.ctypes.data) == (0, None)
    assert kernels.unpack(unpack_desc(empty), out.ctypes.data) == 0
    assert kernels.digest(out.ctypes.data, 0, 5) == 0
    assert (out == 3).all()


def test_the_cuda_probe_says_why_there_is_no_device():
    probe = _C.cuda_probe()
    assert probe["available"] is bool(probe["devices"])
    assert probe["available"] or probe["reason"]
    missing = _C.cuda_probe("/nonexistent/libcudart.so")
    assert not missing["available"]
    assert "/nonexistent/libcudart.so" in missing["reason"]


def test_extents_whose_product_overflows_are_refused():
    descs = pack_desc(torch.ones(2, 4, dtype=torch.bfloat16), OP_COPY)
    descs["extent"] = (1, 1, 1 << 32, 1 << 32)
    with pytest.raises(ConfigError, match=r"PACK_DESC\[0\]: its extents hold more than 1152921504606846976 elements"):
        kernels.pack(descs, bucket(64).ctypes.data)
    cells = np.zeros(1, AMAX_DESC)
    cells["src"], cells["amax"], cells["extent"] = 64, 64, (1 << 32, 1 << 32)
    cells["src_dtype"], cells["recipe_op"] = SRC_F32, descriptors.OP_FP8_TENSOR
    with pytest.raises(ConfigError, match=r"AMAX_DESC\[0\]: its extents hold more"):
        kernels.scales_from_amax(cells)
