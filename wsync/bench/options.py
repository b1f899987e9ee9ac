"""What a run of ``wsync bench e2e`` is asked to do, and its presets. No torch: the CLI reads this at start-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from wsync.errors import ConfigError
from wsync.spec.recipes import RECIPES as ALL_RECIPES

RECIPES = ("bf16", "fp8_block128", "fp8_block128_f32")
"""Recipes that have rows, in the order of the table: those in which the benchmark's engine can hold its weights."""

WSYNC = "wsync"
BASELINES: dict[str, str] = {
    "disk": "reload from disk",
    "tmpfs": "reload from tmpfs",
    "broadcast": "broadcast per tensor",
    "buckets": "packed buckets",
}
"""Row name -> title. Each does the same work as wsync on the same processes; see ``docs/measurement.md``."""

TITLES: dict[str, str] = {WSYNC: "wsync", **BASELINES}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 768,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
"""Preset -> Hugging Face configuration."""

BUCKET_BYTES = 64 << 20
"""Size of a bucket of the ``buckets`` baseline."""

FAULTS = ("corrupt", "raise", "kill", "hang")
"""What `Fault.kind` may be."""


class Fault(msgspec.Struct, frozen=True):
    """A failure to inject, so that tests can see it noticed.

    Attributes:
        kind: one of `FAULTS`.
        role: ``"trainer"`` or ``"engine"``.
        rank: within the role.
        row: the row in whose first timed repeat it happens.
    """

    kind: str
    role: str
    rank: int
    row: str


class BenchOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of one run, as the worker processes get them.

    Attributes:
        model: Hugging Face configuration with its ``model_type``.
        model_name: preset or file that it came from.
        num_trainers, num_engines: processes on each side; the engines are one replica with that tensor parallelism.
        recipes: subset of `RECIPES`.
        baselines: subset of `BASELINES`.
        repeats: timed repeats of each row, after one that warms up and measures memory.
        transport: of the wsync rows, ``"shm"`` or ``"gloo"``.
        quantise_on: where baselines quantise, ``"trainer"`` or ``"engine"``.
        disk_dir: folder for the checkpoint of the ``disk`` baseline.
        tmpfs_dir: folder for that of the ``tmpfs`` baseline, and for the reference checkpoints.
        store_dir: folder for rendezvous files.
        deadline_s: of every wait.
        fault: to inject, or None.
    """

    model: dict[str, Any]
    model_name: str
    num_trainers: int
    num_engines: int
    recipes: tuple[str, ...]
    baselines: tuple[str, ...]
    repeats: int
    transport: str
    quantise_on: str
    disk_dir: str
    tmpfs_dir: str
    store_dir: str
    deadline_s: float
    fault: Fault | None = None

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.num_trainers + self.num_engines

    @property
    def rows(self) -> tuple[str, ...]:
        """Rows of each recipe, in order: wsync, then the baselines."""
        return (WSYNC, *self.baselines)

    def rank_name(self, rank: int) -> str:
        """``trainer 0`` and so on, for a rank of the whole world (trainers come first)."""
        return f"trainer {rank}" if rank < self.num_trainers else f"engine {rank - self.num_trainers}"


def parse_names(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Split a comma-separated list and order it as ``known``.

    Raises:
        ConfigError: a name is not known, or the list is empty.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        got = unknown[0] if unknown else text
        raise ConfigError(f"{what} {got!r} is unknown; known are {', '.join(known)}")
    return tuple(name for name in known if name in names)


def parse_recipes(text: str) -> tuple[str, ...]:
    """A comma-separated list of `RECIPES`.

    Raises:
        ConfigError: a recipe is not known, or the benchmark's engine has no layers that hold it.
    """
    for name in (part.strip() for part in text.split(",")):
        if name in ALL_RECIPES and name not in RECIPES:
            raise ConfigError(
                f"the engine of wsync bench e2e holds {', '.join(RECIPES)}, but recipe {name!r} was asked for"
            )
    return parse_names(text, RECIPES, "recipe")


def parse_baselines(text: str) -> tuple[str, ...]:
    """``all``, ``none`` or a comma-separated list of `BASELINES`."""
    if text == "all":
        return tuple(BASELINES)
    if text == "none":
        return ()
    return parse_names(text, tuple(BASELINES), "baseline")


def parse_fault(text: str | None) -> Fault | None:
    """``kind:role:rank:row`` (for tests).

    Raises:
        ConfigError: not of that form.
    """
    if not text:
        return None
    fields = text.split(":")
    if len(fields) != 4 or fields[0] not in FAULTS or fields[1] not in ("trainer", "engine"):
        raise ConfigError(f"fault {text!r} is not KIND:ROLE:RANK:ROW with a kind of {', '.join(FAULTS)}")
    if not fields[2].isdigit() or fields[3] not in TITLES:
        raise ConfigError(f"fault {text!r} needs a rank and a row of {', '.join(TITLES)}")
    return Fault(fields[0], fields[1], int(fields[2]), fields[3])


def load_model_config(preset: str, config_file: str | None) -> tuple[dict[str, Any], str]:
    """The model's configuration and a name for it.

    Raises:
        ConfigError: the preset is unknown, or the file is not a JSON object with a ``model_type``.
    """
    if config_file is None:
        if preset not in PRESETS:
            raise ConfigError(f"preset {preset!r} is unknown; known are {', '.join(PRESETS)}")
        return PRESETS[preset], preset
    path = Path(config_file)
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as e:
        raise ConfigError(f"configuration {path} cannot be read: {e.strerror}") from e
    except msgspec.DecodeError as e:
        raise ConfigError(f"configuration {path} is not a JSON object: {e}") from e
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(
            f"configuration {path} has model_type {config.get('model_type')!r}, but a name such as 'qwen3' is needed",
            hint="give the config.json of a Hugging Face model",
        )
    return config, path.name


def check_counts(num_trainers: int, num_engines: int, repeats: int, deadline_s: float) -> None:
    """Refuse numbers that no run can have.

    Raises:
        ConfigError: naming the option and its value.
    """
    for name, value in (("--trainers", num_trainers), ("--engines", num_engines), ("--repeats", repeats)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, but at least 1 is needed")
    if not deadline_s > 0:
        raise ConfigError(f"--deadline is {deadline_s} s, but a positive number is needed")
