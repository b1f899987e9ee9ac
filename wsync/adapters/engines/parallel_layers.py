"""Layers as an inference engine holds them: fused, sharded for tensor parallelism, quantised in blocks.

Rows of a fused weight are the parts' rows in order (q, k, v; gate, up), each sharded for itself. Each layer has a
weight loader in the manner of engines: it narrows the checkpoint tensor and copies it into ``param.data``.

Shapes: ``h`` hidden, ``T`` tensor-parallel ranks, ``N`` output rows, ``K`` input columns.
Source: row formulas of vLLM's QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear and
VocabParallelEmbedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from wsync.errors import ConfigError, DtypeMismatchError, ShapeMismatchError, StateError
from wsync.spec.recipes import SCALE_BLOCK

FP8 = torch.float8_e4m3fn

VOCAB_ALIGNMENT = 64
"""Rows of the vocabulary are padded to a multiple of this, as vLLM does."""


class TensorParallel(NamedTuple):
    """This rank's place among those that share the model.

    Attributes:
        rank, size: within the replica.
        group: process group for the forward pass; None is enough to load and record.
    """

    rank: int
    size: int
    group: Any = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(x, group=self._group())
        return x

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors side by side in the last dimension."""
        if self.size == 1:
            return x
        import torch.distributed as dist

        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self._group())
        return torch.cat(parts, dim=-1)

    def _group(self) -> Any:
        import torch.distributed as dist

        if self.group is None and not dist.is_initialized():
            raise StateError(
                f"a forward pass on rank {self.rank} of {self.size} needs a process group, and there is none"
            )
        return self.group


class Rows(NamedTuple):
    """The rows of one checkpoint tensor that this rank holds.

    Attributes:
        name: of the checkpoint's layer, such as ``q_proj``.
        total: rows of the checkpoint tensor.
        first: the first row that this rank holds.
        held: how many.
    """

    name: str
    total: int
    first: int
    held: int


def copy_into(param: torch.Tensor, loaded: torch.Tensor, what: str) -> None:
    """Copy a slice of a checkpoint tensor into live memory.

    Raises:
        ShapeMismatchError: the shapes differ.
        DtypeMismatchError: one of the two is fp8 and the other is not.
    """
    if tuple(param.shape) != tuple(loaded.shape):
        raise ShapeMismatchError(f"{what} takes a slice of shape {tuple(param.shape)}, got {tuple(loaded.shape)}")
    if (param.dtype == FP8) != (loaded.dtype == FP8):
        raise DtypeMismatchError(f"{what} is {param.dtype}, and the checkpoint tensor is {loaded.dtype}")
    param.data.copy_(loaded)


