"""A peer dies at each phase: the others get a named error within the deadline, and no replica serves a mixture."""

from __future__ import annotations

import signal

import chaos_workers
import pytest

import wsync
from wsync.testing.processes import Processes, free_port

pytestmark = pytest.mark.multiproc

DEADLINE_S = 12.0


def run(tmp_path, *, victim, stop, sig=signal.SIGKILL, transport="shm"):
    """Two trainer ranks, replica ``a`` of two ranks, replica ``b`` of one; kill ``victim`` where it stops."""
    key_file = str(wsync.new_key_file(tmp_path / "wsync.key"))
    store = f"tcp://127.0.0.1:{free_port()}"
    names = ["trainer/0", "trainer/1", "a/0", "a/1", "b/0"]
    with Processes() as processes:
        for name in names:
            kind, rank = name.split("/")
            mine = stop if name == victim else ""
            if kind == "trainer":
                args = (int(rank), 2, store, key_file, mine, transport, DEADLINE_S)
                processes.start(name, chaos_workers.trainer, *args)
            else:
                world_size = 2 if kind == "a" else 1
                args = (kind, int(rank), world_size, store, key_file, mine, DEADLINE_S)
                processes.start(name, chaos_workers.engine, *args)
        processes.wait_report(victim, 90)
        processes.kill(victim, sig)
        return {name: processes.wait(name, 60).value for name in names if name != victim}


def assert_old_version_serves(outcome):
    assert (outcome["state"], outcome["version"], outcome["holds"]) == ("serving", 1, [1])


def assert_new_version_serves(outcome):
    assert (outcome["error"], outcome["state"], outcome["version"], outcome["holds"]) == (None, "serving", 2, [2])


def assert_poisoned(outcome):
    assert (outcome["state"], outcome["version"]) == ("poisoned", None)


def test_an_engine_rank_that_dies_while_it_stages_costs_its_replica_only(tmp_path):
    outcomes = run(tmp_path, victim="a/1", stop="verify")
    for rank in ("trainer/0", "trainer/1"):
        assert outcomes[rank]["error"] is None
        assert outcomes[rank]["replicas"] == {"a": "old version serving", "b": "committed"}
        assert "a/1" in outcomes[rank]["dropped"]["a"]
    assert_old_version_serves(outcomes["a/0"])
    assert outcomes["a/0"]["error"] in ("PeerLostError", "CommitError")
    assert_new_version_serves(outcomes["b/0"])


def test_an_engine_rank_that_dies_while_it_installs_poisons_its_replica_only(tmp_path):
    outcomes = run(tmp_path, victim="a/1", stop="install")
    for rank in ("trainer/0", "trainer/1"):
        assert outcomes[rank]["replicas"] == {"a": "poisoned", "b": "committed"}
    assert outcomes["a/0"]["error"] == "CommitError"
    assert_poisoned(outcomes["a/0"])
    assert_new_version_serves(outcomes["b/0"])


def test_a_trainer_rank_that_dies_while_it_packs_leaves_the_old_version_everywhere(tmp_path):
    outcomes = run(tmp_path, victim="trainer/1", stop="pack")
    assert outcomes["trainer/0"]["error"] == "PeerLostError"
    assert "trainer/1" in outcomes["trainer/0"]["message"]
    for rank in ("a/0", "a/1", "b/0"):
        assert_old_version_serves(outcomes[rank])
        assert outcomes[rank]["error"] == "PeerLostError"
        assert outcomes[rank]["seconds"] < DEADLINE_S + 5


def test_trainer_rank_0_that_dies_while_it_packs_leaves_the_old_version_everywhere(tmp_path):
    outcomes = run(tmp_path, victim="trainer/0", stop="pack")
    assert outcomes["trainer/1"]["error"] == "PeerLostError"
    for rank in ("a/0", "a/1", "b/0"):
        assert_old_version_serves(outcomes[rank])
        assert outcomes[rank]["error"] == "PeerLostError"


def test_ranks_that_voted_and_never_learn_the_decision_stop_serving(tmp_path):
    outcomes = run(tmp_path, victim="trainer/0", stop="decide")
    for rank in ("a/0", "a/1"):
        assert outcomes[rank]["error"] == "CommitError"
        assert_poisoned(outcomes[rank])
        assert outcomes[rank]["holds"] == [1]
    assert outcomes["b/0"]["holds"] in ([1], [2])


def test_an_engine_rank_that_hangs_is_dropped_within_the_deadline(tmp_path):
    outcomes = run(tmp_path, victim="a/1", stop="verify", sig=signal.SIGSTOP)
    for rank in ("trainer/0", "trainer/1"):
        assert outcomes[rank]["replicas"] == {"a": "old version serving", "b": "committed"}
        assert "silent" in outcomes[rank]["dropped"]["a"]
    assert_old_version_serves(outcomes["a/0"])
    assert_new_version_serves(outcomes["b/0"])


def test_a_trainer_rank_that_never_publishes_is_named(tmp_path):
    outcomes = run(tmp_path, victim="trainer/1", stop="publish")
    assert outcomes["trainer/0"]["error"] in ("PeerLostError", "DeadlineError")
    assert "1" in outcomes["trainer/0"]["message"]


def test_over_gloo_an_engine_rank_that_dies_while_it_stages_costs_its_replica_only(tmp_path):
    outcomes = run(tmp_path, victim="a/1", stop="verify", transport="gloo")
    assert_old_version_serves(outcomes["a/0"])
    for rank in ("trainer/0", "trainer/1"):
        assert outcomes[rank]["replicas"]["a"] == "old version serving"
