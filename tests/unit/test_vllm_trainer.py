"""The trainer backend for vLLM's own factory: what is read in place, what is copied, versions, shutting down."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from vllm_standin import SHAPES, StandIn

import wsync
from wsync.errors import (
    CommitError,
    ConfigError,
    DtypeMismatchError,
    MissingTensorError,
    ShapeMismatchError,
    StateError,
)
from wsync.integrations.vllm import WsyncTrainer, WsyncTrainerInitInfo
from wsync.integrations.vllm import worker as worker_module
from wsync.integrations.vllm.sources import HostCopy, read_in_place
from wsync.testing.processes import Processes, free_port


@dataclass
class Meta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """vLLM's ``WeightSource``: every tensor has the value ``value``."""

    def __init__(self, held=None):
        self.value = 0.0
        self.held = held

    def metadata(self):
        return [Meta(name, torch.float32, shape) for name, shape in SHAPES.items()]

    def held_names(self):
        return self.held

    def __iter__(self):
        for meta in self.metadata():
            is_held = self.held is None or meta.name in self.held
            yield meta.name, torch.full(meta.shape, self.value) if is_held else None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(worker_module, "_metrics_of", lambda replica, rank: None)
    made = StandIn()
    yield made
    made.shutdown_weight_transfer_engine()


@pytest.fixture
def info(tmp_path):
    key_file = wsync.new_key_file(tmp_path / "key")
    return WsyncTrainerInitInfo(rank=0, store="tcp://127.0.0.1:0", key_file=key_file, deadline_s=20.0)


def test_a_mapping_is_published_at_every_send_with_versions_that_count_up(server, info):
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    trainer = WsyncTrainer.trainer_init(info, client=server, source=tensors)
    for version in (1, 2):
        for tensor in tensors.values():
            tensor.fill_(10 * version)
        report = trainer.send_weights()
        assert report.serving == ("engine-0",)
        assert server.holds(10 * version) == [True]
        assert server.label == str(version)
    trainer.shutdown()


def test_a_weight_source_is_iterated_anew_at_every_send(server, info):
    info.first_version = 7
    source = Weights()
    trainer = WsyncTrainer.trainer_init(info, client=[server], source=source)
    for value in (3.0, 4.0):
        source.value = value
        trainer.send_weights()
        assert server.holds(value) == [True]
    assert (server.label, trainer.version) == ("8", 8)
    trainer.shutdown()


def test_the_choice_of_pause_and_the_names_reach_the_fleet(server, info):
    info.pause, info.caches, info.names = "abort", "keep", ["left"]
    trainer = WsyncTrainer.trainer_init(info, client=server, source=Weights())
    assert trainer.send_weights().serving == ("left",)
    assert server.pause_arguments == ("abort", False)
    trainer.shutdown()


def test_a_send_that_fails_can_be_followed_by_one_that_works(server, info):
    info.deadline_s = 2.0
    trainer = WsyncTrainer.trainer_init(info, client=server, source=Weights())
    server.models[0].swap = True
    with pytest.raises(CommitError):
        trainer.send_weights()
    server.models[0].swap = False
    assert trainer.send_weights().serving == ("engine-0",)
    assert trainer.version == 2
    trainer.shutdown()


def test_shutting_down_frees_the_port_and_ends_sending(server, info):
    info.store = f"tcp://127.0.0.1:{free_port()}"
    trainer = WsyncTrainer.trainer_init(info, client=server, source=Weights())
    trainer.shutdown()
    trainer.shutdown()
    with pytest.raises(StateError, match="after shutdown"):
        trainer.send_weights()
    WsyncTrainer.trainer_init(info, client=server, source=Weights()).shutdown()


def test_a_server_that_refuses_frees_the_port_too(server, info):
    info.store = f"tcp://127.0.0.1:{free_port()}"
    server.fail["init"] = ConfigError("no")
    with pytest.raises(ConfigError, match="no"):
        WsyncTrainer.trainer_init(info, client=server, source=Weights())
    WsyncTrainer.trainer_init(info, client=server, source=Weights()).shutdown()


def test_a_rank_that_only_takes_part_in_collectives_talks_to_nobody(server, info):
    info.rank, info.world_size = 1, 2
    source = Weights()
    trainer = WsyncTrainer.trainer_init(info, client=server, source=source)
    assert trainer.send_weights() is None
    assert server.calls == []
    assert not trainer.is_sender


def test_no_source_is_refused(server, info):
    with pytest.raises(ConfigError, match="needs a source"):
        WsyncTrainer.trainer_init(info, client=server)


def test_older_versions_of_vllm_pass_a_config_besides(server, info):
    trainer = WsyncTrainer.trainer_init(config=object(), init_info=info, client=server, source=Weights())
    trainer.shutdown()


# ---- sources


def test_only_vllms_own_module_source_is_known_to_be_nothing_but_its_module():
    base = pytest.importorskip("vllm.distributed.weight_transfer.base")
    module = torch.nn.Linear(2, 2)

    class Renaming(base.ModuleSource):
        def __iter__(self):
            return ((f"model.{name}", tensor) for name, tensor in super().__iter__())

    assert read_in_place(base.ModuleSource(module)) is module
    assert read_in_place(Renaming(module)) is None
    assert read_in_place(module) is module
    assert read_in_place(Weights()) is None


