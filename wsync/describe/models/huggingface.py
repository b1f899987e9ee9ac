"""Names and shapes of any Hugging Face config: transformers builds the model on the meta device, without memory.

The only module below the adapters that imports torch and transformers, and only when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsync.errors import ConfigError
from wsync.spec.manifest import BUFFER, PARAMETER, TensorSpec


def tensors_of_config(config: Mapping[str, Any], where: str) -> tuple[TensorSpec, ...]:
    """The tensors that transformers would save for a model of this config, in bf16.

    Args:
        config: of a Hugging Face checkpoint.
        where: it was read, for messages.

    Raises:
        ConfigError: transformers is not installed, or does not know or take the config.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as e:
        raise ConfigError(
            f"{where} has the model type {config.get('model_type')!r}, which wsync does not know, and transformers 5, "
            f"which might, cannot be imported: {e}",
            hint="pip install 'wsync-rl[engines]', or give the checkpoint's safetensors headers",
        ) from e
    fields = {key: value for key, value in config.items() if key != "model_type"}
    try:
        built = AutoConfig.for_model(str(config.get("model_type")), **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        state = revert_weight_conversion(model, dict(model.state_dict()))
    except Exception as e:
        raise ConfigError(f"transformers cannot build the model of {where}: {type(e).__name__}: {e}") from e
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    first: dict[int, str] = {}
    found = []
    for name, tensor in state.items():
        # A state dict has detached tensors; what two names share is told by the parameter itself.
        owner = first.setdefault(id(_live(model, name)) if name in parameters else id(tensor), name)
        found.append(
            TensorSpec(
                name=name,
                shape=tuple(int(n) for n in tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                kind=BUFFER if name in dict(model.named_buffers()) else PARAMETER,
                alias_of=None if owner == name else owner,
            )
        )
    return tuple(found)


def _live(model: Any, name: str) -> Any:
    return model.get_parameter(name)
