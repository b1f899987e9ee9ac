"""Calibration: costs from two publishes repeat the one and scale to others."""

from __future__ import annotations

import msgspec
import pytest

from wsync.errors import ConfigError
from wsync.plan import PlanOptions, make_plan
from wsync.sim import simulate
from wsync.sim.calibrate import Measured, calibrate, fit
from wsync.spec.cluster import Cluster, Nic, NodeGroup
from wsync.testing.generators import dense_tensors, fsdp_source, tp_sink

SMALL = Measured(10**6, 0.004, 0.0004, 0.0001, 0.0001)
LARGE = Measured(10**9, 0.5, 0.25, 0.05, 0.1)


def job(num_layers, replicas=1):
    tensors = dense_tensors(num_layers, 1024, 8, 8, 128, 4096, 4096)
    source = fsdp_source(tensors, ["box"])
    sink = tp_sink(tensors, [["box"]] * replicas)
    cluster = Cluster((NodeGroup("box", 1, 1e4, hosts=("box",), nics=(Nic(1.0),)),), alpha_s=0.0)
    return source, sink, cluster


def test_costs_are_passes_of_the_copy_rate():
    options = calibrate(SMALL, LARGE, 10.0)
    assert options.host.pack == pytest.approx(2.5)
    assert options.host.hop == pytest.approx(0.5)
    assert options.host.install == pytest.approx(1.0)
    assert options.start_s == options.vote_s == pytest.approx(0.0017)


def test_the_unit_of_the_passes_changes_nothing():
    one, other = (
        simulate(*planned(4), options=calibrate(SMALL, LARGE, rank_gbps)).simulated_s for rank_gbps in (1.0, 20.0)
    )
    assert one == pytest.approx(other, rel=1e-3)


def planned(num_layers, replicas=1):
    source, sink, cluster = job(num_layers, replicas)
    return make_plan(source, sink, cluster, PlanOptions(bucket_bytes=1 << 20)), source, sink, cluster


def test_a_size_that_was_not_measured_follows_its_bytes():
    options = calibrate(SMALL, LARGE, 10.0)
    for num_layers in (2, 8):
        plan, *rest = planned(num_layers)
        result = simulate(plan, *rest, options=options)
        # The digest of a bucket is hidden behind the packing of the next one; the install comes after.
        expected = 0.0034 + plan.wire_bytes / 1e9 * (0.25 + 0.1)
        assert result.simulated_s == pytest.approx(expected, rel=0.05)


def test_two_engines_install_at_once_on_cores_of_their_own():
    options = calibrate(SMALL, LARGE, 10.0)
    assert simulate(*planned(8, 2), options=options).simulated_s == pytest.approx(
        simulate(*planned(8, 1), options=options).simulated_s, rel=0.02
    )


def test_cores_that_are_fewer_than_ranks_are_shared():
    plan, source, sink, cluster = planned(8, 4)
    options = calibrate(SMALL, LARGE, 10.0)
    group = msgspec.structs.replace(cluster.groups[0], host_gbps=10.0)
    one_core = simulate(plan, source, sink, msgspec.structs.replace(cluster, groups=(group,)), options=options)
    work_s = plan.wire_bytes / 1e9 * (0.25 + 4 * 0.05 + 4 * 0.1)
    assert one_core.simulated_s == pytest.approx(0.0034 + work_s, rel=0.05)


@pytest.mark.parametrize(
    ("small", "large", "rate", "words"),
    [
        (SMALL, msgspec.structs.replace(LARGE, pack_s=0.0), 1.0, "pack_s of the large publish is 0.0"),
        (msgspec.structs.replace(SMALL, total_s=float("nan")), LARGE, 1.0, "total_s of the small publish is nan"),
        (LARGE, LARGE, 1.0, "at most a 4th"),
        (SMALL, LARGE, 0.0, "rank_gbps is 0.0"),
    ],
)
def test_measurements_that_cannot_be_are_refused(small, large, rate, words):
    with pytest.raises(ConfigError, match=words):
        calibrate(small, large, rate)


def test_the_rate_of_all_cores_is_found_from_what_more_ranks_took():
    plan, source, sink, cluster = planned(8, 4)
    options = calibrate(SMALL, LARGE, 10.0)

    def at(host_gbps):
        group = msgspec.structs.replace(cluster.groups[0], host_gbps=host_gbps)
        changed = msgspec.structs.replace(cluster, groups=(group,))
        return simulate(plan, source, sink, changed, options=options).simulated_s

    assert fit(at, at(17.0), 10.0, 40.0) == pytest.approx(17.0, rel=0.01)


@pytest.mark.parametrize(("measured_s", "found"), [(0.01, 8.0), (100.0, 2.0)])
def test_what_no_rate_explains_gives_the_nearer_end(measured_s, found):
    assert fit(lambda rate: 1 / rate, measured_s, 2.0, 8.0) == pytest.approx(found, rel=1e-4)


def test_nothing_is_fitted_to_nothing():
    with pytest.raises(ConfigError, match=r"0\.0 s measured"):
        fit(lambda rate: 1 / rate, 0.0, 2.0, 8.0)
