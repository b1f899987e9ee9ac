"""Numbers that the kernels compile in, as Triton wants them; their meaning is in `wsync.plan.descriptors`."""

from __future__ import annotations

import triton.language as tl

from wsync.formats import digest
from wsync.plan import descriptors

COPY = tl.constexpr(descriptors.OP_COPY)
BF16_ROUND = tl.constexpr(descriptors.OP_BF16)
BLOCK128 = tl.constexpr(descriptors.OP_FP8_BLOCK128)
BLOCK128_F32 = tl.constexpr(descriptors.OP_FP8_BLOCK128_F32)
SCALED = tl.constexpr(descriptors.OP_FP8_SCALED)
CHANNEL = tl.constexpr(descriptors.OP_FP8_CHANNEL)
CHANNEL_SCALED = tl.constexpr(descriptors.OP_FP8_CHANNEL_SCALED)
TENSOR = tl.constexpr(descriptors.OP_FP8_TENSOR)
MXFP8 = tl.constexpr(descriptors.OP_MXFP8)
NVFP4 = tl.constexpr(descriptors.OP_NVFP4)

BYTES = tl.constexpr(descriptors.SRC_BYTES)
BF16 = tl.constexpr(descriptors.SRC_BF16)
F32 = tl.constexpr(descriptors.SRC_F32)
F16 = tl.constexpr(descriptors.SRC_F16)
F32_EXACT = tl.constexpr(descriptors.SRC_F32_EXACT)
F64 = tl.constexpr(descriptors.SRC_F64)

DESC_WORDS = tl.constexpr(descriptors.PACK_DESC.itemsize // 8)
"""int64 words of one `PACK_DESC`, and of one `UNPACK_DESC`."""
TILE = tl.constexpr(128)
"""Rows and columns of one tile: a scale block."""
DIGEST_KEY = tl.constexpr(digest.DIGEST_KEY)
BF16_OVERFLOW = tl.constexpr(0x7F7F8000)
"""From these f32 bits on a magnitude rounds to infinity in bf16."""
UNCOUNTED = tl.constexpr(-1)
"""A wire word that means: leave out of the digest."""
UNPACK_FILL = tl.constexpr(descriptors.UNPACK_FILL)
UNPACK_EXPONENT = tl.constexpr(descriptors.UNPACK_EXPONENT)
AMAX_WORDS = tl.constexpr(descriptors.AMAX_DESC.itemsize // 8)
"""int64 words of one `AMAX_DESC`."""
