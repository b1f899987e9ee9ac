"""A vLLM server for tests: the real worker backend on models of plain tensors, behind the calls of a client."""

from __future__ import annotations

import threading
import time
import types

import torch

import wsync
from wsync.api.live import load_by_name
from wsync.errors import StateError
from wsync.integrations.vllm import Fleet
from wsync.integrations.vllm.worker import WsyncWorkerBackend

SHAPES = {"a": (64, 32), "b": (7,)}


class Model:
    """An engine's live memory. ``swap`` makes a commit fail as one that finds its memory replaced does: poisoned."""

    def __init__(self):
        self.tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.swap = False

    def live_tensors(self):
        return {n: t.clone() for n, t in self.tensors.items()} if self.swap else self.tensors


class Backend(WsyncWorkerBackend):
    """The backend, on a model of plain tensors."""

    def _make_sink(self, info, replica, rank, world_size):
        thread = threading.get_ident()

        def load_weights(weights):  # as vLLM's: on the engine's own thread alone
            if threading.get_ident() != thread:
                raise StateError("recording belongs on the worker's thread")
            load_by_name(self.model.tensors)(weights)

        return wsync.Sink(
            self.model,
            load_weights,
            store=info.store,
            key_file=info.key_file,
            replica=replica,
            rank=rank,
            world_size=world_size,
            join_deadline_s=info.join_deadline_s,
            allow_missing=info.allow_missing,
            num_threads=1,
        )


class StandIn:
    """A server of ``num_engines`` independent data-parallel engines of one worker each."""

    def __init__(self, num_engines=1):
        self.models = [Model() for _ in range(num_engines)]
        self.workers = [self._worker(i) for i in range(num_engines)]
        self.calls = []
        self.infos = []
        self.fail = {}
        self.paused = False
        self.label = "default"
        self.session = False
        self.num_told_to_leave = 0

    def _worker(self, index):
        parallel = types.SimpleNamespace(world_size=1, rank=0, data_parallel_size=1, data_parallel_index=index)
        config = types.SimpleNamespace(parallel_config=parallel, model_config=None, lora_config=None)
        return Backend(None, config, "cpu", self.models[index])

    def _called(self, name):
        self.calls.append(name)
        failure = self.fail.pop(name, None)
        if callable(failure):
            failure()
        elif failure is not None:
            raise failure

    def world_size(self, include_dp=True):
        return len(self.workers) if include_dp else 1

    def init_weight_transfer_engine(self, init_info):
        self._called("init")
        self.infos.append(init_info)
        for worker in self.workers:
            worker.init_transfer_engine(worker.parse_init_info(init_info))

    def start_weight_update(self):
        self._called("start")
        if self.session:
            raise RuntimeError("a weight update is already active")
        self.session = True
        for worker in self.workers:
            worker.start_weight_update()

    def update_weights(self, update_info):
        self._called("update")
        for worker in self.workers:
            worker.update_weights(update_info)

    def finish_weight_update(self, weight_version=None):
        self._called("finish")
        self.session = False
        self.label = weight_version or self.label

    def pause(self, mode, clear_cache):
        self._called("pause")
        self.pause_arguments = (mode, clear_cache)
        self.paused = True

    def resume(self):
        self._called("resume")
        self.paused = False

    def is_paused(self):
        return self.paused

    def shutdown_weight_transfer_engine(self):
        self.num_told_to_leave += 1
        if self.session:
            raise RuntimeError("cannot release a trainer connection during a weight update")
        for worker in self.workers:
            worker.shutdown()

    def holds(self, value):
        return [all(bool((t == value).all()) for t in model.tensors.values()) for model in self.models]

    def close(self):
        """Whatever happened to it."""
        self.session = False
        self.shutdown_weight_transfer_engine()


class Trainer:
    """A Source whose weights all have one value."""

    def __init__(self, key_file, names=tuple(SHAPES), store="tcp://127.0.0.1:0"):
        self.key_file = key_file
        self.tensors = {name: torch.zeros(SHAPES[name]) for name in names}
        self.source = wsync.Source(self.tensors, store=store, key_file=key_file, rank=0, world_size=1, num_threads=1)

    def fleet(self, *servers, **options):
        return Fleet(self.source, list(servers), **{"key_file": self.key_file, "deadline_s": 20.0} | options)

    def fill(self, value):
        for tensor in self.tensors.values():
            tensor.fill_(value)


def publish(trainer, fleet, version, **options):
    """A version whose weights are its number."""
    trainer.fill(version)
    return fleet.publish(version, **options).wait_committed()


def await_true(condition):
    """The coordinator hears of ranks that come and go a moment later."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_joined(trainer, replica):
    """Whether the trainer sees all of the replica."""
    status = trainer.source.replicas().get(replica)
    return status is not None and status.complete
