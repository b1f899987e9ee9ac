"""Names and shapes of a decoder's checkpoint, from its facts: exactly those that Hugging Face checkpoints have.

Source: the modules of ``transformers`` that write these checkpoints; a test compares with them, family by family.
"""

from __future__ import annotations

from collections.abc import Iterator

from wsync.describe.models.facts import Facts, LinearAttention, Mla, Moe
from wsync.errors import ConfigError
from wsync.spec.manifest import BUFFER, PARAMETER, TensorSpec

DTYPE = "bfloat16"

MAX_TENSORS = 1 << 20
"""Fifteen times those of the largest model there is."""

Shapes = Iterator[tuple[str, tuple[int, ...]]]
"""Names below a prefix, with their shapes."""

CORRECTION_BIAS = "e_score_correction_bias"
_IN_F32 = ("linear_attn.A_log", "linear_attn.norm.weight")
"""Parameters that published checkpoints keep in f32. Source: the headers of Qwen3.5-397B-A17B's files."""


def decoder_tensors(facts: Facts, *, mtp: bool = False) -> tuple[TensorSpec, ...]:
    """All tensors of a checkpoint, in bf16 but for a few, in the order of its layers.

    Args:
        facts: of the model.
        mtp: also the layers that predict further tokens, which most trainers and engines leave out.

    Raises:
        ConfigError: there are too many.
    """
    prefix = facts.prefix
    embedding = prefix + "embed_tokens.weight"
    shape = (facts.vocab, facts.hidden)
    found = [TensorSpec(embedding, shape, DTYPE)]
    for layer in range(facts.layers):
        found += _specs(f"{prefix}layers.{layer}.", _layer(facts, layer))
        _check_count(facts, len(found))
    found.append(TensorSpec(prefix + "norm.weight", (facts.hidden,), DTYPE))
    found.append(TensorSpec("lm_head.weight", shape, DTYPE, alias_of=embedding if facts.tied else None))
    for layer in range(facts.layers, facts.layers + facts.mtp_layers if mtp else 0):
        found += _specs(f"{prefix}layers.{layer}.", _mtp_layer(facts, layer))
        _check_count(facts, len(found))
    return tuple(found)


def _check_count(facts: Facts, count: int) -> None:
    if count > MAX_TENSORS:
        experts = 0 if facts.moe is None else facts.moe.num_experts
        raise ConfigError(
            f"a model of {facts.layers + facts.mtp_layers} layers and {experts} experts in each has more than "
            f"{count} tensors, allowed are {MAX_TENSORS}"
        )


def _specs(prefix: str, shapes: Shapes) -> Iterator[TensorSpec]:
    for name, shape in shapes:
        if name.endswith(CORRECTION_BIAS):
            yield TensorSpec(prefix + name, shape, "float32", kind=BUFFER)
        else:
            yield TensorSpec(prefix + name, shape, "float32" if name in _IN_F32 else DTYPE, kind=PARAMETER)


def _layer(facts: Facts, layer: int) -> Shapes:
    yield "input_layernorm.weight", (facts.hidden,)
    if facts.is_linear(layer) and facts.linear is not None:
        yield from _prefixed("linear_attn.", _linear_attention(facts, facts.linear))
    elif facts.mla is not None:
        yield from _prefixed("self_attn.", _latent_attention(facts, facts.mla))
    else:
        yield from _prefixed("self_attn.", _attention(facts))
    yield "post_attention_layernorm.weight", (facts.hidden,)
    if facts.moe is not None and facts.is_moe(layer):
        yield from _prefixed("mlp.", _experts(facts, facts.moe))
    else:
        yield from _prefixed("mlp.", _mlp(facts.hidden, facts.intermediate))


def _mtp_layer(facts: Facts, layer: int) -> Shapes:
    """Source: DeepSeek-V3's ``README_WEIGHTS.md``, section "Multi-Token Prediction (MTP) Modules"."""
    yield "embed_tokens.weight", (facts.vocab, facts.hidden)
    yield "enorm.weight", (facts.hidden,)
    yield "hnorm.weight", (facts.hidden,)
    yield "eh_proj.weight", (facts.hidden, 2 * facts.hidden)
    yield from _layer(facts, layer)
    yield "shared_head.norm.weight", (facts.hidden,)
    yield "shared_head.head.weight", (facts.vocab, facts.hidden)


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return ((prefix + name, shape) for name, shape in shapes)


def _linear(name: str, rows: int, cols: int, bias: bool = False) -> Shapes:
    yield f"{name}.weight", (rows, cols)
    if bias:
        yield f"{name}.bias", (rows,)


