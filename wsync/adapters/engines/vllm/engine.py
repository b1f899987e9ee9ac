"""`VLLMEngine`: one vLLM worker's model, as a `wsync.Sink` takes it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wsync.adapters.engines.recorder import Recipes, Recording, record_loader
from wsync.adapters.engines.verify import verify_recording
from wsync.adapters.engines.vllm.load_view import LoadView, build_load_view
from wsync.adapters.engines.vllm.recipes import engine_recipes
from wsync.adapters.engines.vllm.repacking import LayerRepack, refresh_attention
from wsync.adapters.engines.vllm.self_test import checkpoint_of, self_test
from wsync.adapters.engines.vllm.shadow import post_process
from wsync.errors import MissingTensorError, StateError
from wsync.session.laststep import LastSteps, Repack
from wsync.spec.manifest import TensorSpec

Tensor = torch.Tensor

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """What a `wsync.Sink` needs to know of an engine.

    Attributes:
        recording: of the engine's loader, on its load view.
        last_steps: from there to what its kernels read.
        roads: bytes of weights by how they get there: ``in_place`` (written into live memory), ``repacked`` (by the
            engine's own code, in the background, then put in place) and ``reloaded`` (by the engine's own code, on its
            thread).
    """

    recording: Recording
    last_steps: LastSteps
    roads: dict[str, int]


class VLLMEngine:
    """The model of one vLLM worker.

    Args:
        model: as the worker serves it.
        vllm_config: of the worker; None where the model's own code asks for none.

    Threads: made on the worker's thread; `record` belongs there, between steps.
    """

    def __init__(self, model: nn.Module, vllm_config: Any = None) -> None:
        self.model = model
        self._vllm_config = vllm_config
        self._thread = threading.get_ident()
        self._view: LoadView | None = None
        self._tested = False

    def live_tensors(self) -> dict[str, Tensor]:
        """What the recording is made on, as it is now: live memory, and scratch memory for what is repacked.

        Raises:
            StateError: the engine put another tensor in the place of one that a commit writes.
        """
        view = self._load_view()
        view.check()
        return dict(view.tensors)

    def record(
        self, name_table: Sequence[TensorSpec], recipes: Recipes | None, allow_missing: Collection[str]
    ) -> Recorded:
        """Record vLLM's own loader against the trainer's tensors. Live bytes are what they were when this returns.

        Raises:
            RecordError: a layer, or the loader, does what cannot be followed.
            MissingTensorError: a parameter that the trainer has no tensor for.
            StateError: this is another thread, which the engine may run beside; or the engine replaced its tensors.
        """
        if threading.get_ident() != self._thread:
            raise StateError(
                f"recording belongs on the worker's thread {self._thread:#x}, this is {threading.get_ident():#x}: the "
                "model's modules hold other tensors meanwhile",
                hint="the trainer came back with other tensors: create the Sink again, on the worker's thread",
            )
        view = self._load_view()
        view.check()
        load_weights: Callable[..., Any] = getattr(self.model, "load_weights")  # noqa: B009  (no attribute of nn.Module)
        with view.applied(), self._context():
            quantisation = getattr(self._vllm_config, "quant_config", None)
            recipes = engine_recipes(load_weights, name_table, view.tensors, self.model, quantisation, recipes)
            recording = record_loader(
                load_weights, name_table, view.tensors, recipes, allow_missing=allow_missing, module=self.model
            )
            if recording.needs_verification:
                verify_recording(recording, load_weights, name_table)
        self._check_filled(recording, view, set(allow_missing))
        self._self_test(recording, name_table, view)
        steps = recording.last_steps(self._last_steps(recording, view))
        return Recorded(recording, steps, _roads(recording, view))

    def _load_view(self) -> LoadView:
        if self._view is None:
            # Scratch memory is ordinary memory, whatever mode this thread is in: other threads write it.
            with torch.inference_mode(False):
                self._view = build_load_view(self.model, self._in_background, self._as_at_load)
        return self._view

    def _context(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._vllm_config is None else _current_config(self._vllm_config)

    def _in_background(self, layer: nn.Module) -> None:
        # vLLM's current configuration belongs to the whole process: two threads that set it leave it wrong.
        if threading.get_ident() == self._thread and self._vllm_config is not None:
            with _current_config(None):  # as a thread in the background finds it
                post_process(layer)
            return
        post_process(layer)

    def _as_at_load(self, layer: nn.Module) -> None:
        with self._loading():
            post_process(layer)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """vLLM's setting while it loads. For the engine's thread: all of it belongs to the process."""
        dtype = torch.get_default_dtype()
        with self._context():
            torch.set_default_dtype(self._act_dtype(dtype))
            try:
                yield
            finally:
                torch.set_default_dtype(dtype)

    def _check_filled(self, recording: Recording, view: LoadView, allowed: set[str]) -> None:
        """Check that scratch memory is filled; what the trainer has nothing for stays what it is in the engine."""
        filled = {name for storage in recording.coverage.storages for name in storage.names}
        view.buffers = frozenset(filled)
        for repack, names in view.repacks:
            left = {key for key, name in names.items() if name not in filled and view.tensors[name].numel()}
            for key in left:
                is_weight = isinstance(view.tensors[names[key]], nn.Parameter)
                if is_weight and (names[key] not in allowed or not repack.can_leave(key)):
                    raise MissingTensorError(
                        f"no tensor of the trainer fills {names[key]!r} of the repacked {repack.name!r}",
                        hint="allow_missing is for what the engine holds as it was loaded; it repacks this one"
                        if names[key] in allowed
                        else "",
                    )
            repack.leave(key for key in left if repack.can_leave(key))

    def _self_test(self, recording: Recording, name_table: Sequence[TensorSpec], view: LoadView) -> None:
        """Once, before the first version: later the engine serves other weights than its checkpoint."""
        checkpoint = None if self._tested else checkpoint_of(self._vllm_config)
        if checkpoint is None:
            return
        idx = _storage_idx(recording)
        layers = [(sample, frozenset(idx[n] for n in sample.tensors if n in idx)) for sample in view.samples]
        scratch = frozenset(idx[n] for _, names in view.repacks for n in names.values() if n in idx)
        compared = self_test(recording, name_table, layers, checkpoint, scratch)
        self._tested = True
        _LOG.info("self-test of layers against the engine's checkpoint passed: %s", ", ".join(compared) or "none")

    def _last_steps(self, recording: Recording, view: LoadView) -> LastSteps:
        idx = _storage_idx(recording)
        groups: list[tuple[list[LayerRepack], set[int]]] = []
        for repack, names in view.repacks:
            storages = {idx[name] for name in names.values() if name in idx}
            joined = [g for g in groups if g[1] & storages]
            groups = [g for g in groups if g not in joined]
            layers = [r for g in joined for r in g[0]]
            groups.append(([*layers, repack], storages.union(*(g[1] for g in joined))))
        return LastSteps(tuple(_joint(layers, storages) for layers, storages in groups), self._refresh)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Recompute what attention layers derive from other layers' weights. Registered tensors keep their memory."""
        view = self._load_view()
        with view.with_released(), self._loading():
            for layer in view.derived:
                refresh_attention(layer, self._act_dtype(None))

    def _act_dtype(self, otherwise: torch.dtype | None) -> torch.dtype:
        config = getattr(self._vllm_config, "model_config", None)
        dtype = getattr(config, "dtype", otherwise)
        if not isinstance(dtype, torch.dtype):
            raise StateError("the vllm_config of this engine has no model_config.dtype, which attention layers need")
        return dtype


