"""Small layers as vLLM builds them, with post-processing of every sort. Importing this imports vLLM.

A model here is loaded as vLLM loads one: its layout is remembered, weights are loaded, every method post-processes its
layer, then attention derives what it needs. What a layer must compute afterwards is told by a fresh model that was
loaded with those weights, never by wsync.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import types
import warnings

import torch
from safetensors.torch import save_file
from torch import nn

_env = dict(os.environ)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm  # noqa: F401  (it must be whole before its parts are imported)
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.utils import replace_parameter
# vLLM sets variables for compilers and libraries, which are nothing to the other tests of this process.
os.environ.clear()
os.environ.update(_env)

from wsync.adapters.engines.verify import replay_storage  # noqa: E402
from wsync.adapters.engines.vllm import VLLMEngine  # noqa: E402
from wsync.spec.manifest import TensorSpec  # noqa: E402

BF16 = torch.bfloat16

# ---- layers


class Linear(nn.Module):
    def __init__(self, method, out=6, size=4, *, bias=False):
        super().__init__()
        self.input_size_per_partition = size
        self.params_dtype = BF16
        self.quant_method = method
        self.weight = nn.Parameter(torch.empty(out, size, dtype=BF16), requires_grad=False)
        self.weight.weight_loader = self.weight_loader
        if bias:
            self.bias = nn.Parameter(torch.empty(out, dtype=BF16), requires_grad=False)

    def weight_loader(self, param, loaded):
        param.data.copy_(loaded)

    def forward(self, x):
        return self.quant_method.apply(self, x, getattr(self, "bias", None))


class Method(LinearMethodBase):
    """Post-processing that does nothing."""

    def create_weights(self, *args, **kwargs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        pass

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class Transposes(Method):
    def process_weights_after_loading(self, layer):
        replace_parameter(layer, "weight", layer.weight.t().contiguous())

    def apply(self, layer, x, bias=None):
        return x @ layer.weight


class Views(Transposes):
    """As per-tensor fp8: the kernel reads a view with the strides of the other layout."""

    def process_weights_after_loading(self, layer):
        replace_parameter(layer, "weight", layer.weight.data.clone().t())


class Permutes(Method):
    """Same shape before and after."""

    def process_weights_after_loading(self, layer):
        layer.weight.data = layer.weight.data.flip(0).contiguous()

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight.flip(0), bias)


class Pads(Method):
    def process_weights_after_loading(self, layer):
        replace_parameter(layer, "weight", nn.functional.pad(layer.weight.data, (0, 4)))

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight[:, : x.shape[-1]], bias)


class Quantises(Method):
    """One-byte weights, and a scale that nothing has at loading."""

    def process_weights_after_loading(self, layer):
        scale = layer.weight.float().abs().amax(1, keepdim=True) / 127
        replace_parameter(layer, "weight", (layer.weight.float() / scale).round().to(torch.int8))
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x.float(), layer.weight.float() * layer.weight_scale)


class Expands(Method):
    """A derived parameter of one value that stands for all of a dimension."""

    def process_weights_after_loading(self, layer):
        layer.peak = nn.Parameter(layer.weight.abs().max().expand(3), requires_grad=False)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight) * layer.peak[0]


class Kernel:
    """A kernel object that keeps what it is given."""

    def __init__(self):
        self.packed = None

    def run(self, x):
        return x @ self.packed


class Slotted:
    __slots__ = ("packed",)


def empty(layer):
    layer.weight = nn.Parameter(torch.empty(0, dtype=BF16), requires_grad=False)


class InClosure(Method):
    def process_weights_after_loading(self, layer):
        packed = layer.weight.t().contiguous()
        layer.run = lambda x: x @ packed
        empty(layer)

    def apply(self, layer, x, bias=None):
        return layer.run(x)


class InPartial(InClosure):
    def process_weights_after_loading(self, layer):
        layer.run = functools.partial(torch.matmul, other=layer.weight.t().contiguous())
        empty(layer)


class InDefault(InClosure):
    def process_weights_after_loading(self, layer):
        weight = layer.weight.t().contiguous()
        layer.run = lambda x, packed=weight: x @ packed
        empty(layer)


class InBoundMethod(InClosure):
    def process_weights_after_loading(self, layer):
        kernel = Kernel()
        kernel.packed = layer.weight.t().contiguous()
        layer.run = kernel.run
        empty(layer)


class InKernel(Method):
    """The kernel object belongs to the method, and outlives loading."""

    def __init__(self):
        self.kernel = Kernel()

    def process_weights_after_loading(self, layer):
        self.kernel.packed = layer.weight.t().contiguous()
        empty(layer)

    def apply(self, layer, x, bias=None):
        return self.kernel.run(x)


class InScheme(Method):
    """As compressed tensors: the kernel belongs to a scheme of the layer."""

    def process_weights_after_loading(self, layer):
        layer.scheme.kernel.packed = layer.weight.t().contiguous()

    def apply(self, layer, x, bias=None):
        return layer.scheme.kernel.run(x)


class InDict(Method):
    def process_weights_after_loading(self, layer):
        layer.packed["weight"] = layer.weight.t().contiguous()

    def apply(self, layer, x, bias=None):
        return x @ layer.packed["weight"]


class InList(Method):
    def process_weights_after_loading(self, layer):
        layer.packed[:] = [layer.weight.t().contiguous()]

    def apply(self, layer, x, bias=None):
        return x @ layer.packed[0]


class InTuple(Method):
    def process_weights_after_loading(self, layer):
        layer.packed = (3, layer.weight.t().contiguous())

    def apply(self, layer, x, bias=None):
        return x @ layer.packed[1]


class InSlots(Method):
    def process_weights_after_loading(self, layer):
        layer.packed = Slotted()
        layer.packed.packed = layer.weight.t().contiguous()

    def apply(self, layer, x, bias=None):
        return x @ layer.packed.packed


class UpdatesInPlace(Method):
    """As what must keep addresses for captured graphs: packs into the memory of the first time."""

    def __init__(self):
        self.kernel = Kernel()

    def process_weights_after_loading(self, layer):
        if self.kernel.packed is None:
            self.kernel.packed = layer.weight.t().contiguous()
        else:
            self.kernel.packed.copy_(layer.weight.t())

    def apply(self, layer, x, bias=None):
        return self.kernel.run(x)


class Native:
    """A matrix in memory that only its owner's destructor frees, as oneDNN's."""

    matrices: dict = {}  # noqa: RUF012
    freed: list = []  # noqa: RUF012
    addresses = itertools.count(1000)

    def __init__(self, weight):
        address = next(self.addresses)
        self.matrices[address] = weight.clone()
        self.handler_tensor = torch.tensor(address)

    def __del__(self):
        address = self.handler_tensor.item()
        if address not in Native.matrices:
            Native.freed.append(("twice", address))
            return
        del Native.matrices[address]
        Native.freed.append(address)

    def run(self, x):
        return x @ self.matrices[self.handler_tensor.item()]


class InNative(Method):
    def process_weights_after_loading(self, layer):
        native = Native(layer.weight.t())
        layer.run = lambda x: native.run(x)
        empty(layer)

    def apply(self, layer, x, bias=None):
        return layer.run(x)


class InNativeOfMethod(Method):
    """The method itself owns the native matrix."""

    def process_weights_after_loading(self, layer):
        self.native = Native(layer.weight.t())

    def apply(self, layer, x, bias=None):
        return self.native.run(x)


class Experts(nn.Module):
    """Experts with a map that the engine changes and a correction bias that the gate has, too."""

    def __init__(self, method, correction=None):
        super().__init__()
        self.quant_method = method
        self.w13_weight = nn.Parameter(torch.empty(2, 6, 4, dtype=BF16), requires_grad=False)
        self.register_buffer("_expert_map", torch.tensor([1, 0], dtype=torch.int32))
        if correction is not None:
            self.e_score_correction_bias = correction


class ExpertsMethod(QuantizeMethodBase):
    """Packs when it makes its kernel; a later call is taken for a reload, and leaves the packing out."""

    def __init__(self):
        self.moe_kernel = None

    def create_weights(self, *args, **kwargs):
        raise NotImplementedError

    def apply(self, layer, *args, **kwargs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        if self.moe_kernel is None:
            self.moe_kernel = Kernel()
            replace_parameter(layer, "w13_weight", layer.w13_weight.data.flip(1).contiguous())


class Attention(nn.Module, AttentionLayerBase):
    """Derives a parameter from a neighbour's weight, as MLA does."""

    releases = False

    def __init__(self, neighbour):
        super().__init__()
        self.neighbours = [neighbour]
        self.register_buffer("_k_scale", torch.tensor(1.0))

    def get_attn_backend(self):
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config):
        raise NotImplementedError

    def process_weights_after_loading(self, act_dtype):
        weight = self.neighbours[0].weight
        assert weight.numel(), "the weight was released"
        self.W_UV = nn.Parameter(weight.detach().to(act_dtype).t().contiguous(), requires_grad=False)
        if self.releases:
            self.neighbours[0].weight = nn.Parameter(torch.empty(0, dtype=BF16), requires_grad=False)


class ReleasingAttention(Attention):
    releases = True


class Model(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def load_weights(self, weights):
        found = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers())
        for name, loaded in weights:
            param = found[name]
            load = getattr(param, "weight_loader", lambda p, t: p.data.copy_(t))
            load(param, loaded)


# ---- engines


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
