"""What post-processing does to a layer, found by running it on a shadow with made-up weights, twice.

No table of layers: a layer whose weights come out as they went in, with nothing beside them that depends on them, is
written in place; every other one is repacked by the engine's own code. What cannot be followed (a number or native
memory that depends on the weights, code that runs in the engine's own setting only) makes a layer slow: it is
post-processed on the engine's thread, itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wsync.adapters.engines.vllm.outputs import output_of
from wsync.adapters.engines.vllm.reach import Leaf, Reached, is_constant, is_native, is_opaque, leaves, reached
from wsync.adapters.engines.vllm.reloading import load_time_tensors, over, registered
from wsync.adapters.engines.vllm.shadow import make_shadow
from wsync.errors import RecordError

Tensor = torch.Tensor

Run = Callable[[nn.Module], None]
"""Post-processes a layer."""

_INDICES = (torch.int32, torch.int64)

_NUM_VALUES = 65_537
"""Different values of a made-up tensor: a prime, so that no layout repeats them."""


class StaleKernelError(RecordError):
    """A layer's kernel goes on reading what was made of the weights at loading, whatever its weights become."""


@dataclass(frozen=True)
class Effect:
    """What post-processing does to the weights of one layer.

    Attributes:
        in_place: it leaves every weight as the loader wrote it, and derives nothing from them.
        hidden: paths of the tensors and native matrices beside the registered ones that depend on the weights.
        released: names of weights that it leaves as they are, but the engine freed afterwards: only the attention
            layers that are derived from them read them.
        kept: names of the tensors that come out as they went in.
        slow: it cannot run on a copy of the layer.
    """

    in_place: bool
    hidden: tuple[str, ...] = ()
    released: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()
    slow: bool = False


def probe(name: str, layer: nn.Module, run: Run, run_at_load: Run | None = None) -> Effect:
    """Find out what post-processing does to a layer.

    Args:
        name: of the layer, for messages.
        layer: as it serves; it is not changed.
        run: post-processes a layer as in the background.
        run_at_load: does so as at loading, with the engine's configuration and default dtype in place.

    Raises:
        RecordError: post-processing fails on a shadow, leaves other tensors than the live layer has, or makes what a
            commit cannot put in place.
        StaleKernelError: what the layer computes does not depend on its weights any more.
    """
    remembered = load_time_tensors(layer)
    if not remembered and not registered(layer):
        return Effect(in_place=True)
    first = _run_once(name, layer, remembered, 1, run_at_load or run)
    asked: list[str] = []
    second = _run_once(name, layer, remembered, 2, _watched(run, asked))
    if asked and run_at_load is not None:
        raise RecordError(
            f"post-processing of {name!r} ({type(layer).__name__}) asks for {asked[0]}, which vLLM sets only while it "
            "loads"
        )
    live = leaves(layer)
    kept = first.kept & second.kept
    released = tuple(n for n in kept if n in live and not live[n].numel() and remembered[n].numel())
    _check_same_tensors(name, layer, first, second, released)
    _check_seen_through(name, layer, first, second)
    _check_reads_weights(name, layer, first, second)
    hidden = _hidden(layer, first, second, live)
    _check_hidden(name, layer, first, live, hidden)
    unchanged = kept == remembered.keys() and all(_same_layout(live.get(n), t) for n, t in remembered.items())
    others = registered(layer).keys() - remembered.keys() - _aliases(layer)
    in_place = unchanged and not hidden and not others
    return Effect(in_place, hidden=hidden, released=released, kept=kept)


@dataclass
class _Run:
    """What one run left: leaves, which of the given tensors are as they were, and what the kernel computes."""

    leaves: dict[str, Leaf]
    others: dict[str, Reached]
    kept: frozenset[str]
    output: Tensor | None


def _run_once(name: str, layer: nn.Module, remembered: Mapping[str, Tensor], seed: int, run: Run) -> _Run:
    seeds = {key: 1000 * seed + i for i, key in enumerate(remembered)}
    held = registered(layer)

    def given(key: str) -> Tensor:
        tensor, live = remembered[key], held.get(key)
        # Indices in buffers (expert maps) are the engine's own, and code that follows them does not check them.
        if not isinstance(tensor, nn.Parameter) and tensor.dtype in _INDICES and _same_layout(live, tensor):
            return held[key].detach().clone(memory_format=torch.preserve_format)
        return made_up(tensor, seeds[key])

    shadow = make_shadow(layer, {key: over(t, given(key)) for key, t in remembered.items()})
    try:
        run(shadow)
    except Exception as e:
        raise RecordError(
            f"post-processing of {name!r} ({type(layer).__name__}) fails on a copy of it: {type(e).__name__}: {e}"
        ) from e
    found = leaves(shadow)
    kept = frozenset(n for n in remembered if _same_bytes(found.get(n), given(n)))
    others = {r.path: r for r in reached(shadow) if is_constant(r.value) or is_opaque(r.value)}
    return _Run(found, others, kept, output_of(shadow))


