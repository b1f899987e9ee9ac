"""A trainer and its vLLM servers: stand-ins around the real worker backend, with real sinks and a real trainer."""

from __future__ import annotations

import threading
import time
import types

import pytest
from vllm_standin import StandIn, Trainer, await_true, is_joined, publish

import wsync
from wsync.errors import CommitError, ConfigError, DeadlineError, NonFiniteError, TransportError
from wsync.integrations.vllm import Fleet
from wsync.integrations.vllm import worker as worker_module
from wsync.integrations.vllm.choices import pause_policy


class FourMethods:
    """What vLLM's own clients have, and nothing else."""

    def __init__(self, server):
        self.init_weight_transfer_engine = server.init_weight_transfer_engine
        self.start_weight_update = server.start_weight_update
        self.update_weights = server.update_weights
        self.finish_weight_update = server.finish_weight_update


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


UPDATE = ["start", "pause", "update", "finish", "resume"]


# ---- what a server is asked


def test_a_server_is_paused_for_its_commit_alone_and_labelled_before_it_goes_on(trainer, server):
    fleet = trainer.fleet(server)
    report = publish(trainer, fleet, 3)
    assert server.calls == ["init", *UPDATE]
    assert server.holds(3) == [True]
    assert (server.label, server.paused) == ("3", False)
    assert report.serving == ("engine-0",)
    assert report.publish.committed == ("engine-0",)
    of_server = report.servers["engine-0"]
    assert (of_server.state, of_server.paused, of_server.error) == ("committed", False, "")
    assert 0 < of_server.commit_s < of_server.pause_s
    assert of_server.staged_s > 0


def test_the_key_itself_is_never_sent(trainer, server):
    trainer.fleet(server)
    sent = repr(server.infos)
    assert str(trainer.key_file) in sent
    assert trainer.key_file.read_text().strip() not in sent


def test_options_reach_the_workers(trainer, server):
    trainer.fleet(server, recipes={"a": "raw"}, options={"num_threads": 1}, names=["left"])
    info = server.infos[0]
    assert (info["replica"], info["recipes"], info["num_threads"]) == ("left", {"a": "raw"}, 1)


@pytest.mark.parametrize(
    ("pause", "caches", "clear_cache"),
    [
        ("keep", None, True),
        ("keep", "recompute", True),
        ("keep", "keep", False),
        ("abort", None, True),
        ("abort", "keep", False),
        ("wait", "drop", True),
    ],
)
def test_pause_and_caches_become_vllms_arguments(trainer, server, pause, caches, clear_cache):
    fleet = trainer.fleet(server, pause=pause, caches=caches)
    publish(trainer, fleet, 1)
    assert server.pause_arguments == (pause, clear_cache)


def test_dropping_the_cache_under_frozen_requests_is_refused_with_both_values():
    with pytest.raises(ConfigError, match=r"pause='keep' and caches='drop'"):
        pause_policy("keep", "drop")


@pytest.mark.parametrize(("pause", "caches"), [("stop", None), ("keep", "all")])
def test_unknown_values_are_refused(pause, caches):
    with pytest.raises(ConfigError, match=r"must be"):
        pause_policy(pause, caches)


def test_two_servers_are_taken_to_the_version_each_on_its_own(trainer, server):
    other = StandIn()
    release = threading.Event()
    other.fail["pause"] = lambda: release.wait(10)
    fleet = trainer.fleet(server, other)
    trainer.fill(1)
    publication = fleet.publish(1)
    deadline = time.monotonic() + 10
    while server.calls[-1] != "resume" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.holds(1) == [True]
    assert other.holds(1) == [False]
    release.set()
    assert publication.wait_committed().serving == ("engine-0", "engine-1")
    other.shutdown_weight_transfer_engine()


def test_a_client_that_cannot_pause_is_not_paused(trainer, server):
    fleet = trainer.fleet(FourMethods(server))
    report = publish(trainer, fleet, 1)
    assert server.calls == ["init", "start", "update", "finish"]
    assert report.serving == ("engine-0",)


def test_the_weights_may_change_once_released(trainer, server):
    fleet = trainer.fleet(server)
    server.fail["pause"] = lambda: time.sleep(0.2)
    trainer.fill(1)
    publication = fleet.publish(1)
    publication.wait_released()
    trainer.fill(99)
    publication.wait_committed()
    assert server.holds(1) == [True]


# ---- several engines behind one server


def test_independent_engines_are_replicas_of_their_own(trainer):
    server = StandIn(num_engines=2)
    fleet = trainer.fleet(server)
    report = publish(trainer, fleet, 1)
    assert report.publish.committed == ("engine-0.dp0", "engine-0.dp1")
    assert report.servers["engine-0"].replicas == {"engine-0.dp0": "committed", "engine-0.dp1": "committed"}
    assert server.holds(1) == [True, True]
    assert server.calls == ["init", *UPDATE]
    server.shutdown_weight_transfer_engine()


