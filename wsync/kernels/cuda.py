"""The CUDA kernels: the operations of `wsync.kernels.ops` on device addresses and a stream.

A `CudaProgram` is compiled on the host, where descriptors are checked, and copied to the device once; each run of it is
a few launches without an allocation, in the order of its stream. The one-shot functions compile, run and wait.

All give the bits of the CPU kernels, but that a NaN code may decode to another NaN. Beyond what those refuse, an
element must lie at a multiple of its size, the bucket at a multiple of 16 bytes, and a box has at most 2^31 - 1
elements. Runs of one program must not overlap: they share the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from wsync.errors import ConfigError, StateError
from wsync.kernels.ops import Descriptors, PackResult
from wsync.native import load_extension
from wsync.plan.descriptors import AMAX_DESC, PACK_DESC, TRANSFORM_DESC, UNPACK_DESC

_C = load_extension()

_WORD = 0xFFFFFFFFFFFFFFFF
_ELEMENT_BITS = 40
_NO_BAD_KEY = _WORD


def require_cuda() -> None:
    """Check that kernels can run here.

    Raises:
        ConfigError: torch sees no GPU, or the CUDA library of wsync was not built or finds none; it says which.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "backend 'cuda' needs a GPU, but torch sees none on this machine",
            hint="use backend 'cpu', or a CUDA build of torch on a machine with a GPU",
        )
    found = _C.cuda_probe()
    if not found["available"]:
        raise ConfigError(
            f"backend 'cuda' needs the CUDA library of wsync, but {found['reason']}",
            hint="build wsync with nvcc on PATH, or use backend 'triton' or 'cpu'",
        )


