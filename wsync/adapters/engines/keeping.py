"""Keeps an engine as it is while its loader runs for the recorder: its tensors, and where its modules hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from wsync.adapters.engines.live import Placed


class _Kept(NamedTuple):
    tensor: torch.Tensor
    memory: torch.Tensor
    placed: Placed
    kind: type[torch.Tensor]
    attributes: dict[str, Any]
    requires_grad: bool


@contextmanager
def kept(tensors: Mapping[str, torch.Tensor], module: nn.Module | None = None) -> Iterator[None]:
    """Put back what the body moves or replaces, whether it fails or not. Bytes are not looked at.

    Args:
        tensors: live tensors, which get their memory back.
        module: holds them; its and its children's parameters and buffers become the same objects again.
    """
    before = [_Kept(t, t.detach(), Placed.of(t), type(t), dict(t.__dict__), t.requires_grad) for t in tensors.values()]
    held = [(m, dict(m._parameters), dict(m._buffers)) for m in (module.modules() if module is not None else ())]
    try:
        yield
    finally:
        for m, parameters, buffers in held:
            _put_back(m._parameters, parameters)
            _put_back(m._buffers, buffers)
        for one in before:
            if type(one.tensor) is not one.kind or Placed.of(one.tensor) != one.placed:
                _restore(one)


def _put_back(entries: dict[str, Any], before: dict[str, Any]) -> None:
    same = entries.keys() == before.keys() and all(entries[k] is before[k] for k in before)
    if not same:
        entries.clear()
        entries.update(before)


def _restore(one: _Kept) -> None:
    if type(one.tensor) is one.kind:
        one.tensor.data = one.memory
        return
    # The object itself was swapped with another tensor: swap it with one that is what it was.
    again = torch.Tensor._make_subclass(one.kind, one.memory, one.requires_grad)
    again.__dict__.update(one.attributes)
    torch.utils.swap_tensors(one.tensor, again)  # type: ignore[no-untyped-call]
