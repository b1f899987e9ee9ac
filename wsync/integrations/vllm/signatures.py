"""Compares what this package implements with the vLLM that is installed. vLLM's interfaces drift.

The classes here do not inherit from vLLM's (so that a trainer needs no vLLM): nothing but this comparison, in a test
and when a worker starts, says that a member has changed.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

WRITTEN_FOR = "0.28 to 0.33"
"""Versions of vLLM whose interfaces this package follows."""

_BASE = "vllm.distributed.weight_transfer.base"


def vllm_version() -> str:
    """The installed vLLM's version, or an empty string without one."""
    from importlib.metadata import PackageNotFoundError, distribution, packages_distributions

    for name in packages_distributions().get("vllm", ()):
        try:
            return distribution(name).version
        except PackageNotFoundError:
            continue
    return ""


def differences(ours: type, theirs: type) -> list[str]:
    """What callers of ``theirs`` may do that ``ours`` does not take: members and arguments, one phrase each."""
    found = []
    names = {n for n in dir(theirs) if n == "__init__" or not n.startswith("_")}
    names |= {n for n in getattr(theirs, "__annotations__", {}) if not n.startswith("_")}
    for name in sorted(names):
        mine = inspect.getattr_static(ours, name, None)
        if mine is None and not hasattr(ours, name):
            found.append(f"{name} is missing")
        elif callable(getattr(theirs, name, None)) and callable(getattr(ours, name, None)):
            found += [f"{name}{phrase}" for phrase in _call_differences(getattr(ours, name), getattr(theirs, name))]
    return found


def _call_differences(ours: Any, theirs: Any) -> list[str]:
    """Arguments that a caller of ``theirs`` passes by name and ``ours`` lacks, or that only ``ours`` requires."""
    try:
        mine, wanted = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    except (TypeError, ValueError):  # a class attribute that is a class without a readable signature
        return []
    takes_any = any(p.kind is p.VAR_KEYWORD for p in mine.values())
    plain = [p for p in wanted.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    found = [f" takes no {p.name!r}" for p in plain if p.name not in mine and not takes_any]
    required = [p for p in mine.values() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return found + [f" needs {p.name!r}, which nobody passes" for p in required if p.name not in wanted]


def worker_differences() -> list[str]:
    """How the worker backend differs from the base class of the vLLM that this process runs; empty without one."""
    from wsync.integrations.vllm.worker import WsyncWorkerBackend

    theirs = getattr(sys.modules.get(_BASE), "WeightTransferEngine", None)
    return differences(WsyncWorkerBackend, theirs) if theirs is not None else []


def describe_differences(found: list[str]) -> str:
    """One sentence with both versions."""
    return (
        f"wsync's backend was written for vLLM {WRITTEN_FOR}, this is vLLM {vllm_version() or 'of unknown version'}, "
        f"which differs: {'; '.join(found)}"
    )
