"""Which NICs compute, and who gets which: against an optimiser that we did not write."""

from __future__ import annotations

import dataclasses

import machines as m
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from wsync.topo.nics import assign_nics, compute_nics, hungarian
from wsync.topo.parse import read_texts
from wsync.topo.view import View


def view_of(*texts: str) -> View:
    return View(read_texts((f"f{i}", t) for i, t in enumerate(texts)).machines[0])


@settings(deadline=None)
@given(st.integers(1, 7).flatmap(lambda n: st.integers(n, 9).map(lambda k: (n, k))).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(0, 9000))))  # fmt: skip
def test_the_assignment_costs_what_scipy_says_that_the_best_costs(cost):
    found = hungarian(cost.tolist())
    assert len(set(found)) == len(found)
    rows, columns = linear_sum_assignment(cost)
    assert sum(cost[i][j] for i, j in enumerate(found)) == cost[rows, columns].sum()


def test_storage_nics_are_no_compute_nics():
    view = view_of(m.topo_m(m.h100()))
    assert [n.label for n in compute_nics(view)] == [f"mlx5_{i}" for i in range(8)]


def test_slow_and_dead_ports_are_no_compute_nics():
    port = "Infiniband device 'mlx5_{}' port 1 status:\n\tstate: {}\n\trate: {} Gb/sec\n"
    ports = "".join(port.format(i, "1: DOWN" if i == 1 else "4: ACTIVE", 40 if i == 2 else 400) for i in range(8))
    view = view_of(m.topo_m(m.h100()), ports)
    assert [n.label for n in compute_nics(view)] == ["mlx5_0", *(f"mlx5_{i}" for i in range(3, 8))]


def test_without_a_near_nic_the_nearest_count_and_on_grace_all():
    far = dataclasses.replace(m.l40s(), nics=(m.Place(0, 9), m.Place(7)))
    assert [n.label for n in compute_nics(view_of(m.topo_m(far)))] == ["mlx5_0"]
    assert len(compute_nics(view_of(m.topo_m(m.gb200())), coherent=True)) == 4


def test_each_gpu_gets_its_own_nic_and_shares_only_where_there_are_too_few():
    assert assign_nics(view_of(m.topo_m(m.h100()))) == {i: f"mlx5_{i}" for i in range(8)}
    assert assign_nics(view_of(m.topo_m(m.b200()))) == {i: f"mlx5_{i}" for i in range(8)}
    assert assign_nics(view_of(m.topo_m(m.dgx1()))) == {i: f"mlx5_{i // 2}" for i in range(8)}
    few = assign_nics(view_of(m.topo_m(m.move_nics(m.a100(), 0))))
    assert sorted(few.values()) == sorted(f"mlx5_{i}" for i in range(4) for _ in range(2))


def test_a_machine_without_nics_or_paths_assigns_none():
    assert assign_nics(view_of(m.topo_m(m.rtx3090_pairs()))) == {}
    assert assign_nics(view_of(m.nvlink_s(m.h100()))) == {}
