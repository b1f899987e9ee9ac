"""Small layers as vLLM builds them, with post-processing of every sort. Importing this imports vLLM.

A model here is loaded as vLLM loads one: its layout is remembered, weights are loaded, every method post-processes its
layer, then attention derives what it needs. What a layer must compute afterwards is told by a fresh model that was
loaded with those weights, never by wsync.
"""

from __future__ import annotations

import functools
import itertools
import os
import warnings

import torch
from torch import nn

_env = dict(os.environ)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm  # noqa: F401  (it must be whole before its parts are imported)
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading  # noqa: F401  (for vllm_served)
    from vllm.model_executor.utils import replace_parameter
# vLLM sets variables for compilers and libraries, which are nothing to the other tests of this process.
os.environ.clear()
os.environ.update(_env)

BF16 = torch.bfloat16


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
