"""Engines: where the weights of a running engine lie, learnt from its own loader."""

from wsync.adapters.engines.recorder import Coverage, Recording, StorageCoverage, record_loader
from wsync.adapters.engines.verify import verify_recording

__all__ = ["Coverage", "Recording", "StorageCoverage", "record_loader", "verify_recording"]
