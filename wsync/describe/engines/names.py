"""What vLLM calls the memory of a checkpoint's tensor.

Source: ``hf_to_vllm_mapper`` of vLLM's ``gpt_oss.py`` and ``qwen3_vl.py``; tests compare with the names of its modules.
"""

from __future__ import annotations

from wsync.describe.models.facts import NESTED, Facts

EXPERTS = "routed_experts"
"""The module below ``experts`` that holds the stacked weights."""


def engine_name(name: str, facts: Facts | None) -> str:
    """The engine's name of memory that is called ``name`` after the checkpoint's modules."""
    if facts is None:
        return name
    if facts.family == "gpt_oss":
        return name.replace(".self_attn.", ".attn.").replace("embed_tokens", "embedding")
    if facts.prefix == NESTED:
        inner = name.removeprefix(NESTED)
        return f"language_model.{inner}" if inner == name else f"language_model.model.{inner}"
    return name
