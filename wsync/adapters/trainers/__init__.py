"""Trainers: what a rank of a training job holds, whatever shards it."""

from wsync.adapters.trainers.description import SourceDescription, describe

__all__ = ["SourceDescription", "describe"]
