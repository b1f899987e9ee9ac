"""Models that are known by name: the numbers of their published ``config.json``, and where that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_HUB = "https://huggingface.co"


class Builtin(NamedTuple):
    """A published model.

    Attributes:
        config: the keys of its ``config.json`` that names and shapes follow from.
        repo: of the checkpoint on the Hugging Face hub.
        num_parameters: as published elsewhere, without layers that predict further tokens.
        confirmed: by what, other than the config itself.
    """

    config: Mapping[str, Any]
    repo: str
    num_parameters: int
    confirmed: str

    @property
    def source(self) -> str:
        """Where the numbers are published, and what confirms them."""
        return f"{_HUB}/{self.repo}/blob/main/config.json; {self.confirmed}"


_KERAS = "number of parameters as in Keras Hub's presets"
_HUB_COUNT = "number of parameters as the hub counts it, sizes as in meta-llama/llama-models"
_FIREWORKS = "number of parameters as in Fireworks' list of models"
_DEFAULTS = "sizes as transformers' defaults of this type"


def _qwen3(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen3_moe(layers: int, hidden: int, heads: int, intermediate: int, expert_dim: int) -> dict[str, Any]:
    moe = {"model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": expert_dim}
    return _qwen3(layers, hidden, heads, 4, intermediate, **moe)


def _llama3(layers: int, hidden: int, heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": intermediate,
    }


_DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "n_group": 8,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

_KIMI_K2: dict[str, Any] = {
    **_DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "first_k_dense_replace": 1,
}

_GLM_4_5: dict[str, Any] = {
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": True,
    "n_shared_experts": 1,
    "n_routed_experts": 160,
    "first_k_dense_replace": 3,
}

_GLM_5: dict[str, Any] = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "first_k_dense_replace": 3,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
}

_GPT_OSS_120B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": True,
    "num_local_experts": 128,
}

_MAGISTRAL_SMALL: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}

_QWEN3_5_397B: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 248320,
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_experts": 512,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}

BUILTIN: dict[str, Builtin] = {
    "Qwen3-0.6B": Builtin(
        _qwen3(28, 1024, 16, 8, 3072, tie_word_embeddings=True), "Qwen/Qwen3-0.6B", 596_049_920, _KERAS
    ),
    "Qwen3-32B": Builtin(_qwen3(64, 5120, 64, 8, 25600), "Qwen/Qwen3-32B", 32_762_123_264, _KERAS),
    "Qwen3-30B-A3B": Builtin(_qwen3_moe(48, 2048, 32, 6144, 768), "Qwen/Qwen3-30B-A3B", 30_532_122_624, _KERAS),
    "Qwen3-235B-A22B": Builtin(_qwen3_moe(94, 4096, 64, 12288, 1536), "Qwen/Qwen3-235B-A22B", 235_093_634_560, _KERAS),
    "Qwen3.5-397B-A17B": Builtin(
        _QWEN3_5_397B,
        "Qwen/Qwen3.5-397B-A17B",
        396_346_350_336,
        "text decoder alone; number of tensors, parameters and bytes as in a public audit of the headers of its files",
    ),
    "DeepSeek-V3": Builtin(_DEEPSEEK_V3, "deepseek-ai/DeepSeek-V3", 671_026_419_200, f"{_FIREWORKS}, {_DEFAULTS}"),
    "Kimi-K2": Builtin(
        _KIMI_K2,
        "moonshotai/Kimi-K2-Instruct",
        1_026_408_232_448,
        f"{_FIREWORKS}, and in a public audit of the headers of its files",
    ),
    "GLM-4.5": Builtin(
        _GLM_4_5, "zai-org/GLM-4.5", 352_797_829_024, f"{_FIREWORKS}, sizes as in slime's glm4.5-355B-A32B.sh"
    ),
    "GLM-5": Builtin(_GLM_5, "zai-org/GLM-5", 743_911_218_432, f"{_FIREWORKS}, {_DEFAULTS}"),
    "Llama-3-8B": Builtin(_llama3(32, 4096, 32, 14336), "meta-llama/Meta-Llama-3-8B", 8_030_261_248, _HUB_COUNT),
    "Llama-3-70B": Builtin(_llama3(80, 8192, 64, 28672), "meta-llama/Meta-Llama-3-70B", 70_553_706_496, _HUB_COUNT),
    "Llama-3-405B": Builtin(_llama3(126, 16384, 128, 53248), "meta-llama/Llama-3.1-405B", 405_853_388_800, _HUB_COUNT),
    "gpt-oss-120b": Builtin(
        _GPT_OSS_120B,
        "openai/gpt-oss-120b",
        116_829_156_672,
        f"number of parameters as Ollama counts it, sizes as in openai/gpt-oss gpt_oss/torch/model.py, {_DEFAULTS}",
    ),
    "Magistral-Small": Builtin(_MAGISTRAL_SMALL, "mistralai/Magistral-Small-2506", 23_572_403_200, _KERAS),
}
"""Name -> model. The text decoder only where the checkpoint also has a vision tower."""


def find_builtin(name: str) -> tuple[str, Builtin] | None:
    """The model of that name: any case, with or without the organisation, also by its repository."""
    wanted = name.lower()
    for known, model in BUILTIN.items():
        if wanted in (known.lower(), model.repo.lower(), model.repo.split("/")[1].lower()):
            return known, model
    return None
