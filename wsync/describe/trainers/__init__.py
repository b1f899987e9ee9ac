"""Trainers' layouts: who holds which boxes of every tensor."""

from wsync.describe.trainers.source import TRAINERS, describe_source, trainer_ranks

__all__ = ["TRAINERS", "describe_source", "trainer_ranks"]
