"""Whether Triton is here, and what the device can do."""

from __future__ import annotations

import importlib
import os

import torch

from wsync.errors import ConfigError

INTERPRETER = 0
"""The architecture that stands for Triton's interpreter: integer codecs, host memory."""


def check_triton() -> None:
    """Refuse to go on without Triton.

    Raises:
        ConfigError: Triton does not import.
    """
    try:
        importlib.import_module("triton.language")
    except (ImportError, OSError) as e:
        raise ConfigError(
            f"the backend 'triton' needs the package triton, but it does not import: {e}",
            hint="pip install 'wsync-rl[triton]'",
        ) from e


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on host memory."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_of(device: torch.device | str | int | None) -> torch.device:
    """The device whose memory the kernels use.

    Raises:
        ConfigError: there is no CUDA device and the interpreter is not chosen.
    """
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "the backend 'triton' needs a CUDA device, but torch finds none",
            hint="set TRITON_INTERPRET=1 before the first import to run the kernels on the host, slowly",
        )
    return torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)


def arch_of(device: torch.device) -> int:
    """Compute capability as ten times major plus minor, or `INTERPRETER`."""
    if device.type == "cpu":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
