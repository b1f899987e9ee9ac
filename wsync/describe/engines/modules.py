"""How an engine's rank builds each module: which boxes are fused, stacked, sliced, padded and replicated.

Source: vLLM ``linear.py`` (``QKVParallelLinear``, ``MergedColumnParallelLinear``, ``RowParallelLinear``),
``vocab_parallel_embedding.py``, ``fused_moe/layer.py``; tests compare with vLLM's own loaders.
"""

from __future__ import annotations

from collections.abc import Sequence

from wsync.describe.engines.choices import check_transposed, recipe_of
from wsync.describe.engines.grid import Place
from wsync.describe.engines.groups import Module
from wsync.describe.engines.names import EXPERTS, engine_name
from wsync.describe.engines.storages import Piece, Storages
from wsync.describe.layout import divided
from wsync.describe.models.facts import Facts
from wsync.describe.parts import (
    COLUMN,
    CONV,
    DOWN,
    EMBEDDING,
    GATE,
    GATE_UP,
    HEAD,
    INDEXER,
    KV_A,
    LINEAR_A,
    LINEAR_B,
    LINEAR_QKV,
    LINEAR_Z,
    NORM,
    OTHER,
    Q_A,
    REPLICATED,
    ROUTER,
    ROW,
    UP,
    K,
    Part,
    Q,
    V,
)
from wsync.errors import ConfigError, ManifestError
from wsync.plan.geometry import replaced
from wsync.spec.box import Box
from wsync.spec.manifest import TensorSpec
from wsync.spec.recipes import get_recipe

VOCAB_MULTIPLE = 64
"""Rows that vLLM pads the vocabulary to a multiple of."""

FUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", (Q, K, V)),
    ("fused_qkv_a_proj", (Q_A, KV_A)),
    ("gate_up_proj", (GATE, UP)),
    ("in_proj_qkvz", (LINEAR_QKV, LINEAR_Z)),
    ("in_proj_ba", (LINEAR_B, LINEAR_A)),
)
"""Engine's name of a fused projection -> what it is made of, one behind the other."""

_WHOLE = frozenset({Q_A, KV_A, NORM, ROUTER, REPLICATED, INDEXER})


