"""The recorder's view of a loader: every operation on a stand-in or on live memory passes through here.

Copies between views are followed; a copy into live memory becomes a landing and is not executed. Reading live memory
therefore gives a stand-in too: for what has landed there so far. What computes on a stand-in gives a stand-in that
remembers the operation, so that only a loader that puts the result into live memory is refused. Nothing that would
change live memory is ever executed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from wsync.adapters.engines.indexing import IndexedMoves
from wsync.adapters.engines.standins import StandIn, buffer_like, write
from wsync.adapters.engines.strided import dense_span
from wsync.adapters.engines.tracking import TrackedMemory
from wsync.adapters.engines.twins import computed, filled, on_meta
from wsync.errors import RecordError

aten = torch.ops.aten


class LoaderRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what a loader does with stand-ins.

    Args:
        memory: what is followed.
    """

    def __init__(self, memory: TrackedMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory
        self._handlers: dict[Any, Callable[..., Any]] = {
            aten.copy_: self._copy,
            aten.fill_: self._fill,
            aten.zero_: self._zero,
            aten._foreach_copy_: self._foreach_copy,
            aten._local_scalar_dense: self._item,
            aten.clone: self._clone,
            aten._to_copy: self._clone,
            aten._pin_memory: self._clone,
            aten.cat: self._cat,
            aten.stack: self._stack,
            aten.repeat: self._repeat,
            aten.constant_pad_nd: self._pad,
            aten.is_pinned: lambda *_, **__: False,
        }
        for op, value in ((aten.zeros_like, 0), (aten.new_zeros, 0), (aten.ones_like, 1), (aten.new_ones, 1)):
            self._handlers[op] = lambda func, args, kwargs, value=value: self._allocate(func, args, kwargs, value)
        for op in (aten.empty_like, aten.new_empty, aten.new_empty_strided):
            self._handlers[op] = lambda func, args, kwargs: self._allocate(func, args, kwargs, None)
        for op in (aten.full_like, aten.new_full):
            self._handlers[op] = self._allocate_full
        self._handlers |= IndexedMoves(self.memory).handlers()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        memory = self.memory
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        mutated = _mutated(func, args, kwargs)
        written = {id(t) for t in mutated}
        stand_ins = any(isinstance(t, StandIn) for t in tensors)
        scratch = any(memory.scratch_of(t) is not None for t in tensors)
        lives = [name for t in mutated if (name := memory.written_name(t)) is not None]
        reads_live = any(memory.live_name(t) is not None for t in tensors if id(t) not in written)
        handler = self._handlers.get(func.overloadpacket)
        if not stand_ins and not scratch and not lives and (not reads_live or _reads_no_values(func)):
            return self._execute(func, args, kwargs, mutated)
        done = NotImplemented if handler is None else self._handle(handler, func, args, kwargs)
        if done is not NotImplemented:
            return done
        if lives:
            raise RecordError(
                f"the loader changes the engine's {lives[0]!r} in place with {func}; only copies can be recorded"
            )
        if not stand_ins and _is_view(func):
            return self._execute(func, args, kwargs, mutated)
        inputs = [t for t in tensors if memory.is_followed(t)]
        if mutated:
            return self._compute_in_place(func, mutated, inputs)
        if not _is_view(func) and all(memory.known(t) is not None for t in inputs):
            return self._execute(func, tree_map(self._known, args), tree_map(self._known, kwargs), [])
        return self._view_or_compute(func, args, kwargs, inputs)

    def _handle(self, handler: Callable[..., Any], func: Any, args: Any, kwargs: Any) -> Any:
        """Run a handler; an operation that writes its result into given memory is one that returns it, and a copy."""
        outs = [a.name for a in func._schema.arguments if a.is_out]
        if not outs:
            return handler(func, args, kwargs)
        base = func._overloadname.removesuffix("out").rstrip("_") or "default"
        returning = getattr(func.overloadpacket, base, None)
        target = kwargs.get(outs[0])
        if returning is None or len(outs) > 1 or target is None:
            return NotImplemented
        found = handler(returning, args, {k: v for k, v in kwargs.items() if k != outs[0]})
        # Torch gives the target another shape where it does not fit; that is not followed.
        if found is NotImplemented or found.shape != target.shape:
            return NotImplemented
        self.memory.transfer(target, found)
        return target

    def _known(self, value: Any) -> Any:
        return self.memory.known(value) if isinstance(value, torch.Tensor) else value

    # Copies.

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.memory.transfer(args[0], args[1])
        return args[0]

    def _foreach_copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        for dst, src in zip(args[0], args[1], strict=True):
            # One list may mix memory that is followed and plain memory.
            if self.memory.written_name(dst) or self.memory.is_followed(dst) or self.memory.is_followed(src):
                self.memory.transfer(dst, src)
            else:
                self._execute(aten.copy_.default, (dst, src), {}, [dst])
        return None

    def _fill(self, func: Any, args: Any, kwargs: Any) -> Any:
        dst, value = args[0], args[1]
        literal = not isinstance(value, torch.Tensor) or not self.memory.is_followed(value)
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        self.memory.transfer(dst, value, literal=literal)
        return dst

    def _zero(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.memory.transfer(args[0], torch.zeros((), dtype=args[0].dtype), literal=True)
        return args[0]

    # Operations that move values into new memory.

    def _clone(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = buffer_like(on_meta(self.memory, func, args, kwargs))
        return filled(self.memory, out, [(out.twin, args[0])])

    def _cat(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Legacy: torch.cat ignores 1-d tensors without elements.
        parts = [t for t in args[0] if tuple(t.shape) != (0,)]
        out = buffer_like(on_meta(self.memory, func, args, kwargs))
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        position, pairs = 0, []
        for t in parts:
            pairs.append((out.twin.narrow(dim, position, t.shape[dim]), t))
            position += t.shape[dim]
        return filled(self.memory, out, pairs)

    def _stack(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = buffer_like(on_meta(self.memory, func, args, kwargs))
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return filled(self.memory, out, [(out.twin.select(dim, i), t) for i, t in enumerate(args[0])])

    def _repeat(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = buffer_like(on_meta(self.memory, func, args, kwargs))
        src, repeats = args[0], args[1]
        shape = (1,) * (len(repeats) - src.dim()) + tuple(src.shape)
        tiled = out.twin.view([n for r, s in zip(repeats, shape, strict=True) for n in (r, s)])
        by_tile = tiled.permute(*range(0, 2 * len(repeats), 2), *range(1, 2 * len(repeats), 2))
        return filled(self.memory, out, [(by_tile, src)])

    def _pad(self, func: Any, args: Any, kwargs: Any) -> Any:
        pads = args[1]
        fill = args[2] if len(args) > 2 else kwargs.get("value", 0)
        twin = on_meta(self.memory, func, args, kwargs)
        if min(pads, default=0) < 0:
            return computed(self.memory, func, twin, [args[0]])
        out = buffer_like(twin, torch.tensor(fill, dtype=twin.dtype))
        inside = out.twin
        for i in range(len(pads) // 2):
            dim = twin.dim() - 1 - i
            inside = inside.narrow(dim, pads[2 * i], args[0].shape[dim])
        return filled(self.memory, out, [(inside, args[0])])

    def _allocate(self, func: Any, args: Any, kwargs: Any, value: float | None) -> Any:
        twin = on_meta(self.memory, func, args, kwargs)
        if dense_span(twin.shape, twin.stride()) != max(twin.numel(), 1):
            return computed(self.memory, func, twin, [args[0]])
        return buffer_like(twin, None if value is None else torch.tensor(value, dtype=twin.dtype))

    def _allocate_full(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[-1] if len(args) > 1 else kwargs.get("fill_value")
        if isinstance(value, torch.Tensor):
            return computed(self.memory, func, on_meta(self.memory, func, args, kwargs), [args[0]])
        return self._allocate(func, args, kwargs, value)

    # Everything else.

    def _item(self, func: Any, args: Any, kwargs: Any) -> Any:
        known = self.memory.known(args[0])
        if known is not None:
            return func(known)
        raise RecordError(
            f"the loader reads the value of {self.memory.said(args[:1])} with item(); its decisions cannot be recorded"
        )

    def _execute(self, func: Any, args: Any, kwargs: Any, mutated: list[torch.Tensor]) -> Any:
        """Run an operation whose result does not depend on what is followed."""
        out = func(*args, **kwargs)
        if not _is_view(func):
            self.memory.executed(func, mutated, out)
        return out

    def _compute_in_place(self, func: Any, mutated: list[torch.Tensor], inputs: list[torch.Tensor]) -> Any:
        """An operation that changes stand-ins, or scratch memory by stand-ins: what it wrote is no copy any more."""
        if torch.Tag.inplace_view in func.tags:
            raise RecordError(f"the loader changes {self.memory.said(inputs)} with {func}, which cannot be recorded")
        made = self.memory.computation(func, inputs)
        for t in mutated:
            write(self.memory.target(t), made)
        returned = len(func._schema.returns)
        return None if not returned else mutated[0] if returned == 1 else tuple(mutated[:returned])

    def _view_or_compute(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        out = on_meta(self.memory, func, args, kwargs)
        bases = {t.twin.untyped_storage()._cdata: t for t in inputs if isinstance(t, StandIn)}

        def wrapped(t: Any) -> Any:
            if not isinstance(t, torch.Tensor):
                return t
            base = bases.get(t.untyped_storage()._cdata) if t.is_meta else None
            if base is not None and t.element_size() == base.element_size():
                return StandIn(base.source, t)
            return computed(self.memory, func, t, inputs)

        return tree_map(wrapped, out)


def _mutated(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that an operation writes, by its schema."""
    found: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        found.extend(t for t in tree_leaves(value) if isinstance(t, torch.Tensor))
    return found


def _is_view(func: Any) -> bool:
    """Whether an operation returns views of what it gets, and writes nothing."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _reads_no_values(func: Any) -> bool:
    """Whether an operation looks only at shape and dtype, or returns views."""
    name = func.overloadpacket.__name__
    return name.endswith("_like") or name.startswith("new_") or name == "is_pinned" or _is_view(func)
