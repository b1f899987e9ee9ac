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
from wsync.spec.recipes import PartSpec, get_recipe, recipe_parts

FLOAT_RECIPES = ("raw", "bf16", "fp8_block128", "fp8_block128_f32")


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

    Weights have up to a few hundred rows and columns, so that shard edges fall on and off the scale grid; sinks take
    column, row and replicated shards, overlapping boxes, lone scales, transposed and padded destinations, and aliases.
    """
    hosts = [f"h{i}" for i in range(rng.randint(1, 4))]
    tensors = _random_tensors(rng, rng.randint(1, max_tensors))
    world = rng.randint(1, 5)
    shards = tuple(((),) * world if t.alias_of else tuple(_random_shards(rng, t.shape, world)) for t in tensors)
    source = SourceManifest(tuple(RankInfo(rng.choice(hosts), i) for i in range(world)), tensors, shards)
    ranks: list[SinkRankManifest] = []
    for replica in range(rng.randint(1, 3)):
        ranks += _random_replica(rng, f"engine-{replica}", tensors, hosts)
    options = PlanOptions(bucket_bytes=rng.choice((16384, 16640, 32768, 65536)))
    return Scenario(source, SinkManifest(tuple(ranks)), options)


def _random_tensors(rng: random.Random, count: int) -> tuple[TensorSpec, ...]:
    out = []
    for i in range(count):
        kind = rng.random()
        if kind < 0.6:
            sizes = (1, 7, 64, 100, 127, 128, 129, 192, 256, 300)
            shape: tuple[int, ...] = (rng.choice(sizes), rng.choice(sizes))
            if rng.random() < 0.25:
                shape = (rng.randint(1, 3), *shape)
            dtype = rng.choice(("bfloat16", "float32"))
        else:
            shape = tuple(rng.randint(1, (40, 20, 5, 3, 2, 2)[d]) for d in range(rng.randint(0, 6)))
            dtype = rng.choice(("bfloat16", "float32", "int64", "uint8"))
        out.append(TensorSpec(f"t{i}", shape, dtype))
    if rng.random() < 0.4:
        target = rng.choice(out)
        out.append(TensorSpec("tied", target.shape, target.dtype, alias_of=target.name))
    return tuple(out)


def _random_shards(rng: random.Random, shape: tuple[int, ...], world: int) -> list[tuple[Box, ...]]:
    """The boxes of each rank; together they cover the tensor."""
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
    rng: random.Random, name: str, tensors: tuple[TensorSpec, ...], hosts: list[str]
) -> list[SinkRankManifest]:
    world = rng.randint(1, 4)
    builders = [_Storages(rng) for _ in range(world)]
    recipes: dict[str, str] = {}
    for tensor in tensors:
        if rng.random() < 0.15:
            continue
        recipe = recipes[tensor.name] = _random_recipe(rng, tensor)
        parts = recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe)
        for rank, box in enumerate(_random_needs(rng, tensor.shape, world)):
            for part in parts:
                if len(parts) > 1 and rng.random() < 0.1:
                    continue  # only the scales, or only the weight
                needed = box if part.role == "weight" else touched_cells(box, get_recipe(recipe).block)
                if box.num_elements:
                    builders[rank].take(tensor.name, part, needed)
    info = [RankInfo(rng.choice(hosts), 100 + r) for r in range(world)]
    return [
        SinkRankManifest(name, r, world, info[r], recipes, b.storages(), tuple(b.copies))
        for r, b in enumerate(builders)
    ]


def _random_recipe(rng: random.Random, tensor: TensorSpec) -> str:
    if tensor.dtype not in ("bfloat16", "float32"):
        return "raw"
    return rng.choice(FLOAT_RECIPES if len(tensor.shape) > 1 else FLOAT_RECIPES[:2])


def _random_needs(rng: random.Random, shape: tuple[int, ...], world: int) -> list[Box]:
    """What each rank of a replica needs of one tensor."""
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

    def take(self, tensor: str, part: PartSpec, box: Box) -> None:
        self._add(tensor, part, box)
        if self._rng.random() < 0.1:
            self._add(tensor, part, box)  # the engine keeps it twice
        if self._rng.random() < 0.1 and box.shape:
            self._add(tensor, part, _random_box(self._rng, box.shape).shifted(box.offset))

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
        for part in recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipes[tensor.name]):
            box = _tp_box(tensor.name, part.shape, rank, world)
            storages.append(StorageSpec(part.name, part.dtype, math.prod(box.shape)))
            strides = contiguous_strides(box.shape)
            copies.append(CopySpec(tensor.name, part.role, box, len(storages) - 1, 0, strides))
    return SinkRankManifest(replica, rank, world, RankInfo(host, rank), recipes, tuple(storages), tuple(copies))


def _tp_box(name: str, shape: tuple[int, ...], rank: int, world: int) -> Box:
    column = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "experts")
    if any(c in name for c in column):
        return split_evenly(shape, 0, world)[rank]
    if "o_proj" in name or "down_proj" in name:
        return split_evenly(shape, len(shape) - 1, world)[rank]
    return Box.whole(shape)