def _current_config(vllm_config: Any) -> AbstractContextManager[Any]:
    from vllm.config import set_current_vllm_config

    context: AbstractContextManager[Any] = set_current_vllm_config(vllm_config)
    return context


def _storage_idx(recording: Recording) -> dict[str, int]:
    return {name: i for i, s in enumerate(recording.coverage.storages) for name in s.names}


def _roads(recording: Recording, view: LoadView) -> dict[str, int]:
    road_of = {n: "reloaded" if repack.slow else "repacked" for repack, names in view.repacks for n in names.values()}
    roads = {"in_place": 0, "repacked": 0, "reloaded": 0}
    for storage in recording.coverage.storages:
        roads[road_of.get(storage.names[0], "in_place")] += storage.direct_bytes + storage.widened_bytes
    return roads


def _joint(layers: Sequence[LayerRepack], storages: set[int]) -> Repack:
    def each(step: Callable[[LayerRepack], None]) -> Callable[[], None]:
        def run() -> None:
            for layer in layers:
                step(layer)

        return run

    return Repack(
        name=" and ".join(layer.name for layer in layers),
        storages=frozenset(storages),
        prepare=each(lambda layer: layer.prepare()),
        commit=each(lambda layer: layer.commit()),
        discard=each(lambda layer: layer.discard()),
    )