def test_an_engine_that_fell_out_does_not_keep_the_others_and_the_label_stays(trainer):
    server = StandIn(num_engines=2)
    fleet = trainer.fleet(server)
    publish(trainer, fleet, 1)
    server.workers[1]._sink._session.close()  # its process hangs, say
    report = publish(trainer, fleet, 2, deadline_s=5.0)
    states = report.servers["engine-0"].replicas
    assert states["engine-0.dp0"] == "committed"
    assert states["engine-0.dp1"] in ("absent", "old version serving")
    assert server.holds(2) == [True, False]
    assert server.label == "1"
    server.shutdown_weight_transfer_engine()


# ---- failures


def test_a_version_that_is_not_staged_leaves_the_server_running(trainer, server):
    fleet = trainer.fleet(server)
    publish(trainer, fleet, 1)
    server.calls.clear()
    trainer.fill(float("nan"))
    publication = fleet.publish(2)
    with pytest.raises(NonFiniteError):
        publication.wait_committed()
    assert server.calls == []
    assert publication.servers["engine-0"].state == "old version serving"
    assert server.holds(1) == [True]
    assert publish(trainer, fleet, 3).serving == ("engine-0",)


def test_a_server_that_cannot_be_paused_goes_on_with_the_old_version(trainer, server):
    fleet = trainer.fleet(server)
    publish(trainer, fleet, 1)
    server.calls.clear()
    server.fail["pause"] = DeadlineError("no answer")
    trainer.fill(2)
    publication = fleet.publish(2, deadline_s=1.0)
    with pytest.raises(CommitError):
        publication.wait_committed()
    of_server = publication.servers["engine-0"]
    assert (of_server.state, of_server.paused) == ("old version serving", False)
    assert "no answer" in of_server.error
    assert server.calls == ["start", "pause", "finish", "resume"]
    assert server.holds(1) == [True]
    assert publish(trainer, fleet, 3).serving == ("engine-0",)
    assert server.holds(3) == [True]


def test_a_poisoned_server_stays_paused_until_a_publish_heals_it(trainer, server):
    fleet = trainer.fleet(server)
    publish(trainer, fleet, 1)
    server.models[0].swap = True
    trainer.fill(2)
    publication = fleet.publish(2, deadline_s=5.0)
    with pytest.raises(CommitError):
        publication.wait_committed()
    of_server = publication.servers["engine-0"]
    assert (of_server.state, of_server.paused) == ("poisoned", True)
    assert "when it was recorded" in of_server.error
    assert server.paused
    assert server.label == "1"
    server.models[0].swap = False
    assert publish(trainer, fleet, 3).serving == ("engine-0",)
    assert not server.paused
    assert server.holds(3) == [True]


def test_a_poisoned_server_that_misses_the_next_version_too_is_still_not_resumed(trainer, server):
    fleet = trainer.fleet(server)
    server.models[0].swap = True
    with pytest.raises(CommitError):
        publish(trainer, fleet, 1, deadline_s=5.0)
    trainer.fill(float("nan"))
    publication = fleet.publish(2, deadline_s=5.0)
    with pytest.raises(NonFiniteError):
        publication.wait_committed()
    assert publication.servers["engine-0"].state == "poisoned"
    assert server.paused


def test_a_commit_that_worked_but_was_not_heard_of_counts(trainer, server):
    fleet = trainer.fleet(server)
    update = server.update_weights

    def update_and_lose_the_answer(update_info):
        update(update_info)
        raise DeadlineError("the answer is lost")

    server.update_weights = update_and_lose_the_answer
    report = publish(trainer, fleet, 1)
    assert report.serving == ("engine-0",)
    assert "the answer is lost" in report.servers["engine-0"].error
    assert (server.label, server.paused) == ("1", False)


def test_a_session_that_an_earlier_failure_left_open_is_closed_first(trainer, server):
    fleet = trainer.fleet(server)
    server.session = True
    assert publish(trainer, fleet, 1).serving == ("engine-0",)
    assert server.calls == ["init", "start", "finish", *UPDATE]


def test_a_dead_server_does_not_keep_the_others_beyond_the_deadline(trainer, server, monkeypatch):
    monkeypatch.setattr("wsync.integrations.vllm.fleet._GRACE_S", 0.5)
    dead = StandIn()
    hang = threading.Event()
    fleet = trainer.fleet(server, dead)
    dead.fail["pause"] = lambda: hang.wait(30)
    began = time.monotonic()
    report = publish(trainer, fleet, 1, deadline_s=2.0)
    assert time.monotonic() - began < 8
    assert report.serving == ("engine-0",)
    assert report.servers["engine-1"].state == "lost"
    hang.set()
    await_true(lambda: dead.calls[-1] == "resume")
    dead.close()


