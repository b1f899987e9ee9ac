"""What vLLM's own loaders do to tiny models, recorded for one rank of a layout: ``python vllm_recordings.py FOLDER``.

Runs in a process of its own: it sets the size and rank of vLLM's tensor parallel group, so that this process builds and
loads the part of any rank. Nothing is computed, so that no rank has to talk to another one.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One rank of one engine.

    Attributes:
        family: key of `CONFIGS`.
        tp: tensor parallel ranks.
        rank: in the replica: tensor parallelism innermost, then stages, then data parallelism.
        experts: expert parallelism over the ranks of tp and dp.
        placement: of the experts.
        recipe: of the checkpoint that vLLM is told of.
        pp, dp: pipeline stages; ranks of data parallel attention.
    """

    family: str
    tp: int = 1
    rank: int = 0
    experts: bool = False
    placement: str = "linear"
    recipe: str = "bf16"
    pp: int = 1
    dp: int = 1

    @property
    def size(self) -> int:
        """Ranks of the replica."""
        return self.tp * self.pp * self.dp

    @property
    def layout(self) -> str:
        """What wsync calls it."""
        found = f"tp={self.tp},pp={self.pp},dp={self.dp}" + (f",ep={self.tp * self.dp}" if self.experts else "")
        return found + (f",placement={self.placement}" if self.placement != "linear" else "")


# 570 rows are padded to 576: a multiple of 64, and not of 128.
_DENSE: dict[str, Any] = {
    "vocab_size": 570,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
_ROUTED = {
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
_WIDE = {"hidden_size": 512, "head_dim": 128}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"num_hidden_layers": 4}),
    "qwen3_tied": ("Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3_one_kv_head": ("Qwen3Config", {"num_key_value_heads": 1}),
    "qwen3_wide": ("Qwen3Config", _WIDE),
    "qwen3_moe": ("Qwen3MoeConfig", _QWEN_MOE),
    "qwen3_moe_wide": ("Qwen3MoeConfig", {**_QWEN_MOE, **_WIDE}),
    "deepseek_v3": ("DeepseekV3Config", {**_MLA, **_ROUTED}),
    "glm4_moe": ("Glm4MoeConfig", {**_ROUTED, "attention_bias": True, "use_qk_norm": True}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {
            **_QWEN_MOE,
            "shared_expert_intermediate_size": 256,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "num_hidden_layers": 4,
        },
    ),
}
"""Class of the transformers config, and its options."""

_SCALES_OF_ATTENTION = (".attn.q_scale", ".attn.k_scale", ".attn.v_scale", ".attn.prob_scale")
"""Which stay 1 where no checkpoint has them."""

DENSE = ("llama", "mistral", "qwen2", "qwen3", "qwen3_tied", "qwen3_one_kv_head")
SPARSE = ("qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_5_moe")


def cases() -> list[Case]:
    """Every case."""
    found = [Case(family, tp, rank) for family in DENSE for tp, rank in ((1, 0), (2, 0), (2, 1))]
    found += [Case("qwen3", 4, rank) for rank in range(4)]
    for family in SPARSE:
        found += [Case(family, tp, rank) for tp, rank in ((1, 0), (2, 0), (2, 1))]
        found += [Case(family, 2, rank, experts=True) for rank in range(2)]
    found += [Case("deepseek_v3", 2, rank, True, "round_robin") for rank in range(2)]
    for family in ("qwen3_wide", "qwen3_moe_wide"):
        found += [Case(family, tp, rank, recipe="fp8_block128") for tp, rank in ((1, 0), (2, 0), (2, 1))]
    found.append(Case("qwen3_moe_wide", 2, 1, experts=True, recipe="fp8_block128"))
    found += [Case(family, 1, rank, pp=2) for family in ("qwen3_tied", "deepseek_v3") for rank in range(2)]
    found += [Case("qwen3", 1, rank, pp=3) for rank in range(3)]
    found += [Case("qwen3_moe", 1, rank, True, dp=2) for rank in range(2)]
    return [*found, Case("qwen3_moe", 2, 3, True, dp=2), Case("qwen3_moe", 2, 3, dp=2)]