class CudaProgram:
    """Descriptors, checked and bound to one device, to be run any number of times.

    Attributes:
        num_launches: kernels that one run starts (and one that resets the result).
        device_bytes: device memory that it holds.
    """

    def __init__(self, program: Any, descs: Descriptors | None, device: torch.device) -> None:
        """Use `compile_pack` and its siblings instead."""
        self._program = program
        self._pieces = None if descs is None else descs["piece_idx"].copy()
        self._device = device
        host = torch.from_numpy(program.bytes)
        self._bytes = host.to(device) if len(host) else torch.empty(16, dtype=torch.uint8, device=device)
        self._result = torch.empty(2, dtype=torch.int64, device=device)
        self._stream: torch.cuda.Stream | None = None
        self.num_launches = len(program.launches)
        self.device_bytes = self._bytes.numel() + 16

    def run(self, base: int = 0, stream: int | None = None) -> None:
        """Start the kernels and return.

        Args:
            base: address of the bucket on the device, where the descriptors name offsets in one.
            stream: handle of the CUDA stream, or None: torch's current one of the device.

        Raises:
            ConfigError: ``base`` is no multiple of 16, or the CUDA library is missing.
            WsyncError: a launch failed; it names CUDA's error.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            on = current if stream is None else _external_stream(stream, self._device)
            # Memory that is let go while the kernels run must not be given to work on another stream.
            self._bytes.record_stream(on)
            self._result.record_stream(on)
            self._program.run(self._bytes.data_ptr(), base, self._result.data_ptr(), on.cuda_stream)
            self._stream = on

    def result(self) -> PackResult:
        """Wait for the last run, on whatever stream it was, and return what it found.

        ``bad`` is ``(piece_idx, index)`` for a pack or a transform, ``(descriptor index, index)`` otherwise.

        Raises:
            StateError: there was no run.
        """
        if self._stream is None:
            raise StateError("result() of a program that never ran", hint="call run() first")
        self._stream.synchronize()
        digest, key = (int(value) & _WORD for value in self._result.cpu().tolist())
        if key == _NO_BAD_KEY:
            return PackResult(digest, None)
        desc_idx, element = key >> _ELEMENT_BITS, key & ((1 << _ELEMENT_BITS) - 1)
        return PackResult(digest, (desc_idx if self._pieces is None else int(self._pieces[desc_idx]), element))


def _external_stream(handle: int, device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.ExternalStream(handle, device=device)  # type: ignore[no-untyped-call]
    return stream


def compile_pack(descs: Descriptors, device: torch.device) -> CudaProgram:
    """A program that packs. Arguments and errors: `wsync.kernels.pack`."""
    return CudaProgram(_C.cuda_pack(_checked(descs, PACK_DESC, "PACK_DESC")), descs, device)


def compile_amax(descs: Descriptors, device: torch.device) -> CudaProgram:
    """A program that raises amax cells. Arguments and errors: `wsync.kernels.amax`."""
    return CudaProgram(_C.cuda_amax(_checked(descs, AMAX_DESC, "AMAX_DESC")), None, device)


def compile_scales_from_amax(descs: Descriptors, device: torch.device) -> CudaProgram:
    """A program that writes scales. Arguments and errors: `wsync.kernels.scales_from_amax`."""
    return CudaProgram(_C.cuda_scales_from_amax(_checked(descs, AMAX_DESC, "AMAX_DESC")), None, device)


def compile_unpack(descs: Descriptors, device: torch.device) -> CudaProgram:
    """A program that unpacks. Arguments and errors: `wsync.kernels.unpack`."""
    return CudaProgram(_C.cuda_unpack(_checked(descs, UNPACK_DESC, "UNPACK_DESC")), None, device)


def compile_installed_digest(descs: Descriptors, device: torch.device) -> CudaProgram:
    """A program that digests what is installed. Arguments and errors: `wsync.kernels.installed_digest`."""
    return CudaProgram(_C.cuda_installed_digest(_checked(descs, UNPACK_DESC, "UNPACK_DESC")), None, device)


def compile_transform(descs: Descriptors, device: torch.device) -> CudaProgram:
    """A program of transforms. Arguments and errors: `wsync.kernels.transform`."""
    return CudaProgram(_C.cuda_transform(_checked(descs, TRANSFORM_DESC, "TRANSFORM_DESC")), descs, device)


class CudaKernels:
    """The operations of `wsync.kernels.ops` on one device, each one compiled, run and waited for.

    Addresses in descriptors are the device's. Runs are on torch's current stream.
    """

    def __init__(self, device: torch.device) -> None:
        """Bind to ``device``.

        Raises:
            ConfigError: see `require_cuda`.
        """
        require_cuda()
        self._device = device

    def pack(self, descs: Descriptors, dst_base: int) -> PackResult:
        """See `wsync.kernels.pack`."""
        return _once(compile_pack(descs, self._device), dst_base)

    def amax(self, descs: Descriptors) -> tuple[int, int] | None:
        """See `wsync.kernels.amax`."""
        return _once(compile_amax(descs, self._device)).bad

    def scales_from_amax(self, descs: Descriptors) -> None:
        """See `wsync.kernels.scales_from_amax`."""
        _once(compile_scales_from_amax(descs, self._device))

    def unpack(self, descs: Descriptors, src_base: int) -> int:
        """See `wsync.kernels.unpack`."""
        return _once(compile_unpack(descs, self._device), src_base).digest

    def installed_digest(self, descs: Descriptors) -> int:
        """See `wsync.kernels.installed_digest`."""
        return _once(compile_installed_digest(descs, self._device)).digest

    def transform(self, descs: Descriptors) -> tuple[int, int] | None:
        """See `wsync.kernels.transform`."""
        return _once(compile_transform(descs, self._device)).bad

    def digest(self, address: int, nbytes: int, first_word: int) -> int:
        """See `wsync.kernels.digest`."""
        return _once(CudaProgram(_C.cuda_digest(address, nbytes, first_word), None, self._device)).digest


def _once(program: CudaProgram, base: int = 0) -> PackResult:
    program.run(base)
    return program.result()


def _checked(descs: Descriptors, dtype: np.dtype[Any], name: str) -> Descriptors:
    if descs.dtype != dtype:
        raise ConfigError(f"the descriptors must have the dtype {name}, but they have {descs.dtype}")
    return descs