def _attention(facts: Facts) -> Shapes:
    q_rows, kv_rows = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    yield from _linear("q_proj", q_rows * (2 if facts.gated else 1), facts.hidden, facts.qkv_bias)
    yield from _linear("k_proj", kv_rows, facts.hidden, facts.qkv_bias)
    yield from _linear("v_proj", kv_rows, facts.hidden, facts.qkv_bias)
    yield from _linear("o_proj", facts.hidden, q_rows, facts.o_bias)
    if facts.qk_norm:
        yield "q_norm.weight", (facts.head_dim,)
        yield "k_norm.weight", (facts.head_dim,)
    if facts.family == "gpt_oss":
        yield "sinks", (facts.heads,)


def _latent_attention(facts: Facts, mla: Mla) -> Shapes:
    q_rows = facts.heads * (mla.nope_dim + mla.rope_dim)
    if mla.q_rank:
        yield from _linear("q_a_proj", mla.q_rank, facts.hidden, facts.qkv_bias)
        yield "q_a_layernorm.weight", (mla.q_rank,)
        yield from _linear("q_b_proj", q_rows, mla.q_rank)
    else:
        yield from _linear("q_proj", q_rows, facts.hidden)
    yield from _linear("kv_a_proj_with_mqa", mla.kv_rank + mla.rope_dim, facts.hidden, facts.qkv_bias)
    yield "kv_a_layernorm.weight", (mla.kv_rank,)
    yield from _linear("kv_b_proj", facts.heads * (mla.nope_dim + mla.v_dim), mla.kv_rank)
    yield from _linear("o_proj", facts.hidden, facts.heads * mla.v_dim, facts.qkv_bias)
    if mla.indexer_heads:
        yield from _linear("indexer.wq_b", mla.indexer_heads * mla.indexer_dim, mla.q_rank)
        yield from _linear("indexer.wk", mla.indexer_dim, facts.hidden)
        yield "indexer.k_norm.weight", (mla.indexer_dim,)
        yield "indexer.k_norm.bias", (mla.indexer_dim,)
        yield from _linear("indexer.weights_proj", mla.indexer_heads, facts.hidden)


def _linear_attention(facts: Facts, linear: LinearAttention) -> Shapes:
    keys, values = linear.key_heads * linear.key_dim, linear.value_heads * linear.value_dim
    yield "dt_bias", (linear.value_heads,)
    yield "A_log", (linear.value_heads,)
    yield "conv1d.weight", (2 * keys + values, 1, linear.kernel)
    yield "norm.weight", (linear.value_dim,)
    yield from _linear("out_proj", facts.hidden, values)
    yield from _linear("in_proj_qkv", 2 * keys + values, facts.hidden)
    yield from _linear("in_proj_z", values, facts.hidden)
    yield from _linear("in_proj_b", linear.value_heads, facts.hidden)
    yield from _linear("in_proj_a", linear.value_heads, facts.hidden)


def _mlp(hidden: int, intermediate: int) -> Shapes:
    yield from _linear("gate_proj", intermediate, hidden)
    yield from _linear("up_proj", intermediate, hidden)
    yield from _linear("down_proj", hidden, intermediate)


def _experts(facts: Facts, moe: Moe) -> Shapes:
    if facts.family == "gpt_oss":
        yield from _stacked_experts(facts, moe)
        return
    yield "gate.weight", (moe.num_experts, facts.hidden)
    if moe.router_bias:
        yield f"gate.{CORRECTION_BIAS}", (moe.num_experts,)
    if facts.family == "qwen3_5_moe_text":
        yield "experts.gate_up_proj", (moe.num_experts, 2 * moe.expert_dim, facts.hidden)
        yield "experts.down_proj", (moe.num_experts, facts.hidden, moe.expert_dim)
        yield from _prefixed("shared_expert.", _mlp(facts.hidden, moe.shared_dim))
        yield "shared_expert_gate.weight", (1, facts.hidden)
        return
    for expert in range(moe.num_experts):
        yield from _prefixed(f"experts.{expert}.", _mlp(facts.hidden, moe.expert_dim))
    if moe.shared_dim:
        yield from _prefixed("shared_experts.", _mlp(facts.hidden, moe.shared_dim))


def _stacked_experts(facts: Facts, moe: Moe) -> Shapes:
    """As gpt-oss keeps them unquantised: inputs are rows, and gate and up are interleaved columns."""
    yield from _linear("router", moe.num_experts, facts.hidden, bias=True)
    yield "experts.gate_up_proj", (moe.num_experts, facts.hidden, 2 * moe.expert_dim)
    yield "experts.gate_up_proj_bias", (moe.num_experts, 2 * moe.expert_dim)
    yield "experts.down_proj", (moe.num_experts, moe.expert_dim, facts.hidden)
    yield "experts.down_proj_bias", (moe.num_experts, facts.hidden)
