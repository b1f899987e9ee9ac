"""Manifests for tests: random ones with every oddity that the planner has to take, and those of known model shapes.

Deterministic in the random generator that is passed in; no torch, no memory behind them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wsync.plan.geometry import replaced, touched_cells
from wsync.plan.grids import grids_of, to_packed
from wsync.plan.types import PlanOptions
from wsync.spec.box import Box, contiguous_strides
from wsync.spec.manifest import (
    CopySpec,
    RankInfo,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    StorageSpec,
    TensorSpec,
)
from wsync.spec.recipes import RECIPES, PartSpec, get_recipe, recipe_parts

_FLOATS = ("bfloat16", "float32", "float16")
_COLUMNS = 32
"""Columns at whose multiples every edge of some tensors falls: those that any recipe can encode."""


@dataclass(frozen=True)
class Scenario:
    """What `wsync.make_plan` takes, without a cluster."""

    source: SourceManifest
    sink: SinkManifest
    options: PlanOptions


def split_evenly(shape: tuple[int, ...], dim: int, count: int) -> list[Box]:
    """``Shard(dim)`` over ``count`` ranks as torch.chunk cuts it: ceil(n / count) each, the last short or empty."""
    size = -(-shape[dim] // count)
    whole = Box.whole(shape)
    edges = [min(i * size, shape[dim]) for i in range(count + 1)]
    return [replaced(whole, dim, begin, end) for begin, end in itertools.pairwise(edges)]


# ---- random scenarios


def random_scenario(rng: random.Random, *, max_tensors: int = 5) -> Scenario:
    """Several trainer ranks and replicas on several hosts, with uneven, replicated, strided and empty shards.

    Weights have up to a few hundred rows and columns, so that shard edges fall on and off the scale grids; sinks take
    column, row and replicated shards, overlapping boxes, lone scales, transposed and padded destinations, aliases, and
    tensors that share their scales. Every recipe occurs; edges of some tensors respect groups of columns.
    """
    hosts = [f"h{i}" for i in range(rng.randint(1, 4))]
    tensors = _random_tensors(rng, rng.randint(1, max_tensors))
    world = rng.randint(1, 5)
    cols = _random_cols(rng, tensors)
    shards = tuple(
        ((),) * world if t.alias_of else tuple(_random_shards(rng, t.shape, world, cols[t.name])) for t in tensors
    )
    source = SourceManifest(tuple(RankInfo(rng.choice(hosts), i) for i in range(world)), tensors, shards)
    ranks: list[SinkRankManifest] = []
    for replica in range(rng.randint(1, 3)):
        ranks += _random_replica(rng, f"engine-{replica}", tensors, hosts, cols)
    options = PlanOptions(bucket_bytes=rng.choice((16384, 16640, 32768, 65536)))
    return Scenario(source, SinkManifest(tuple(ranks)), options)


def _random_tensors(rng: random.Random, count: int) -> tuple[TensorSpec, ...]:
    out = []
    for i in range(count):
        kind = rng.random()
        if kind < 0.7:
            sizes = (1, 7, 32, 64, 96, 100, 127, 128, 129, 192, 256, 300)
            shape: tuple[int, ...] = (rng.choice(sizes), rng.choice(sizes))
            if rng.random() < 0.25:
                shape = (rng.randint(1, 3), *shape)
            dtype = rng.choice(_FLOATS)
        else:
            shape = tuple(rng.randint(1, (40, 20, 5, 3, 2, 2)[d]) for d in range(rng.randint(0, 6)))
            dtype = rng.choice((*_FLOATS, "int64", "uint8"))
        out.append(TensorSpec(f"t{i}", shape, dtype))
    if rng.random() < 0.4:
        target = rng.choice(out)
        out.append(TensorSpec("tied", target.shape, target.dtype, alias_of=target.name))
    return tuple(out)


def _random_cols(rng: random.Random, tensors: tuple[TensorSpec, ...]) -> dict[str, int]:
    """For each tensor the columns at whose multiples its edges fall."""
    cols: dict[str, int] = {}
    for t in tensors:
        whole = len(t.shape) > 1 and t.shape[-1] % _COLUMNS == 0 and rng.random() < 0.85
        cols[t.name] = cols[t.alias_of] if t.alias_of else _COLUMNS if whole else 1
    return cols


def _in_columns(boxes: Sequence[Box], cols: int) -> list[Box]:
    """Boxes that count columns by ``cols``, as boxes of elements."""
    if cols == 1:
        return list(boxes)
    return [Box((*b.offset[:-1], b.offset[-1] * cols), (*b.shape[:-1], b.shape[-1] * cols)) for b in boxes]


def _by_columns(shape: tuple[int, ...], cols: int) -> tuple[int, ...]:
    return shape if cols == 1 else (*shape[:-1], shape[-1] // cols)


def _random_shards(rng: random.Random, shape: tuple[int, ...], world: int, cols: int) -> list[tuple[Box, ...]]:
    """The boxes of each rank; together they cover the tensor."""
    return [tuple(_in_columns(b, cols)) for b in _random_boxes(rng, _by_columns(shape, cols), world)]


def _random_boxes(rng: random.Random, shape: tuple[int, ...], world: int) -> list[tuple[Box, ...]]:
    whole = Box.whole(shape)
    kind = rng.choice(("shard", "replicate", "one", "hybrid", "strided", "grid")) if shape else "replicate"
    if kind == "replicate":
        return [(whole,)] * world
    if kind == "one":
        owner = rng.randrange(world)
        return [(whole,) if r == owner else () for r in range(world)]
    dim = rng.randrange(len(shape))
    if kind == "shard":
        return [(b,) for b in split_evenly(shape, dim, world)]
    if kind == "hybrid":  # ranks in two groups, each group holds everything
        groups = [world - world // 2, world // 2] if world > 1 else [1]
        return [(b,) for size in groups for b in split_evenly(shape, dim, size)]
    if kind == "strided":  # every rank has two separate bands
        bands = split_evenly(shape, dim, 2 * world)
        return [(bands[r], bands[world + r]) for r in range(world)]
    outer = rng.randint(1, world)
    inner_dim = rng.randrange(len(shape))
    boxes: list[list[Box]] = [[] for _ in range(world)]
    for i, band in enumerate(split_evenly(shape, dim, outer)):
        for j, part in enumerate(split_evenly(band.shape, inner_dim, -(-world // outer))):
            boxes[(i + j * outer) % world].append(part.shifted(band.offset))
    return [tuple(b) for b in boxes]


def _random_replica(
    rng: random.Random, name: str, tensors: tuple[TensorSpec, ...], hosts: list[str], cols: dict[str, int]
) -> list[SinkRankManifest]:
    world = rng.randint(1, 4)
    builders = [_Storages(rng) for _ in range(world)]
    recipes: dict[str, str] = {}
    favourite = rng.choice((None, *RECIPES))
    for tensor in tensors:
        if rng.random() < 0.15:
            continue
        recipe = recipes[tensor.name] = _random_recipe(rng, tensor, cols[tensor.name], favourite)
        for rank, box in enumerate(_random_needs(rng, tensor.shape, world, cols[tensor.name])):
            if box.num_elements:
                _take_parts(rng, builders[rank], tensor, recipe, box)
    info = [RankInfo(rng.choice(hosts), 100 + r) for r in range(world)]
    groups = _random_groups(rng, tensors, recipes, cols)
    return [
        SinkRankManifest(name, r, world, info[r], recipes, b.storages(), tuple(b.copies), groups)
        for r, b in enumerate(builders)
    ]


def _take_parts(rng: random.Random, builder: _Storages, tensor: TensorSpec, recipe: str, box: Box) -> None:
    """A box of a weight and the scales that it touches; now and then only the weight, or only scales."""
    facts = get_recipe(recipe)
    parts = _parts_of(tensor, recipe, box)
    for part, wanted in parts:
        lone = part.role == "weight" and facts.group > 1  # packing these weights makes the scales
        if len(parts) > 1 and not lone and rng.random() < 0.1:
            continue
        builder.take(tensor.name, part, wanted, facts.group // facts.packed if part.role == "weight" else 1)


def _random_recipe(rng: random.Random, tensor: TensorSpec, cols: int, favourite: str | None) -> str:
    if tensor.dtype not in _FLOATS:
        return "raw"
    known = [
        r.name
        for r in RECIPES.values()
        if r.name == "raw"
        or (r.quantised and len(tensor.shape) > 1 and cols % r.group == 0)
        or (r.name == "bf16" and tensor.dtype != "float16")
    ]
    return favourite if favourite in known and rng.random() < 0.8 else rng.choice(known)


def _random_groups(
    rng: random.Random, tensors: tuple[TensorSpec, ...], recipes: dict[str, str], cols: dict[str, int]
) -> tuple[tuple[str, ...], ...]:
    """Tensors that share an amax; some of a group are not taken by the replica at all."""
    by_kind: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for tensor in tensors:
        recipe = recipes.get(tensor.name)
        if recipe is not None and get_recipe(recipe).needs_amax:
            by_kind.setdefault((recipe, tensor.shape[:-2]), []).append(tensor.name)
    groups: list[tuple[str, ...]] = []
    for (_, batch), names in sorted(by_kind.items()):
        rng.shuffle(names)
        members = names[: rng.randint(1, len(names))]
        for tensor in tensors:
            taken = tensor.name in recipes or any(tensor.name in names for names in groups)
            encodable = tensor.dtype in _FLOATS and len(tensor.shape) > 1 and cols[tensor.name] == _COLUMNS
            if not taken and encodable and tensor.shape[:-2] == batch and rng.random() < 0.3:
                members.append(tensor.name)
        if rng.random() < 0.7:
            groups.append(tuple(members))
    return tuple(groups)


def _random_needs(rng: random.Random, shape: tuple[int, ...], world: int, cols: int) -> list[Box]:
    """What each rank of a replica needs of one tensor."""
    return _in_columns(_random_parts(rng, _by_columns(shape, cols), world), cols)


def _random_parts(rng: random.Random, shape: tuple[int, ...], world: int) -> list[Box]:
    whole = Box.whole(shape)
    kind = rng.choice(("column", "replicated", "row", "kv", "any")) if shape else "replicated"
    if kind == "replicated":
        return [whole] * world
    if kind == "kv":  # fewer heads than ranks: neighbours need the same
        halves = split_evenly(shape, 0, -(-world // 2))
        return [halves[r // 2] for r in range(world)]
    if kind == "any":
        return [_random_box(rng, shape) for _ in range(world)]
    return split_evenly(shape, 0 if kind == "column" else len(shape) - 1, world)


def _random_box(rng: random.Random, shape: tuple[int, ...]) -> Box:
    offset, extent = [], []
    for n in shape:
        begin = rng.randrange(n)
        offset.append(begin)
        extent.append(rng.randint(1, n - begin))
    return Box(tuple(offset), tuple(extent))


class _Storages:
    """Lays copies out in one storage for each dtype: fused one behind the other, padded, transposed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: dict[str, int] = {}
        self.copies: list[CopySpec] = []

    def take(self, tensor: str, part: PartSpec, box: Box, cols: int = 1) -> None:
        """Take a box, and now and then it or a part of it again; edges fall on multiples of ``cols`` columns."""
        self._add(tensor, part, box)
        if self._rng.random() < 0.1:
            self._add(tensor, part, box)  # the engine keeps it twice
        if self._rng.random() < 0.1 and box.shape:
            (inner,) = _in_columns([_random_box(self._rng, _by_columns(box.shape, cols))], cols)
            self._add(tensor, part, inner.shifted(box.offset))

    def _add(self, tensor: str, part: PartSpec, box: Box) -> None:
        rng = self._rng
        order = list(range(len(box.shape)))
        if rng.random() < 0.3:
            rng.shuffle(order)
        strides, step = [0] * len(order), 1
        for dim in reversed(order):
            strides[dim] = step
            step *= box.shape[dim] + (rng.random() < 0.2)
        first = self._used.setdefault(part.dtype, 0) + rng.randrange(3)
        idx = list(self._used).index(part.dtype)
        self.copies.append(CopySpec(tensor, part.role, box, idx, first, tuple(strides)))
        self._used[part.dtype] = first + step

    def storages(self) -> tuple[StorageSpec, ...]:
        return tuple(StorageSpec(f"storage.{dtype}", dtype, used) for dtype, used in self._used.items())


