"""Which kernels run: the one place that turns ``backend=`` and a tensor's device into a name."""

from __future__ import annotations

import importlib.util
import os

import torch

from wsync.errors import ConfigError

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
"""What ``backend=`` takes. All give the same bits."""


def resolve_backend(backend: str, device: torch.device) -> str:
    """The back end for tensors on ``device``.

    ``"auto"`` is ``"cpu"`` in CPU memory; on a GPU ``"cuda"`` where the CUDA library was built, else ``"triton"``.

    Raises:
        ConfigError: the name is unknown, the back end does not work on this device, or what it needs is missing here;
            it says what to use instead.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; known are {', '.join(BACKENDS)}")
    if device.type == "cpu":
        return _on_cpu(backend, device)
    if device.type == "cuda":
        return _on_gpu(backend, device)
    raise ConfigError(
        f"backend {backend!r} takes tensors in CPU or CUDA memory, but this one is on {device}",
        hint="move it with .to('cpu')",
    )


def _on_cpu(backend: str, device: torch.device) -> str:
    if backend in ("auto", "cpu"):
        return "cpu"
    if backend == "triton":
        _require_triton()
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            return backend
    if backend in ("cuda", "triton"):
        raise ConfigError(
            f"backend {backend!r} takes tensors on a GPU, but this one is on {device}",
            hint="move it with .to('cuda'), or use backend 'cpu'",
        )
    return backend


def _on_gpu(backend: str, device: torch.device) -> str:
    if backend in ("cpu", "reference"):
        raise ConfigError(
            f"backend {backend!r} takes tensors in CPU memory, but this one is on {device}",
            hint="use backend 'cuda' or 'triton', or move it with .to('cpu')",
        )
    if backend == "triton":
        _require_triton()
        return backend
    from wsync.kernels.cuda import require_cuda

    try:
        require_cuda()
    except ConfigError:
        if backend == "cuda" or not _has_triton():
            raise
        return "triton"
    return "cuda"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _require_triton() -> None:
    if not _has_triton():
        raise ConfigError(
            "backend 'triton' needs the package triton, which is not installed",
            hint="pip install 'wsync-rl[triton]', or use another backend",
        )
