"""Whole-job benchmarks that ship with wsync: the main job end to end and a real vLLM server, baselines and limits.

``wsync bench e2e`` runs `wsync.bench.e2e.run`, ``wsync bench vllm`` runs `wsync.bench.vllm_run.run`;
``docs/measurement.md`` defines every number that they print.
"""
