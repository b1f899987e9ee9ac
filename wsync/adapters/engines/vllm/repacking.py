"""Repacks one layer: the engine's own post-processing, on a shadow in the background, put in place at the commit.

Where a layer's post-processing cannot run on a shadow, it runs on the layer itself at the commit, as in vLLM's own
reload: that takes the engine's time, so such layers are counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from wsync.adapters.engines.vllm.outputs import output_of
from wsync.adapters.engines.vllm.probing import Effect, Run, as_bytes
from wsync.adapters.engines.vllm.reach import Leaf, is_native, leaves
from wsync.adapters.engines.vllm.reloading import over, registered
from wsync.adapters.engines.vllm.shadow import ALREADY, make_shadow, post_process_attention, snapshot
from wsync.errors import StateError

Tensor = torch.Tensor


class LayerRepack:
    """The repacking of one layer's weights.

    Args:
        name: of the layer, for messages.
        layer: as it serves.
        effect: of post-processing.
        remembered: its tensors as at load, by attribute name.
        scratch: memory of the same names and shapes, which the sink fills.
        run: post-processes a layer.
    """

    slow = False

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        effect: Effect,
        remembered: Mapping[str, Tensor],
        scratch: Mapping[str, Tensor],
        run: Run,
    ) -> None:
        self.name = name
        self.effect = effect
        self._layer = layer
        self._remembered = dict(remembered)
        self._scratch = dict(scratch)
        self._run = run
        live = leaves(layer)
        # Held, so that the commit writes what the kernels read even where an attribute is looked up by nobody.
        self._live = {p: live[p] for p in (*registered(layer), *effect.hidden) if p not in effect.released}
        self._addresses = {path: _address(leaf) for path, leaf in self._live.items()}
        self._left: frozenset[str] = frozenset()
        self._made: dict[str, Leaf] | None = None

    def check(self) -> None:
        """Check that the layer still holds what the commit writes.

        Raises:
            StateError: with both addresses.
        """
        held = leaves(self._layer)
        for path, before in self._addresses.items():
            if path in self._left:
                continue
            now = _address(held.get(path))
            if now != before:
                raise StateError(
                    f"{self.name}.{path.removeprefix('.')} was at address {before:#x} when it was recorded and is at "
                    f"{now:#x} now",
                    hint="create the Sink again; captured graphs hold the old address",
                )

    def can_leave(self, name: str) -> bool:
        """Whether a tensor that the trainer does not fill may stay as it is: the engine holds it as it was loaded."""
        live, at_load = registered(self._layer).get(name), self._remembered[name]
        is_same = live is not None and (live.shape, live.dtype) == (at_load.shape, at_load.dtype)
        return is_same and (name in self.effect.kept or not isinstance(live, nn.Parameter))

    def leave(self, names: Iterable[str]) -> None:
        """Take these tensors from the engine, where they may change (expert maps), and never write them."""
        self._left = frozenset(names)

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the packed form of what scratch memory holds. Touches nothing that the engine reads."""
        self._made = self._packed(leaves(self._shadow()))

    def _shadow(self) -> nn.Module:
        shadow = make_shadow(self._layer, self._given(self._scratch))
        self._run(shadow)
        return shadow

    def _given(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        live = registered(self._layer)
        for name in self._left:
            memory[name].copy_(live[name].detach())
        return {key: over(tensor, memory[key]) for key, tensor in self._remembered.items()}

    def _packed(self, found: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """What a commit puts in place.

        Raises:
            StateError: something is lacking, or of another shape or dtype than what the engine holds.
        """
        made = {}
        for path, live in self._live.items():
            if path in self._left:
                continue
            new = found.get(path)
            if new is None or _kind(new) != _kind(live):
                raise StateError(
                    f"post-processing of {self.name!r} made {path!r} {_kind(new)} this time, the engine holds "
                    f"{_kind(live)}"
                )
            made[path] = new
        return made

    @torch.no_grad()
    def commit(self) -> None:
        """Put the packed form in place: same addresses, new values."""
        made, self._made = self._made, None
        if made is None:
            raise StateError(f"{self.name!r} is to be put in place, but nothing is prepared")
        for path, new in made.items():
            if is_native(new):
                _swap(self._live[path], new)
            else:
                _write(self._live[path], new)

    @torch.no_grad()
    def differences(self) -> list[str]:
        """The paths at which the packed form of scratch memory differs from what the engine serves.

        Native matrices are compared by what the layer computes with them, where that can be asked.
        """
        shadow = self._shadow()
        made = self._packed(leaves(shadow))
        found = [p for p, new in made.items() if not is_native(new) and _differ(self._live[p], new)]
        natives = [p for p, new in made.items() if is_native(new)]
        if natives and not found:
            here, there = output_of(self._layer), output_of(shadow)
            if here is not None and there is not None and _differ(here, there):
                found = natives
        return found

    def discard(self) -> None:
        """Forget what was prepared."""
        self._made = None


class LayerReload(LayerRepack):
    """A layer that is post-processed on the engine's thread, itself."""

    slow = True
    _in_use: object = None

    @torch.no_grad()
    def prepare(self) -> None:
        """Nothing: scratch memory keeps the weights until the commit."""
        self._made = {}

    @torch.no_grad()
    def commit(self) -> None:
        """Load the layer as vLLM's own reload does. Registered tensors keep their memory.

        After an error the layer, its method and its kernels have the attributes that they had.
        """
        if self._made is None:
            raise StateError(f"{self.name!r} is to be put in place, but nothing is prepared")
        self._made = None
        restore = snapshot(self._layer)
        try:
            given, made = self._reloaded()
            packed = self._packed(made)
        except BaseException:
            restore()
            raise
        for path, new in packed.items():
            _write(self._live[path], new)
        self._in_use = (given, made)  # a kernel may read them by their addresses

    def _reloaded(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        layer = self._layer
        tables = [(table, dict(table)) for table in (layer._parameters, layer._buffers)]
        # Clones, as a kernel may keep what it is given, and scratch memory is filled again while it serves.
        given = self._given({key: memory.clone() for key, memory in self._scratch.items()})
        try:
            hold(layer, given)
            _as_before_loading(layer)
            self._run(layer)
            return given, registered(layer)
        finally:
            for table, entries in tables:
                put_back(table, entries)

    @torch.no_grad()
    def differences(self) -> list[str]:
        """As of a `LayerRepack`. The layer is what it was when this returns or raises."""
        tensors = {path: leaf for path, leaf in leaves(self._layer).items() if not is_native(leaf)}
        before = {path: tensor.detach().clone() for path, tensor in tensors.items()}
        here = output_of(self._layer)
        restore = snapshot(self._layer)
        try:
            self.prepare()
            self.commit()
            found = [path for path, live in self._live.items() if _differ(live, before[path])]
            there = output_of(self._layer)
            if not found and here is not None and there is not None and _differ(here, there):
                found = [".quant_method"]
            return found
        finally:
            restore()
            self._in_use = None
            for path, tensor in tensors.items():
                _write(tensor, before[path])


def refresh_attention(layer: nn.Module, act_dtype: torch.dtype) -> None:
    """Derive an attention layer's tensors from its neighbours' weights again. Registered ones keep their memory.

    Raises:
        StateError: one comes out in another shape or dtype.
    """
    tables = [(table, dict(table)) for table in (layer._parameters, layer._buffers)]
    before = registered(layer)
    try:
        post_process_attention(layer, act_dtype)
        made = registered(layer)
    finally:
        for table, entries in tables:
            put_back(table, entries)
    for key, live in before.items():
        new = made.get(key)
        if new is not None and _kind(new) != _kind(live):
            raise StateError(
                f"post-processing of an attention layer ({type(layer).__name__}) made {key!r} {_kind(new)} this time, "
                f"the engine holds {_kind(live)}"
            )
        if new is not None:
            _write(live, new)


def hold(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make a module hold these tensors and no others."""
    put_back(module._parameters, {key: t for key, t in tensors.items() if isinstance(t, nn.Parameter)})
    put_back(module._buffers, {key: t for key, t in tensors.items() if not isinstance(t, nn.Parameter)})


def put_back(table: dict[str, Any], entries: Mapping[str, Tensor | None]) -> None:
    """Make a module's table what it was."""
    table.clear()
    table.update(entries)


def _as_before_loading(layer: nn.Module) -> None:
    """Forget that a layer was post-processed: else vLLM leaves out steps that it takes at loading."""
    layer.__dict__.pop(ALREADY, None)
    method = getattr(layer, "quant_method", None)
    if method is not None and "moe_kernel" in vars(method):
        vars(method)["moe_kernel"] = None


def _address(leaf: Leaf | None) -> int:
    if leaf is None:
        return 0
    return int((leaf.handler_tensor if is_native(leaf) else leaf).data_ptr())


def _kind(leaf: Leaf | None) -> tuple[object, ...]:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf).__name__,)


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(as_bytes(a), as_bytes(b))


def _write(live: Tensor, new: Tensor) -> None:
    if new is live or not new.numel():
        return
    target, values = live.detach(), new.detach()
    for dim, (extent, stride) in enumerate(zip(live.shape, live.stride(), strict=True)):
        if extent > 1 and not stride:  # one value that stands for all
            target, values = target.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    target.copy_(values)


def _swap(live: Leaf, new: Leaf) -> None:
    """Exchange two native matrices. Compiled code reads the address from the tensor, which stays where it is."""
    mine, other = live.handler_tensor, new.handler_tensor
    kept = mine.clone()
    mine.copy_(other)
    other.copy_(kept)  # its owner frees what served so far
