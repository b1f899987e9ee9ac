"""Descriptors: fixed-size records that bind a plan's slice to addresses. CPU, CUDA and Triton execute the same ones.

The byte layout is the contract with ``csrc/core/descriptors.h``, which repeats it field by field; a test compares
sizes and offsets. All addresses are absolute. Extents and strides are outer to inner; unused dimensions have extent 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wsync.errors import ManifestError

NUM_DIMS = 4
"""Dimensions of a descriptor. Boxes of more dimensions are collapsed or split when the program is compiled."""

OP_COPY = 0
"""Bytes as they are (``elem_bytes`` each); refuses non-finite values of a float source dtype, `SRC_BYTES` is not
looked at. Takes every source dtype but `SRC_F32`, which asks for a rounding."""
OP_BF16 = 1
"""bf16 source, or f32 source rounded to bf16 (RNE); refuses non-finite values."""
OP_FP8_BLOCK128 = 2
"""e4m3 with power-of-two scales; every scale block of the box is whole: its amax is taken here."""
OP_FP8_BLOCK128_F32 = 3
"""e4m3 with f32 scales; every scale block of the box is whole."""
OP_FP8_SCALED = 4
"""e4m3 with 128 x 128 scales that the scale table already holds (power of two or not): blocks cut by an edge."""
OP_FP8_CHANNEL = 5
"""e4m3 with one f32 scale for each row; the box holds whole rows: their amaxes are taken here."""
OP_FP8_CHANNEL_SCALED = 6
"""The same with scales that the table already holds: rows cut by an edge."""
OP_FP8_TENSOR = 7
"""e4m3 with one scale for a whole tensor or scale group, made from the f32 at ``amax``. Writes no scale."""
OP_MXFP8 = 8
"""e4m3 with one E8M0 byte for each 32 columns of a row; the box holds whole groups."""
OP_NVFP4 = 9
"""e2m1, two codes a byte (low nibble: even column), with one e4m3 byte for each 16 columns of a row; the box holds
whole groups. The scale of the whole tensor or scale group is made from the f32 at ``amax`` and is not written."""

SRC_BYTES = 0
SRC_BF16 = 1
SRC_F32 = 2
SRC_F16 = 3
SRC_F32_EXACT = 4
SRC_F64 = 5
"""Source dtypes: any bytes, bf16, f32 (rounded to bf16 first), f16 (as given, through exact f32), f32 (as given), f64
(of copies only)."""

PACK_DESC = np.dtype(
    [
        ("src", "<u8"),  # address of the box's first element
        ("src_stride", "<i8", (NUM_DIMS,)),  # in elements
        ("extent", "<i8", (NUM_DIMS,)),  # the packed form is row major over these
        ("dst_offset", "<u8"),  # bytes from the bucket's base; a multiple of 256
        ("wire_word", "<u8"),  # digest key of the first 8-byte word: logical wire offset / 8
        ("scales", "<u8"),  # address of the scale of the box's first scale block (f32, or a byte), or 0
        ("scale_stride", "<i8"),  # scales from one row of scale blocks to the next
        ("amax", "<u8"),  # address of the f32 amax of the whole scale group, after the exchange, or 0
        ("row_phase", "<i4"),  # first row modulo the block's rows, in the tensor's own grid
        ("col_phase", "<i4"),
        ("op", "<i4"),
        ("src_dtype", "<i4"),
        ("elem_bytes", "<i4"),  # bytes of one source element
        ("piece_idx", "<i4"),  # position of this descriptor in its bucket, for messages
    ]
)
"""Packs one box into a bucket. The fp8 operations quantise ``extent[2] x extent[3]`` matrices, one for each outer
index; their ``extent[0]`` and ``extent[1]`` are 1 (the compiler emits one descriptor per matrix)."""

AMAX_DESC = np.dtype(
    [
        ("src", "<u8"),
        ("src_stride", "<i8", (2,)),
        ("extent", "<i8", (2,)),
        ("amax", "<u8"),  # address of the f32 amax of the box's first scale block, in the exchanged vector
        ("amax_stride", "<i8"),  # f32 elements between rows of scale blocks
        ("scales", "<u8"),  # address of the same block's scale in the rank's table, written after the exchange
        ("scale_stride", "<i8"),
        ("row_phase", "<i4"),
        ("col_phase", "<i4"),
        ("src_dtype", "<i4"),
        ("recipe_op", "<i4"),  # which blocks share an amax, and which rule turns it into a scale
    ]
)
"""A part of a scale block that another rank or piece shares: its amax is exchanged before packing.