CUT = (Case("qwen3", 4, 0, recipe="fp8_block128"), Case("qwen3", 2, 0, recipe="fp8_block128"))
"""Layouts that cut blocks: of columns and of rows, of rows alone."""


def name_of(case: Case) -> str:
    """Of a case's file."""
    experts = f"-ep-{case.placement}" if case.experts else ""
    return f"{case.family}-{case.recipe}-tp{case.tp}-pp{case.pp}-dp{case.dp}-rank{case.rank}{experts}"


def save_config(case: Case, folder: Path) -> Path:
    """Write the ``config.json`` of a case into a folder of its own."""
    import json

    import transformers

    kind, options = CONFIGS[case.family]
    target = folder / f"{case.family}-{case.recipe}"
    config = getattr(transformers, kind)(**{**_DENSE, **options}, dtype="bfloat16")
    config.architectures = [kind.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    config.save_pretrained(target)
    if case.recipe != "bf16":
        path = target / "config.json"
        quantised = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        # As Qwen's own fp8 checkpoints say.
        quantised["modules_to_not_convert"] = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(4))]
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised}))
    return target


def _record(case: Case, folder: Path) -> Any:
    """The manifest of the case's rank."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from wsync.adapters.engines.recorder import record_loader
    from wsync.adapters.engines.vllm.recipes import engine_recipes
    from wsync.describe import load_model
    from wsync.spec.manifest import RankInfo

    model_folder = save_config(case, folder)
    arguments = EngineArgs(model=str(model_folder), skip_tokenizer_init=True, load_format="dummy", max_model_len=64)
    config = arguments.create_engine_config()
    config.parallel_config.enable_expert_parallel = case.experts
    config.parallel_config.expert_placement_strategy = case.placement
    config.parallel_config.data_parallel_size = case.dp
    tp, pp, dp = case.rank % case.tp, case.rank // case.tp % case.pp, case.rank // case.tp // case.pp
    for group, size, rank in (
        (parallel_state.get_tp_group(), case.tp, tp),
        (parallel_state.get_pp_group(), case.pp, pp),
        (parallel_state.get_dp_group(), case.dp, dp),
        (parallel_state.get_ep_group(), case.tp * case.dp, dp * case.tp + tp),
    ):
        group.world_size, group.rank_in_group, group.rank, group.ranks = size, rank, rank, list(range(size))
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(config)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        names = load_model(model_folder).tensors
        load = model.load_weights
        recipes = engine_recipes(load, names, tensors, model, config.quant_config, None)
        derived = [n for n in tensors if n.endswith(_SCALES_OF_ATTENTION)]
        parameters = dict(model.named_parameters())
        found = record_loader(load, names, parameters, recipes, allow_missing=derived, module=model)
    return found.manifest("engine-0", case.rank, case.size, RankInfo("host"))


def _stand_in_for_torchvision() -> None:
    """Qwen3.5's module imports image processors that want it; only the text decoder is built here."""
    import importlib.machinery
    import importlib.util
    from unittest.mock import MagicMock

    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
            module = MagicMock(name=name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []
            sys.modules[name] = module


def _install() -> None:
    """A kernel for fp8, which vLLM has for few processors, and the text decoder alone of Qwen3.5."""
    import transformers.image_processing_utils  # noqa: F401  (it looks for torchvision, too, and does without)
    from vllm import ModelRegistry

    _stand_in_for_torchvision()
    from vllm.model_executor.models.qwen3_5 import Qwen3_5MoeForCausalLM

    sys.path.append(str(Path(__file__).parents[1] / "engines"))
    from vllm_cpu import reference_fp8

    reference_fp8.install()
    ModelRegistry.register_model("Qwen3_5MoeForCausalLM", Qwen3_5MoeForCausalLM)


def main(out: Path) -> None:
    """Record all cases; what a case fails with becomes the text of its file."""
    import traceback

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    from wsync.spec.serde import encode

    _install()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1, backend="gloo")
        for case in (*cases(), *CUT):
            try:
                (out / f"{name_of(case)}.manifest").write_bytes(encode(_record(case, Path(folder))))
            except Exception:
                (out / f"{name_of(case)}.error").write_text(traceback.format_exc())


if __name__ == "__main__":
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")
    main(Path(sys.argv[1]))
