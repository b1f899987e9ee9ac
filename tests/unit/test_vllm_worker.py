"""The backend that vLLM makes in its workers: joining, one update, refusals. Sinks here are stand-ins."""

from __future__ import annotations

import types

import pytest

from wsync.errors import CommitError, ConfigError, StateError
from wsync.integrations.vllm import worker as worker_module
from wsync.integrations.vllm.worker import WsyncWorkerBackend, placement

STORE = "tcp://127.0.0.1:29600"


class FakeSink:
    """What the backend uses of a `Sink`."""

    def __init__(self, replica):
        self.replica = replica
        self.calls = []
        self.background_error = None
        self.error = None

    def start(self):
        self.calls.append("start")

    def poll(self):
        if self.background_error:
            raise self.background_error

    def wait(self, version, deadline_s):
        self.calls.append(("wait", version, deadline_s))
        return f"ticket {version}"

    def commit(self, ticket):
        if self.error:
            raise self.error
        self.calls.append(("commit", ticket))

    def close(self):
        self.calls.append("close")


def parallel(**fields):
    return types.SimpleNamespace(
        **{"world_size": 1, "rank": 0, "data_parallel_size": 1, "data_parallel_index": 0} | fields
    )


@pytest.fixture
def made(monkeypatch):
    """Sinks that backends made, with the info and the place of each."""
    sinks = []

    def make_sink(self, info, replica, rank, world_size):
        sink = FakeSink(replica)
        sink.made_with = (info, replica, rank, world_size)
        sinks.append(sink)
        return sink

    monkeypatch.setattr(WsyncWorkerBackend, "_make_sink", make_sink)
    monkeypatch.setattr(worker_module, "_metrics_of", lambda replica, rank: None)
    return sinks


def backend(parallel_config=None, lora_config=None):
    vllm_config = types.SimpleNamespace(
        parallel_config=parallel_config or parallel(), model_config=object(), lora_config=lora_config
    )
    return WsyncWorkerBackend(object(), vllm_config, "cpu", object())


def join(worker, **info):
    worker.init_transfer_engine(worker.parse_init_info({"store": STORE, "replica": "engine-0", **info}))


# ---- where a worker stands


@pytest.mark.parametrize(
    ("fields", "num_engines", "expected"),
    [
        ({}, 1, ("e", 0, 1)),
        ({"world_size": 4, "rank": 3}, 1, ("e", 3, 4)),
        # independent data-parallel engines: vLLM tells their workers a size of 1 and keeps the index
        ({"world_size": 2, "rank": 1}, 2, ("e.dp0", 1, 2)),
        ({"world_size": 2, "rank": 1, "data_parallel_index": 1}, 2, ("e.dp1", 1, 2)),
        ({"data_parallel_index": 3}, 1, ("e.dp3", 0, 1)),
        # in lockstep, for a mixture of experts: one replica
        ({"world_size": 2, "rank": 1, "data_parallel_size": 3, "data_parallel_index": 2}, 3, ("e", 5, 6)),
        ({"data_parallel_size": 2, "data_parallel_index": 0}, 2, ("e", 0, 2)),
    ],
)
def test_every_worker_knows_its_replica_and_its_rank_in_it(fields, num_engines, expected):
    assert placement(parallel(**fields), "e", num_engines) == expected


def test_the_workers_of_one_server_share_no_place():
    dense = {
        placement(parallel(world_size=2, rank=r, data_parallel_index=d), "e", 2)[:2] for d in (0, 1) for r in (0, 1)
    }
    moe = {
        placement(parallel(world_size=2, rank=r, data_parallel_index=d, data_parallel_size=2), "e", 2)[:2]
        for d in (0, 1)
        for r in (0, 1)
    }
    assert len(dense) == len(moe) == 4


# ---- what the trainer sends


def test_an_unknown_key_is_named(made):
    with pytest.raises(ValueError, match=r"unknown keys \['rank_offset'\]"):
        backend().parse_init_info({"store": STORE, "replica": "e", "rank_offset": 1})


def test_a_lacking_key_is_named(made):
    with pytest.raises(ConfigError, match=r"lacks \['replica'\]"):
        backend().parse_init_info({"store": STORE})


@pytest.mark.parametrize("replica", ["", "a/b", "a b", 3])
def test_a_name_that_cannot_be_is_refused(made, replica):
    with pytest.raises(ConfigError, match="replica must be a name"):
        backend().parse_init_info({"store": STORE, "replica": replica})


