"""The operations of `wsync.kernels.ops` through Triton: the same records, results and errors.

Each takes ``device`` (the current CUDA device by default; the host in the interpreter) and works on torch's current
stream of that device, or on ``stream``. It waits for its own result, which is read back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from wsync.errors import ConfigError
from wsync.kernels.ops import PackResult
from wsync.kernels.triton.checks import Descs, check_amax, check_base, check_pack, check_unpack
from wsync.kernels.triton.configs import BOX_WORDS, DIGEST_WORDS, GATHER_WORDS
from wsync.kernels.triton.launch import NO_BAD, first_bad_element, new_result, on_device, run, run_all, table_on
from wsync.kernels.triton.support import device_of
from wsync.kernels.triton.tables import (
    Launches,
    grid,
    plan_amax,
    plan_installed,
    plan_pack,
    plan_scales,
    plan_unpack,
    tiles,
)
from wsync.plan.descriptors import OP_BF16, OP_COPY, PACK_DESC, SRC_BF16, SRC_F16, SRC_F32

_MASK = (1 << 64) - 1

Device = torch.device | str | int | None
Range = tuple[int, int, int]


@contextmanager
def _on(device: Device, stream: Any) -> Iterator[torch.device]:
    where = device_of(device)
    if where.type == "cpu":
        yield where
        return
    with torch.cuda.device(where), torch.cuda.stream(stream):
        yield where


def pack(descs: Descs, dst_base: int, *, device: Device = None, stream: Any = None) -> PackResult:
    """Gather, check, quantise and write every box into the bucket at ``dst_base``, in one pass.

    Boxes whose rows do not begin on digest words are digested from the bucket in a second pass, and rows of fp8_channel
    that are not aligned or longer than 32768 are read twice.

    Args:
        descs: vector of `PACK_DESC`; its addresses are of ``device``.
        dst_base: address of the bucket on ``device``.
        device: see the module.
        stream: a ``torch.cuda.Stream``; see the module.

    Raises:
        ConfigError: a descriptor is malformed (nothing was written), or there is no device.
    """
    check_pack(descs)
    check_base(dst_base, "dst_base", descs)
    with _on(device, stream) as where:
        records, launches, ranges = plan_pack(descs, dst_base)
        table, result = table_on(records, where), new_result(where)
        run_all(launches, table, None, dst_base, result, device=where)
        _digest_ranges(ranges, result, where)
        total, bad_idx = (int(n) for n in result.tolist())
        bad = None
        if bad_idx != NO_BAD:
            record = records[bad_idx]
            # A copy keeps f32 as it is; everything else of SRC_F32, and every rounding to bf16, must survive that.
            rounded = record["src_dtype"] == SRC_F32 or record["op"] == OP_BF16
            bad = (int(record["piece_idx"]), first_bad_element(record, table, bad_idx, where, bool(rounded)))
        return PackResult(total & _MASK, bad)


def amax(descs: Descs, *, device: Device = None, stream: Any = None) -> tuple[int, int] | None:
    """Raise each amax cell to the largest magnitude of its scale block's part in the box.

    Args:
        descs: vector of `AMAX_DESC`; cells are f32, not negative, zeroed by the caller.
        device: see the module.
        stream: see the module.

    Returns:
        ``(descriptor index, packed index in its box)`` of the first non-finite element, or None.

    Raises:
        ConfigError: a descriptor is malformed (nothing was written), or there is no device.
    """
    check_amax(descs)
    with _on(device, stream) as where:
        result = new_result(where)
        run_all(plan_amax(descs), table_on(descs, where), None, result, device=where)
        bad_idx = int(result[1].item())
        if bad_idx == NO_BAD:
            return None
        record = _box_of(descs[bad_idx])
        rounded = int(record["src_dtype"][0]) == SRC_F32
        return bad_idx, first_bad_element(record[0], table_on(record, where), 0, where, rounded)


def _box_of(desc: np.void) -> Descs:
    """The `PACK_DESC` of the box that an `AMAX_DESC` reads."""
    record = np.zeros(1, PACK_DESC)
    record["src"], record["src_dtype"], record["op"] = desc["src"], desc["src_dtype"], OP_COPY
    record["elem_bytes"] = 2 if desc["src_dtype"] in (SRC_BF16, SRC_F16) else 4
    record["extent"], record["src_stride"][:, 2:] = 1, desc["src_stride"]
    record["extent"][:, 2:] = desc["extent"]
    return record


def scales_from_amax(descs: Descs, *, device: Device = None, stream: Any = None) -> None:
    """Write the scale of every block that the boxes touch, from its amax cell by the rule of ``recipe_op``.

    Raises:
        ConfigError: a descriptor is malformed (nothing was written), or there is no device.
    """
    check_amax(descs)
    empty = (descs["extent"] == 0).any(axis=1)
    if ((descs["scales"] == 0) & ~empty).any():
        raise ConfigError("an AMAX_DESC has no address of scales")
    with _on(device, stream) as where:
        run_all(plan_scales(descs), table_on(descs, where), None, None, device=where)


def unpack(descs: Descs, src_base: int, *, device: Device = None, stream: Any = None) -> int:
    """Scatter every box of the bucket at ``src_base`` into engine memory: copied, filled, or as exponents of scales.

    Returns:
        The digest of the bytes written, in packed order; descriptors with the wire word ``2**64 - 1`` are not counted.

    Raises:
        ConfigError: a descriptor is malformed (nothing was written), or there is no device.
    """
    check_unpack(descs)
    check_base(src_base, "src_base", descs)
    with _on(device, stream) as where:
        records, launches, boxes, ranges = plan_unpack(descs, src_base)
        table, result = table_on(records, where), new_result(where)
        run_all(launches, table, None, src_base, result, device=where)
        _digest_ranges(ranges, result, where)
        _digest_boxes(records, boxes, table, result, where)
        return int(result[0].item()) & _MASK


def installed_digest(descs: Descs, *, device: Device = None, stream: Any = None) -> int:
    """Digest of what lies at the destinations of ``descs`` now: equals that of `unpack` if nothing changed since.

    Raises:
        ConfigError: a descriptor is malformed, or there is no device.
    """
    check_unpack(descs)
    with _on(device, stream) as where:
        records, launches, boxes = plan_installed(descs)
        table, result = table_on(records, where), new_result(where)
        run_all(launches, table, None, 0, result, device=where)
        _digest_boxes(records, boxes, table, result, where)
        return int(result[0].item()) & _MASK


def digest(address: int, nbytes: int, first_word: int, *, device: Device = None, stream: Any = None) -> int:
    """Digest of ``nbytes`` contiguous bytes whose first word has the logical index ``first_word``.

    Raises:
        ConfigError: the address is null, or there is no device.
    """
    if nbytes and not address:
        raise ConfigError("address is null")
    with _on(device, stream) as where:
        result = new_result(where)
        _digest_ranges([(address, nbytes, first_word)], result, where)
        return int(result[0].item()) & _MASK


def _digest_ranges(ranges: list[Range], result: torch.Tensor, device: torch.device) -> None:
    """Adds contiguous bytes to the digest: whole words of aligned ranges at full width, the rest byte by byte."""
    wide, narrow = [], []
    for address, nbytes, word in ranges:
        whole = nbytes // 16 * 16 if address % 16 == 0 else 0
        if whole:
            wide.append((address, whole, word))
        if nbytes - whole:
            narrow.append((address + whole, nbytes - whole, word + whole // 8))
    for aligned, entries in ((True, wide), (False, narrow)):
        if not entries:
            continue
        words = DIGEST_WORDS if aligned else GATHER_WORDS
        launches = Launches()
        for i, (_, nbytes, _) in enumerate(entries):
            launches.add(("digest_ranges", aligned), grid(i, tiles(nbytes, 8 * words), 1))
        table = np.array([[n & _MASK for n in entry] for entry in entries], np.uint64)
        for key, units in launches.items():
            run(key, units, on_device(table, device), None, result, device=device)


def _digest_boxes(
    records: Descs, boxes: list[int], table: torch.Tensor, result: torch.Tensor, device: torch.device
) -> None:
    launches = Launches()
    for idx in boxes:
        nbytes = int(np.prod(records["extent"][idx])) * int(records["elem_bytes"][idx])
        launches.add(("digest_boxes",), grid(idx, tiles(nbytes, 8 * BOX_WORDS), 1))
    run_all(launches, table, None, result, device=device)
