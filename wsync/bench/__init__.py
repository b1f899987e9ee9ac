"""Whole-job benchmarks that ship with wsync: the main job end to end, its baselines and its limit.

``wsync bench e2e`` runs `wsync.bench.e2e.run`; ``docs/measurement.md`` defines every number that it prints.
"""