@pytest.mark.parametrize(
    "update",
    [{"version": "3"}, {"version": True}, {"version": 1, "deadline_s": -1}, {"version": 1, "replicas": "e"}, {}],
)
def test_an_update_that_cannot_be_is_refused(made, update):
    with pytest.raises(ConfigError):
        backend().parse_update_info(update)


def test_joining_makes_a_sink_with_what_was_sent_and_starts_it(made):
    worker = backend(parallel(world_size=2, rank=1))
    join(worker, key_file="/keys/k", recipes={"a": "bf16"}, allow_missing=["b"])
    info, *place = made[0].made_with
    assert (info.store, info.key_file, info.recipes, info.allow_missing) == (STORE, "/keys/k", {"a": "bf16"}, ("b",))
    assert place == ["engine-0", 1, 2]
    assert made[0].calls == ["start"]


def test_joining_again_with_the_same_info_changes_nothing(made):
    worker = backend()
    join(worker)
    join(worker)
    assert len(made) == 1


def test_joining_afresh_joins_anew_and_the_same_info_then_changes_nothing(made):
    worker = backend()
    join(worker)
    join(worker, afresh=True)
    join(worker)
    assert [s.calls for s in made] == [["start", "close"], ["start"]]


def test_joining_another_store_leaves_the_first(made):
    worker = backend()
    join(worker)
    join(worker, store="tcp://127.0.0.1:1")
    assert [s.calls for s in made] == [["start", "close"], ["start"]]


def test_joining_again_after_the_background_thread_ended_joins_anew(made):
    worker = backend()
    join(worker)
    made[0].background_error = StateError("refused")
    join(worker)
    assert [s.calls for s in made] == [["start", "close"], ["start"]]


# ---- one update


def test_an_update_commits_the_version_that_it_names(made):
    worker = backend()
    join(worker)
    worker.start_weight_update()
    worker.update_weights({"version": 7, "deadline_s": 3})
    worker.finish_weight_update()
    assert made[0].calls == ["start", ("wait", 7, 3), ("commit", "ticket 7")]


def test_an_update_of_other_replicas_leaves_this_one_alone(made):
    worker = backend()
    join(worker)
    worker.update_weights({"version": 7, "replicas": ["engine-1"]})
    assert made[0].calls == ["start"]
    worker.update_weights({"version": 7, "replicas": ["engine-0"]})
    assert made[0].calls[-1] == ("commit", "ticket 7")


def test_the_error_of_a_commit_reaches_the_caller_as_it_is(made):
    worker = backend()
    join(worker)
    made[0].error = CommitError("half of it", replicas={"engine-0": "poisoned"})
    with pytest.raises(CommitError, match="half of it"):
        worker.update_weights({"version": 7})


@pytest.mark.parametrize("call", ["start_weight_update", "update_weights"])
def test_an_update_before_the_trainer_joined_says_so(made, call):
    args = [{"version": 1}] if call == "update_weights" else []
    with pytest.raises(StateError, match=f"{call} came before init_weight_transfer_engine"):
        getattr(backend(), call)(*args)


def test_nothing_asks_for_an_accelerator(made, monkeypatch):
    import torch

    def fail():
        raise AssertionError("this build has no accelerator")

    monkeypatch.setattr(torch.accelerator, "synchronize", fail)
    worker = backend()
    join(worker)
    worker.update_weights({"version": 1})
    worker.drain_pending()


def test_shutting_down_closes_the_sink_once(made):
    worker = backend()
    join(worker)
    worker.shutdown()
    worker.shutdown()
    assert made[0].calls == ["start", "close"]
    join(worker)
    assert len(made) == 2


# ---- refusals


def test_a_server_with_lora_is_refused_when_it_starts():
    with pytest.raises(ConfigError, match="LoRA"):
        backend(lora_config=object())


def test_a_server_that_moves_experts_about_is_refused_when_it_starts():
    with pytest.raises(ConfigError, match="enable_eplb"):
        backend(parallel(enable_eplb=True))


def test_a_draft_model_is_refused(made):
    worker = backend()
    assert worker.supports_draft_weight_update is False
    with pytest.raises(ConfigError, match="draft"):
        worker.set_weight_update_target(object(), object())
    worker.reset_weight_update_target()
