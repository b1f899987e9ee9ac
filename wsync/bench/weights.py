"""Models of random weights, whose contents change in place from version to version."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

CONTENT_BITS = (0x0000, 0x8015, 0x004A)
"""What each content flips in a bf16: sign and mantissa only, so that every value stays finite."""


def build_model(config: dict[str, Any]) -> nn.Module:
    """A causal language model in bf16 whose weights nobody has written yet."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    fields = {key: value for key, value in config.items() if key != "model_type"}
    with no_init_weights():  # `fill` writes them
        from_config: Any = AutoModelForCausalLM.from_config
        model: nn.Module = from_config(AutoConfig.for_model(config["model_type"], **fields), dtype=torch.bfloat16)
    model.tie_weights()  # type: ignore[operator]
    return model


def fill(model: nn.Module, seed: int) -> None:
    """Random weights, around 1 for norms and around 0 for the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            local_part(parameter).normal_(mean, 0.02, generator=generator)


def change_content(parameters: Iterable[torch.Tensor], before: int, after: int) -> None:
    """Turn one content (an index of `CONTENT_BITS`) into another, in every element and in place."""
    flip = CONTENT_BITS[before] ^ CONTENT_BITS[after]
    if not flip:
        return
    with torch.no_grad():
        for parameter in parameters:
            _flip_bits(local_part(parameter), flip)


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a parameter, which may be a DTensor."""
    local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach()


def _flip_bits(local: torch.Tensor, flip: int) -> None:
    if local.dtype == torch.float32:
        local.view(torch.int32).bitwise_xor_(_signed(flip << 16, 32))
    else:
        local.view(torch.int16).bitwise_xor_(_signed(flip, 16))


def _signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> (width - 1) else bits
