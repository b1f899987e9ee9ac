"""An engine's live tensors, and the loader of engines that have none of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from wsync.errors import ConfigError, ShapeMismatchError

if TYPE_CHECKING:
    import torch

LoadWeights = Callable[[Iterable[tuple[str, "torch.Tensor"]]], Any]
"""An engine's loader: takes pairs of a checkpoint name and a tensor."""


def live_tensors(engine_model: Any) -> dict[str, torch.Tensor]:
    """The live parameters and buffers of an engine: its own ``live_tensors()``, a module's, or a dict as it is.

    Raises:
        ConfigError: it is none of these.
    """
    if hasattr(engine_model, "live_tensors"):
        return dict(engine_model.live_tensors())
    if isinstance(engine_model, Mapping):
        return dict(engine_model)
    if hasattr(engine_model, "named_parameters") and hasattr(engine_model, "named_buffers"):
        tensors = dict(engine_model.named_parameters())
        keys = set(engine_model.state_dict(keep_vars=True))
        tensors.update((name, b) for name, b in engine_model.named_buffers() if name in keys)
        return tensors
    raise ConfigError(
        f"an engine is a module, a dict of tensors or has live_tensors(); got {type(engine_model).__name__}"
    )


def load_by_name(tensors: Mapping[str, torch.Tensor]) -> LoadWeights:
    """The loader of an engine whose tensors have checkpoint names and whole shapes: one copy each."""

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            target = tensors.get(name)
            if target is None:
                continue
            if target.shape != weight.shape:
                raise ShapeMismatchError(
                    f"tensor {name!r} has shape {tuple(weight.shape)} at the trainer "
                    f"and {tuple(target.shape)} in the engine"
                )
            target.data.copy_(weight)

    return load
