"""The CUDA kernels' own source, run on the CPU in three orders of its threads, gives the bytes of the CPU kernels."""

from __future__ import annotations

import pytest
import scenarios
from cases import run_cases
from runner_build import CHECKED, PLAIN, build_runner


def mistakes(runner, scratch, found, seed=0):
    outcomes = run_cases(runner, [s.case for s in found], [s.encoded for s in found], scratch, seed)
    wrong = [s.mistake(o) for s, o in zip(found, outcomes, strict=False)]
    if len(outcomes) < len(found):
        wrong.append(f"the runner ended after {len(outcomes)} of {len(found)} cases")
    return [w for w in wrong if w]


def all_scenarios(seed):
    return [s for make in scenarios.ALL for s in make(seed)]


def test_every_operation_gives_the_bytes_of_the_cpu_without_races_or_faults(runner, tmp_path):
    path, build = runner
    found = all_scenarios({"plain": 0, "checked": 1, "sanitized": 2}[build.name])
    assert len(found) > 100
    assert mistakes(path, tmp_path, found) == []


def test_no_two_answers_of_the_scenarios_are_the_same_by_chance():
    digests = [s.digest for s in all_scenarios(3) if s.case.call in ("pack", "unpack", "digest") and s.bad is None]
    assert len(set(digests)) == len(digests)


@pytest.mark.deep
@pytest.mark.parametrize("build", [PLAIN, CHECKED], ids=lambda b: b.name)
def test_many_seeds_give_the_bytes_of_the_cpu(build, object_cache, tmp_path):
    path = build_runner(build, object_cache)
    for seed in range(3, 40 if build is PLAIN else 12):
        assert mistakes(path, tmp_path, all_scenarios(seed), seed) == []
