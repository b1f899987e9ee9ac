"""The session between real processes and inside one: what is published arrives, and what goes wrong is named."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import wsync
from wsync.testing.processes import free_port


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return wsync.new_key_file(tmp_path / "wsync.key")


class Pair:
    """One trainer rank and one engine rank in this process; the engine commits on a thread of its own."""

    def __init__(self, trainer, engine, key_file, *, transport="shm", **sink_args):
        self.source = wsync.Source(trainer, store="tcp://127.0.0.1:0", key_file=key_file, transport=transport)
        try:
            self.sink = wsync.Sink(engine, store=self.source.store, key_file=key_file, **sink_args)
        except BaseException:
            self.source.close()
            raise

    def sync(self, version, deadline_s=20.0):
        errors = []

        def engine():
            try:
                self.sink.commit(self.sink.prepare(deadline_s))
            except wsync.WsyncError as e:
                errors.append(e)

        thread = threading.Thread(target=engine)
        thread.start()
        try:
            return self.source.publish(version, deadline_s=deadline_s).wait_committed()
        finally:
            thread.join()
            self.sink_errors = errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sink.close()
        self.source.close()


def tensors(seed=0, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(300, 64, generator=g).to(dtype),
        "layer.weight": torch.randn(256, 200, generator=g).to(dtype),
        "norm.weight": torch.randn(64, generator=g).to(dtype),
        "router.bias": torch.randn(7, generator=g),
        "steps": torch.tensor(3, dtype=torch.int64),
    }


def zeros_like(source):
    return {name: torch.zeros_like(t) for name, t in source.items()}


def equal_bytes(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )


@pytest.mark.parametrize("transport", ["loopback", "shm", "gloo"])
def test_a_published_version_arrives_byte_for_byte_again_and_again(key_file, transport):
    trainer = tensors()
    engine = zeros_like(trainer)
    addresses = {n: t.data_ptr() for n, t in engine.items()}
    with Pair(trainer, engine, key_file, transport=transport) as pair:
        assert pair.sink.version is None
        for version in (1, 2, 5):
            report = pair.sync(version)
            assert report.committed == ("engine-0",)
            assert report.dropped == {}
            assert pair.sink.version == version
            assert pair.sink.state == "serving"
            assert equal_bytes(trainer, engine)
            for t in trainer.values():
                t.add_(1)
            assert not equal_bytes(trainer, engine)
    assert addresses == {n: t.data_ptr() for n, t in engine.items()}


def test_the_report_counts_bytes_and_phases(key_file):
    trainer = tensors()
    with Pair(trainer, zeros_like(trainer), key_file) as pair:
        report = pair.sync(1)
    num_bytes = sum(t.numel() * t.element_size() for t in trainer.values())
    assert report.logical_bytes == report.wire_bytes == report.sink_bytes == num_bytes
    assert {"total", "stall", "pack", "receive", "verify", "install", "pause"} <= set(report.seconds)
    assert 0 < report.seconds["stall"] <= report.seconds["total"]
    assert {r.name for r in report.ranks} == {"trainer/0", "engine-0/0"}


def test_f32_masters_arrive_as_their_bf16_rounding(key_file):
    trainer = {"w": torch.randn(130, 70)}
    engine = {"w": torch.zeros(130, 70, dtype=torch.bfloat16)}
    with Pair(trainer, engine, key_file) as pair:
        pair.sync(1)
    assert torch.equal(engine["w"], trainer["w"].to(torch.bfloat16))


def test_tied_weights_travel_once(key_file):
    weight = torch.randn(128, 64).to(torch.bfloat16)
    trainer = {"embed": weight, "head": weight}
    tied = torch.zeros_like(weight)
    with Pair(trainer, {"embed": tied, "head": tied}, key_file) as pair:
        assert pair.sync(1).wire_bytes == weight.numel() * 2
    assert torch.equal(tied, weight)


def test_numpy_arrays_can_be_published(key_file):
    trainer = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
    engine = {"w": torch.zeros(3, 4)}
    with Pair(trainer, engine, key_file) as pair:
        pair.sync(1)
    assert engine["w"].tolist() == trainer["w"].tolist()


def test_a_non_finite_weight_is_named_on_both_sides_and_the_old_version_serves(key_file):
    trainer = tensors()
    engine = zeros_like(trainer)
    with Pair(trainer, engine, key_file) as pair:
        pair.sync(1)
        before = {n: t.clone() for n, t in engine.items()}
        trainer["layer.weight"][17, 5] = float("nan")
        with pytest.raises(wsync.NonFiniteError, match=r"layer\.weight.*17, 5"):
            pair.sync(2)
        assert [type(e) for e in pair.sink_errors] == [wsync.NonFiniteError]
        assert equal_bytes(engine, before)
        assert (pair.sink.version, pair.sink.state) == (1, "serving")
        trainer["layer.weight"][17, 5] = 0
        pair.sync(3)
        assert equal_bytes(trainer, engine)


def test_versions_must_increase_within_a_source(key_file):
    trainer = tensors()
    with Pair(trainer, zeros_like(trainer), key_file) as pair:
        pair.sync(4)
        with pytest.raises(wsync.StateError, match=r"got 4, the last was 4"):
            pair.source.publish(4)


def test_another_model_is_refused_by_name_on_both_sides(key_file):
    trainer = tensors()
    engine = zeros_like(trainer)
    engine["layer.weight"] = torch.zeros(256, 201, dtype=torch.bfloat16)
    with wsync.Source(trainer, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        with pytest.raises(wsync.ShapeMismatchError, match=r"\(256, 200\).*\(256, 201\)"):
            wsync.Sink(engine, store=source.store, key_file=key_file)
        with pytest.raises(wsync.ShapeMismatchError, match=r"\(256, 200\).*\(256, 201\)"):
            source.publish(1, deadline_s=0.5).wait_committed()
        # A refusal counts once: an engine that fits may come afterwards.
        with pytest.raises(wsync.DeadlineError, match="needs 1 complete replicas and has 0"):
            source.publish(2, deadline_s=0.5).wait_committed()


def test_an_engine_with_a_tensor_that_the_trainer_lacks_is_refused(key_file):
    trainer = tensors()
    engine = zeros_like(trainer) | {"extra": torch.zeros(3)}
    with wsync.Source(trainer, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        with pytest.raises(wsync.MissingTensorError, match="extra"):
            wsync.Sink(engine, store=source.store, key_file=key_file)


def test_a_dtype_that_no_recipe_converts_is_refused(key_file):
    trainer = {"w": torch.zeros(4, 4, dtype=torch.float16)}
    engine = {"w": torch.zeros(4, 4, dtype=torch.bfloat16)}
    with wsync.Source(trainer, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        with pytest.raises(wsync.DtypeMismatchError, match=r"float16.*bfloat16|bfloat16.*float16"):
            wsync.Sink(engine, store=source.store, key_file=key_file)


def test_a_wrong_key_is_refused_on_both_sides(key_file, tmp_path):
    other = wsync.new_key_file(tmp_path / "other.key")
    trainer = tensors()
    with wsync.Source(trainer, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        with pytest.raises(wsync.ConnectError, match="different keys"):
            wsync.Sink(zeros_like(trainer), store=source.store, key_file=other, join_deadline_s=10)
        with pytest.raises(wsync.DeadlineError, match="connections with another key"):
            source.publish(1, deadline_s=0.5).wait_committed()


def test_a_port_in_use_is_named(key_file):
    trainer = tensors()
    with wsync.Source(trainer, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        with pytest.raises(wsync.ConnectError, match="cannot be bound"):
            wsync.Source(trainer, store=source.store, key_file=key_file)


def test_a_missing_store_is_named_within_the_deadline(key_file):
    with pytest.raises(wsync.ConnectError, match="found no store at"):
        wsync.Sink(tensors(), store=f"tcp://127.0.0.1:{free_port()}", key_file=key_file, join_deadline_s=1)


def test_missing_trainer_ranks_are_named_within_the_deadline(key_file):
    with pytest.raises(wsync.DeadlineError, match="all 2 trainer ranks"):
        wsync.Source(
            tensors(),
            store=f"tcp://127.0.0.1:{free_port()}",
            key_file=key_file,
            rank=0,
            world_size=2,
            join_deadline_s=1,
        )


def test_a_replica_that_never_prepares_is_dropped_where_others_are_enough(key_file):
    trainer = tensors()
    engine, idle = zeros_like(trainer), zeros_like(trainer)
    with Pair(trainer, engine, key_file) as pair:
        with wsync.Sink(idle, store=pair.source.store, key_file=key_file, replica="idle"):
            report = pair.sync(1, deadline_s=4)
    assert report.committed == ("engine-0",)
    assert "idle" in report.dropped
    assert equal_bytes(trainer, engine)
    assert equal_bytes(idle, zeros_like(idle))


def test_publish_raises_below_min_replicas(key_file):
    trainer = tensors()
    with Pair(trainer, zeros_like(trainer), key_file) as pair:
        with pytest.raises(wsync.DeadlineError, match="needs 2 complete replicas and has 1"):
            pair.source.publish(1, min_replicas=2, deadline_s=0.5).wait_committed()


class _Held:
    """A sink's transport end that receives nothing before it is let go."""

    def __init__(self, end, let_go):
        self._end, self._let_go = end, let_go

    def receive(self, version, deadline, cancelled):
        while not self._let_go.wait(0.01):
            cancelled()
        return self._end.receive(version, deadline, cancelled)

    def __getattr__(self, name):
        return getattr(self._end, name)