# ---- known model shapes


def dense_tensors(
    layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, vocab: int
) -> tuple[TensorSpec, ...]:
    """A decoder with grouped-query attention, q and k norms and tied embeddings, in bf16."""
    out = [TensorSpec("model.embed_tokens.weight", (vocab, hidden), "bfloat16")]
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "self_attn.q_norm": (head_dim,),
            "self_attn.k_norm": (head_dim,),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        out += [TensorSpec(f"{p}{name}.weight", shape, "bfloat16") for name, shape in shapes.items()]
    out.append(TensorSpec("model.norm.weight", (hidden,), "bfloat16"))
    out.append(TensorSpec("lm_head.weight", (vocab, hidden), "bfloat16", alias_of=out[0].name))
    return tuple(out)


def qwen3_0p6b_tensors() -> tuple[TensorSpec, ...]:
    """Qwen3-0.6B: 1.19 GB in bf16."""
    return dense_tensors(28, 1024, 16, 8, 128, 3072, 151936)


def moe_tensors(
    layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, experts: int, expert_dim: int, vocab: int
) -> tuple[TensorSpec, ...]:
    """A mixture of experts with one stacked tensor for all experts of a projection (transformers 5), in bf16."""
    out: list[TensorSpec] = []
    for tensor in dense_tensors(layers, hidden, heads, kv_heads, head_dim, expert_dim, vocab):
        stem, _, name = tensor.name.rpartition("mlp.")
        if not stem:
            out.append(tensor)
        elif name == "gate_proj.weight":
            out.append(TensorSpec(f"{stem}mlp.gate.weight", (experts, hidden), "bfloat16"))
            out.append(TensorSpec(f"{stem}mlp.experts.gate_up_proj", (experts, 2 * expert_dim, hidden), "bfloat16"))
            out.append(TensorSpec(f"{stem}mlp.experts.down_proj", (experts, hidden, expert_dim), "bfloat16"))
    return tuple(out)


