"""A model by name, config or checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import msgspec

from wsync.describe.models.builtin import BUILTIN, find_builtin
from wsync.describe.models.decoder import decoder_tensors
from wsync.describe.models.facts import Facts, read_facts
from wsync.describe.models.headers import read_headers
from wsync.describe.models.huggingface import tensors_of_config
from wsync.describe.models.shape import ModelShape
from wsync.errors import ConfigError
from wsync.spec.files import read_file

MAX_CONFIG_BYTES = 16 << 20


def load_model(name_or_path: str | Path, *, mtp: bool = False) -> ModelShape:
    """Names and shapes of a model, without its weights.

    Args:
        name_or_path: a built-in model's name, or the path of a Hugging Face ``config.json``, of a safetensors file or
            ``model.safetensors.index.json``, or of a folder that has one of these. A folder's safetensors headers
            count for names and shapes, its config for the rest.
        mtp: also the layers that predict further tokens, of a model that is known by its config.

    Raises:
        ConfigError: no such model or file; a config, header or index that is truncated, absurd or not one.
    """
    found = find_builtin(str(name_or_path))
    if found is not None:
        name, model = found
        facts = read_facts(model.config, model.source)
        if facts is None:
            raise ConfigError(f"built-in model {name!r} has the unknown type {model.config['model_type']!r}")
        return ModelShape(name, decoder_tensors(facts, mtp=mtp), model.source, facts)
    path = Path(name_or_path)
    try:
        return _of_path(path, mtp) if path.exists() else _unknown(path)
    except OSError as e:
        raise ConfigError(f"{str(name_or_path)!r} cannot be read: {e.strerror}") from e


def _unknown(path: Path) -> NoReturn:
    raise ConfigError(
        f"{str(path)!r} is neither a built-in model nor a file; built in are {', '.join(BUILTIN)}",
        hint="give the path of a config.json or of a safetensors file, index or folder",
    )


def _of_path(path: Path, mtp: bool) -> ModelShape:
    folder = path if path.is_dir() else path.parent
    is_config = path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json")
    config_path = path if is_config else folder / "config.json"
    config = _read_config(config_path) if config_path.is_file() else None
    facts = None if config is None else read_facts(config, str(config_path))
    if not is_config:
        tensors = read_headers(path)
        if tensors:
            return ModelShape(folder.name if path.is_dir() else path.name, tensors, str(path), facts)
    if config is None:
        raise ConfigError(f"{str(path)!r} has neither a config.json nor safetensors files")
    tensors = decoder_tensors(facts, mtp=mtp) if facts is not None else tensors_of_config(config, str(config_path))
    return ModelShape(folder.resolve().name, tensors, str(config_path), facts)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = msgspec.json.decode(read_file(path, MAX_CONFIG_BYTES), type=dict[str, Any])
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not the JSON of a config: {e}") from e
    text = config.get("text_config")
    if isinstance(text, dict) and str(text.get("model_type")).endswith("_text"):
        outer = {key: config[key] for key in ("tie_word_embeddings", "architectures") if key in config}
        return {**text, **outer}
    return config


def known_models() -> tuple[tuple[str, Facts, str], ...]:
    """Name, facts and source of every built-in model."""
    return tuple((name, _facts_of(name), model.source) for name, model in BUILTIN.items())


def _facts_of(name: str) -> Facts:
    facts = read_facts(BUILTIN[name].config, name)
    if facts is None:
        raise ConfigError(f"built-in model {name!r} has an unknown type")
    return facts
