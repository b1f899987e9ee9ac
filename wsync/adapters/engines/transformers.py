"""An engine made of a Hugging Face decoder, with the memory layout of an inference engine.

The model's own code runs; its parameters are fused (q, k, v; gate, up), sharded for tensor parallelism, padded (the
vocabulary) and, where asked for, held as e4m3 with block scales. Loading takes checkpoint names, as engines do.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsync.adapters.engines.parallel_layers import (
    ColumnParallel,
    RowParallel,
    Rows,
    ShardedLinear,
    TensorParallel,
    VocabEmbedding,
    VocabHead,
    VocabParallel,
    check_shape,
    copy_into,
    divide,
)
from wsync.errors import ConfigError, RecipeError, UnknownTensorError
from wsync.spec.manifest import TensorSpec
from wsync.spec.recipes import get_recipe

QUANTIZATIONS = ("fp8_block128", "fp8_block128_f32")
"""Recipes that its linear layers compute with."""

STACKED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Checkpoint layer -> the fused layer that holds it, and its place there."""


class TransformersEngine:
    """One tensor-parallel rank of a decoder of the Llama, Mistral, Qwen2 or Qwen3 kind.

    Weights are zero until they are loaded. With ``tp_size > 1`` every rank runs ``forward`` together; loading needs
    no process group. Not thread-safe: load, commit and run on one thread.

    Args:
        config_or_dir: a transformers configuration, or a folder with ``config.json`` (weights are not read; see
            `load_checkpoint`).
        tp_rank, tp_size: this rank's place in the replica.
        process_group: of the replica's ranks; None is the default group.
        quantization: None, or a block recipe for the linear projections (not embeddings, head and norms).
        dtype: of everything that is not quantised.

    Attributes:
        model: the transformers module.
        config: its configuration.

    Raises:
        ConfigError: sizes that do not divide by ``tp_size``, shards that cut scale blocks, another structure.
        RecipeError: a quantization that is unknown, or not one of `QUANTIZATIONS`.
    """

    def __init__(
        self,
        config_or_dir: Any,
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        process_group: Any = None,
        quantization: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if not 0 <= tp_rank < tp_size:
            raise ConfigError(f"tp_rank {tp_rank} is not inside tp_size {tp_size}")
        if quantization is not None and get_recipe(quantization).quantised and quantization not in QUANTIZATIONS:
            raise RecipeError(
                f"this engine holds weights in {', '.join(QUANTIZATIONS)}, but quantization is {quantization!r}"
            )
        self.recipe = quantization
        self.dtype = dtype
        self._quantised = quantization is not None and get_recipe(quantization).quantised
        self._tp = TensorParallel(tp_rank, tp_size, process_group)
        self.config = _config_of(config_or_dir)
        self.model = _meta_model(self.config, dtype)
        self._loadable: dict[str, ShardedLinear | VocabParallel] = {}
        self._rebuild()

    # What an engine offers.

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy checkpoint tensors into live memory, each rank its own slices.

        Args:
            weights: pairs of a checkpoint name and the whole tensor; with quantization, e4m3 weights and
                their ``weight_scale_inv``.

        Returns:
            The engine's own names that were written.

        Raises:
            UnknownTensorError: a name that the engine has no place for.
            ShapeMismatchError, DtypeMismatchError: a tensor that does not fit.
        """
        params = dict(self.model.named_parameters(remove_duplicate=False))
        written: set[str] = set()
        for name, loaded in weights:
            if name == "lm_head.weight" and self.tied:
                continue
            module_name, _, kind = name.rpartition(".")
            path, _, leaf = module_name.rpartition(".")
            fused, index = STACKED.get(leaf, (leaf, 0))
            own = f"{path}.{fused}" if path else fused
            if f"{own}.{kind}" not in params:
                raise UnknownTensorError(f"the engine has no parameter {own}.{kind} for the checkpoint tensor {name!r}")
            module = self._loadable.get(own)
            if module is not None:
                module.load(kind, loaded, index)
            else:
                param = params[name]
                check_shape(name, loaded, tuple(param.shape))
                copy_into(param, loaded, name)
            written.add(f"{own}.{kind}")
        return written

    def load_checkpoint(self, folder: str | os.PathLike[str]) -> set[str]:
        """Load every ``*.safetensors`` file of a folder, in order of name.

        Raises:
            ConfigError: there is none.
        """
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ConfigError(f"the folder {os.fspath(folder)!r} has no safetensors files")
        return self.load_weights(_tensors_in(files))

    def live_tensors(self) -> dict[str, torch.Tensor]:
        """Live parameters and persistent buffers by the engine's own names; tied ones under both."""
        return {**dict(self.named_parameters(remove_duplicate=False)), **dict(self._persistent_buffers())}

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Live parameters by the engine's own names."""
        yield from self.model.named_parameters(remove_duplicate=remove_duplicate)

    def recipe_for(self, spec: TensorSpec) -> str:
        """The recipe in which the engine wants a checkpoint tensor."""
        module_name, _, kind = spec.name.rpartition(".")
        path, _, leaf = module_name.rpartition(".")
        fused = STACKED.get(leaf, (leaf, 0))[0]
        module = self._loadable.get(f"{path}.{fused}")
        if self.recipe and kind == "weight" and isinstance(module, ShardedLinear) and module.quantised:
            return self.recipe
        return "bf16" if self.dtype == torch.bfloat16 and spec.dtype in ("bfloat16", "float32") else "raw"

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """``input_ids`` int64 `[B, S]` to logits `[B, S, V]`, on every rank."""
        logits: torch.Tensor = self.model(input_ids, use_cache=False, **kwargs).logits
        return logits

    __call__ = forward

    @torch.no_grad()
    def generate_greedy(self, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Append the ``num_tokens`` most likely tokens, one by one: `[B, S]` to `[B, S + num_tokens]`."""
        ids, cache, new = input_ids, None, input_ids
        for _ in range(num_tokens):
            out = self.model(new, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            new = out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], dim=1)
        return ids

    # How it is built.

    def _rebuild(self) -> None:
        """Replace the meta model's layers by sharded ones with memory."""
        decoder, causal = self.model.model, self.model
        for i, layer in enumerate(decoder.layers):
            self._fuse_attention(layer.self_attn, f"model.layers.{i}.self_attn")
            self._fuse_mlp(layer.mlp, f"model.layers.{i}.mlp")
        hidden = int(self.config.hidden_size)
        vocab = int(self.config.vocab_size)
        if type(decoder.embed_tokens) is not nn.Embedding:
            raise ConfigError(f"the model's embedding is a {type(decoder.embed_tokens).__name__}, not a plain one")
        decoder.embed_tokens = VocabEmbedding(vocab, hidden, self._tp, self.dtype, "model.embed_tokens")
        causal.lm_head = VocabHead(vocab, hidden, self._tp, self.dtype, "lm_head")
        if self.tied:
            causal.lm_head.weight = decoder.embed_tokens.weight
        self._loadable |= {"model.embed_tokens": decoder.embed_tokens, "lm_head": causal.lm_head}
        decoder.rotary_emb = type(decoder.rotary_emb)(config=self.config)
        _materialise(self.model, self.dtype)
        self.model.eval()

    def _fuse_attention(self, attention: Any, name: str) -> None:
        _check_linear(attention, name, ("q_proj", "k_proj", "v_proj", "o_proj"))
        head_dim, tp = int(attention.head_dim), self._tp
        num_heads, num_kv = attention.q_proj.out_features // head_dim, attention.k_proj.out_features // head_dim
        local = divide(num_heads, tp.size, f"the number of heads of {name}")
        q = Rows("q_proj", num_heads * head_dim, tp.rank * local * head_dim, local * head_dim)
        first, count = _kv_heads(num_kv, tp, name)
        k, v = (Rows(n, num_kv * head_dim, first * head_dim, count * head_dim) for n in ("k_proj", "v_proj"))
        self._stack(attention, name, "qkv_proj", [q, k, v])
        self._shard_rows(attention, name, "o_proj")
        # The attention kernels repeat each local key head for this many local query heads.
        attention.num_key_value_groups = local // count

    def _fuse_mlp(self, mlp: Any, name: str) -> None:
        _check_linear(mlp, name, ("gate_proj", "up_proj", "down_proj"))
        width = int(mlp.gate_proj.out_features)
        share = divide(width, self._tp.size, f"the intermediate size of {name}")
        self._stack(
            mlp, name, "gate_up_proj", [Rows(n, width, self._tp.rank * share, share) for n in ("gate_proj", "up_proj")]
        )
        self._shard_rows(mlp, name, "down_proj")

    def _stack(self, parent: Any, name: str, fused: str, rows: list[Rows]) -> None:
        """Replace column-parallel layers by one fused layer and callers of its parts."""
        linears = [getattr(parent, r.name) for r in rows]
        columns = int(linears[0].in_features)
        stacked = ShardedLinear(
            rows, columns, (0, columns), has_bias=linears[0].bias is not None, **self._layer(f"{name}.{fused}")
        )
        for index, r in enumerate(rows):
            setattr(parent, r.name, ColumnParallel(stacked, index))
        setattr(parent, fused, stacked)
        self._loadable[f"{name}.{fused}"] = stacked

    def _shard_rows(self, parent: Any, name: str, leaf: str) -> None:
        linear = getattr(parent, leaf)
        rows = Rows(leaf, int(linear.out_features), 0, int(linear.out_features))
        layer = RowParallel(
            rows, int(linear.in_features), self._tp, has_bias=linear.bias is not None, **self._layer(f"{name}.{leaf}")
        )
        setattr(parent, leaf, layer)
        self._loadable[f"{name}.{leaf}"] = layer

    def _layer(self, name: str) -> dict[str, Any]:
        return {"quantised": self._quantised, "dtype": self.dtype, "name": name}

    def _persistent_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        kept = self.model.state_dict(keep_vars=True).keys()
        yield from ((name, b) for name, b in self.model.named_buffers() if name in kept)


def _config_of(config_or_dir: Any) -> Any:
    """A configuration of our own: building a model writes into it."""
    try:
        from transformers import AutoConfig
    except ImportError as e:
        raise ConfigError(
            "the transformers engine needs the package transformers", hint="pip install 'wsync-rl[engines]'"
        ) from e
    if isinstance(config_or_dir, str | os.PathLike):
        if not (Path(config_or_dir) / "config.json").is_file():
            raise ConfigError(f"the folder {os.fspath(config_or_dir)!r} has no config.json")
        return AutoConfig.from_pretrained(os.fspath(config_or_dir), local_files_only=True)
    return copy.deepcopy(config_or_dir)


def _meta_model(config: Any, dtype: torch.dtype) -> Any:
    """The model's modules without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    decoder = getattr(model, "model", None)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    if decoder is None or not hasattr(model, "lm_head") or not all(hasattr(decoder, p) for p in parts):
        raise ConfigError(f"{type(model).__name__} is no decoder of the Llama kind (model.layers, model.norm, lm_head)")
    return model


def _check_linear(parent: Any, name: str, leaves: tuple[str, ...]) -> None:
    for leaf in leaves:
        if not isinstance(getattr(parent, leaf, None), nn.Linear):
            raise ConfigError(
                f"{name} has no linear layer {leaf}; models of the Llama, Mistral, Qwen2 and Qwen3 kind have"
            )


def _kv_heads(num_kv: int, tp: TensorParallel, name: str) -> tuple[int, int]:
    """First key/value head of this rank and how many; with more ranks than heads, several ranks hold the same one."""
    if num_kv >= tp.size:
        count = divide(num_kv, tp.size, f"the number of key/value heads of {name}")
        return tp.rank * count, count
    if tp.size % num_kv:
        raise ConfigError(f"{tp.size} tensor-parallel ranks do not share the {num_kv} key/value heads of {name} evenly")
    return tp.rank // (tp.size // num_kv), 1


def _materialise(model: nn.Module, dtype: torch.dtype) -> None:
    """Give memory to what is whole on every rank (norms), and refuse what nobody filled."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter.dim() != 1:
                raise ConfigError(
                    f"the engine does not know how to shard {name}.{key} of shape {tuple(parameter.shape)}"
                )
            whole = torch.zeros(parameter.shape, dtype=dtype, device="cpu")
            module._parameters[key] = nn.Parameter(whole, requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                raise ConfigError(f"the engine does not know how to compute the buffer {name}.{key}")


def _tensors_in(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                yield name, opened.get_tensor(name)