``recipe_op`` is OP_FP8_BLOCK128 or OP_FP8_BLOCK128_F32 (128 x 128 blocks), OP_FP8_CHANNEL (rows), OP_FP8_TENSOR or
OP_NVFP4 (the box as a whole; the scale is ``weight_scale`` or ``weight_scale_2``)."""

UNPACK_COPY = 0
UNPACK_FILL = 1
"""Writes the ``elem_bytes`` low bytes of ``fill`` to every element; reads nothing."""
UNPACK_EXPONENT = 2
"""Reads f32 powers of two and writes their exponent bytes (E8M0); ``elem_bytes`` is 1, strides of the source count
f32 elements."""

UNPACK_DESC = np.dtype(
    [
        ("dst", "<u8"),  # address of the box's first element in engine memory
        ("dst_stride", "<i8", (NUM_DIMS,)),  # in elements
        ("src_stride", "<i8", (NUM_DIMS,)),  # in elements; those of a packed box unless a transform reorders it
        ("extent", "<i8", (NUM_DIMS,)),
        ("src_offset", "<u8"),  # bytes from the bucket's base
        ("wire_word", "<u8"),
        ("elem_bytes", "<i4"),  # of one element at the destination
        ("piece_idx", "<i4"),
        ("op", "<i4"),
        ("fill", "<u4"),
    ]
)
"""Scatters one box of a bucket into engine memory. A source stride of 0 repeats an element. The digest of a descriptor
is that of the bytes that it writes, in row-major order of ``extent``, from ``wire_word`` on: where the box is packed
these are the wire's bytes at their own place."""

TRANSFORM_DEQUANTISE = 0
TRANSFORM_REQUANT_E8M0 = 1

TRANSFORM_DESC = np.dtype(
    [
        ("codes", "<u8"),  # address of the first code
        ("code_stride", "<i8"),  # bytes between rows of codes
        ("extent", "<i8", (2,)),  # of the matrix, in weights
        ("scales", "<u8"),  # address of the scale of the first scale block
        ("scale_stride", "<i8"),  # scales between rows of scale blocks
        ("tensor_scale", "<u8"),  # address of the f32 second-level scale (nvfp4), or 0
        ("dst", "<u8"),
        ("dst_stride", "<i8", (2,)),  # in elements
        ("dst_scales", "<u8"),  # requantisation only: f32, written
        ("dst_scale_stride", "<i8"),
        ("row_phase", "<i4"),
        ("col_phase", "<i4"),
        ("recipe_op", "<i4"),  # how the codes are encoded
        ("op", "<i4"),  # TRANSFORM_*
        ("dst_dtype", "<i4"),  # SRC_BF16, SRC_F16 or SRC_F32 of dequantised values
        ("piece_idx", "<i4"),
    ]
)
"""Turns one encoded matrix, whose codes and scales are staged, into engine memory by value: dequantised, or
requantised from f32 to power-of-two scales as vLLM does when it loads (128 x 128 blocks, all whole)."""


def descriptor_dims(strides: Sequence[int], shape: Sequence[int], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and extents of a descriptor: dimensions of one element dropped, filled up on the outside.

    Raises:
        ManifestError: more than `NUM_DIMS` dimensions remain; ``name`` says of what. The planner makes no such piece.
    """
    kept = [(s, n) for s, n in zip(strides, shape, strict=True) if n != 1]
    if len(kept) > NUM_DIMS:
        raise ManifestError(
            f"a piece of {name!r} has {len(kept)} dimensions (shape {tuple(shape)}), descriptors have {NUM_DIMS}"
        )
    fill = NUM_DIMS - len(kept)
    return (0,) * fill + tuple(s for s, _ in kept), (1,) * fill + tuple(n for _, n in kept)
