"""The recorder's view of a loader: every operation on a stand-in or on live memory passes through here.

Copies between views are followed; a copy into live memory becomes an event and is not executed. What computes on a
stand-in gives a stand-in that remembers the operation, so that only a loader that puts the result into live memory is
refused. Nothing that would change live memory is ever executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from wsync.adapters.engines.live import LiveMemory, LivePlace
from wsync.adapters.engines.standins import (
    Buffer,
    Constant,
    Landing,
    StandIn,
    StridedView,
    axes_of,
    buffer_like,
    resolve,
    write,
)
from wsync.adapters.engines.strided import Axis, dense_span
from wsync.errors import RecordError, ShapeMismatchError

aten = torch.ops.aten

# A scalar that was read from a stand-in is this plus a multiple of the step: no loader computes it by chance.
_CODE_BASE = 1.0 + 4111 / 2**23
_CODE_STEP = 1 / 2**44


class Event(NamedTuple):
    """Something that arrives in live memory.

    Attributes:
        place: where the destination's first element is.
        shape, strides: of the destination view, in elements.
        dtype: of the destination view.
        landings: where the elements come from; far offsets count from ``place``'s storage.
    """

    place: LivePlace
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    landings: tuple[Landing, ...]


class LoaderRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what a loader does with stand-ins.

    Attributes:
        events: in order of time.
    """

    def __init__(self, live: LiveMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = live
        self.events: list[Event] = []
        self._scratch: dict[int, tuple[Buffer, torch.Tensor]] = {}
        self._allocated: dict[int, tuple[int, ...]] = {}
        self._scalars: dict[float, tuple[StandIn, bool]] = {}
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

    def check_scalars(self) -> None:
        """Refuse a loader that read a weight's value and did something else with it than fill live memory.

        Raises:
            RecordError: with the tensor's name.
        """
        for stand_in, landed in self._scalars.values():
            if not landed:
                raise RecordError(
                    f"the loader reads the value of {_names(stand_in)} with item() and does not fill live memory with "
                    "it; what it decides by it cannot be recorded"
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        symbolic: list[torch.Tensor] = [t for t in tensors if isinstance(t, StandIn)]
        scratch = any(self._scratch_of(t) is not None for t in tensors)
        mutated = _mutated(func, args, kwargs)
        lives = [name for t in mutated if (name := self._live_name(t)) is not None]
        handler = self._handlers.get(func.overloadpacket)
        if handler is not None and (symbolic or scratch or lives or self._is_coded_fill(func, args)):
            return handler(func, args, kwargs)
        if lives:
            raise RecordError(
                f"the loader changes the engine's {lives[0]!r} in place with {func}; only copies can be recorded"
            )
        if not symbolic and (not scratch or _is_view(func)):
            return self._execute(func, args, kwargs)
        if mutated:
            return self._compute_in_place(func, mutated, symbolic or tensors, args)
        return self._view_or_compute(func, args, kwargs, symbolic or tensors)

    # Copies.

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._transfer(args[0], args[1])
        return args[0]

    def _foreach_copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        for dst, src in zip(args[0], args[1], strict=True):
            if isinstance(src, StandIn) or self._scratch_of(src) or self._live_name(dst) or isinstance(dst, StandIn):
                self._transfer(dst, src)
            else:
                dst.copy_(src)
        return None

    def _fill(self, func: Any, args: Any, kwargs: Any) -> Any:
        dst, value = args[0], args[1]
        if isinstance(value, float) and value in self._scalars:
            stand_in, _ = self._scalars[value]
            self._scalars[value] = (stand_in, True)
            value = stand_in
        elif not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        if isinstance(value, StandIn) and value.dim():
            value = StandIn(value.source, value.twin.reshape(()))
        self._transfer(dst, value)
        return dst

    def _zero(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._transfer(args[0], torch.zeros((), dtype=args[0].dtype))
        return args[0]

    def _transfer(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        """Follow ``dst.copy_(src)``."""
        name = self._live_name(dst)
        try:
            source = self._view(src)
            if name is None:
                write(self._target(dst), source)
            else:
                self._land(name, dst, source)
        except RuntimeError as e:
            where = f"the engine's {name!r}" if name else "a buffer"
            shapes = f"of shape {tuple(src.shape)} into {where} of shape {tuple(dst.shape)}"
            raise ShapeMismatchError(f"the loader copies {_names(src)} {shapes}: {e}") from e

    def _land(self, name: str, dst: torch.Tensor, src: StridedView | Constant) -> None:
        place = self.live.place(dst)
        if place is None:
            raise RecordError(
                f"the loader writes memory beside the engine's {name!r}, in a view of shape {tuple(dst.shape)}"
            )
        shape, strides = tuple(dst.shape), tuple(dst.stride())
        if isinstance(src, Constant):
            value = src.value.expand(shape) if src.value.dim() else src.value
            axes = tuple(Axis(n, 0, s) for n, s in zip(shape, strides, strict=True))
            landings = [Landing(Constant(value.detach().to(dst.dtype, copy=True)), 0, place.offset, axes, ())]
        else:
            src = src.expanded(shape)
            conversions = () if src.dtype == dst.dtype else ((src.dtype, dst.dtype),)
            far = StridedView(src.source, place.offset, shape, strides, dst.dtype)
            try:
                landings = list(resolve(src.source, src.offset, place.offset, axes_of(src, far), conversions))
            except RecordError as e:
                raise RecordError(f"{e.message} (into the engine's {name!r})", hint=e.hint) from e
        self.events.append(Event(place, shape, strides, dst.dtype, tuple(landings)))

    # Operations that move values into new memory.

    def _clone(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = buffer_like(self._on_meta(func, args, kwargs))
        return self._written(out, [(out.twin, args[0])])

    def _cat(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Legacy: torch.cat ignores 1-d tensors without elements.
        parts = [t for t in args[0] if tuple(t.shape) != (0,)]
        out = buffer_like(self._on_meta(func, args, kwargs))
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        position, pairs = 0, []
        for t in parts:
            pairs.append((out.twin.narrow(dim, position, t.shape[dim]), t))
            position += t.shape[dim]
        return self._written(out, pairs)

    def _stack(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = buffer_like(self._on_meta(func, args, kwargs))
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return self._written(out, [(out.twin.select(dim, i), t) for i, t in enumerate(args[0])])

    def _repeat(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = buffer_like(self._on_meta(func, args, kwargs))
        src, repeats = args[0], args[1]
        shape = (1,) * (len(repeats) - src.dim()) + tuple(src.shape)
        tiled = out.twin.view([n for r, s in zip(repeats, shape, strict=True) for n in (r, s)])
        by_tile = tiled.permute(*range(0, 2 * len(repeats), 2), *range(1, 2 * len(repeats), 2))
        return self._written(out, [(by_tile, src)])

    def _pad(self, func: Any, args: Any, kwargs: Any) -> Any:
        pads = args[1]
        fill = args[2] if len(args) > 2 else kwargs.get("value", 0)
        twin = self._on_meta(func, args, kwargs)
        if min(pads, default=0) < 0:
            return self._computed(func, twin, [args[0]])
        out = buffer_like(twin, torch.tensor(fill, dtype=twin.dtype))
        inside = out.twin
        for i in range(len(pads) // 2):
            dim = twin.dim() - 1 - i
            inside = inside.narrow(dim, pads[2 * i], args[0].shape[dim])
        return self._written(out, [(inside, args[0])])

    def _allocate(self, func: Any, args: Any, kwargs: Any, value: float | None) -> Any:
        twin = self._on_meta(func, args, kwargs)
        if dense_span(twin.shape, twin.stride()) != max(twin.numel(), 1):
            return self._computed(func, twin, [args[0]])
        return buffer_like(twin, None if value is None else torch.tensor(value, dtype=twin.dtype))

    def _allocate_full(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[-1] if len(args) > 1 else kwargs.get("fill_value")
        if isinstance(value, StandIn) or value in self._scalars:
            return self._computed(func, self._on_meta(func, args, kwargs), [args[0]])
        return self._allocate(func, args, kwargs, value)

    def _written(self, out: StandIn, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> StandIn:
        for twin, src in pairs:
            target = StridedView(
                out.source, int(twin.storage_offset()), tuple(twin.shape), tuple(twin.stride()), twin.dtype
            )
            write(target, self._view(src))
        return out

    # Everything else.

    def _item(self, func: Any, args: Any, kwargs: Any) -> Any:
        stand_in = args[0]
        if not isinstance(stand_in, StandIn):
            raise RecordError(f"the loader reads the value of a buffer made of {_names(stand_in)} with item()")
        if not stand_in.dtype.is_floating_point:
            raise RecordError(
                f"the loader reads the value of {_names(stand_in)} with item(); its decisions cannot be recorded"
            )
        code = _CODE_BASE + len(self._scalars) * _CODE_STEP
        self._scalars[code] = (stand_in, False)
        return code

    def _is_coded_fill(self, func: Any, args: Any) -> bool:
        return func.overloadpacket is aten.fill_ and isinstance(args[1], float) and args[1] in self._scalars

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation that touches no stand-in, and remember the shape of memory that it allocated."""
        out = func(*args, **kwargs)
        if not _is_view(func):
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.is_contiguous() and not t.storage_offset():
                    self._allocated[t.untyped_storage()._cdata] = tuple(t.shape)
        return out

    def _compute_in_place(self, func: Any, mutated: list[torch.Tensor], inputs: list[torch.Tensor], args: Any) -> Any:
        """An operation that changes stand-ins, or scratch memory by stand-ins: what it wrote is no copy any more."""
        if torch.Tag.inplace_view in func.tags:
            raise RecordError(f"the loader changes {_names(*inputs)} with {func}, which cannot be recorded")
        for t in mutated:
            source = t.source if isinstance(t, StandIn) else self._target(t).source
            source.computed = source.computed or str(func)
            if isinstance(source, Buffer):
                source.made_of |= self._names_of(inputs)
        return args[0]

    def _view_or_compute(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        out = self._on_meta(func, args, kwargs)
        bases = {t.twin.untyped_storage()._cdata: t for t in inputs if isinstance(t, StandIn)}

        def wrapped(t: Any) -> Any:
            if not isinstance(t, torch.Tensor):
                return t
            base = bases.get(t.untyped_storage()._cdata) if t.is_meta else None
            if base is not None and t.element_size() == base.element_size():
                return StandIn(base.source, t)
            return self._computed(func, t, inputs)

        return tree_map(wrapped, out)

    def _computed(self, func: Any, twin: torch.Tensor, inputs: list[torch.Tensor]) -> StandIn:
        """The result of an operation that is no copy; it remembers which one, and of what."""
        buffer = Buffer(twin.shape, twin.dtype)
        sources = [v.source for t in inputs if isinstance(v := self._view(t), StridedView)]
        buffer.computed = next((s.computed for s in sources if s.computed), "") or str(func)
        buffer.made_of = self._names_of(inputs)
        return StandIn(buffer, torch.empty(twin.shape, dtype=twin.dtype, device="meta"))

    def _on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on twins, for the shapes of what it returns."""

        def twin(t: Any) -> Any:
            if isinstance(t, StandIn):
                return t.twin
            if isinstance(t, torch.Tensor) and not t.is_meta:
                return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            return t

        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        meta_kwargs = {k: (torch.device("meta") if k == "device" else v) for k, v in tree_map(twin, kwargs).items()}
        meta_kwargs.pop("pin_memory", None)
        if func.overloadpacket is aten._pin_memory:
            func, args = aten.clone.default, args[:1]
        try:
            return func(*tree_map(twin, args), **meta_kwargs)
        except NotImplementedError as e:
            raise RecordError(f"the loader uses {func} on {_names(*inputs)}, which needs its values") from e
        except RuntimeError as e:
            if "meta" in str(e) or "fake" in str(e).lower() or "data-dependent" in str(e):
                raise RecordError(f"the loader uses {func} on {_names(*inputs)}, which needs its values") from e
            raise

    # What a tensor is.

    def _live_name(self, tensor: torch.Tensor) -> str | None:
        return None if isinstance(tensor, StandIn) or tensor.is_meta else self.live.owner(tensor)

    def _scratch_of(self, tensor: torch.Tensor) -> Buffer | None:
        if isinstance(tensor, StandIn) or tensor.is_meta or not self._scratch:
            return None
        found = self._scratch.get(tensor.untyped_storage()._cdata)
        return found[0] if found else None

    def _view(self, tensor: torch.Tensor) -> StridedView | Constant:
        """One end of a copy: a stand-in, scratch memory that holds some, or plain values."""
        if isinstance(tensor, StandIn):
            return tensor.view_of_source
        buffer = self._scratch_of(tensor)
        if buffer is None:
            return Constant(tensor.detach())
        return StridedView(
            buffer, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype
        )

    def _names_of(self, tensors: Iterable[torch.Tensor]) -> set[str]:
        return {n for t in tensors if isinstance(v := self._view(t), StridedView) for n in v.source.names}

    def _target(self, tensor: torch.Tensor) -> StridedView:
        """The view of a buffer that a copy writes; plain memory becomes a buffer whose background are its values."""
        if isinstance(tensor, StandIn):
            return tensor.view_of_source
        if self._scratch_of(tensor) is None:
            cdata = tensor.untyped_storage()._cdata
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            shape = self._allocated.get(cdata, (elements,))
            flat = tensor.detach().as_strided((elements,), (1,), 0)
            if flat.numel() != torch.Size(shape).numel():
                shape = (elements,)
            # The tensor is kept so that its storage's id is not given to another one.
            self._scratch[cdata] = (Buffer(shape, tensor.dtype, flat.view(shape)), tensor)
        found = self._view(tensor)
        if not isinstance(found, StridedView):
            raise RecordError(f"the loader writes a tensor of shape {tuple(tensor.shape)} that cannot be followed")
        return found


def _names(*tensors: torch.Tensor) -> str:
    names = sorted({n for t in tensors if isinstance(t, StandIn) for n in t.source.names})
    return " and ".join(repr(n) for n in names) or "a tensor that is not from the checkpoint"


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