class RankBuilder:
    """Builds the modules of one rank.

    Args:
        facts: of the model; None where only names and shapes are known.
        place: where the rank stands.
        recipe: of linear weights.
        storages: that the modules are added to.
    """

    def __init__(self, facts: Facts | None, place: Place, recipe: str, storages: Storages) -> None:
        self.facts = facts
        self.place = place
        self.recipe = recipe
        self.storages = storages
        self.scale_groups: list[tuple[str, ...]] = []
        self._expert_boxes: dict[tuple[tuple[int, ...], int], Box] = {}

    def add(self, module: Module, experts: Sequence[int]) -> None:
        """Add a module; of experts those with the given numbers.

        Raises:
            ConfigError: the ranks do not divide it.
            RecipeError: the recipe does not fit it.
            ManifestError: it has a matrix that tensor parallelism does not know.
        """
        if module.experts:
            self._add_experts(module, experts)
        rest = dict(module.by_kind)
        for name, kinds in FUSED:
            for bias in (False, True):
                if all((kind, bias) in rest for kind in kinds):
                    members = [rest.pop((kind, bias)) for kind in kinds]
                    leaf = "bias" if bias else "weight"
                    self._add_fused(f"{module.stem}.{name}.{leaf}", members)
        for tensor, part in (*rest.values(), *module.others):
            if part.stacked:
                self._add_stacked(tensor, part, experts)
            elif part.kind in (EMBEDDING, HEAD):
                self._add_vocabulary(tensor)
            else:
                self._add(tensor.name, [Piece(tensor, box) for box in self.boxes(tensor, part)], part)

    # ---- slices

    def boxes(self, tensor: TensorSpec, part: Part) -> list[Box]:
        """What this rank takes of a tensor that is no expert, in the order of its memory."""
        whole = Box.whole(tensor.shape)
        if self.place.tp_size == 1 or part.kind in _WHOLE:
            return [whole]
        if part.kind in (K, V):
            return [self._kv_heads(tensor)]
        if part.kind in (LINEAR_QKV, CONV):
            return self._linear(whole)
        if part.kind == Q or part.kind in COLUMN:
            return [self._share(tensor, whole, 0)]
        if part.kind in ROW:
            return [whole if part.bias else self._share(tensor, whole, 1)]
        if part.kind == OTHER and len(tensor.shape) < 2:
            return [whole]
        raise ManifestError(
            f"tensor {tensor.name!r} of shape {tensor.shape} is none that tp={self.place.tp_size} is known to cut",
            hint="describe it with tp=1, or record the engine's own layout",
        )

    def _share(self, tensor: TensorSpec, box: Box, dim: int) -> Box:
        what = f"dimension {dim} of {tensor.name!r}"
        each = divided(tensor.shape[dim], self.place.tp_size, what, "tp")
        return replaced(box, dim, self.place.tp * each, (self.place.tp + 1) * each)

    def _kv_heads(self, tensor: TensorSpec) -> Box:
        """Fewer heads than ranks: neighbours hold the same one."""
        tp, heads = self.place.tp_size, self._facts().kv_heads
        rows = tensor.shape[0] // heads
        if tp > heads:
            first = self.place.tp // divided(tp, heads, "tp", "the number of key-value heads")
            return replaced(Box.whole(tensor.shape), 0, first * rows, (first + 1) * rows)
        each = divided(heads, tp, "the number of key-value heads", "tp") * rows
        return replaced(Box.whole(tensor.shape), 0, self.place.tp * each, (self.place.tp + 1) * each)

    def _linear(self, whole: Box) -> list[Box]:
        """Query, key and value of linear attention are sliced one by one."""
        linear = self._facts().linear
        if linear is None:
            raise ConfigError(f"tp={self.place.tp_size} cuts linear attention, but the model's config has none")
        boxes, base = [], 0
        for heads, dim in ((linear.key_heads, linear.key_dim),) * 2 + ((linear.value_heads, linear.value_dim),):
            each = divided(heads, self.place.tp_size, "the number of heads of linear attention", "tp") * dim
            begin = base + self.place.tp * each
            boxes.append(replaced(whole, 0, begin, begin + each))
            base += heads * dim
        return boxes

    def _facts(self) -> Facts:
        if self.facts is None:
            raise ConfigError(
                f"tp={self.place.tp_size} cuts heads, but of this model only names and shapes are known",
                hint="put the checkpoint's config.json beside its safetensors files",
            )
        return self.facts

    # ---- modules

    def _add(self, name: str, pieces: Sequence[Piece], part: Part, padded_elements: int = 0) -> None:
        recipe = recipe_of(pieces[0].tensor, part, self.recipe)
        self._store(name, pieces, recipe, padded_elements)

    def _store(self, name: str, pieces: Sequence[Piece], recipe: str, padded_elements: int = 0) -> None:
        self.storages.add(engine_name(name, self.facts), pieces, recipe, padded_elements)

    def _add_fused(self, name: str, members: Sequence[tuple[TensorSpec, Part]]) -> None:
        if members[0][1].kind == Q and self.place.tp_size > 1:
            divided(self._facts().heads, self.place.tp_size, "the number of attention heads", "tp")
        pieces = [Piece(tensor, box) for tensor, part in members for box in self.boxes(tensor, part)]
        self._add(name, pieces, members[0][1])
        if recipe_of(*members[0], self.recipe) == self.recipe:
            self._share_scale([tensor for tensor, _ in members])

    def _share_scale(self, tensors: Sequence[TensorSpec]) -> None:
        if get_recipe(self.recipe).needs_amax and len({t.shape[:-2] for t in tensors}) == 1:
            self.scale_groups.append(tuple(t.name for t in tensors))

    def _add_vocabulary(self, tensor: TensorSpec) -> None:
        """Equal shares of the padded rows; the last ranks have fewer that are real."""
        rows = tensor.shape[0]
        padded = -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        each = divided(padded, self.place.tp_size, f"the padded vocabulary of {tensor.name!r}", "tp")
        begin, end = min(self.place.tp * each, rows), min((self.place.tp + 1) * each, rows)
        if begin < end:
            box = replaced(Box.whole(tensor.shape), 0, begin, end)
            padding = (each - (end - begin)) * tensor.shape[1]
            self._store(tensor.name, [Piece(tensor, box)], "bf16", padding)

    def _add_experts(self, module: Module, experts: Sequence[int]) -> None:
        """``w13 [E, 2I, h]`` and ``w2 [E, h, I]`` of the experts of this rank."""
        w13: list[Piece] = []
        w2: list[Piece] = []
        for expert in experts:
            found = module.experts[expert]
            if set(found) != {GATE, UP, DOWN}:
                raise ManifestError(f"{module.stem}.{expert} has {', '.join(sorted(found))}, needed are gate, up, down")
            w13 += [self._expert_piece(found[kind], 0) for kind in (GATE, UP)]
            w2.append(self._expert_piece(found[DOWN], 1))
            self._share_scale([found[GATE], found[UP]])
        self._store(f"{module.stem}.{EXPERTS}.w13_weight", w13, self.recipe)
        self._store(f"{module.stem}.{EXPERTS}.w2_weight", w2, self.recipe)

    def _expert_piece(self, tensor: TensorSpec, dim: int) -> Piece:
        key = (tensor.shape, dim)
        box = self._expert_boxes.get(key)
        if box is None:  # the same for hundreds of experts in each layer
            whole = Box.whole(tensor.shape)
            box = whole
            if self.place.moe_tp_size > 1:
                box = replaced(whole, dim, *self._moe_share(tensor, tensor.shape[dim]))
            self._expert_boxes[key] = box
        return Piece(tensor, box)

    def _moe_share(self, tensor: TensorSpec, extent: int) -> tuple[int, int]:
        each = divided(extent, self.place.moe_tp_size, f"the intermediate size of {tensor.name!r}", "tp * dp / ep")
        return self.place.moe_tp * each, (self.place.moe_tp + 1) * each

    def _add_stacked(self, tensor: TensorSpec, part: Part, experts: Sequence[int]) -> None:
        """All experts in one checkpoint tensor."""
        leaf = ("w13" if part.kind == GATE_UP else "w2") + ("_bias" if part.bias else "_weight")
        name = f"{part.stem}.{EXPERTS}.{leaf}"
        if part.bias:
            if part.kind == GATE_UP or self.place.moe_tp == 0:  # the engine adds the other one up: once
                dims = self._moe_share(tensor, tensor.shape[1]) if part.kind == GATE_UP else (0, tensor.shape[1])
                boxes = [Box((e, dims[0]), (1, dims[1] - dims[0])) for e in experts]
                self._add(name, [Piece(tensor, box) for box in boxes], part)
        elif self.facts is not None and self.facts.family == "gpt_oss":
            self._add_transposed(name, tensor, part, experts)
        else:
            pieces = [Piece(tensor, box) for e in experts for box in self._stacked_boxes(tensor, part, e)]
            self._add(name, pieces, part)

    def _stacked_boxes(self, tensor: TensorSpec, part: Part, expert: int) -> list[Box]:
        """``[E, 2I, h]`` or ``[E, h, I]``: gate and up are sliced one by one."""
        _, rows, cols = tensor.shape
        if self.place.moe_tp_size == 1:
            return [Box((expert, 0, 0), (1, rows, cols))]
        if part.kind == DOWN:
            begin, end = self._moe_share(tensor, cols)
            return [Box((expert, 0, begin), (1, rows, end - begin))]
        begin, end = self._moe_share(tensor, rows // 2)
        return [Box((expert, half + begin, 0), (1, end - begin, cols)) for half in (0, rows // 2)]

    def _add_transposed(self, name: str, tensor: TensorSpec, part: Part, experts: Sequence[int]) -> None:
        """``[E, h, 2I]`` becomes ``[E, 2I, h]``, and ``[E, I, h]`` becomes ``[E, h, I]``."""
        check_transposed(tensor.name, self.recipe)
        _, rows, cols = tensor.shape
        top, left, bottom, right = 0, 0, rows, cols
        if part.kind == DOWN:
            top, bottom = self._moe_share(tensor, rows)
        else:
            left, right = self._moe_share(tensor, cols)
        held = (bottom - top, right - left)
        placed = [
            (Piece(tensor, Box((e, top, left), (1, *held))), slot * held[0] * held[1], (held[0] * held[1], 1, held[0]))
            for slot, e in enumerate(experts)
        ]
        self.storages.add_strided(engine_name(name, self.facts), placed, tensor.dtype, "bf16")
