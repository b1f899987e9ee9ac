"""An engine that fuses q, k, v and stacks experts, tensor parallel, in any recipe; its loader is slicing code.

Weights are cut by heads, intermediate rows and experts' rows; scales of whole tensors are kept once for a fused matrix.
"""

from __future__ import annotations

import torch
from torch import nn

from wsync.spec.recipes import get_recipe, recipe_parts

HIDDEN, Q, KV, INTER, EXPERTS = 64, 192, 96, 192, 3


def checkpoint_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        "attn.q_proj.weight": (Q, HIDDEN),
        "attn.k_proj.weight": (KV, HIDDEN),
        "attn.v_proj.weight": (KV, HIDDEN),
        "attn.o_proj.weight": (HIDDEN, Q),
        "norm.weight": (HIDDEN,),
    }
    for e in range(EXPERTS):
        shapes |= {f"experts.{e}.{w}.weight": (INTER, HIDDEN) for w in ("w1", "w3")}
        shapes[f"experts.{e}.w2.weight"] = (HIDDEN, INTER)
    return shapes


GROUPS = (
    ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    *((f"experts.{e}.w1.weight", f"experts.{e}.w3.weight") for e in range(EXPERTS)),
)
"""What the engine's layout makes of it: tensors that it fuses into one matrix."""


def _params(name: str, batch: tuple[int, ...], rows: int, cols: int, recipe: str) -> dict[str, nn.Parameter]:
    """A parameter for each part of a fused matrix (or a stack of them)."""
    parts = recipe_parts(name, (*batch, rows, cols), "bfloat16", recipe)
    return {
        p.name.replace(".", "_"): nn.Parameter(torch.zeros(p.shape, dtype=getattr(torch, p.dtype)), requires_grad=False)
        for p in parts
    }


class FusedEngine(nn.Module):
    """One tensor-parallel rank."""

    def __init__(self, recipe: str, rank: int, world_size: int) -> None:
        super().__init__()
        self.recipe, self.rank, self.world_size = get_recipe(recipe), rank, world_size
        w = world_size
        made = {
            **_params("qkv", (), (Q + 2 * KV) // w, HIDDEN, recipe),
            **_params("o", (), HIDDEN, Q // w, recipe),
            **_params("w13", (EXPERTS,), 2 * INTER // w, HIDDEN, recipe),
            **_params("w2", (EXPERTS,), HIDDEN, INTER // w, recipe),
            "norm": nn.Parameter(torch.zeros(HIDDEN, dtype=torch.bfloat16), requires_grad=False),
        }
        for name, param in made.items():
            self.register_parameter(name, param)

    def load_weights(self, weights) -> None:
        for name, loaded in weights:
            if name == "norm.weight":
                self.norm.data.copy_(loaded)
                continue
            module, kind = name.rsplit(".", 1)
            self._load(module.split("."), kind.removeprefix("weight"), loaded)

    def _load(self, path: list[str], suffix: str, loaded: torch.Tensor) -> None:
        leaf = path[-1].removesuffix("_proj")
        index = int(path[1]) if path[0] == "experts" else None
        fused = {"q": "qkv", "k": "qkv", "v": "qkv", "w1": "w13", "w3": "w13"}.get(leaf, leaf)
        param = getattr(self, fused + suffix).data
        place = param if index is None else param[index]
        if suffix and loaded.numel() == 1:
            place.copy_(loaded.reshape(place.shape))
        elif leaf in ("o", "w2"):  # row parallel: columns, unless there is one scale for a whole row
            if loaded.shape[-1] > 1:
                loaded = loaded.chunk(self.world_size, dim=-1)[self.rank]
            place.copy_(loaded)
        else:
            first = {"q": 0, "k": Q, "v": Q + KV, "w1": 0, "w3": INTER}[leaf] // self.world_size
            rows = loaded.shape[0] // self.world_size
            place[first : first + rows].copy_(loaded[self.rank * rows : (self.rank + 1) * rows])
