"""What vLLM remembers of a layer from before it post-processed the weights: the tensors that its loader fills."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from wsync.errors import ConfigError

Tensor = torch.Tensor


def load_time_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of one layer as its loader fills them: tensors without memory, by attribute name.

    They carry the class and the attributes (``weight_loader`` and such) that vLLM gave them. What vLLM never takes off
    its layer (biases, expert maps, correction biases) is the live tensor itself.

    Raises:
        ConfigError: this vLLM keeps no such record.
    """
    try:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    except ImportError as e:
        raise ConfigError(
            f"this vLLM does not remember the layout of loading ({e}); versions from 0.28 on do",
            hint="pip install --upgrade vllm",
        ) from e
    held = registered(layer)
    if not is_recorded(layer) or type(layer).__name__ in _untouched("SKIP_MODULES", "HadamardTransform"):
        return held
    parameters, buffers = get_layerwise_info(layer).restore_metadata
    found = {name: _with_layer(tensor, layer) for name, tensor in (*parameters.items(), *buffers.items())}
    for name in held:
        if name not in found and name in _untouched("SKIP_TENSORS", "bias"):
            found[name] = held[name]
    return found


def is_recorded(layer: nn.Module) -> bool:
    """Whether vLLM remembers how a layer is loaded; one that was made after loading it does not know."""
    from vllm.model_executor.model_loader.reload import layerwise

    known = getattr(layerwise, "LAYERWISE_INFO", None)
    return known is None or layer in known


def registered(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a layer itself holds, by attribute name."""
    both = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def is_attention(layer: nn.Module) -> bool:
    """Whether vLLM post-processes a layer after all others, from the weights of its neighbours."""
    try:
        from vllm.model_executor.layers.attention import is_deferred_attention_layer
    except ImportError:
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        return isinstance(layer, AttentionLayerBase) and hasattr(layer, "process_weights_after_loading")
    return bool(is_deferred_attention_layer(layer))


def is_post_processed(layer: nn.Module) -> bool:
    """Whether vLLM has a layer's weights processed by its quantisation method, as also an unquantised layer has one."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    return isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase)


def over(at_load: Tensor, memory: Tensor) -> Tensor:
    """``memory`` as a tensor of the kind of one at load: a remembered one without memory, or a live one."""
    if at_load.is_meta:
        tensor = memory.detach()
        tensor.__class__ = at_load.__class__
        tensor.__dict__ = dict(at_load.__dict__)
        return tensor
    tensor = (
        nn.Parameter(memory.detach(), requires_grad=False) if isinstance(at_load, nn.Parameter) else memory.detach()
    )
    tensor.__dict__.update(at_load.__dict__)
    return tensor


def _untouched(name: str, otherwise: str) -> set[str]:
    """What vLLM's reload leaves alone: a set of its own."""
    from vllm.model_executor.model_loader.reload import meta

    return set(getattr(meta, name, {otherwise}))


def _with_layer(tensor: Tensor, layer: nn.Module) -> Tensor:
    """vLLM cuts a remembered tensor's references to its layer; the weight loader needs them."""
    from vllm.model_executor.model_loader.reload import sanitize

    cut = getattr(sanitize, "layer_ref_sentinel", None)
    attributes: dict[str, Any] = {}
    for key, value in tensor.__dict__.items():
        is_cut = isinstance(value, MethodType) and value.__self__ is cut
        attributes[key] = _unwrapped(value.__func__.__get__(layer) if is_cut else value)
    copy = tensor.detach()
    copy.__class__ = tensor.__class__
    copy.__dict__ = attributes
    return copy


def _unwrapped(value: Any) -> Any:
    """A weight loader without what vLLM wraps around it to post-process a layer as soon as it is loaded."""
    while getattr(value, "__name__", "") == "online_process_loader" and hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value
