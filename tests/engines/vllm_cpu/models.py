"""Tiny checkpoints of several model families, made here: one configuration each, as many versions as a test wants.

A version's weights are drawn from a generator that is seeded by the family and the version, so that any process makes
the same ones. Everything is random (norms, biases, sinks, correction biases): zeros and ones would hide a wrong layout.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wsync

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Two ranks get whole blocks of 128 rows of k and v.
_WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}


@dataclass(frozen=True)
class Family:
    """A model family at toy size.

    Attributes:
        config_class: name of the transformers configuration.
        options: of the configuration, over what all families have in common.
        recipe: how the checkpoint holds the weights of linear layers; None for bf16 as they are.
        trained_as: the family whose trainer it shares; None for its own.
    """

    config_class: str
    options: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    trained_as: str | None = None


_MLA = {
    "num_key_value_heads": 4,
    # The CPU kernels have one size of latent cache: 512 + 64.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_DSV3_MOE = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    # transformers knows no other way and does not write these down; vLLM reads them.
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_QWEN3_MOE = {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
_GPT_OSS = {
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    # Positions as few as the models have: the default makes a table of 16 MB.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}

FAMILIES = {
    "llama": Family("LlamaConfig"),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", {"head_dim": 32}),
    "qwen3_tied": Family("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3moe": Family("Qwen3MoeConfig", _QWEN3_MOE),
    "mixtral": Family("MixtralConfig", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptoss": Family("GptOssConfig", _GPT_OSS),
    "dsv3": Family("DeepseekV3Config", _MLA | _DSV3_MOE),
    "qwen3_wide": Family("Qwen3Config", _WIDE),
    "qwen3_fp8": Family("Qwen3Config", _WIDE, "fp8_block128", trained_as="qwen3_wide"),
    "qwen3_fp8_f32": Family("Qwen3Config", _WIDE, "fp8_block128_f32", trained_as="qwen3_wide"),
}


def tensors(family: str, version: int) -> dict[str, Tensor]:
    """The weights of a version as a trainer holds them, under the names of the checkpoint.

    Returns:
        bf16 tensors, and f32 where transformers keeps f32 whatever the model's dtype is.
    """
    trainer = FAMILIES[family].trained_as or family
    seed = hashlib.sha256(f"{trainer}/{version}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
    is_tied = FAMILIES[family].options.get("tie_word_embeddings", False)
    return {name: _draw(name, shape, generator, is_tied).to(dtype) for name, shape, dtype in name_table(family)}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, is_tied: bool) -> Tensor:
    """Values of a size that keeps activations near 1 and makes one token much more likely than the rest."""
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        values = 1 + 0.3 * values
    elif "bias" in name:
        values *= 0.2
    elif "embed_tokens" in name:
        # A token whose own embedding is all that the head sees would be repeated for ever.
        values *= 0.3 if is_tied else 1.0
    elif len(shape) > 1:
        # gpt-oss alone stores its experts as [expert, in, out].
        fan_in = shape[-2] if len(shape) == 3 else shape[-1]
        values *= (4.0 if "lm_head" in name else 1.2) / fan_in**0.5
    if len(shape) == 2 and is_quantized(name):
        # Scales of fp8 blocks are to differ between blocks and versions, also where they are powers of two.
        grid = torch.randn([-(-n // 128) for n in shape], generator=generator)
        blocks = grid.repeat_interleave(128, 0).repeat_interleave(128, 1)
        values *= (0.5 * blocks[: shape[0], : shape[1]]).exp()
    return values


@functools.cache
def name_table(family: str) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Checkpoint name, shape and trainer dtype of every tensor, read from what transformers saves."""
    import tempfile

    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        in_f32 = _save_template(family, Path(folder))
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            return tuple(
                (name, tuple(file.get_slice(name).get_shape()), torch.float32 if in_f32(name) else torch.bfloat16)
                for name in file.keys()  # noqa: SIM118  (no mapping)
            )


def _save_template(family: str, folder: Path) -> Any:
    """Save an untrained model of the family; returns which names stay f32 in a bf16 trainer."""
    import transformers

    config = getattr(transformers, FAMILIES[family].config_class)(**{**_COMMON, **FAMILIES[family].options})
    config.dtype = torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    # What transformers keeps in f32 "strictly", it keeps so in bf16 too (the other list is for f16).
    always_f32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return lambda name: any(part in name for part in always_f32)


def checkpoint(family: str, version: int, folder: Path) -> Path:
    """Write the checkpoint of a version, with a tokenizer, into ``folder/<family>-<version>``; kept if it is there."""
    from safetensors.torch import save_file

    final = folder / f"{family}-{version}"
    if final.exists():
        return final
    template = folder / f"{family}-template"
    if not template.exists():
        _save_template(family, template)
        (template / "model.safetensors").unlink()
        _quantization_config(family, template / "config.json")
        save_tokenizer(template)
    fresh = folder / f"{family}-{version}.new"
    shutil.copytree(template, fresh, dirs_exist_ok=True)
    save_file(checkpoint_tensors(family, version), fresh / "model.safetensors", metadata={"format": "pt"})
    return fresh.rename(final)


def checkpoint_tensors(family: str, version: int) -> dict[str, Tensor]:
    """What a checkpoint file of the version holds: `tensors`, with the parts of the recipe where there is one."""
    recipe = FAMILIES[family].recipe
    found: dict[str, Tensor] = {}
    for name, weight in tensors(family, version).items():
        if recipe is None or not is_quantized(name):
            found[name] = weight
            continue
        for role, part in wsync.quantize(weight, recipe).items():
            found[name.removesuffix("weight") + role] = part
    return found


def is_quantized(name: str) -> bool:
    """Whether a quantised checkpoint holds this weight quantised."""
    return name.endswith("_proj.weight")


def num_bytes(family: str) -> int:
    """Bytes of a version at the trainer."""
    return sum(prod(shape) * dtype.itemsize for _, shape, dtype in name_table(family))


def _quantization_config(family: str, path: Path) -> None:
    if FAMILIES[family].recipe is None:
        return
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    path.write_text(json.dumps(config, indent=2))


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with the 512 tokens that the models have."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(kinds.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_COMMON["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, this is a tiny tokenizer that a test makes"] * 50, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
