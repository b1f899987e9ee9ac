"""The simulator against a real run of this machine, and how long it takes for large clusters.

Calibrated with two publishes over shared memory (4 MiB and 384 MiB of bf16, one trainer and one engine) and with the
rates at which one core and all cores copy, it predicts others: another size, two engines, two trainers. ``ratio`` is
predicted over measured, the best of the repeats on both sides; ``verdict`` says whether it is within 25 %, and fails
the benchmark with ``WSYNC_BENCH_STRICT=1``, on a machine that does nothing else.
"""

from __future__ import annotations

import os
import resource
from dataclasses import replace

import pytest
from shm_publish import COLUMNS, ROWS, Layout, measure_together

from wsync.bench.limit import measure_memcpy, num_cores
from wsync.plan import PlanOptions, make_plan
from wsync.sim import simulate
from wsync.sim.calibrate import Measured, calibrate
from wsync.sim.presets import PRESETS
from wsync.sim.run import Simulation
from wsync.spec.cluster import Cluster, Nic, NodeGroup
from wsync.spec.manifest import TensorSpec
from wsync.testing.generators import fsdp_source, tp_sink

RANK_GBPS = 10.0
"""A unit: what calibration measures is relative to it."""
BUCKET_BYTES = 4 << 20
REPEATS = 20
TOLERANCE = 0.25
STRICT = os.environ.get("WSYNC_BENCH_STRICT") == "1"

MEASURED = {
    "small": Layout(1),
    "large": Layout(96),
    "another size": Layout(224),
    "two engines": Layout(128, num_replicas=2),
    "two trainers": Layout(128, num_trainers=2),
}
"""The first two calibrate; the others are predicted."""
PREDICTED = list(MEASURED)[2:]


def best(reports):
    """The publish that took least."""
    report = min(reports, key=lambda r: r["seconds"]["total"])
    seconds = report["seconds"]
    phases = (seconds[name] for name in ("total", "pack", "verify", "install", "receive"))
    return Measured(report["wire_bytes"], *phases)


@pytest.fixture(scope="module", params=["fp8_block128", "bf16"])
def measured(request):
    """Recipe, the best publish of each layout, and how many times faster all cores copy than one."""
    layouts = {name: replace(layout, recipe=request.param) for name, layout in MEASURED.items()}
    cores = Cores()
    reports = measure_together(layouts, REPEATS, cores.copy)
    return request.param, {name: best(found) for name, found in reports.items()}, cores.scaling


class Cores:
    """How many times faster all cores together copy than one of them, the best of several times each."""

    def __init__(self):
        self.alone = self.together = 0.0

    def copy(self):
        cores = os.sched_getaffinity(0)
        try:
            self.together = max(self.together, self._once())
            os.sched_setaffinity(0, {min(cores)})
            self.alone = max(self.alone, self._once())
        finally:
            os.sched_setaffinity(0, cores)

    def _once(self):
        return measure_memcpy(rounds=1, total_bytes=128 << 20).gbps

    @property
    def scaling(self):
        return min(max(self.together / self.alone, 1.0), float(num_cores()))


def predict(layout, options, scaling):
    tensors = tuple(TensorSpec(f"layer{i}.weight", (ROWS, COLUMNS), "bfloat16") for i in range(layout.num_tensors))
    source = fsdp_source(tensors, ["box"] * layout.num_trainers, replicas=layout.num_trainers)
    sink = tp_sink(tensors, [["box"]] * layout.num_replicas, layout.recipe, quantises=lambda _: True)
    box = NodeGroup("box", 1, scaling * RANK_GBPS, hosts=("box",), nics=(Nic(1.0),))
    cluster = Cluster((box,), alpha_s=0.0)
    plan = make_plan(source, sink, cluster, PlanOptions(bucket_bytes=BUCKET_BYTES))
    return simulate(plan, source, sink, cluster, options=options)


@pytest.mark.benchmark(group="simulated and measured")
@pytest.mark.parametrize("what", PREDICTED)
def test_a_publish_takes_what_the_simulator_says(benchmark, measured, what):
    recipe, publishes, scaling = measured
    options = calibrate(publishes["small"], publishes["large"], RANK_GBPS)
    layout = replace(MEASURED[what], recipe=recipe)
    result = benchmark.pedantic(predict, (layout, options, scaling), rounds=1)
    ratio = result.simulated_s / publishes[what].total_s
    benchmark.extra_info.update(
        measured_s=round(publishes[what].total_s, 5),
        simulated_s=round(result.simulated_s, 5),
        ratio=round(ratio, 3),
        copy_scaling=round(scaling, 2),
        verdict="ok" if abs(ratio - 1) <= TOLERANCE else "WRONG",
    )
    if STRICT:
        assert abs(ratio - 1) <= TOLERANCE


@pytest.mark.benchmark(group="presets")
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_planned_and_simulated(benchmark, name):
    preset = PRESETS[name]
    source, sink, cluster, options = preset.build()
    plan = make_plan(source, sink, cluster, options)

    def run():
        return Simulation(plan, source, sink, cluster, preset.sim).run(name)

    result = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(
        score=round(result.score, 4),
        plan_score=round(plan.score, 4),
        simulated_s=round(result.simulated_s, 4),
        lower_bound_s=round(result.lower_bound_s, 4),
        binding_cut=result.binding_cut,
        published_s=preset.published.seconds if preset.published else None,
        num_hops=result.num_hops,
        num_events=result.num_events,
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    )
    assert result.committed == tuple(r.name for r in result.replicas)
    if STRICT:
        assert result.sim_wall_s <= 60.0
