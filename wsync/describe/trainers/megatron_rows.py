"""Which rows and columns of each checkpoint tensor one of Megatron's tensor parallel ranks holds."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.describe.intervals import Interval
from wsync.describe.layout import divided
from wsync.describe.models.shape import ModelShape
from wsync.describe.parts import (
    COLUMN,
    CONV,
    DOWN,
    EMBEDDING,
    GATE_UP,
    HEAD,
    LINEAR_QKV,
    ROW,
    K,
    Part,
    Q,
    V,
)
from wsync.errors import ConfigError

Cuts = dict[int, list[Interval]]
"""For each dimension that is cut the intervals that a rank holds."""


def fused_qkv_rows(heads: int, groups: int, head_dim: int, gated: bool = False) -> list[tuple[str, Interval]]:
    """The rows of ``linear_qkv``, in its order: (projection, rows of that projection in the checkpoint).

    ``(g (r + 1 + 1) D)``: the query heads of a group, then its key and value head; with a gate of the output, the
    queries of a group, then their gates, which the checkpoint has head by head.

    Source: Megatron-Bridge ``merge_qkv_weights``; its outputs are test vectors.
    """
    per_group = heads // groups
    step = head_dim * (2 if gated else 1)
    rows: list[tuple[str, Interval]] = []
    for group in range(groups):
        queries = [(group * per_group + head) * step for head in range(per_group)]
        rows += [(Q, (at, at + head_dim)) for at in queries]
        rows += [(Q, (at + head_dim, at + step)) for at in queries if gated]
        rows += [(kind, (group * head_dim, (group + 1) * head_dim)) for kind in (K, V)]
    return rows


def rows_of_rank(rows: Sequence[tuple[str, Interval]], num_ranks: int, rank: int) -> dict[str, list[Interval]]:
    """What a rank holds that has an equal, contiguous share of fused rows, by projection; neighbours are joined."""
    total = sum(end - begin for _, (begin, end) in rows)
    first, last = rank * total // num_ranks, (rank + 1) * total // num_ranks
    held: dict[str, list[Interval]] = {}
    position = 0
    for kind, (begin, end) in rows:
        low, high = max(first - position, 0), min(last - position, end - begin)
        position += end - begin
        if low >= high:
            continue
        found = held.setdefault(kind, [])
        if found and found[-1][1] == begin + low:
            found[-1] = (found[-1][0], begin + high)
        else:
            found.append((begin + low, begin + high))
    return {kind: sorted(found) for kind, found in held.items()}


class Rows:
    """What one tensor parallel rank of ``num_ranks`` holds.

    Args:
        model: whose heads are counted.
        num_ranks: tensor parallel ranks.
        vocab_multiple: rows of the vocabulary are padded to a multiple of this times the ranks.
    """

    def __init__(self, model: ModelShape, num_ranks: int, vocab_multiple: int) -> None:
        self.model = model
        self.num_ranks = num_ranks
        self.vocab_multiple = vocab_multiple
        self._qkv: list[dict[str, list[Interval]]] = []

    def cuts(self, shape: tuple[int, ...], part: Part, rank: int) -> Cuts:
        """The cut dimensions of a tensor of that part; what is not named is whole."""
        if self.num_ranks == 1:
            return {}
        if part.kind in (EMBEDDING, HEAD):
            return {0: self._vocab(shape[0], rank)}
        if part.kind in (Q, K, V):
            return {0: self._fused(part, rank)}
        if part.kind in (LINEAR_QKV, CONV):
            return {0: self._linear(rank)}
        if part.kind in COLUMN:
            return {0: [self._share(shape[0], rank, part)]}
        if part.kind in ROW and not part.bias:
            return {1: [self._share(shape[1], rank, part)]}
        return {}

    def stacked_cuts(self, shape: tuple[int, ...], part: Part, rank: int) -> Cuts:
        """The same for all experts in one tensor, whose first dimension counts them."""
        if self.num_ranks == 1 or (part.kind == DOWN and part.bias):
            return {}
        transposed = self.model.facts is not None and self.model.facts.family == "gpt_oss"
        if part.kind == DOWN:
            dim = 1 if transposed else 2
            return {dim: [self._share(shape[dim], rank, part)]}
        if part.kind != GATE_UP:
            return {}
        if transposed:  # gate and up alternate: an equal share has as many of both
            return {len(shape) - 1: [self._share(shape[-1], rank, part)]}
        half = shape[1] // 2
        begin, end = self._share(half, rank, part)
        return {1: [(begin, end), (half + begin, half + end)]}

    def _share(self, extent: int, rank: int, part: Part) -> Interval:
        what = f"the cut dimension of {part.kind} in {part.stem}"
        each = divided(extent, self.num_ranks, what, "etp" if part.routed else "tp")
        return rank * each, (rank + 1) * each

    def _vocab(self, rows: int, rank: int) -> list[Interval]:
        multiple = self.vocab_multiple * self.num_ranks
        each = -(-rows // multiple) * multiple // self.num_ranks
        return [(min(rank * each, rows), min((rank + 1) * each, rows))]

    def _fused(self, part: Part, rank: int) -> list[Interval]:
        facts = self.model.facts
        if facts is None:
            raise ConfigError(
                f"tp={self.num_ranks} cuts heads, but of {self.model.name} only names and shapes are known",
                hint="put the checkpoint's config.json beside its safetensors files",
            )
        if facts.mla is not None:  # without a low rank of the queries
            divided(facts.heads, self.num_ranks, "the number of heads", "tp")
            each = facts.heads // self.num_ranks * (facts.mla.nope_dim + facts.mla.rope_dim)
            return [(rank * each, (rank + 1) * each)]
        if not self._qkv:
            divided(facts.heads, self.num_ranks, "the number of heads", "tp")
            fused = fused_qkv_rows(facts.heads, facts.kv_heads, facts.head_dim, facts.gated)
            divided(sum(e - b for _, (b, e) in fused), self.num_ranks, "the number of rows of linear_qkv", "tp")
            self._qkv = [rows_of_rank(fused, self.num_ranks, r) for r in range(self.num_ranks)]
        return self._qkv[rank].get(part.kind, [(0, 0)])

    def _linear(self, rank: int) -> list[Interval]:
        """Each of query, key and value is cut by itself."""
        linear = self.model.facts.linear if self.model.facts is not None else None
        if linear is None:
            raise ConfigError(f"tp={self.num_ranks} cuts linear attention, whose heads {self.model.name} does not tell")
        divided(linear.key_heads, self.num_ranks, "the number of key heads", "tp")
        held, base = [], 0
        for heads, dim in (
            (linear.key_heads, linear.key_dim),
            (linear.key_heads, linear.key_dim),
            (linear.value_heads, linear.value_dim),
        ):
            each = divided(heads, self.num_ranks, "the number of heads of linear attention", "tp") * dim
            held.append((base + rank * each, base + (rank + 1) * each))
            base += heads * dim
        return held