def fsdp_source(tensors: tuple[TensorSpec, ...], hosts: Sequence[str], *, replicas: int = 1) -> SourceManifest:
    """``Shard(0)`` of every tensor over the ranks (one per entry of ``hosts``), in ``replicas`` full copies (HSDP)."""
    size = len(hosts) // replicas
    shards = []
    for tensor in tensors:
        boxes = split_evenly(tensor.shape, 0, size)
        one = tuple((b,) if b.num_elements else () for b in boxes) * replicas
        shards.append(((),) * len(hosts) if tensor.alias_of else one)
    return SourceManifest(tuple(RankInfo(h, i) for i, h in enumerate(hosts)), tensors, tuple(shards))


def tp_sink(
    tensors: tuple[TensorSpec, ...],
    replica_hosts: Sequence[Sequence[str]],
    recipe: str = "bf16",
    *,
    quantises: Callable[[TensorSpec], bool] | None = None,
) -> SinkManifest:
    """Replicas whose ranks are tensor parallel: column and row shards by name, experts by expert, the rest replicated.

    Args:
        tensors: the source's; aliases are not taken (the engine ties them).
        replica_hosts: for each replica the host of each of its ranks.
        recipe: of projections; norms, routers and embeddings stay ``bf16``.
        quantises: which tensors take ``recipe`` instead; by default projections and experts.
    """
    chooses = quantises or (lambda t: "_proj" in t.name)
    ranks = []
    for replica_idx, hosts in enumerate(replica_hosts):
        for rank, host in enumerate(hosts):
            ranks.append(_tp_rank(tensors, f"engine-{replica_idx}", rank, len(hosts), host, recipe, chooses))
    return SinkManifest(tuple(ranks))


