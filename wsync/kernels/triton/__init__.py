"""Triton kernels behind the same descriptors as the CPU's and CUDA's: the same bits.

Importing this package asks for Triton and names what is missing; nothing else in wsync imports it. Memory that
descriptors name is that of the current CUDA device, or of the host where ``TRITON_INTERPRET=1`` was set before the
first import (slow, for tests). Descriptors, units and results travel to and from the device in every call.
"""

from __future__ import annotations

from wsync.kernels.triton.support import check_triton

check_triton()

from wsync.kernels.triton.ops import amax, digest, installed_digest, pack, scales_from_amax, unpack  # noqa: E402
from wsync.kernels.triton.quantize import quantize_triton  # noqa: E402

__all__ = ["amax", "digest", "installed_digest", "pack", "quantize_triton", "scales_from_amax", "unpack"]
