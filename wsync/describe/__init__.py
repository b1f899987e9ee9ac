"""Manifests from model configs, checkpoint headers and parallel layouts, without running the job."""

from wsync.describe.engines import describe_sink, engine_ranks
from wsync.describe.models import Facts, ModelShape, known_models, load_model
from wsync.describe.ranks import positions
from wsync.describe.summary import Summary, summarise
from wsync.describe.trainers import describe_source, trainer_ranks
from wsync.spec.manifest_file import load_manifest, load_sink, load_source, save_manifest

__all__ = [
    "Facts",
    "ModelShape",
    "Summary",
    "describe_sink",
    "describe_source",
    "engine_ranks",
    "known_models",
    "load_manifest",
    "load_model",
    "load_sink",
    "load_source",
    "positions",
    "save_manifest",
    "summarise",
    "trainer_ranks",
]
