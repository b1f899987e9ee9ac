"""The engine side of the benchmark: a tensor-parallel engine, its reference twin, and the bitwise verdict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from wsync.bench.world import World
from wsync.spec.manifest import TensorSpec
from wsync.spec.recipes import get_recipe

if TYPE_CHECKING:
    from wsync.adapters.engines.transformers import TransformersEngine

Shapes = list[tuple[str, list[int], str]]
"""Name, global shape and dtype of every tensor of the trainers."""

Snapshot = dict[str, torch.Tensor]
"""Name of a parameter -> its bytes, ``uint8`` of shape ``[nbytes]``."""


class Engine:
    """One tensor-parallel rank of the replica.

    Attributes:
        live: the engine that the rows write into.
        recipes: checkpoint name -> recipe, for every tensor of the trainers.
    """

    def __init__(self, world: World, config: dict[str, Any], recipe: str, tensors: Shapes) -> None:
        self.world = world
        self._config = config
        self._recipe = recipe
        self.live: TransformersEngine = self._build()
        self._tensors = tensors
        specs = [TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in tensors]
        self.recipes = {spec.name: str(self.live.recipe_for(spec)) for spec in specs}

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's parameters."""
        return sum(tensor.nbytes for tensor in parameters(self.live).values())

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand checkpoint tensors to the live engine's own loader."""
        with torch.no_grad():
            self.live.load_weights(tensors)

    def twin(self) -> Engine:
        """A second engine of the same kind, with memory of its own."""
        return Engine(self.world, self._config, self._recipe, self._tensors)

    def _build(self) -> TransformersEngine:
        from transformers import AutoConfig

        from wsync.adapters.engines.transformers import TransformersEngine

        fields = {key: value for key, value in self._config.items() if key != "model_type"}
        config = AutoConfig.for_model(self._config["model_type"], **fields)
        return TransformersEngine(
            config,
            tp_rank=self.world.side_rank,
            tp_size=self.world.options.num_engines,
            quantization=self._recipe if get_recipe(self._recipe).quantised else None,
        )


def parameters(engine: TransformersEngine) -> dict[str, torch.Tensor]:
    """The engine's parameters and persistent buffers by its own names; tied ones once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in engine.live_tensors().items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def snapshot(engine: Engine) -> Snapshot:
    """A copy of the bytes of every parameter."""
    return {name: _bytes(tensor).clone() for name, tensor in parameters(engine.live).items()}


def difference(engine: Engine, reference: Snapshot) -> str:
    """Compare live memory with a snapshot of a twin, byte for byte; empty when they are equal."""
    live = parameters(engine.live)
    if live.keys() != reference.keys():
        return f"parameters {sorted(live.keys() ^ reference.keys())[0]!r} and others are on one side only"
    for name, expected in reference.items():
        got = _bytes(live[name])
        if got.shape != expected.shape:
            return f"{name} holds {got.numel()} bytes, {expected.numel()} expected"
        if not torch.equal(got, expected):
            wrong = (got != expected).nonzero().flatten()
            at = int(wrong[0])
            values = f"{int(got[at])}, not {int(expected[at])}"
            return f"{name} differs in {len(wrong)} of {got.numel()} bytes, first at {at}: {values}"
    return ""


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    return tensor.contiguous().reshape(-1).view(torch.uint8)