def made_up(like: Tensor, seed: int) -> Tensor:
    """Values that any post-processing accepts: finite, of ordinary size, and not powers of two."""
    generator = torch.Generator().manual_seed(seed)
    if like.dtype.is_floating_point and like.dtype.itemsize == 1:
        few = torch.randint(0x20, 0x60, (_NUM_VALUES,), generator=generator, dtype=torch.uint8).view(like.dtype)
    elif like.dtype.is_floating_point:
        few = (torch.rand(_NUM_VALUES, generator=generator) * 0.37 + 0.11).to(like.dtype)
    else:
        few = torch.randint(0, 2 if like.dtype == torch.bool else 100, (_NUM_VALUES,), generator=generator).to(
            like.dtype
        )
    repeats = -(-like.numel() // _NUM_VALUES)
    many = few.repeat(max(repeats, 1))[: like.numel()].view(like.shape)
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(many)


# ---- what makes a layer slow, or wsync refuse it


def _check_same_tensors(name: str, layer: nn.Module, first: _Run, second: _Run, released: tuple[str, ...]) -> None:
    aliases = _aliases(layer)
    for key, live in registered(layer).items():
        if key in released or key in aliases:
            continue
        for made in (first.leaves.get(key), second.leaves.get(key)):
            if not _same_layout(made, live):
                raise RecordError(
                    f"{name}.{key} is {_layout(live)} in the engine, "
                    f"but post-processing of a copy of its {type(layer).__name__} leaves {_layout(made)}"
                )


def _check_seen_through(name: str, layer: nn.Module, first: _Run, second: _Run) -> None:
    held = {id(r.value) for r in reached(layer)}
    for path, (_, value) in first.others.items():
        other = second.others.get(path)
        if is_opaque(value):
            if id(value) not in held:
                raise RecordError(
                    f"post-processing of {name!r} ({type(layer).__name__}) makes {path!r}, a {type(value).__name__} "
                    "that cannot be looked into"
                )
        elif other is None or repr(value) != repr(other.value):
            raise RecordError(
                f"post-processing of {name!r} ({type(layer).__name__}) makes the {type(value).__name__} {path!r} of "
                f"the weights: it is {value!r} for some, {other.value if other else None!r} for others"
            )


def _check_reads_weights(name: str, layer: nn.Module, first: _Run, second: _Run) -> None:
    a, b = first.output, second.output
    if a is not None and b is not None and a.numel() and _same_bytes(a, b):
        raise StaleKernelError(
            f"the kernel of {name!r} ({type(layer).__name__}) computes the same for any weights after they are "
            "post-processed again: it holds a copy of them that vLLM makes at the first loading only",
            hint="this vLLM packs the layer in a way that wsync does not know: please report it with its version",
        )


def _check_hidden(name: str, layer: nn.Module, first: _Run, live: Mapping[str, Leaf], hidden: tuple[str, ...]) -> None:
    for path in hidden:
        made, held = first.leaves[path], live.get(path)
        if held is None:
            raise RecordError(
                f"post-processing of {name!r} ({type(layer).__name__}) makes {path!r}, which the layer does not have"
            )
        if is_native(made) != is_native(held) or not (is_native(made) or _same_layout(made, held)):
            raise RecordError(
                f"{name}{path} is {_layout(held)} in the engine, but post-processing of a copy of its "
                f"{type(layer).__name__} leaves {_layout(made)}"
            )


def _watched(run: Run, asked: list[str]) -> Run:
    """``run``, which notes whether torch's default dtype is asked for: in the background it is not that of loading."""
    get = torch.get_default_dtype

    def watched() -> torch.dtype:
        asked.append("torch's default dtype")
        return get()

    def run_watched(layer: nn.Module) -> None:
        setattr(torch, "get_default_dtype", watched)  # noqa: B010  (a function of the module, for a moment)
        try:
            run(layer)
        finally:
            setattr(torch, "get_default_dtype", get)  # noqa: B010

    return run_watched


# ---- what depends on the weights


def _hidden(layer: nn.Module, first: _Run, second: _Run, live: Mapping[str, Leaf]) -> tuple[str, ...]:
    plain = registered(layer)
    return tuple(p for p in first.leaves if p.startswith(".") and _depends(plain, first, second, p, live.get(p)))


def _depends(plain: Mapping[str, Tensor], first: _Run, second: _Run, path: str, live: Leaf | None) -> bool:
    """Whether a leaf that is not registered depends on the weights."""
    a, b = first.leaves[path], second.leaves.get(path)
    if a is b or a is live:
        return False  # not made by post-processing
    if is_native(a) or is_native(b) or a.is_meta:
        return True
    alias = next((n for n, t in first.leaves.items() if not n.startswith(".") and _shares(a, t)), None)
    if alias is not None and alias in plain and _shares(live, plain[alias]):
        return False  # another name of a registered tensor, which is put in place itself
    return not _same_bytes(a, b)


def _aliases(layer: nn.Module) -> set[str]:
    """Buffers that are views of a parameter of the layer: vLLM does not remember them, and they follow it."""
    parameters = [p for p in layer._parameters.values() if p is not None]
    return {n for n, b in layer._buffers.items() if b is not None and any(_shares(b, p) for p in parameters)}


def _shares(a: Any, b: Any) -> bool:
    if (
        not isinstance(a, Tensor)
        or not isinstance(b, Tensor)
        or a.is_meta
        or b.is_meta
        or not (a.numel() and b.numel())
    ):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _same_layout(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _same_bytes(a: Any, b: Any) -> bool:
    return _same_layout(a, b) and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements, row major."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _layout(leaf: Leaf | None) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} of shape {tuple(leaf.shape)} and strides {leaf.stride()}"
    return "nothing" if leaf is None else f"a {type(leaf).__name__}"
