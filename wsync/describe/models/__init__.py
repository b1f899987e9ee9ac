"""Models without weights: built in, from a Hugging Face config, or from safetensors headers."""

from wsync.describe.models.facts import Facts
from wsync.describe.models.load import known_models, load_model
from wsync.describe.models.shape import ModelShape

__all__ = ["Facts", "ModelShape", "known_models", "load_model"]
