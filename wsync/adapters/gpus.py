"""Which GPU of its machine a rank uses, for the plan. Asks nothing that would begin to use one."""

from __future__ import annotations

import os

import msgspec
import torch

from wsync.spec.manifest import DEVICE, HOST, RankInfo


def on_its_gpu(info: RankInfo, *, in_host: bool) -> RankInfo:
    """What is known of this process's rank, completed by the GPU that it uses; as it is if it uses none.

    Args:
        info: of the rank. A GPU that it names already stays.
        in_host: what is synced is in host memory: tensors on the CPU, or what a transport stages there.
    """
    if info.gpu is None and not _uses_gpu():
        return info
    gpu = _gpu_index() if info.gpu is None else info.gpu
    return msgspec.structs.replace(info, gpu=gpu, memory=HOST if in_host else DEVICE)


def _uses_gpu() -> bool:
    """Whether this process has begun to use CUDA, or is given one GPU to use."""
    if _is_begun():
        return True
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Counting devices leaves CUDA alone where NVML answers, which it does unless a driver is missing or broken.
    return visible is not None and len(_entries(visible)) == 1 and torch.cuda.device_count() == 1


def _is_begun() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _gpu_index() -> int | None:
    """Index on the machine of the current device; None where CUDA_VISIBLE_DEVICES names it by a UUID.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables": devices are numbered as they are listed, and what
    follows an invalid index is not visible.
    """
    device = torch.cuda.current_device() if _is_begun() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return device
    entries = _entries(visible)
    if device >= len(entries) or not all(entry.isascii() and entry.isdecimal() for entry in entries[: device + 1]):
        return None
    return int(entries[device])


def _entries(visible: str) -> list[str]:
    return [entry.strip() for entry in visible.split(",")]
