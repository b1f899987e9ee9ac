"""The presets: they name what they assume, and their lower bounds are those of the design."""

from __future__ import annotations

import re

import pytest

from wsync.describe import known_models
from wsync.errors import ConfigError
from wsync.plan import make_plan
from wsync.sim.presets import PRESETS, find_preset
from wsync.spec.cluster import check_cluster

LARGE = {"nemo-dsv3", "perplexity-kimi-k2-k4", "perplexity-kimi-k2-k2", "miles-kimi-k2", "checkpoint-engine-kimi-k2"}
"""Planned in seconds: with the exhaustive tests."""

BOUNDED = [
    pytest.param(name, marks=[pytest.mark.deep] if name in LARGE else [])
    for name, preset in PRESETS.items()
    if preset.bound_s is not None
]


@pytest.mark.parametrize("name", BOUNDED)
def test_the_lower_bound_is_that_of_the_design(name):
    preset = PRESETS[name]
    source, sink, cluster, options = preset.build()
    plan = make_plan(source, sink, cluster, options)
    assert plan.lower_bound_s == pytest.approx(preset.bound_s, rel=0.03)
    assert plan.time_s >= plan.lower_bound_s


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_every_preset_says_what_it_is_and_what_it_assumes(preset):
    assert preset.assumptions
    assert preset.title
    assert preset.model in {name for name, _, _ in known_models()}
    check_cluster(preset.cluster)
    if preset.published is not None:
        assert preset.published.seconds > (preset.bound_s or 0)
        assert re.search(r"https://[a-z.]+/\S+$", preset.published.source)
    assert not re.search(r"planning\.md|topology\.md", str(preset))


def test_the_rows_of_the_design_are_there_with_the_two_shapes():
    peers = ("nemo-qwen", "nemo-dsv3", "perplexity", "prime-rl", "vllm-rdt", "miles", "checkpoint-engine", "m2n")
    for peer in peers:
        assert any(name.startswith(peer) for name in PRESETS), peer
    assert {"one-to-64", "wan-100g"} <= set(PRESETS)


def test_a_preset_that_is_not_there_names_the_nearest():
    with pytest.raises(ConfigError, match="neither a preset nor a file") as e:
        find_preset("perplexity-kimi-k2")
    assert "did you mean 'perplexity-kimi-k2" in e.value.hint
