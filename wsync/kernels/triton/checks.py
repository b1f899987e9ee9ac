"""Refusing malformed descriptors before anything is launched: the conditions of ``csrc/api/descriptor_checks.cpp``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wsync.errors import ConfigError
from wsync.plan import descriptors as d

Descs = npt.NDArray[np.void]
_Mask = npt.NDArray[np.bool_]

_SRC_BYTES = {d.SRC_BF16: 2, d.SRC_F16: 2, d.SRC_F32: 4, d.SRC_F32_EXACT: 4, d.SRC_F64: 8}
_FLOATS = (d.SRC_BF16, d.SRC_F32, d.SRC_F16, d.SRC_F32_EXACT)
_COPIED = (d.SRC_BYTES, d.SRC_BF16, d.SRC_F16, d.SRC_F32_EXACT, d.SRC_F64)
_BLOCKS = (d.OP_FP8_BLOCK128, d.OP_FP8_BLOCK128_F32, d.OP_FP8_SCALED)
_F32_SCALES = (*_BLOCKS, d.OP_FP8_CHANNEL, d.OP_FP8_CHANNEL_SCALED)
_AMAX_OPS = (d.OP_FP8_BLOCK128, d.OP_FP8_BLOCK128_F32, d.OP_FP8_CHANNEL, d.OP_FP8_TENSOR, d.OP_NVFP4)


def _refuse(bad: _Mask, descs: Descs, field: str, what: str) -> None:
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise ConfigError(f"descriptor {index}: {field} is {descs[field][index]}, but {what}")


def check_dtype(descs: Descs, dtype: np.dtype[Any], name: str) -> None:
    """Raises: ConfigError: the records have another dtype."""
    if descs.dtype != dtype:
        raise ConfigError(f"the descriptors must have the dtype {name}, but they have {descs.dtype}")


def _elements(descs: Descs) -> _Mask:
    _refuse(np.asarray((descs["extent"] < 0).any(axis=1)), descs, "extent", "extents are not negative")
    held = np.prod(descs["extent"].astype(np.float64), axis=1)
    _refuse(np.asarray(held > 2.0**60), descs, "extent", "a box holds at most 2^60 elements")
    return np.asarray((descs["extent"] > 0).all(axis=1))


def _aligned(descs: Descs, where: _Mask, field: str, nbytes: Any) -> None:
    wrong = where & (descs[field] % np.asarray(nbytes, np.uint64) != 0)
    _refuse(wrong, descs, field, "addresses are multiples of the size of what lies there")


def _phases(descs: Descs, blocks: _Mask) -> None:
    for field in ("row_phase", "col_phase"):
        _refuse(blocks & ((descs[field] < 0) | (descs[field] > 127)), descs, field, "phases are 0 to 127")


def check_pack(descs: Descs) -> None:
    """Raises: ConfigError: a `PACK_DESC` is malformed."""
    check_dtype(descs, d.PACK_DESC, "PACK_DESC")
    op, src_dtype = descs["op"], descs["src_dtype"]
    _refuse((op < d.OP_COPY) | (op > d.OP_NVFP4), descs, "op", "operations are 0 to 9")
    copies, quantises = op == d.OP_COPY, op > d.OP_BF16
    _refuse(copies & ~np.isin(src_dtype, _COPIED), descs, "src_dtype", "copies take 0, 1, 3, 4 and 5")
    _refuse(~copies & ~np.isin(src_dtype, _FLOATS), descs, "src_dtype", "this operation takes 1 to 4")
    _refuse(~np.isin(descs["elem_bytes"], (1, 2, 4, 8)), descs, "elem_bytes", "elements have 1, 2, 4 or 8 bytes")
    for dtype, nbytes in _SRC_BYTES.items():
        _refuse((src_dtype == dtype) & (descs["elem_bytes"] != nbytes), descs, "elem_bytes", f"its dtype has {nbytes}")
    holds = _elements(descs)
    _refuse(holds & (descs["src"] == 0), descs, "src", "a box has an address")
    _phases(descs, np.isin(op, _BLOCKS))
    for group_op, group in ((d.OP_MXFP8, 32), (d.OP_NVFP4, 16)):
        cut = (descs["extent"][:, 3] % group != 0) | (descs["col_phase"] % group != 0)
        _refuse((op == group_op) & cut, descs, "extent", f"columns and col_phase are multiples of {group}")
    deep = (descs["extent"][:, :2] != 1).any(axis=1)
    _refuse(holds & quantises & deep, descs, "extent", "a quantised box has two dimensions")
    _refuse(
        holds & quantises & (op != d.OP_FP8_TENSOR) & (descs["scales"] == 0), descs, "scales", "it needs an address"
    )
    reads_amax = np.isin(op, (d.OP_FP8_TENSOR, d.OP_NVFP4))
    _refuse(holds & reads_amax & (descs["amax"] == 0), descs, "amax", "it needs an address")
    _aligned(descs, holds, "src", descs["elem_bytes"])
    _aligned(descs, holds & reads_amax, "amax", 4)
    _aligned(descs, holds & np.isin(op, _F32_SCALES), "scales", 4)
    _aligned(descs, holds & ~quantises, "dst_offset", np.where(copies, descs["elem_bytes"], 2))


def check_amax(descs: Descs) -> None:
    """Raises: ConfigError: an `AMAX_DESC` is malformed."""
    check_dtype(descs, d.AMAX_DESC, "AMAX_DESC")
    _refuse(~np.isin(descs["src_dtype"], _FLOATS), descs, "src_dtype", "an amax takes 1 to 4")
    _refuse(~np.isin(descs["recipe_op"], _AMAX_OPS), descs, "recipe_op", "known are 2, 3, 5, 7 and 9")
    _phases(descs, np.isin(descs["recipe_op"], _BLOCKS))
    holds = _elements(descs)
    _refuse(holds & (descs["src"] == 0), descs, "src", "a box has an address")
    _refuse(holds & (descs["amax"] == 0), descs, "amax", "it needs an address")
    _aligned(descs, holds, "src", np.where(np.isin(descs["src_dtype"], (d.SRC_BF16, d.SRC_F16)), 2, 4))
    for field in ("amax", "scales"):
        _aligned(descs, holds, field, 4)


def check_unpack(descs: Descs) -> None:
    """Raises: ConfigError: an `UNPACK_DESC` is malformed."""
    check_dtype(descs, d.UNPACK_DESC, "UNPACK_DESC")
    op, elem_bytes = descs["op"], descs["elem_bytes"]
    _refuse((op < d.UNPACK_COPY) | (op > d.UNPACK_EXPONENT), descs, "op", "operations are 0 to 2")
    _refuse(~np.isin(elem_bytes, (1, 2, 4, 8)), descs, "elem_bytes", "elements have 1, 2, 4 or 8 bytes")
    _refuse((op == d.UNPACK_FILL) & (elem_bytes > 4), descs, "elem_bytes", "a fill has 4 bytes at most")
    _refuse((op == d.UNPACK_EXPONENT) & (elem_bytes != 1), descs, "elem_bytes", "an exponent has 1")
    holds = _elements(descs)
    _refuse(holds & (descs["dst"] == 0), descs, "dst", "a box has an address")
    _aligned(descs, holds, "dst", elem_bytes)
    read_bytes = np.where(op == d.UNPACK_EXPONENT, 4, elem_bytes)
    _aligned(descs, holds & (op != d.UNPACK_FILL), "src_offset", read_bytes)


def check_base(base: int, name: str, descs: Descs) -> None:
    """Raises: ConfigError: the address of a bucket is null or not aligned, and there is something to do."""
    if len(descs) and base == 0:
        raise ConfigError(f"{name} is null")
    if len(descs) and base % 16:
        raise ConfigError(f"{name} is {base}, but the kernels need a multiple of 16")
