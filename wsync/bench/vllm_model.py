"""The trainer of ``wsync bench vllm``: one process that holds the whole model, and writes checkpoints of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch

from wsync.bench.checkpoint import needed_bytes, write_checkpoint
from wsync.bench.rows import all_parts
from wsync.bench.weights import build_model, change_content, fill
from wsync.errors import ConfigError

NUM_CONTENTS = 2
"""Versions take turns between this many different weights."""

_WEIGHTS = "model.safetensors"


class ServedModel:
    """Random weights in bf16, which change from version to version.

    Attributes:
        model: the module that is published.
        parameters: name -> tensor, tied ones once; the memory of `model`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.model = build_model(config)
        fill(self.model, seed=0)
        self.parameters: dict[str, torch.Tensor] = {n: p.detach() for n, p in self.model.named_parameters()}
        self._content = 0
        shapes = [(n, list(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in self.parameters.items()]
        self._needed_bytes = needed_bytes(all_parts(shapes, dict.fromkeys(self.parameters, "raw")))

    @property
    def num_bytes(self) -> int:
        """Of all weights, tied ones once."""
        return sum(tensor.nbytes for tensor in self.parameters.values())

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.model.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def set_content(self, content: int) -> None:
        """Change every element of every weight in place, as an optimizer step does, to one of `NUM_CONTENTS`."""
        change_content(self.parameters.values(), self._content, content)
        self._content = content

    def prepare_folder(self, folder: Path, copied: Path | None = None) -> None:
        """Write what a checkpoint has besides its weights, or copy it from another folder."""
        folder.mkdir()
        if copied is not None:
            for path in copied.iterdir():
                if path.name != _WEIGHTS:
                    shutil.copy(path, folder)
            return
        config: Any = self.model.config
        config.architectures = [type(self.model).__name__]
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        _write_tokenizer(folder, self.vocabulary)

    def write_weights(self, folder: Path) -> None:
        """Write the weights as one safetensors file.

        Raises:
            ConfigError: there is no room for them.
        """
        try:
            write_checkpoint(folder / _WEIGHTS, self.parameters, self._needed_bytes)
        except ConfigError as e:
            e.hint = "make room there, or take a smaller model"
            raise

    def remove_weights(self, folder: Path) -> None:
        """Remove the file. A new one never shares memory with it, so a server that still maps it is not disturbed."""
        (folder / _WEIGHTS).unlink(missing_ok=True)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word for each token: ``t0``, ``t1``, ..."""
    words = {f"t{token}": token for token in range(vocabulary)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(settings))
