"""What a loader does with tensors beside operations: it reads single values, and it hands memory to others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from wsync.adapters.engines.standins import StandIn
from wsync.adapters.engines.tracking import TrackedMemory
from wsync.errors import RecordError

Tensor = torch.Tensor

_HANDS_OUT = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)
"""What gives values or memory to code that the recorder does not see."""


class RecordedScalar:
    """What ``item()`` gives while a loader is recorded: a value that may fill memory, and nothing else.

    No float: a float's value can be read without anybody noticing. Whatever needs the value is refused by name.
    """

    def __init__(self, stand_in: StandIn, said: str) -> None:
        self.stand_in = stand_in
        self.said = said

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What ``item()`` would give, for loaders that look."""
        dtype = self.stand_in.dtype
        return float if dtype.is_floating_point else bool if dtype == torch.bool else int

    def __repr__(self) -> str:
        return f"RecordedScalar({self.said})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = next(a for a in tree_leaves((args, kwargs)) if type(a) is RecordedScalar)
        raise found.refusal(getattr(func, "__name__", str(func)))

    def refusal(self, operation: str) -> RecordError:
        """The error for a loader that needs the value."""
        return RecordError(
            f"the loader reads the value of {self.said} with item() and uses it in {operation}; it may only fill "
            "memory with it, as what it decides or computes by it cannot be recorded"
        )


def _refusing(operation: str) -> Callable[..., Any]:
    def refuse(self: RecordedScalar, *_: Any) -> Any:
        raise self.refusal(operation)

    return refuse


_NEEDS_VALUE = (
    "float int bool complex index hash round trunc floor ceil neg pos abs invert lt le gt ge eq ne "
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv rfloordiv ifloordiv mod rmod imod "
    "divmod rdivmod pow rpow ipow and rand or ror xor rxor lshift rlshift rshift rrshift matmul rmatmul reduce_ex"
)

for _name in _NEEDS_VALUE.split():
    setattr(RecordedScalar, f"__{_name}__", _refusing(f"__{_name}__"))


class ValueGuard(TorchFunctionMode):
    """Gives `RecordedScalar` for ``item()``, and refuses what would show or change followed memory unseen."""

    def __init__(self, memory: TrackedMemory) -> None:
        super().__init__()
        self.memory = memory
        self._scalars: list[tuple[str, weakref.ref[RecordedScalar]]] = []
        self._replaced = Tensor.data.__set__  # type: ignore[attr-defined]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        scalars = [a for a in tree_leaves((args, kwargs)) if type(a) is RecordedScalar]
        if scalars:
            return self._use(func, args, kwargs, scalars[0])
        if func is Tensor.item and self.memory.is_followed(args[0]):
            known = self.memory.known(args[0])
            return self._read(args[0]) if known is None else func(known)
        if func is Tensor.tolist and (known := self.memory.known(args[0])) is not None:
            return func(known)
        if func in _HANDS_OUT and isinstance(args[0], Tensor) and self.memory.is_followed(args[0]):
            raise RecordError(
                f"the loader uses {func.__name__}() on {self.memory.said(args[:1])}; only copies by torch are recorded"
            )
        if func == self._replaced and self.memory.live_name(args[0]) is not None:
            raise RecordError(
                f"the loader replaces the memory of the engine's {self.memory.live_name(args[0])!r} by assigning to "
                "its .data; live tensors are written in place",
                hint="copy into the parameter instead: param.data.copy_(tensor)",
            )
        return func(*args, **kwargs)

    def check_scalars(self) -> None:
        """Refuse a loader that keeps a value: no copy would renew it.

        Raises:
            RecordError: with the tensor's name.
        """
        if any(scalar() is not None for _, scalar in self._scalars):
            # A cycle of the loader's own may hold it for no reason.
            gc.collect()
        for said, scalar in self._scalars:
            if scalar() is not None:
                raise RecordError(
                    f"the loader reads the value of {said} with item() and keeps it; only what it copies into live "
                    "memory is renewed by a sync"
                )

    def _read(self, tensor: Tensor) -> RecordedScalar:
        if tensor.numel() != 1:
            raise RuntimeError(f"a Tensor with {tensor.numel()} elements cannot be converted to Scalar")
        said = self.memory.said([tensor])
        # A copy, as the memory may be used again before the value lands.
        scalar = RecordedScalar(tensor.detach().reshape(()).clone(), said)  # type: ignore[arg-type]
        self._scalars.append((said, weakref.ref(scalar)))
        return scalar

    def _use(self, func: Any, args: Any, kwargs: Any, scalar: RecordedScalar) -> Any:
        if func is Tensor.fill_ and len(args) == 2 and args[1] is scalar:
            return args[0].fill_(scalar.stand_in)
        if func is Tensor.__setitem__ and args[2] is scalar:
            args[0][args[1]] = scalar.stand_in
            return None
        raise scalar.refusal(getattr(func, "__name__", str(func)))
