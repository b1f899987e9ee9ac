"""An optimizer that writes before its weights are released is caught: no engine takes a mixture of two versions."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
import torch
from packing_worlds import wait_until

import wsync
import wsync.session.source
from wsync import kernels
from wsync.errors import CommitError, ConfigError, StateError
from wsync.plan.types import PlanOptions

SHAPE = (64, 1024)
NAMES = [f"layer.{i}.weight" for i in range(8)]


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


class Kernels:
    """The kernels; between the first bucket and the second one the trainer writes."""

    def __init__(self, write):
        self._write = write
        self._num_packed = 0

    def pack(self, *args, **options):
        self._num_packed += 1
        if self._num_packed == 2:
            self._write()
        return kernels.pack(*args, **options)

    def __getattr__(self, name):
        return getattr(kernels, name)


class World:
    """A trainer with eight tensors in several buckets, and one engine that commits what it can."""

    def __init__(self, key_file, tensors, **options):
        self.tensors = tensors
        self.source = wsync.Source(
            tensors,
            store="tcp://127.0.0.1:0",
            key_file=key_file,
            options=PlanOptions(bucket_bytes=2 * SHAPE[0] * SHAPE[1]),
            **options,
        )
        self.live = {name: torch.zeros(SHAPE, dtype=torch.bfloat16) for name in NAMES}
        self.sink = wsync.Sink(self.live, store=self.source.store, key_file=key_file)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.sink.start()
        self._thread.start()

    def _serve(self):
        while not self._stop.wait(0.005):
            if ticket := self.sink.poll():
                with contextlib.suppress(CommitError):  # the trainer ended the publish: the old version serves
                    self.sink.commit(ticket)

    def publish(self, version):
        return self.source.publish(version, deadline_s=30)

    def serves(self, value):
        return all(bool((t == value).all()) for t in self.live.values())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.sink.close()
        self.source.close()


def torch_tensors(value):
    return {name: torch.full(SHAPE, value, dtype=torch.bfloat16) for name in NAMES}


def arrays(value):
    return {name: np.full(SHAPE, value, dtype=np.float32) for name in NAMES}


def fill(tensors, value):
    for tensor in tensors.values():
        tensor[...] = value


def fill_unseen(tensors, value):
    for tensor in tensors.values():
        tensor.data.fill_(value)


@pytest.mark.parametrize(
    ("make", "write", "options", "said"),
    [
        (torch_tensors, fill, {}, "'layer.0.weight' was written 1 times while it was read"),
        (torch_tensors, fill_unseen, {"write_check": "digest"}, "weights were written in the bucket"),
        (arrays, fill, {"write_check": "digest"}, "weights were written in the bucket"),
    ],
    ids=["torch-counts", "data-digest", "numpy-digest"],
)
def test_a_write_before_released_ends_the_publish_and_the_engine_serves_on(
    key_file, monkeypatch, make, write, options, said
):
    with World(key_file, make(1.0), **options) as world:
        world.publish(1).wait_committed()
        assert world.serves(1.0)
        with monkeypatch.context() as patch:
            patch.setattr(wsync.session.source, "kernels", Kernels(lambda: write(world.tensors, 2.0)))
            publication = world.publish(2)
            with pytest.raises(StateError, match=said):
                publication.wait_committed()
        assert world.serves(1.0)
        wait_until(lambda: world.sink.version == 1)  # it hears that the replica committed after the trainer did
        world.publish(3).wait_committed()
        assert world.serves(2.0)


@pytest.mark.parametrize("write_check", ["counts", "digest"])
def test_writes_after_released_are_welcome(key_file, write_check):
    with World(key_file, torch_tensors(1.0), write_check=write_check) as world:
        for version in range(1, 4):
            publication = world.publish(version)
            publication.wait_released()
            fill(world.tensors, float(version + 1))
            publication.wait_committed()
            assert world.serves(float(version))


def test_inference_tensors_have_no_count_and_are_published(key_file):
    with torch.inference_mode():
        tensors = torch_tensors(3.0)
    with World(key_file, tensors) as world:
        world.publish(1).wait_committed()
        assert world.serves(3.0)


def test_an_unknown_check_is_refused(key_file):
    with pytest.raises(ConfigError, match=r"write_check must be one of .*'digest'.*, got 'always'"):
        wsync.Source(torch_tensors(1.0), store="tcp://127.0.0.1:0", key_file=key_file, write_check="always")


class AfterAmaxes:
    """The kernels; between the amaxes and the first bucket the trainer writes."""

    def __init__(self, write):
        self._write = write

    def scales_from_amax(self, descs):
        kernels.scales_from_amax(descs)
        self._write()

    def __getattr__(self, name):
        return getattr(kernels, name)


def test_a_write_between_the_amaxes_and_the_packing_is_seen_by_the_second_read(key_file, monkeypatch):
    weights = {name: torch.full((8, 32), 1.0) for name in ("a", "b")}
    live = {part: torch.zeros((8, 32), dtype=torch.float8_e4m3fn) for part in weights}
    live |= {f"{name}_scale": torch.zeros(()) for name in weights}
    args = {"key_file": key_file, "recipes": dict.fromkeys(weights, "fp8_tensor")}
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file, write_check="digest") as source:
        with wsync.Sink(live, store=source.store, **args) as sink:
            write = AfterAmaxes(lambda: weights["b"].data.fill_(3.0))
            changed = "weights of 'b' were written while they were read for a publish"
            with monkeypatch.context() as patch:
                patch.setattr(wsync.session.source, "kernels", write)
                publication = source.publish(1, deadline_s=30)
                # The engine hears of it before or after it has staged everything, as the threads run.
                with pytest.raises((StateError, CommitError), match=f"{changed}|version 1 was not committed"):
                    sink.commit(sink.prepare(30))
                with pytest.raises(StateError, match=changed):
                    publication.wait_committed()
            publication = source.publish(2, deadline_s=30)
            sink.commit(sink.prepare(30))
            publication.wait_committed()
            assert float(live["b_scale"]) == pytest.approx(3 / 448)