def test_errors_of_a_foreign_client_are_named(trainer, server):
    fleet = trainer.fleet(server)
    server.fail["start"] = server.fail["finish"] = None
    server.start_weight_update = lambda: (_ for _ in ()).throw(RuntimeError("requests says 500"))
    trainer.fill(1)
    publication = fleet.publish(1, deadline_s=1.0)
    with pytest.raises(CommitError):
        publication.wait_committed()
    of_server = publication.servers["engine-0"]
    assert of_server.state == "old version serving"
    assert "requests says 500" in of_server.error
    assert "pause" not in server.calls


# ---- who is there


def test_a_server_that_restarted_joins_again_and_takes_the_next_version(trainer, server):
    other = StandIn()
    fleet = trainer.fleet(server, other)
    publish(trainer, fleet, 1)
    server.shutdown_weight_transfer_engine()  # the process is another one now
    await_true(lambda: "engine-0" not in trainer.source.replicas())
    started = threading.Event()
    server.fail["init"] = lambda: started.wait(30)  # it is still loading its model
    for version in (2, 3):
        began = time.monotonic()
        report = publish(trainer, fleet, version)
        assert time.monotonic() - began < 5  # of the 20 s that a publish has: nobody waits for it
        assert report.servers["engine-0"].state == "absent"
        assert "joins now" in report.servers["engine-0"].error
        assert report.serving == ("engine-1",)
    assert server.calls.count("init") == 2
    started.set()
    await_true(lambda: is_joined(trainer, "engine-0"))
    assert publish(trainer, fleet, 4).serving == ("engine-0", "engine-1")
    other.shutdown_weight_transfer_engine()


def test_a_server_can_be_added_and_removed(trainer, server):
    fleet = trainer.fleet()
    assert fleet.servers == ()
    assert fleet.add(server, "late") == "late"
    assert publish(trainer, fleet, 1).serving == ("late",)
    fleet.remove("late")
    assert fleet.servers == ()
    await_true(lambda: "late" not in trainer.source.replicas())
    with pytest.raises(ConfigError, match="no server 'late'"):
        fleet.remove("late")


def test_a_server_that_says_no_ends_the_constructor_with_its_words(trainer, server):
    server.fail["init"] = TransportError("http://x answered 500: Weight transfer not configured")
    with pytest.raises(TransportError, match="Weight transfer not configured") as caught:
        trainer.fleet(server)
    assert "--weight-transfer-config" in caught.value.hint


def test_a_server_whose_workers_have_another_backend_is_reported(trainer, server, monkeypatch):
    monkeypatch.setattr("wsync.integrations.vllm.joining._APPEAR_S", 0.2)
    server.init_weight_transfer_engine = lambda init_info: None
    with pytest.raises(ConfigError, match="sees no replica of it") as caught:
        trainer.fleet(server)
    assert "--weight-transfer-config" in caught.value.hint


def test_closing_lets_the_servers_go(trainer, server):
    with trainer.fleet(server) as fleet:
        publish(trainer, fleet, 1)
    assert server.workers[0]._sink is None
    fleet.close()


def test_options_cannot_redirect_a_server(trainer, server):
    with pytest.raises(ConfigError, match=r"options has \['store'\]"):
        trainer.fleet(server, options={"store": "tcp://127.0.0.1:1"})
    assert server.calls == []


@pytest.mark.parametrize("store", ["tcp://0.0.0.0:29600", "tcp://[::]:29600"])
def test_an_address_that_no_server_can_reach_is_refused(trainer, store):
    with pytest.raises(ConfigError, match="cannot reach"):
        trainer.fleet(store=store)


def test_names_are_checked(trainer, server):
    with pytest.raises(ConfigError, match="2 names for 1 servers"):
        trainer.fleet(server, names=["a", "b"])
    with pytest.raises(ConfigError, match="two servers have the name"):
        trainer.fleet(server, server, names=["a", "a"])
    with pytest.raises(ConfigError, match="no '/'"):
        trainer.fleet(server, names=["a/b"])
    with pytest.raises(ConfigError, match="lacks"):
        trainer.fleet(object())
    with pytest.raises(ConfigError, match="list of servers"):
        Fleet(trainer.source, "http://127.0.0.1:1")


def test_other_trainer_ranks_publish_and_talk_to_nobody(server):
    published = []

    class OtherRank:
        rank, world_size = 1, 2

        def publish(self, version, *, min_replicas, deadline_s):
            published.append((version, min_replicas, deadline_s))
            return types.SimpleNamespace(
                version=version,
                deadline=0.0,
                released=True,
                wait_committed=lambda: "report",
                wait_released=lambda: None,
            )

    fleet = Fleet(OtherRank(), [server], deadline_s=7)
    report = fleet.publish(4, min_replicas=2).wait_committed()
    assert published == [(4, 2, 7)]
    assert (report.publish, report.servers) == ("report", {})
    assert fleet.add(server, "x") == "x"
    fleet.remove("x")
    fleet.close()
    assert server.calls == []
