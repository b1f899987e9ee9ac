"""Engines that serve models of `vllm_layers`: loaded as vLLM loads them, and published other versions."""

from __future__ import annotations

import dataclasses
import types

import torch
from safetensors.torch import save_file
from vllm_layers import BF16, AttentionLayerBase, Linear, record_metadata_for_reloading

from wsync.adapters.engines.verify import replay_storage
from wsync.adapters.engines.vllm import VLLMEngine
from wsync.spec.manifest import TensorSpec


def state_of(model, seed, *, without=()):
    """Weights of a version, by the names of the loader; of tied tensors only the first."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator).sub(0.3).to(p.dtype)
        for name, p in model.named_parameters()
        if name not in without
    }


def load(model, state, act_dtype=BF16):
    """Load a model as vLLM does."""
    with torch.no_grad():
        record_metadata_for_reloading(model)
        model.load_weights(state.items())
        for layer in model.modules():
            if getattr(layer, "quant_method", None) is not None:
                layer.quant_method.process_weights_after_loading(layer)
        for layer in model.modules():
            if isinstance(layer, AttentionLayerBase):
                layer.process_weights_after_loading(act_dtype)
    return model


def names_of(state):
    return [
        TensorSpec(name=n, shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch.")) for n, t in state.items()
    ]


def config(folder="", dtype=BF16):
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(dtype=dtype, model=str(folder)),
        load_config=types.SimpleNamespace(load_format="auto"),
    )


class Served:
    """An engine that serves one version and is published others.

    Args:
        make: builds the model, not loaded.
        folder: where the checkpoint that it is loaded from is saved.
    """

    def __init__(self, make, seed=1, *, folder="", without=(), allow_missing=()):
        self.make = make
        self.model = make()
        self.first = state_of(self.model, seed)
        if folder:
            save_file(self.first, folder / "model.safetensors")
        load(self.model, self.first)
        self.state = {n: t for n, t in self.first.items() if n not in without}
        self.engine = VLLMEngine(self.model, config(folder))
        self.allow_missing = allow_missing

    def record(self):
        self.recorded = self.engine.record(names_of(self.state), None, self.allow_missing)
        return self.recorded

    @property
    def repacked(self):
        return {name for r in self.recorded.last_steps.repacks for name in r.name.split(" and ")}

    def version(self, seed):
        """Weights of another version."""
        return {n: t for n, t in state_of(self.make(), seed).items() if n in self.state}

    def stage(self, state):
        """What a sink does in the background."""
        for repack in self.recorded.last_steps.repacks:
            self._fill(state, repack.storages)
            repack.prepare()

    def commit(self, state):
        """What it does on the engine's thread."""
        recording, steps = self.recorded.recording, self.recorded.last_steps
        scratch = {i for repack in steps.repacks for i in repack.storages}
        self._fill(state, set(range(len(recording.storages))) - scratch)
        for repack in steps.repacks:
            repack.commit()
        steps.refresh()

    def publish(self, state):
        self.stage(state)
        self.commit(state)

    def _fill(self, state, storages):
        recording = dataclasses.replace(self.recorded.recording, widened=())
        for i in storages:
            replay_storage(recording, i, recording.storage_view(i), lambda name, role: state[name])

    def fresh(self, state):
        """A model that vLLM loaded with these weights, and the first version's where there are none."""
        return load(self.make(), {**self.first, **state})


def held(model):
    """The bytes of all registered tensors."""
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: t.detach().clone() for name, t in found.items()}


def addresses(model):
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: t.data_ptr() for name, t in found.items()}


def outputs(model):
    """What the linear layers of a model compute."""
    x = torch.linspace(-1, 1, 12).reshape(3, 4).to(BF16)
    return {n: m(x[:, : m.input_size_per_partition]) for n, m in model.named_modules() if isinstance(m, Linear)}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )
