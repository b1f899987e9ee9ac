"""What a checkpoint tensor is, told by its name: which projection, of which layer, of which expert.

Names are those of Hugging Face checkpoints of decoders. A tensor whose name says nothing that a layout could use is
`OTHER`; layouts that would have to cut it refuse it by name.
"""

from __future__ import annotations

from typing import NamedTuple

EMBEDDING = "embedding"
HEAD = "head"
NORM = "norm"
ROUTER = "router"
SINKS = "sinks"
OTHER = "other"
Q, K, V, OUT = "q", "k", "v", "o"
Q_A, KV_A, Q_B, KV_B = "q_a", "kv_a", "q_b", "kv_b"
GATE, UP, DOWN = "gate", "up", "down"
GATE_UP = "gate_up"
"""All experts' gates and ups in one tensor, ``[E, 2I, h]``; interleaved columns ``[E, h, 2I]`` in gpt-oss."""
LINEAR_QKV, LINEAR_Z, LINEAR_B, LINEAR_A, CONV, LINEAR_OUT, LINEAR_HEAD = (
    "linear_qkv",
    "linear_z",
    "linear_b",
    "linear_a",
    "conv",
    "linear_out",
    "linear_head",
)
"""Of a gated delta net; `LINEAR_HEAD` is what has one value for each head."""
COLUMN = frozenset({Q_B, KV_B, GATE, UP, SINKS, LINEAR_Z, LINEAR_B, LINEAR_A, LINEAR_HEAD})
ROW = frozenset({OUT, DOWN, LINEAR_OUT})
"""What tensor parallel ranks get equal shares of, by rows and by columns, in Megatron-Core and in vLLM alike."""
INDEXER = "indexer"
REPLICATED = "replicated"
"""What every rank of a tensor-parallel group holds whole, by all frameworks' choice."""

_MODULES: dict[str, str] = {
    "embed_tokens": EMBEDDING,
    "lm_head": HEAD,
    "q_proj": Q,
    "k_proj": K,
    "v_proj": V,
    "o_proj": OUT,
    "q_a_proj": Q_A,
    "kv_a_proj_with_mqa": KV_A,
    "q_b_proj": Q_B,
    "kv_b_proj": KV_B,
    "gate_proj": GATE,
    "up_proj": UP,
    "down_proj": DOWN,
    "w1": GATE,
    "w3": UP,
    "w2": DOWN,
    "router": ROUTER,
    "in_proj_qkv": LINEAR_QKV,
    "in_proj_z": LINEAR_Z,
    "in_proj_b": LINEAR_B,
    "in_proj_a": LINEAR_A,
    "conv1d": CONV,
    "out_proj": LINEAR_OUT,
    "shared_expert_gate": REPLICATED,
    "eh_proj": REPLICATED,
}
_LEAVES: dict[str, str] = {
    "sinks": SINKS,
    "e_score_correction_bias": ROUTER,
    "dt_bias": LINEAR_HEAD,
    "A_log": LINEAR_HEAD,
    "gate_up_proj": GATE_UP,
    "gate_up_proj_bias": GATE_UP,
    "down_proj": DOWN,
    "down_proj_bias": DOWN,
}


class Part(NamedTuple):
    """What one checkpoint tensor is.

    Attributes:
        kind: one of the constants of this module.
        layer: its number, or None outside of the layers.
        expert: its number; None for what is no expert, and for all experts stacked.
        stacked: whether the tensor holds all experts.
        bias: whether it is one.
        stem: the name of the module that an engine would fuse it into, such as ``model.layers.3.self_attn``.
        shared: whether it is of the shared expert.
    """

    kind: str
    layer: int | None
    expert: int | None
    stacked: bool
    bias: bool
    stem: str
    shared: bool

    @property
    def routed(self) -> bool:
        """Whether it is of one or all of the experts that tokens are routed to."""
        return self.expert is not None or self.stacked


def part_of(name: str) -> Part:
    """What the tensor of that checkpoint name is."""
    words = name.split(".")
    leaf = words[-1]
    module = words[-2] if len(words) > 1 else ""
    expert = _number_after(words, "experts")
    stacked = expert is None and "experts" in words
    kind = _kind(words, module, leaf)
    bias = leaf == "bias" or leaf.endswith("_proj_bias")
    depth = 1 if leaf in _LEAVES or module == "" else 2
    stem = ".".join(words[: len(words) - depth])
    shared = "shared_experts" in words or "shared_expert" in words
    return Part(kind, _number_after(words, "layers"), expert, stacked, bias, stem, shared)


def _kind(words: list[str], module: str, leaf: str) -> str:
    if leaf in _LEAVES:
        return _LEAVES[leaf]
    if "indexer" in words:
        return INDEXER
    if module in _MODULES:
        return _MODULES[module]
    if module == "gate":
        return ROUTER
    if module == "head" and "shared_head" in words:
        return HEAD
    if "norm" in module:
        return NORM
    return OTHER


def _number_after(words: list[str], word: str) -> int | None:
    """The number that follows ``word``, as in ``experts.7``."""
    if word not in words[:-1]:
        return None
    following = words[words.index(word) + 1]
    return int(following) if following.isdecimal() else None