def test_what_is_no_source_is_refused():
    with pytest.raises(ConfigError, match="got int"):
        HostCopy(3, 0, 1)


@pytest.mark.parametrize(
    ("yielded", "error", "message"),
    [
        ([("a", torch.zeros(64, 32))], ConfigError, "yields 1 tensors, its metadata"),
        ([("b", torch.zeros(7))], ConfigError, "yields 'b' at index 0"),
        ([("a", torch.zeros(64, 31))], ShapeMismatchError, r"\(64, 31\).*\(64, 32\)"),
        ([("a", torch.zeros(64, 32, dtype=torch.float64))], DtypeMismatchError, "float64.*float32"),
        ([("a", None)], StateError, "NoneType for 'a'"),
        ([("a", torch.zeros(64, 32)), ("b", torch.zeros(7)), ("c", torch.zeros(1))], ConfigError, "yields 'c' after"),
    ],
)
def test_a_source_that_yields_other_than_it_declares_is_refused_when_it_is_through(
    monkeypatch, yielded, error, message
):
    copy = HostCopy(Weights(), 0, 1)
    left = iter(yielded)  # whose iteration is a collective of all ranks, maybe
    monkeypatch.setattr(Weights, "__iter__", lambda self: left)
    with pytest.raises(error, match=message):
        copy.fill()
    assert list(left) == []


def test_a_split_source_of_unconnected_ranks_is_refused():
    with pytest.raises(ConfigError, match="split over 2 ranks"):
        HostCopy(Weights(held=["a"]), 0, 2)


def test_a_tensor_that_nobody_holds_is_named():
    with pytest.raises(MissingTensorError, match="'b' is held by none"):
        HostCopy(Weights(held=["a"]), 0, 1)


def _split_rank(report, rank, port, store, key_file):
    """Rank 0 holds ``a``, rank 1 holds ``b``; an engine in a process of its own takes both."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    source = Weights(held=["ab"[rank]])
    info = WsyncTrainerInitInfo(rank=rank, world_size=2, store=store, key_file=key_file, deadline_s=30.0)
    server = StandIn() if rank == 0 else None
    worker_module._metrics_of = lambda replica, rank: None
    trainer = WsyncTrainer.trainer_init(info, client=server, source=source)
    held = sorted(trainer._copy._memory)
    for value in (5.0, 6.0):
        source.value = value
        trainer.send_weights()
    result = held, server.holds(6.0) if server else None
    dist.barrier()
    trainer.shutdown()
    if server:
        server.shutdown_weight_transfer_engine()
    dist.destroy_process_group()
    return result


def _failing_rank(report, rank, port, store, key_file):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    info = WsyncTrainerInitInfo(rank=rank, world_size=2, store=store, key_file=key_file, deadline_s=30.0)
    server = StandIn()
    server.fail["init"] = ConfigError("this server has no backend")
    WsyncTrainer.trainer_init(info, client=server, source=tensors)


def _whole_rank(report, rank, port, store, key_file, failure):
    """All of the source is on rank 0, where something fails; rank 1 must not be left in its collectives."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    info = WsyncTrainerInitInfo(rank=rank, world_size=2, store=store, key_file=key_file, deadline_s=30.0)
    server = StandIn() if rank == 0 else None
    worker_module._metrics_of = lambda replica, rank: None
    if failure == "joining" and server:
        server.fail["init"] = ConfigError("this server has no backend")
    source = Weights()
    trainer = WsyncTrainer.trainer_init(info, client=server, source=source)
    source.value = 3.0
    if failure == "copying" and rank == 0:
        source.value = "three"
    trainer.send_weights()


def _run_two(worker, tmp_path, *more):
    key_file = str(wsync.new_key_file(tmp_path / "key"))
    arguments = (free_port(), f"tcp://127.0.0.1:{free_port()}", key_file, *more)
    with Processes() as processes:
        for rank in (0, 1):
            processes.start(f"rank{rank}", worker, rank, *arguments)
        return [processes.wait(f"rank{rank}", 90) for rank in (0, 1)]


@pytest.mark.multiproc
def test_a_split_source_is_published_by_the_ranks_that_hold_it(tmp_path):
    outcomes = _run_two(_split_rank, tmp_path)
    assert [o.error for o in outcomes] == [None, None], outcomes[0].trace + outcomes[1].trace
    assert outcomes[0].value == (["a"], [True])
    assert outcomes[1].value == (["b"], None)


@pytest.mark.multiproc
def test_where_the_servers_do_not_join_every_trainer_rank_learns_of_it(tmp_path):
    outcomes = _run_two(_failing_rank, tmp_path)
    assert outcomes[0].error == ("ConfigError", "this server has no backend")
    assert outcomes[1].error[0] == "TransportError"
    assert "trainer rank 0 could not" in outcomes[1].error[1]


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("failure", "own", "of_others"),
    [
        ("joining", "this server has no backend", "could not join its servers"),
        ("copying", "must be Number", "could not be copied on another trainer rank"),
    ],
)
def test_where_rank_0_alone_publishes_the_others_learn_that_it_cannot(tmp_path, failure, own, of_others):
    outcomes = _run_two(_whole_rank, tmp_path, failure)
    assert own in outcomes[0].error[1]
    assert outcomes[1].error[0] == "TransportError"
    assert of_others in outcomes[1].error[1]