def check_shape(what: str, loaded: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Refuse a checkpoint tensor of another shape.

    Raises:
        ShapeMismatchError: with both shapes.
    """
    if tuple(loaded.shape) != expected:
        raise ShapeMismatchError(f"{what} takes a checkpoint tensor of shape {expected}, got {tuple(loaded.shape)}")


def dequantise(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight`` e4m3 `[N, K]` times ``scale`` f32 `[ceil(N/128), ceil(K/128)]`, rounded to ``dtype``."""
    rows, cols = weight.shape
    by_row = scale.repeat_interleave(SCALE_BLOCK, 0)[:rows]
    return (weight.to(torch.float32) * by_row.repeat_interleave(SCALE_BLOCK, 1)[:, :cols]).to(dtype)


class ShardedLinear(nn.Module):
    """A linear layer's local weight `[N, K]`: plain, or e4m3 with block scales.

    Args:
        rows: of the checkpoint tensors that are stacked in it.
        in_features: columns of the checkpoint tensors.
        columns: first column and how many this rank holds.
        has_bias: whether the checkpoint has one.
        quantised: e4m3 with ``weight_scale_inv``.
        dtype: of a plain weight, of the bias and of the result.
        name: for messages.

    Raises:
        ConfigError: a shard's edge cuts a scale block.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        in_features: int,
        columns: tuple[int, int],
        *,
        has_bias: bool,
        quantised: bool,
        dtype: torch.dtype,
        name: str,
    ) -> None:
        super().__init__()
        self.rows = tuple(rows)
        self.in_features = in_features
        self.columns = columns
        self.quantised = quantised
        self.dtype = dtype
        self.name = name
        count = sum(r.held for r in rows)
        if quantised:
            self._check_grid()
        self.weight = _parameter((count, columns[1]), FP8 if quantised else dtype)
        if quantised:
            self.weight_scale_inv = _parameter((_blocks(count), _blocks(columns[1])), torch.float32)
        self.bias = _parameter((count,), dtype) if has_bias else None

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """What the stacked checkpoint layer ``index`` gives for ``x`` `[..., K]`, its bias included."""
        first = sum(r.held for r in self.rows[:index])
        last = first + self.rows[index].held
        bias = None if self.bias is None else self.bias[first:last]
        return functional.linear(x, self._dense(first, last), bias)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The whole local weight applied to ``x`` `[..., K]`, without the bias."""
        return functional.linear(x, self._dense(0, self.weight.shape[0]))

    def load(self, kind: str, loaded: torch.Tensor, index: int = 0) -> None:
        """Copy this rank's slice of a checkpoint tensor into live memory.

        Args:
            kind: ``"weight"``, ``"bias"`` or ``"weight_scale_inv"``.
            loaded: the whole checkpoint tensor.
            index: which of the stacked layers it belongs to.

        Raises:
            ShapeMismatchError: it has another shape than the configuration says.
        """
        what = f"{self.name}.{kind} ({self.rows[index].name})"
        unit = SCALE_BLOCK if kind == "weight_scale_inv" else 1
        rows = self.rows[index]
        place = _ceil(sum(r.held for r in self.rows[:index]), unit)
        count = _ceil(rows.held, unit)
        if kind == "bias":
            check_shape(what, loaded, (rows.total,))
        else:
            check_shape(what, loaded, (_ceil(rows.total, unit), _ceil(self.in_features, unit)))
            loaded = loaded.narrow(1, self.columns[0] // unit, _ceil(self.columns[1], unit))
        param: nn.Parameter = getattr(self, kind)
        copy_into(param.data.narrow(0, place, count), loaded.narrow(0, rows.first // unit, count), what)

    def _dense(self, first: int, last: int) -> torch.Tensor:
        if not self.quantised:
            return self.weight[first:last]
        scale = self.weight_scale_inv[first // SCALE_BLOCK : _blocks(last)]
        return dequantise(self.weight[first:last], scale, self.dtype)

    def _check_grid(self) -> None:
        """Scale blocks belong to the checkpoint tensor; a shard or a stacked part has to take them whole."""
        place = 0
        for i, rows in enumerate(self.rows):
            ends_inside = rows.first + rows.held < rows.total or i + 1 < len(self.rows)
            for edge in (rows.first, place, rows.held if ends_inside else 0):
                _check_edge(f"{self.name} ({rows.name})", "row", edge)
            place += rows.held
        first, count = self.columns
        _check_edge(self.name, "column", first)
        _check_edge(self.name, "column", count if first + count < self.in_features else 0)


class ColumnParallel(nn.Module):
    """One of the layers stacked in a `ShardedLinear`, where the model's own code calls it. It holds nothing itself."""

    def __init__(self, stacked: ShardedLinear, index: int) -> None:
        super().__init__()
        # In a tuple, so that the stacked layer is registered once, under its own name.
        self._stacked = (stacked,)
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` `[..., K]` to this rank's `[..., N/T]`."""
        return self._stacked[0].part(x, self._index)


class RowParallel(ShardedLinear):
    """A linear layer that is sharded by input columns; the ranks' products are added, the bias once."""

    def __init__(self, rows: Rows, in_features: int, tp: TensorParallel, **kwargs: Any) -> None:
        name = str(kwargs["name"])
        share = divide(in_features, tp.size, f"the input of {name}")
        super().__init__([rows], in_features, (tp.rank * share, share), **kwargs)
        self.tp = tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` `[..., K/T]` to the whole `[..., N]` on every rank."""
        y = self.tp.all_reduce(self.product(x))
        return y if self.bias is None else y + self.bias


class VocabParallel(nn.Module):
    """The local rows of an embedding or output head: `[align(V, 64) / T, h]`, zero where the vocabulary ends.

    Raises:
        ConfigError: the padded vocabulary does not divide by the ranks.
    """

    def __init__(self, vocab_size: int, hidden: int, tp: TensorParallel, dtype: torch.dtype, name: str) -> None:
        super().__init__()
        padded = _ceil(vocab_size, VOCAB_ALIGNMENT) * VOCAB_ALIGNMENT
        local = divide(padded, tp.size, f"the vocabulary of {name} (padded to {padded})")
        self.vocab_size = vocab_size
        self.first = min(tp.rank * local, vocab_size)
        self.count = min((tp.rank + 1) * local, vocab_size) - self.first
        self.name = name
        self.tp = tp
        self.weight = _parameter((local, hidden), dtype)

    def load(self, kind: str, loaded: torch.Tensor, index: int = 0) -> None:
        """Copy this rank's rows into live memory and fill the rest with zeros.

        Raises:
            ShapeMismatchError: the checkpoint tensor is not `[V, h]`.
        """
        what = f"{self.name}.{kind}"
        check_shape(what, loaded, (self.vocab_size, self.weight.shape[1]))
        copy_into(self.weight.data.narrow(0, 0, self.count), loaded.narrow(0, self.first, self.count), what)
        self.weight.data[self.count :].fill_(0)


class VocabEmbedding(VocabParallel):
    """Token embedding; each rank looks up its own rows and the results are added."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``input_ids`` int64 `[B, S]` to `[B, S, h]`."""
        local = input_ids - self.first
        foreign = (local < 0) | (local >= self.count)
        found = functional.embedding(local.masked_fill(foreign, 0), self.weight)
        return self.tp.all_reduce(found.masked_fill(foreign.unsqueeze(-1), 0))


class VocabHead(VocabParallel):
    """Output head; the ranks' logits are put side by side and the padding is cut off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` `[..., h]` to `[..., V]`."""
        return self.tp.all_gather_last(functional.linear(x, self.weight))[..., : self.vocab_size]


def divide(extent: int, parts: int, what: str) -> int:
    """``extent / parts``.

    Raises:
        ConfigError: it does not divide.
    """
    if extent % parts:
        raise ConfigError(f"{what} is {extent}, which does not divide by {parts} tensor-parallel ranks")
    return extent // parts


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device="cpu"), requires_grad=False)


def _ceil(extent: int, unit: int) -> int:
    return -(-extent // unit)


def _blocks(extent: int) -> int:
    return _ceil(extent, SCALE_BLOCK)


def _check_edge(what: str, kind: str, edge: int) -> None:
    if edge % SCALE_BLOCK:
        raise ConfigError(
            f"{what} would be cut at {kind} {edge}, which is no multiple of the scale block of {SCALE_BLOCK}"
        )
