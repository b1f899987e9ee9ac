"""Engines: where the weights of a running engine lie, learnt from its own loader."""

from wsync.adapters.engines.coverage import Coverage, StorageCoverage
from wsync.adapters.engines.recorder import Recording, record_loader
from wsync.adapters.engines.verify import verify_recording
from wsync.adapters.engines.wanted import wanted_recipes
from wsync.adapters.engines.widening import Widening

__all__ = [
    "Coverage",
    "Recording",
    "StorageCoverage",
    "Widening",
    "record_loader",
    "verify_recording",
    "wanted_recipes",
]
