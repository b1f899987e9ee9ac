"""Calls of every operation with what the CPU kernels answer: boxes of all kinds, edges of the formats, bad values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from cases import Case
from kernel_boxes import amax_desc, code_bytes, matrix_of, pack_desc, unpack_desc
from scenario import Scenario, aligned, at_aligned, bytes_of, finish, name_of, span_of
from torch import Tensor

from wsync import kernels
from wsync.formats import quantize_reference
from wsync.plan import descriptors as d

SOURCES = {
    "bf16": (torch.bfloat16, d.SRC_BF16),
    "f16": (torch.float16, d.SRC_F16),
    "f32 rounded": (torch.float32, d.SRC_F32),
    "f32": (torch.float32, d.SRC_F32_EXACT),
}
GROUPS = {d.OP_MXFP8: 32, d.OP_NVFP4: 16}
RECIPES = {
    "fp8_block128": d.OP_FP8_BLOCK128,
    "fp8_block128_f32": d.OP_FP8_BLOCK128_F32,
    "fp8_channel": d.OP_FP8_CHANNEL,
    "fp8_tensor": d.OP_FP8_TENSOR,
    "mxfp8": d.OP_MXFP8,
    "nvfp4": d.OP_NVFP4,
}
UNCOUNTED = 2**64 - 1


def scale_table(op: int, rows: int, cols: int, phase: tuple[int, int], values: np.random.Generator) -> Tensor | None:
    """A table with a margin for the scales of a box, filled where the operation reads it."""
    if op in (d.OP_FP8_TENSOR, d.OP_COPY, d.OP_BF16):
        return None
    if op in GROUPS:
        return aligned(rows * (cols // GROUPS[op] + 3), torch.uint8, 7).view(rows, -1)
    if op in (d.OP_FP8_CHANNEL, d.OP_FP8_CHANNEL_SCALED):
        shape = (rows, 2)
    else:
        shape = (-(-(phase[0] + rows) // 128), -(-(phase[1] + cols) // 128) + 1)
    table = aligned(shape[0] * shape[1], torch.float32, -1.0).view(shape)
    if op in (d.OP_FP8_SCALED, d.OP_FP8_CHANNEL_SCALED):
        table.copy_(torch.from_numpy(values.choice([2.0**-12, 1e-3 / 3, 0.3, 1.7e-5], shape).astype(np.float32)))
    return table


def pack_scenario(op: int, boxes: list[tuple[Tensor, int]], seed: int, phase: tuple[int, int] = (0, 0)) -> Scenario:
    """Boxes with their source dtypes, one descriptor each, packed into one bucket."""
    rng = np.random.default_rng(seed)
    descs, inputs, outputs, at = [], {}, {}, 0
    for i, (box, src_dtype) in enumerate(boxes):
        rows, cols = box.shape[-2:]
        table = scale_table(op, rows, cols, phase, rng)
        amax = None
        if op in (d.OP_FP8_TENSOR, d.OP_NVFP4):
            finite = box.to(torch.float32).abs()
            amax = aligned(1, torch.float32, float(finite[finite.isfinite()].max()))
            inputs[f"amax {i}"] = bytes_of(amax)
        is_block = op in (d.OP_FP8_BLOCK128, d.OP_FP8_BLOCK128_F32, d.OP_FP8_SCALED)
        descs.append(
            pack_desc(
                box,
                op,
                dst_offset=at,
                wire_word=at // 8 + 5,
                scales=table,
                amax=amax,
                src_dtype=src_dtype,
                phase=phase if is_block else (0, 0),
                piece_idx=i,
            )
        )
        inputs[f"source {i}"] = span_of(box)
        if table is not None:
            outputs[f"scales {i}"] = bytes_of(table)
        nbytes = code_bytes(op, box.numel())
        nbytes *= box.element_size() if op == d.OP_COPY else 2 if op == d.OP_BF16 else 1
        at += -(-nbytes // 256) * 256 + 256
    bucket = aligned(at if len(boxes) > 1 else nbytes, torch.uint8, 0xAA)  # of one box: not a byte too many
    outputs["bucket"] = bytes_of(bucket)
    table_of = np.concatenate(descs)
    case = Case("pack", table_of, inputs, outputs, bucket.data_ptr())
    name = name_of("pack op", op, [(tuple(b.shape), tuple(b.stride()), s) for b, s in boxes], phase, "seed", seed)
    return finish(name, case, lambda: kernels.pack(table_of, bucket.data_ptr(), 1))


PACK_OPS = (
    d.OP_FP8_BLOCK128,
    d.OP_FP8_BLOCK128_F32,
    d.OP_FP8_SCALED,
    d.OP_FP8_CHANNEL,
    d.OP_FP8_CHANNEL_SCALED,
    d.OP_FP8_TENSOR,
    d.OP_MXFP8,
    d.OP_NVFP4,
    d.OP_BF16,
)
STYLES = ("normal", "wild", "sparse")
# Vector roads, long rows, and what has no vectors.
SHAPES = ((1, 16), (5, 48), (130, 160), (9, 2080), (3, 4128), (17, 33), (140, 131))


def _edge_values(box: Tensor) -> None:
    """Zeros of both signs, subnormals, ties of both codes and the largest value, somewhere in the first row."""
    ties = [0.0, -0.0, 1.0, -1.0625, 1.1875, 0.25, 0.75, 2.5, 5.0, 2**-24, -(2**-24), 6.1e-5]
    n = min(len(ties), box.shape[-1])
    box[0, :n] = torch.tensor(ties[:n]).to(box.dtype)


def pack_scenarios(seed: int, ops: tuple[int, ...] = PACK_OPS) -> Iterator[Scenario]:
    """Every operation from every source dtype; shapes, layouts and values vary with the seed."""
    rng = np.random.default_rng(seed)
    for op in ops:
        for k, (dtype, src_dtype) in enumerate(SOURCES.values()):
            boxes = []
            for n in range(3):
                shape = SHAPES[(seed + 2 * k + 3 * n + op) % len(SHAPES)]
                cols = -(-shape[1] // GROUPS.get(op, 1)) * GROUPS.get(op, 1)
                layout = ("rows", "rows", "columns", "steps")[int(rng.integers(4))]
                box = at_aligned(matrix_of(rng, (shape[0], cols), STYLES[(seed + n + k) % 3], layout, dtype))
                if n == 0:
                    _edge_values(box)
                boxes.append((box, src_dtype))
            phase = ((0, 0), (8, 64), (127, 16), (3, 5))[int(rng.integers(4))]
            yield pack_scenario(op, boxes, seed, phase)


def nonfinite_scenarios(seed: int, ops: tuple[int, ...] = PACK_OPS) -> Iterator[Scenario]:
    """Two bad elements in the second of three boxes and one in the third: the first is named."""
    rng = np.random.default_rng(seed)
    for i, op in enumerate(ops):
        dtype, src_dtype = list(SOURCES.values())[(seed + i) % 4]
        boxes = [(at_aligned(matrix_of(rng, (20, 160), "normal", "rows", dtype)), src_dtype) for _ in range(3)]
        boxes[1][0][7, 63], boxes[1][0][19, 2], boxes[2][0][0, 0] = float("nan"), float("-inf"), float("inf")
        yield pack_scenario(op, boxes, seed)


def awkward_scenarios(seed: int) -> Iterator[Scenario]:
    """Rows half a vector off, and one value far larger than its neighbours, which given scales do not fit."""
    rng = np.random.default_rng(seed)
    for op in PACK_OPS:
        for dtype, src_dtype in SOURCES.values():
            half = 8 // dtype.itemsize
            stored = at_aligned(matrix_of(rng, (9, 160 + 4 * half), "normal", "rows", dtype))
            steep = at_aligned(torch.full((4, 64), 1e-3).to(dtype))
            for row in range(4):
                steep[row, int(rng.integers(64))] = 4e36 if dtype != torch.float16 else 6e4
            yield pack_scenario(op, [(stored[:, half : half + 160], src_dtype), (steep, src_dtype)], seed)


def copy_scenarios(seed: int) -> Iterator[Scenario]:
    """Raw copies of every element size, checked floats among them, in boxes of up to four dimensions."""
    rng = np.random.default_rng(seed)
    for dtype, src in (
        (torch.uint8, d.SRC_BYTES),
        (torch.int16, d.SRC_BYTES),
        (torch.float16, d.SRC_F16),
        (torch.bfloat16, d.SRC_BF16),
        (torch.float32, d.SRC_F32_EXACT),
        (torch.float64, d.SRC_F64),
    ):
        for shape in ((3, 5, 7, 11), (2, 6, 4, 64), (1, 1, 1, 4100)):
            whole = at_aligned(torch.from_numpy(rng.integers(0, 100, shape)).to(dtype))
            yield (
                pack_scenario(d.OP_COPY, [(whole, src), (whole.transpose(1, 2), src), (whole[:, 1:, :, 1:], src)], seed)
                if shape[1] > 1
                else pack_scenario(d.OP_COPY, [(whole, src)], seed)
            )
    bad = at_aligned(torch.ones(4, 96, dtype=torch.float64))
    bad[2, 17] = float("inf")
    yield pack_scenario(d.OP_COPY, [(bad, d.SRC_F64)], seed)


def amax_scenarios(seed: int) -> Iterator[Scenario]:
    """Amaxes of every rule over parts of shared cells, and the scales made from such cells."""
    rng = np.random.default_rng(seed)
    for k, op in enumerate((d.OP_FP8_BLOCK128, d.OP_FP8_BLOCK128_F32, d.OP_FP8_CHANNEL, d.OP_FP8_TENSOR, d.OP_NVFP4)):
        for j, (dtype, src) in enumerate(SOURCES.values()):
            shape = SHAPES[(seed + j + 2 * k) % len(SHAPES)]
            box = at_aligned(matrix_of(rng, shape, STYLES[j % 3], ("rows", "columns")[(k + j) % 2], dtype))
            if j == 3 and seed % 2:
                box[-1, -1] = float("inf")
            phase = (3, 16) if op in (d.OP_FP8_BLOCK128, d.OP_FP8_BLOCK128_F32) else (0, 0)
            cells = aligned(shape[0] * 40, torch.float32).view(-1, 40)
            top, bottom = box[: shape[0] // 2], box[shape[0] // 2 :]
            parts = [amax_desc(bottom, cells, cells, phase, op, src)]
            if len(top):
                parts.append(amax_desc(top, cells, cells, phase, op, src))
            descs = np.concatenate(parts)
            case = Case("amax", descs, {"source": span_of(box)}, {"cells": bytes_of(cells)})
            yield finish(name_of("amax op", op, shape, src, "seed", seed), case, lambda d=descs: kernels.amax(d, 1))
            scales = aligned(shape[0] * 40, torch.float32, -1.0).view(-1, 40)
            descs = amax_desc(box, cells, scales, phase, op, src)
            case = Case("scales", descs, {"cells": bytes_of(cells)}, {"scales": bytes_of(scales)})
            yield finish(
                name_of("scales op", op, shape, "seed", seed), case, lambda d=descs: kernels.scales_from_amax(d)
            )


def unpack_scenarios(seed: int) -> Iterator[Scenario]:
    """Copies, broadcasts, fills and exponents into strided engine memory; then the digest of what lies there."""
    rng = np.random.default_rng(seed)
    for k, (elem_bytes, dtype) in enumerate({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.items()):
        shape = ((3, 4, 5, 16), (2, 3, 9, 7), (1, 1, 33, 64), (1, 2, 3, 1000))[(seed + k) % 4]
        numel = int(np.prod(shape))
        wire = aligned(numel * elem_bytes, torch.uint8)
        wire.copy_(torch.from_numpy(rng.integers(0, 256, numel * elem_bytes, dtype=np.uint8)))
        live = aligned(numel + 2 * numel // shape[-1], dtype, 1).view(*shape[:-1], shape[-1] + 2)[..., : shape[-1]]
        turned = aligned(numel, dtype, 1).view(shape[0], shape[1], shape[3], shape[2]).transpose(2, 3)
        repeated = aligned(numel, dtype, 1).view(shape)
        filled = aligned(numel, dtype, 1).view(shape)
        row = (0, 0, 0, 1)
        pieces = [
            unpack_desc(live, wire_word=3),
            unpack_desc(turned, wire_word=UNCOUNTED, piece_idx=1),
            unpack_desc(repeated, src_stride=row, wire_word=9000, piece_idx=2),
        ]
        targets = {"live": live, "turned": turned, "repeated": repeated}
        if elem_bytes < 8:
            pieces.append(unpack_desc(filled, op=d.UNPACK_FILL, fill=0x81027F03, wire_word=70000, piece_idx=3))
            targets["filled"] = filled
        descs = np.concatenate(pieces)
        outputs = {n: span_of(t) for n, t in targets.items()}
        inputs = {"bucket": bytes_of(wire)}
        name = name_of("unpack", elem_bytes, shape, "seed", seed)
        base = wire.data_ptr()
        yield finish(
            name, Case("unpack", descs, inputs, outputs, base), lambda a=descs, b=base: kernels.unpack(a, b, 1)
        )
        yield finish(
            f"installed {name}",
            Case("installed", descs, dict(outputs), {}),
            lambda a=descs: kernels.installed_digest(a, 1),
        )
    powers = aligned(77, torch.float32)
    powers.copy_(torch.from_numpy(np.exp2(rng.integers(-126, 127, 77)).astype(np.float32)))
    exponents = aligned(77, torch.uint8, 1).view(7, 11)
    descs = unpack_desc(exponents, src_stride=(11, 1), op=d.UNPACK_EXPONENT, wire_word=1)
    case = Case("unpack", descs, {"bucket": bytes_of(powers)}, {"exponents": bytes_of(exponents)}, powers.data_ptr())
    yield finish(name_of("exponents seed", seed), case, lambda: kernels.unpack(descs, powers.data_ptr(), 1))


def digest_scenarios(seed: int) -> Iterator[Scenario]:
    """Contiguous bytes of lengths around words and vectors."""
    rng = np.random.default_rng(seed)
    for nbytes in (1, 8, 15, 16, 4099, 70000):
        data = aligned(nbytes, torch.uint8)
        data.copy_(torch.from_numpy(rng.integers(0, 256, nbytes, dtype=np.uint8)))
        values = np.array([data.data_ptr(), nbytes, 12345], np.uint64)
        case = Case("digest", values, {"data": bytes_of(data)}, {})
        yield finish(
            name_of("digest", nbytes), case, lambda a=data, n=nbytes: kernels.digest(a.data_ptr(), n, 12345, 1)
        )


def _transform_desc(op: int, recipe: str, parts: list[Tensor], dst: Tensor, dtype: int) -> np.ndarray:
    desc = np.zeros(1, d.TRANSFORM_DESC)
    desc["codes"], desc["code_stride"], desc["extent"] = parts[0].data_ptr(), parts[0].stride(0), dst.shape
    desc["scales"], desc["scale_stride"] = parts[1].data_ptr(), parts[1].stride(0) if parts[1].dim() else 0
    desc["tensor_scale"] = parts[2].data_ptr() if len(parts) > 2 else 0
    desc["dst"], desc["dst_stride"] = dst.data_ptr(), dst.stride()
    desc["recipe_op"], desc["op"], desc["dst_dtype"] = RECIPES[recipe], op, dtype
    return desc


def transform_scenarios(seed: int) -> Iterator[Scenario]:
    """Every recipe decoded to every float, straight and turned; requantisation, with a code that is no number."""
    rng = np.random.default_rng(seed)
    floats = ((torch.bfloat16, d.SRC_BF16), (torch.float16, d.SRC_F16), (torch.float32, d.SRC_F32))
    for k, recipe in enumerate(RECIPES):
        rows, cols = ((130, 160), (9, 2080), (7, 96), (140, 288))[(seed + k) % 4]
        weight = matrix_of(rng, (rows, cols), "normal", "rows", torch.bfloat16)
        parts = [at_aligned(p.contiguous()) for p in quantize_reference(weight, recipe).values()]
        if recipe == "mxfp8":
            parts[1][0, 0], parts[1][-1, -1] = 0xFF, 0  # no number, and the least power of two
        inputs = {f"part {i}": bytes_of(p) for i, p in enumerate(parts)}
        for j, (dtype, src) in enumerate(floats):
            stored = aligned(rows * cols, dtype, -3)
            dst = stored.view(cols, rows).t() if (seed + j + k) % 3 == 0 else stored.view(rows, cols)
            descs = _transform_desc(d.TRANSFORM_DEQUANTISE, recipe, parts, dst, src)
            case = Case("transform", descs, inputs, {"values": bytes_of(stored)})
            yield finish(
                name_of("dequantise", recipe, rows, cols, src, "seed", seed),
                case,
                lambda a=descs: kernels.transform(a, 1),
            )
    for phase in ((3, 16), (127, 40)):  # parts of matrices: with vectors, and without
        weight = matrix_of(rng, (300, 400), "normal", "rows", torch.bfloat16)
        codes, scales = (at_aligned(p.contiguous()) for p in quantize_reference(weight, "fp8_block128_f32").values())
        values = aligned(140 * 272, torch.float32, -3).view(140, 272)
        part = codes[phase[0] :, phase[1] :]
        descs = _transform_desc(d.TRANSFORM_DEQUANTISE, "fp8_block128_f32", [part, scales], values, d.SRC_F32)
        descs["row_phase"], descs["col_phase"] = phase
        inputs = {"codes": bytes_of(codes), "scales": bytes_of(scales)}
        case = Case("transform", descs, inputs, {"values": bytes_of(values)})
        yield finish(name_of("dequantise a part", phase, "seed", seed), case, lambda a=descs: kernels.transform(a, 1))
    yield from _requantise_scenarios(seed, rng)


def _requantise_scenarios(seed: int, rng: np.random.Generator) -> Iterator[Scenario]:
    """Into other memory, with a code that is no number, and over the codes and scales themselves."""
    for cols, kind in ((160, "plain"), (131, "plain"), (160, "bad"), (160, "in place"), (131, "in place")):
        weight = matrix_of(rng, (140, cols), "normal", "rows", torch.bfloat16)
        codes, scales = (at_aligned(p.contiguous()) for p in quantize_reference(weight, "fp8_block128_f32").values())
        if kind == "bad":
            codes.view(torch.uint8)[130, 17] = 0x7F
        dst, dst_scales = (
            aligned(140 * cols, torch.uint8, 9).view(140, cols),
            aligned(scales.numel(), torch.float32, -1),
        )
        inputs = {"codes": bytes_of(codes), "old scales": bytes_of(scales)}
        if kind == "in place":
            dst, dst_scales, inputs = codes, scales, {}
        descs = _transform_desc(d.TRANSFORM_REQUANT_E8M0, "fp8_block128_f32", [codes, scales], dst, 0)
        descs["dst_scales"], descs["dst_scale_stride"] = dst_scales.data_ptr(), scales.shape[1]
        case = Case("transform", descs, inputs, {"new codes": bytes_of(dst), "new scales": bytes_of(dst_scales)})
        yield finish(name_of("requantise", cols, kind, "seed", seed), case, lambda a=descs: kernels.transform(a, 1))


ALL = (
    pack_scenarios,
    nonfinite_scenarios,
    awkward_scenarios,
    copy_scenarios,
    amax_scenarios,
    unpack_scenarios,
    digest_scenarios,
    transform_scenarios,
)
