"""Runs planned launches: each maps to one kernel call over its units."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from wsync.kernels.triton import configs, copy_kernels, quantise_kernels, reduce_kernels
from wsync.kernels.triton.checks import Descs
from wsync.kernels.triton.support import arch_of
from wsync.kernels.triton.tables import Launches, Units

NO_BAD = (1 << 63) - 1
"""What the result holds where no descriptor is bad."""

_POINTERS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


def pointer_of(elem_bytes: int) -> Any:
    """Triton's type of a pointer to elements of that many bytes."""
    return tl.pointer_type(_POINTERS[elem_bytes])


def calls(key: tuple[Any, ...], arch: int) -> tuple[Any, dict[str, Any], int]:
    """The kernel of a launch's key, its compile-time arguments, and its warps."""
    name, *args = key
    if name == "quantise_tiles":
        op, src, full, counted, divide = args
        constants = {"OP": op, "SRC": src, "ARCH": arch, "FULL": full, "COUNTED": counted, "DIVIDE": divide}
        return quantise_kernels.quantise_tiles, constants, configs.TILE_WARPS
    if name == "quantise_rows":
        src, rows, cols, full = args
        constants = {"SRC": src, "ARCH": arch, "ROWS": rows, "COLS": cols, "FULL": full}
        return quantise_kernels.quantise_rows, constants, configs.row_tile(cols)[2]
    if name == "row_scales":
        return quantise_kernels.row_scales, {"SRC": args[0]}, configs.TILE_WARPS
    if name == "copy_words":
        src, rows, words = args
        return copy_kernels.copy_words, {"SRC": src, "ROWS": rows, "WORDS": words}, configs.TILE_WARPS
    if name == "round_words":
        rows, words = args
        return copy_kernels.round_words, {"ARCH": arch, "ROWS": rows, "WORDS": words}, configs.TILE_WARPS
    if name == "copy_elements":
        op, src, elem_bytes, rows, cols = args
        constants = {"OP": op, "SRC": src, "POINTER": pointer_of(elem_bytes), "ROWS": rows, "COLS": cols}
        return copy_kernels.copy_elements, constants, configs.TILE_WARPS
    if name == "unpack_words":
        installed, rows, words = args
        constants = {"INSTALLED": installed, "ROWS": rows, "WORDS": words}
        return copy_kernels.unpack_words, constants, configs.TILE_WARPS
    if name == "unpack_elements":
        op, elem_bytes, rows, cols = args
        constants = {"OP": op, "POINTER": pointer_of(elem_bytes), "ROWS": rows, "COLS": cols}
        return copy_kernels.unpack_elements, constants, configs.TILE_WARPS
    if name == "amax_tiles":
        op, src, full = args
        return reduce_kernels.amax_tiles, {"OP": op, "SRC": src, "FULL": full}, configs.TILE_WARPS
    if name == "scales_of_cells":
        return reduce_kernels.scales_of_cells, {"OP": args[0], "CELLS": configs.CELLS}, 4
    if name == "digest_ranges":
        aligned = args[0]
        words = configs.DIGEST_WORDS if aligned else configs.GATHER_WORDS
        return reduce_kernels.digest_ranges, {"ALIGNED": aligned, "WORDS": words}, configs.TILE_WARPS
    return reduce_kernels.digest_boxes, {"WORDS": configs.BOX_WORDS}, configs.TILE_WARPS


def on_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A tensor of int32 or int64 words with the bytes of ``array``, on ``device``."""
    words = array if array.dtype == np.int32 else np.ascontiguousarray(array).view(np.int64)
    return torch.from_numpy(words).to(device)


def table_on(descs: Descs, device: torch.device) -> Tensor:
    """The records as int64 words on ``device``."""
    return on_device(np.frombuffer(descs.tobytes(), np.int64).copy(), device)


def new_result(device: torch.device) -> Tensor:
    """Digest zero, no bad descriptor."""
    return torch.tensor([0, NO_BAD], dtype=torch.int64).to(device)


def run(key: tuple[Any, ...], units: Units, *args: Any, device: torch.device) -> None:
    """Launches one kernel over ``units``; ``args`` come before and after the units, divided by None."""
    kernel, constants, warps = calls(key, arch_of(device))
    at = args.index(None)
    kernel[(len(units),)](
        *args[:at], on_device(units, device), *args[at + 1 :], **constants, num_warps=warps, **configs.OPTIONS
    )


def run_all(launches: Launches, *args: Any, device: torch.device) -> None:
    """Launches all of them in order."""
    for key, units in launches.items():
        if key[0] in ("unpack_elements", "scales_of_cells"):  # they only write
            run(key, units, *args[:-1], device=device)
        elif key[0] == "row_scales":  # it knows no bucket
            run(key, units, args[0], None, args[-1], device=device)
        else:
            run(key, units, *args, device=device)


def first_bad_element(record: np.void, table: Tensor, idx: int, device: torch.device, rounded: bool) -> int:
    """Packed index of the first element of one `PACK_DESC` in ``table`` that is not finite."""
    result = torch.full((1,), NO_BAD, dtype=torch.int64, device=device)
    words = table[17 * idx :]
    blocks = -(-int(np.prod(record["extent"])) // configs.SEARCH_ELEMS)
    reduce_kernels.first_bad[(blocks,)](
        words,
        result,
        POINTER=pointer_of(int(record["elem_bytes"])),
        SRC=int(record["src_dtype"]),
        ROUNDED=rounded,
        ELEMS=configs.SEARCH_ELEMS,
        num_warps=configs.TILE_WARPS,
        **configs.OPTIONS,
    )
    return int(result.item())
