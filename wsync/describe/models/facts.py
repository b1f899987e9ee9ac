"""A model's architecture as numbers, read from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from wsync.errors import ConfigError

PREFIX, NESTED = "model.", "model.language_model."
"""What names of a decoder begin with: alone, and in a checkpoint that also has a vision tower."""

MAX_LAYERS = 4096
MAX_EXPERTS = 1 << 16
MAX_HEADS = 1 << 16
MAX_SIZE = 1 << 31
"""Above these a config is a slip of the pen."""


class Mla(msgspec.Struct, frozen=True):
    """Multi-head latent attention.

    Attributes:
        q_rank: rows of ``q_a_proj``; 0 where queries have no low rank.
        kv_rank: rows of ``kv_a_proj_with_mqa`` before the rotary ones.
        nope_dim, rope_dim, v_dim: of one head.
        indexer_heads, indexer_dim: of the sparse attention's indexer; 0 for none.
    """

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    indexer_heads: int = 0
    indexer_dim: int = 0


class LinearAttention(msgspec.Struct, frozen=True):
    """Gated delta net, in all layers but every ``interval``-th.

    Attributes:
        key_heads, value_heads, key_dim, value_dim: heads and the size of one.
        kernel: of the convolution.
        interval: layers from one full attention to the next.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    interval: int


class Moe(msgspec.Struct, frozen=True):
    """Mixture of experts.

    Attributes:
        num_experts: that tokens are routed to.
        expert_dim: intermediate size of one.
        shared_dim: intermediate size of the shared one; 0 for none.
        first_dense: layers before the first mixture.
        router_bias: the router has a correction bias that is no parameter.
        num_groups: of experts, of which the router chooses some first; 1 for none.
    """

    num_experts: int
    expert_dim: int
    shared_dim: int = 0
    first_dense: int = 0
    router_bias: bool = False
    num_groups: int = 1


class Facts(msgspec.Struct, frozen=True):
    """What names and shapes of a decoder follow from.

    Attributes:
        family: Hugging Face ``model_type``, of the family's first member.
        vocab, hidden, layers, heads, kv_heads, head_dim, intermediate: sizes.
        tied: the output layer is the embedding.
        qkv_bias, o_bias: whether these projections have one.
        qk_norm: heads of queries and keys are normalised.
        gated: ``q_proj`` also makes a gate of the output, head by head.
        mtp_layers: layers that predict further tokens, behind the others.
        prefix: of the names of all layers.
    """

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    gated: bool = False
    mtp_layers: int = 0
    moe: Moe | None = None
    mla: Mla | None = None
    linear: LinearAttention | None = None
    prefix: str = PREFIX

    def is_moe(self, layer: int) -> bool:
        """Whether that layer routes tokens to experts."""
        return self.moe is not None and layer >= self.moe.first_dense

    def is_linear(self, layer: int) -> bool:
        """Whether that layer's attention is linear."""
        return self.linear is not None and (layer + 1) % self.linear.interval != 0 and layer < self.layers


FAMILIES: dict[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_5_moe_text": "qwen3_5_moe_text",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "deepseek_v32": "glm_moe_dsa",
    "glm_moe_dsa": "glm_moe_dsa",
    "glm4_moe": "glm4_moe",
    "gpt_oss": "gpt_oss",
}
"""``model_type`` of a config -> the family whose names and shapes it has."""

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
"""Keys of the number of experts: each family has its own, and transformers 5 writes the last one for all of them."""
_OUTPUT_BIAS = ("llama", "qwen3", "qwen3_moe", "gpt_oss")
"""Families whose ``attention_bias`` is also that of the output projection."""
_HEAD_NORMS = ("qwen3", "qwen3_moe", "qwen3_5_moe_text")
_USUAL: dict[str, tuple[object, ...]] = {
    "mlp_bias": (None, False),
    "decoder_sparse_step": (None, 1),
    "mlp_only_layers": (None, []),
    "moe_layer_freq": (None, 1),
}
"""What the known families' configs say of these keys; another value is another architecture."""