def _tp_rank(
    tensors: tuple[TensorSpec, ...],
    replica: str,
    rank: int,
    world: int,
    host: str,
    recipe: str,
    quantises: Callable[[TensorSpec], bool],
) -> SinkRankManifest:
    recipes: dict[str, str] = {}
    storages: list[StorageSpec] = []
    copies: list[CopySpec] = []
    for tensor in tensors:
        if tensor.alias_of:
            continue
        recipes[tensor.name] = recipe if quantises(tensor) else "bf16"
        for part, box in _parts_of(tensor, recipes[tensor.name], _tp_box(tensor.name, tensor.shape, rank, world)):
            storages.append(StorageSpec(part.name, part.dtype, math.prod(box.shape)))
            strides = contiguous_strides(box.shape)
            copies.append(CopySpec(tensor.name, part.role, box, len(storages) - 1, 0, strides))
    groups = _fused(recipes) if get_recipe(recipe).needs_amax else ()
    return SinkRankManifest(replica, rank, world, RankInfo(host, rank), recipes, tuple(storages), tuple(copies), groups)


def _parts_of(tensor: TensorSpec, recipe: str, weights: Box) -> list[tuple[PartSpec, Box]]:
    """The parts of a tensor, with the box of each that belongs to a box of weights."""
    facts = get_recipe(recipe)
    weight, *scales = recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe)
    packed = to_packed(weights, facts.packed)
    found = [(weight, packed)]
    for part, grid in zip(scales, grids_of(facts, tensor.shape).levels if scales else (), strict=True):
        cells = touched_cells(packed, grid.cell)
        num_dims = len(part.shape)
        found.append((part, Box(cells.offset[:num_dims], cells.shape[:num_dims])))
    return found


def _fused(recipes: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    """The projections that engines fuse: q, k, v; gate, up."""
    groups: dict[str, list[str]] = {}
    for name in recipes:
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
        if leaf in fused and get_recipe(recipes[name]).needs_amax:
            groups.setdefault(f"{stem}.{fused[leaf]}", []).append(name)
    return tuple(tuple(names) for names in groups.values())


def _tp_box(name: str, shape: tuple[int, ...], rank: int, world: int) -> Box:
    column = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "experts")
    if any(c in name for c in column):
        return split_evenly(shape, 0, world)[rank]
    if "o_proj" in name or "down_proj" in name:
        return split_evenly(shape, len(shape) - 1, world)[rank]
    return Box.whole(shape)