def test_a_newer_publish_supersedes_one_that_was_not_decided(key_file):
    trainer = tensors()
    engines = [zeros_like(trainer), zeros_like(trainer)]
    let_go = threading.Event()
    with wsync.Source(trainer, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        sinks = [
            wsync.Sink(live, store=source.store, key_file=key_file, rank=rank, world_size=2)
            for rank, live in enumerate(engines)
        ]
        opened = sinks[1]._session._open_transport
        sinks[1]._session._open_transport = lambda name: _Held(opened(name), let_go)
        voted = threading.Event()
        seen: list[str] = []

        def take_version_2(sink):
            while sink.version != 2:
                ticket = sink.prepare(20)
                voted.set()
                try:
                    sink.commit(ticket)
                except wsync.CommitError as e:
                    seen.append(e.message)
                    seen.append(sink.state)

        threads = [threading.Thread(target=take_version_2, args=(sink,)) for sink in sinks]
        for thread in threads:
            thread.start()
        old = source.publish(1, deadline_s=20)
        assert voted.wait(20)
        old.wait_released()
        for t in trainer.values():
            t.add_(1)
        new = source.publish(2, deadline_s=20)
        with pytest.raises(wsync.CommitError, match="superseded by version 2") as error:
            old.wait_committed()
        assert error.value.replicas == {"engine-0": "old version serving"}
        let_go.set()
        assert new.wait_committed().committed == ("engine-0",)
        for thread in threads:
            thread.join()
        assert "superseded by version 2" in seen[0]
        assert seen[1] == "serving"
        assert [s.version for s in sinks] == [2, 2]
        assert all(equal_bytes(trainer, live) for live in engines)
        for sink in sinks:
            sink.close()


def test_a_background_sink_commits_between_steps(key_file):
    trainer = tensors()
    engine = zeros_like(trainer)
    with Pair(trainer, engine, key_file) as pair:
        pair.sink.start()
        for version in (1, 2, 3):
            publication = pair.source.publish(version, deadline_s=20)
            while pair.sink.version != version:
                ticket = pair.sink.poll()
                if ticket is not None:
                    pair.sink.commit(ticket)
            publication.wait_committed()
            assert equal_bytes(trainer, engine)
            for t in trainer.values():
                t.add_(1)


def test_a_restarted_trainer_begins_a_new_incarnation_and_may_rewind(key_file):
    trainer = tensors()
    engine = zeros_like(trainer)
    port = free_port()
    first = wsync.Source(trainer, store=f"tcp://127.0.0.1:{port}", key_file=key_file)
    with wsync.Sink(engine, store=first.store, key_file=key_file) as sink:
        sink.start()

        def sync(source, version):
            publication = source.publish(version, deadline_s=20)
            while not publication.over:
                ticket = sink.poll()
                if ticket is not None:
                    sink.commit(ticket)
            publication.wait_committed()
            assert sink.version == version

        sync(first, 7)
        first.close()
        for t in trainer.values():
            t.mul_(2)
        with wsync.Source(trainer, store=f"tcp://127.0.0.1:{port}", key_file=key_file) as second:
            sync(second, 2)
        assert equal_bytes(trainer, engine)


def test_what_the_loader_sets_itself_is_set_in_an_engine_that_never_loaded_a_checkpoint(key_file):
    trainer = {"embed": torch.randn(10, 8).to(torch.bfloat16)}
    live = {"padded": torch.full((16, 8), 7.0, dtype=torch.bfloat16), "copy": torch.full((10, 8), 7.0).bfloat16()}

    def load(weights):
        for _, weight in weights:
            live["padded"][:10].copy_(weight)
            live["padded"][10:].zero_()
            live["copy"].copy_(weight)

    with wsync.Source(trainer, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        with wsync.Sink(live, load, store=source.store, key_file=key_file) as sink:
            assert bool((live["padded"] == 7).all())  # recording writes nothing
            engine = threading.Thread(target=lambda: sink.commit(sink.prepare(20)))
            engine.start()
            report = source.publish(1, deadline_s=20).wait_committed()
            engine.join()
    assert torch.equal(live["padded"][:10], trainer["embed"])
    assert torch.equal(live["copy"], trainer["embed"])
    assert bool((live["padded"][10:] == 0).all())
    assert report.wire_bytes == 160
