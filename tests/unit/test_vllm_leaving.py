"""Servers of a fleet that are let go, that somebody died on, or that cannot take a version: none is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from vllm_standin import StandIn, Trainer, await_true, is_joined, publish

import wsync
from wsync.errors import CommitError, ConnectError, NonFiniteError, TransportError
from wsync.integrations.vllm import worker as worker_module
from wsync.testing.processes import free_port


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "_metrics_of", lambda replica, rank: None)
    made = Trainer(wsync.new_key_file(tmp_path / "key"))
    yield made
    made.source.close()


@pytest.fixture
def server():
    made = StandIn()
    yield made
    made.close()


@pytest.fixture
def other():
    made = StandIn()
    yield made
    made.close()


def has_left(server):
    return all(worker._sink is None for worker in server.workers)


def fails_after_joining(server):
    """The answer to a join is lost."""
    join = server.init_weight_transfer_engine

    def init(init_info):
        join(init_info)
        raise TransportError("the answer is lost")

    server.init_weight_transfer_engine = init


# ---- let go


@pytest.mark.parametrize("how", ["close", "remove"])
def test_a_version_on_its_way_arrives_before_a_server_is_let_go(trainer, server, how):
    fleet = trainer.fleet(server)
    server.fail["pause"] = lambda: time.sleep(0.5)
    trainer.fill(1)
    publication = fleet.publish(1)
    fleet.close() if how == "close" else fleet.remove("engine-0")
    assert server.holds(1) == [True]
    assert not server.paused
    assert has_left(server)
    assert publication.wait_committed().serving == ("engine-0",)


def test_a_server_that_was_not_resumed_is_when_the_fleet_is_closed(trainer, server, monkeypatch):
    monkeypatch.setattr("wsync.integrations.vllm.update.CLEANUP_S", 0.1)
    fleet = trainer.fleet(server)
    server.fail["resume"] = ConnectError("reset")
    publish(trainer, fleet, 1)
    assert server.paused
    fleet.close()
    assert not server.paused


def test_closing_does_not_resume_a_poisoned_server(trainer, server, caplog):
    fleet = trainer.fleet(server)
    server.models[0].swap = True
    with pytest.raises(CommitError):
        publish(trainer, fleet, 1, deadline_s=5.0)
    fleet.close()
    assert server.paused
    assert "'engine-0' is left paused" in caplog.text


def test_a_server_with_an_open_update_leaves_all_the_same(trainer, server):
    fleet = trainer.fleet(server)
    server.session = True
    fleet.remove("engine-0")
    assert has_left(server)
    assert server.num_told_to_leave == 2


def test_a_server_that_is_let_go_while_it_joins_leaves_when_it_has(trainer, server, other, monkeypatch):
    monkeypatch.setattr("wsync.integrations.vllm.fleet._CLOSE_S", 0.1)
    fleet = trainer.fleet(server, other)
    server.shutdown_weight_transfer_engine()
    await_true(lambda: "engine-0" not in trainer.source.replicas())
    started = threading.Event()
    server.fail["init"] = lambda: started.wait(30)
    publish(trainer, fleet, 1)
    fleet.remove("engine-0")
    told = server.num_told_to_leave
    started.set()
    await_true(lambda: server.num_told_to_leave > told)
    assert has_left(server)


def test_a_program_that_ends_without_closing_leaves_no_server_paused(tmp_path):
    program = f"""
        import atexit, sys, time
        from vllm_standin import StandIn, Trainer, publish
        import wsync
        from wsync.integrations.vllm import worker

        worker._metrics_of = lambda replica, rank: None
        server = StandIn()
        trainer = Trainer(wsync.new_key_file({str(tmp_path / "key")!r}))
        fleet = trainer.fleet(server)
        update = server.update_weights

        def seen(update_info):
            time.sleep(0.5)
            update(update_info)

        server.update_weights = seen
        trainer.fill(1)
        fleet.publish(1)
        while not server.paused:
            time.sleep(0.01)
        resume = server.resume
        server.resume = lambda: (resume(), print("resumed", server.holds(1), flush=True))
    """
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "resumed [True]\n", ended.stderr


# ---- resumed


def test_a_resume_that_does_not_get_through_is_tried_again(trainer, server):
    fleet = trainer.fleet(server)
    server.fail["resume"] = ConnectError("reset")
    report = publish(trainer, fleet, 1)
    assert server.calls == ["init", "start", "pause", "update", "finish", "resume", "resume"]
    assert report.serving == ("engine-0",)
    assert report.servers["engine-0"].error == ""


def test_a_server_that_was_not_resumed_is_by_the_next_publish(trainer, server, monkeypatch):
    fleet = trainer.fleet(server)
    monkeypatch.setattr("wsync.integrations.vllm.update.CLEANUP_S", 0.1)
    server.fail["resume"] = ConnectError("reset")
    report = publish(trainer, fleet, 1)
    assert report.servers["engine-0"].state == "committed"
    assert report.servers["engine-0"].paused
    assert report.serving == ()
    assert publish(trainer, fleet, 2).serving == ("engine-0",)
    assert not server.paused


# ---- those that did not get in


def test_a_server_that_could_not_be_added_is_no_replica_that_a_publish_waits_for(trainer, server, other):
    fleet = trainer.fleet(server)
    fails_after_joining(other)
    with pytest.raises(TransportError, match="answer is lost"):
        fleet.add(other)
    assert has_left(other)
    await_true(lambda: not is_joined(trainer, "engine-1"))
    assert publish(trainer, fleet, 1).publish.committed == ("engine-0",)


def test_a_fleet_that_cannot_be_made_leaves_no_server_joined(trainer, server, other):
    other.fail["init"] = TransportError("no key")
    with pytest.raises(TransportError, match="no key"):
        trainer.fleet(server, other)
    assert has_left(server)


def test_a_server_with_another_backend_is_not_told_to_leave_it(trainer, server, other):
    other.fail["init"] = TransportError("http://x answered 500: Invalid init_info for NCCLWeightTransferEngine")
    with pytest.raises(TransportError, match="NCCL"):
        trainer.fleet(server, other)
    assert other.num_told_to_leave == 0


# ---- what is found


def test_a_server_that_a_trainer_died_on_is_resumed_by_a_commit_alone(trainer, server, caplog):
    server.paused = True
    fleet = trainer.fleet(server)
    assert "'engine-0' is paused already" in caplog.text
    trainer.fill(float("nan"))
    publication = fleet.publish(1)
    with pytest.raises(NonFiniteError):
        publication.wait_committed()
    assert (publication.servers["engine-0"].state, publication.servers["engine-0"].paused) == ("poisoned", True)
    assert server.paused
    assert publish(trainer, fleet, 2).serving == ("engine-0",)
    assert not server.paused


def test_a_poisoned_server_that_restarted_is_poisoned_no_more(trainer, server, other):
    fleet = trainer.fleet(server, other)
    server.models[0].swap = True
    publish(trainer, fleet, 1, deadline_s=5.0)
    server.shutdown_weight_transfer_engine()
    server.models[0].swap = server.paused = False  # another process
    await_true(lambda: "engine-0" not in trainer.source.replicas())
    publish(trainer, fleet, 2)
    await_true(lambda: is_joined(trainer, "engine-0") and not fleet._servers["engine-0"].busy.locked())
    trainer.fill(float("nan"))
    publication = fleet.publish(3)
    with pytest.raises(NonFiniteError):
        publication.wait_committed()
    of_server = publication.servers["engine-0"]
    assert (of_server.state, of_server.paused) == ("old version serving", False)


def test_an_engine_of_a_server_that_is_gone_is_absent_and_joins_again(trainer):
    server = StandIn(num_engines=2)
    fleet = trainer.fleet(server)
    server.workers[1]._sink._session.close()  # its process hangs, say
    await_true(lambda: "engine-0.dp1" not in trainer.source.replicas())
    of_server = publish(trainer, fleet, 1).servers["engine-0"]
    assert of_server.replicas == {"engine-0.dp0": "committed", "engine-0.dp1": "absent"}
    assert (of_server.state, of_server.paused) == ("absent", False)
    assert "engine-0.dp1 has not joined" in of_server.error
    await_true(lambda: is_joined(trainer, "engine-0.dp1"))
    assert publish(trainer, fleet, 2).serving == ("engine-0",)
    assert server.holds(2) == [True, True]
    server.close()


def test_a_trainer_that_restarts_with_other_tensors_is_joined(server, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "_metrics_of", lambda replica, rank: None)
    key_file, store = wsync.new_key_file(tmp_path / "key"), f"tcp://127.0.0.1:{free_port()}"
    options = {"options": {"allow_missing": ["b"]}}
    first = Trainer(key_file, ["a"], store)
    publish(first, first.fleet(server, **options), 1)
    first.source.close()  # it dies without letting the server go
    second = Trainer(key_file, ["a", "b"], store)
    fleet = second.fleet(server, **options)
    assert publish(second, fleet, 1).serving == ("engine-0",)
    assert server.holds(1) == [True]
    second.source.close()


# ---- those that cannot take a version


@pytest.mark.parametrize("call", ["start", "pause"])
def test_nobody_waits_for_a_server_that_could_not_be_updated_and_it_comes_back(trainer, server, other, call):
    fleet = trainer.fleet(server, other)
    if call == "start":
        server.fail["start"] = ConnectError("reset")
    else:
        server.fail["pause"] = TransportError("not now")
    began = time.monotonic()
    report = publish(trainer, fleet, 1)
    assert time.monotonic() - began < 8  # of the 20 s that a publish has
    assert report.serving == ("engine-1",)
    assert (report.servers["engine-0"].state, report.servers["engine-0"].paused) == ("old version serving", False)
    await_true(lambda: is_joined(trainer, "engine-0") and not fleet._servers["engine-0"].busy.locked())
    assert publish(trainer, fleet, 2).serving == ("engine-0", "engine-1")


def test_a_server_that_was_paused_too_late_is_not_asked_to_commit(trainer, server):
    fleet = trainer.fleet(server)
    server.fail["pause"] = lambda: time.sleep(1.2)
    trainer.fill(1)
    publication = fleet.publish(1, deadline_s=1.0)
    with pytest.raises(CommitError):
        publication.wait_committed()
    of_server = publication.servers["engine-0"]
    assert (of_server.state, of_server.paused) == ("old version serving", False)
    assert "before the deadline of version 1" in of_server.error
    assert server.calls == ["init", "start", "pause", "finish", "resume"]
    assert publish(trainer, fleet, 2).serving == ("engine-0",)


def test_a_join_may_take_longer_than_a_publish(trainer):
    class Limited(StandIn):
        limits = ()

        @contextmanager
        def limited(self, timeout_s):
            self.limits = (*self.limits, timeout_s)
            yield

    server = Limited()
    trainer.fleet(server, deadline_s=5.0, options={"join_deadline_s": 300.0})
    assert server.infos[0]["join_deadline_s"] == 300.0
    assert max(server.limits) > 300.0
    server.close()
