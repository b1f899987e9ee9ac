"""Engines' layouts: what every rank needs, and where in its memory that goes."""

from wsync.describe.engines.grid import KEYS
from wsync.describe.engines.sink import describe_sink, engine_ranks

__all__ = ["KEYS", "describe_sink", "engine_ranks"]