def read_facts(config: Mapping[str, Any], where: str) -> Facts | None:
    """The facts of a config, or None where it is of no family that is known here.

    Args:
        config: of a Hugging Face checkpoint.
        where: it was read, for messages.

    Raises:
        ConfigError: a number is missing, of the wrong type or absurd; the message names the key and the value.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or any(config.get(key) not in usual for key, usual in _USUAL.items()):
        return None
    read = _Reader(config, where)
    facts = Facts(
        family=family,
        vocab=read.size("vocab_size"),
        hidden=read.size("hidden_size"),
        layers=read.size("num_hidden_layers", limit=MAX_LAYERS),
        heads=read.size("num_attention_heads", limit=MAX_HEADS),
        kv_heads=read.size("num_key_value_heads", default=read.size("num_attention_heads"), limit=MAX_HEADS),
        head_dim=read.size("head_dim", default=_head_dim(read)),
        intermediate=read.size("intermediate_size", default=0, least=0),
        tied=read.flag("tie_word_embeddings", default=False),
        qkv_bias=read.flag("attention_bias", default=family in ("qwen2", "gpt_oss")),
        o_bias=read.flag("attention_bias", default=family == "gpt_oss") and family in _OUTPUT_BIAS,
        qk_norm=read.flag("use_qk_norm", default=family in _HEAD_NORMS),
        gated=family == "qwen3_5_moe_text",
        mtp_layers=_mtp_layers(read),
        moe=_read_moe(family, read),
        mla=_read_mla(family, read),
        linear=_read_linear(read) if family == "qwen3_5_moe_text" else None,
        prefix=NESTED if _is_nested(config) else PREFIX,
    )
    _check(facts, where)
    return facts


def _is_nested(config: Mapping[str, Any]) -> bool:
    """Whether the config is that of the decoder of a model with a vision tower."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and any("ConditionalGeneration" in str(name) for name in architectures)


class _Reader:
    """Numbers of a config, checked."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def size(self, key: str, *, default: int | None = None, limit: int = MAX_SIZE, least: int = 1) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where} has no {key!r}")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
            raise ConfigError(f"{self.where} has {key} {value!r}, allowed are whole numbers from {least} to {limit}")
        return value

    def first(self, keys: tuple[str, ...], *, limit: int = MAX_SIZE) -> int:
        """The number of the first of these keys that is there."""
        found = [key for key in keys if self.config.get(key) is not None]
        return self.size(found[0] if found else keys[0], limit=limit)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where} has {key} {value!r}, allowed are true and false")
        return value


def _head_dim(read: _Reader) -> int:
    return max(read.size("hidden_size") // read.size("num_attention_heads"), 1)


def _mtp_layers(read: _Reader) -> int:
    found = read.size("num_nextn_predict_layers", default=0, limit=MAX_LAYERS, least=0)
    return found or read.size("num_mtp_layers", default=0, limit=MAX_LAYERS, least=0)


def _read_moe(family: str, read: _Reader) -> Moe | None:
    if family in ("deepseek_v3", "glm_moe_dsa", "glm4_moe"):
        expert_dim = read.size("moe_intermediate_size")
        return Moe(
            num_experts=read.first(_EXPERTS, limit=MAX_EXPERTS),
            expert_dim=expert_dim,
            shared_dim=expert_dim * read.size("n_shared_experts", default=0, limit=MAX_EXPERTS, least=0),
            first_dense=read.size("first_k_dense_replace", default=0, limit=MAX_LAYERS, least=0),
            router_bias=True,
            num_groups=read.size("n_group", default=1, limit=MAX_EXPERTS),
        )
    if family in ("qwen3_moe", "qwen3_5_moe_text"):
        return Moe(
            num_experts=read.first(_EXPERTS, limit=MAX_EXPERTS),
            expert_dim=read.size("moe_intermediate_size"),
            shared_dim=read.size("shared_expert_intermediate_size", default=0, least=0),
        )
    if family == "gpt_oss":
        return Moe(read.first(_EXPERTS, limit=MAX_EXPERTS), read.size("intermediate_size"))
    return None


def _read_mla(family: str, read: _Reader) -> Mla | None:
    if family not in ("deepseek_v3", "glm_moe_dsa"):
        return None
    sparse = family == "glm_moe_dsa"
    return Mla(
        q_rank=read.size("q_lora_rank", default=0, least=0),
        kv_rank=read.size("kv_lora_rank"),
        nope_dim=read.size("qk_nope_head_dim"),
        rope_dim=read.size("qk_rope_head_dim"),
        v_dim=read.size("v_head_dim"),
        indexer_heads=read.size("index_n_heads") if sparse else 0,
        indexer_dim=read.size("index_head_dim") if sparse else 0,
    )


def _read_linear(read: _Reader) -> LinearAttention:
    return LinearAttention(
        key_heads=read.size("linear_num_key_heads"),
        value_heads=read.size("linear_num_value_heads"),
        key_dim=read.size("linear_key_head_dim"),
        value_dim=read.size("linear_value_head_dim"),
        kernel=read.size("linear_conv_kernel_dim"),
        interval=read.size("full_attention_interval", default=4),
    )


def _check(facts: Facts, where: str) -> None:
    if facts.heads % facts.kv_heads:
        raise ConfigError(
            f"{where} has {facts.heads} attention heads, which do not divide into {facts.kv_heads} key-value heads"
        )
    if facts.moe is not None and facts.moe.first_dense > facts.layers:
        raise ConfigError(f"{where} has {facts.moe.first_dense} dense layers first, but {facts.layers} layers")
