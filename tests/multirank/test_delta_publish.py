"""Deltas end to end: what travels, when a version must come whole, and what faults cost."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

import wsync
from wsync.formats import quantize_reference
from wsync.plan.types import PlanOptions
from wsync.session import install as install_module
from wsync.session.messages import Sent, SourceJoin
from wsync.spec.serde import FORMAT_VERSION
from wsync.testing.processes import free_port

SHAPES = {"a": (256, 384), "b": (130, 200), "norm": (100,)}
FP8 = "fp8_block128"
SMALL = PlanOptions(bucket_bytes=64 << 10)


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: (0.02 * torch.randn(s, generator=generator)).to(torch.bfloat16) for n, s in SHAPES.items()}


def step(tensors, seed, share=0.01):
    """Move some weights to the next code up or down, as an optimizer with a small rate does."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        moved = torch.rand(tensor.shape, generator=generator) < share
        way = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int16) * 2 - 1
        tensor.copy_((tensor.view(torch.int16) + way * moved).view(torch.bfloat16))


class Engine:
    """A Sink that takes every version in a thread of its own, until it is closed."""

    def __init__(self, store, key_file, replica="engine-0", recipe="bf16"):
        self.recipe = recipe
        self.live = {}
        for name, shape in SHAPES.items():
            parts = quantize_reference(torch.zeros(shape), recipe) if recipe != "bf16" and len(shape) == 2 else {}
            suffixes = {"weight": "", "weight_scale_inv": "_scale_inv"}
            self.live |= {name + suffixes[part]: torch.zeros_like(value) for part, value in parts.items()}
            if not parts:
                self.live[name] = torch.zeros(shape, dtype=torch.bfloat16)
        recipes = {n: recipe for n in SHAPES if n + "_scale_inv" in self.live}
        load = self._load if recipes else None
        self.sink = wsync.Sink(self.live, load, store=store, key_file=key_file, replica=replica, recipes=recipes)
        self.errors = []
        self.paused = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _load(self, pairs):
        for name, value in pairs:
            self.live[name].copy_(value)

    def _run(self):
        while not self._stop:
            if self.paused.is_set():
                time.sleep(0.01)
                continue
            try:
                self.sink.commit(self.sink.prepare(30))
            except wsync.WsyncError as e:
                self.errors.append(e)
                time.sleep(0.02)

    def holds(self, tensors):
        for name, tensor in tensors.items():
            if name + "_scale_inv" not in self.live:
                if not torch.equal(self.live[name], tensor):
                    return False
                continue
            parts = quantize_reference(tensor, self.recipe)
            scale = parts["weight_scale_inv"]
            same = torch.equal(self.live[name].view(torch.uint8), parts["weight"].view(torch.uint8))
            if not same or not torch.equal(self.live[name + "_scale_inv"], scale):
                return False
        return True

    @property
    def keeper(self):
        return self.sink._session._staging._keeper

    def close(self):
        self._stop = True
        self.sink.close()
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def make_source(tensors, key_file, **args):
    args = {"transport": "shm", "options": SMALL, "delta": True} | args
    return wsync.Source(tensors, store="tcp://127.0.0.1:0", key_file=key_file, **args)


def publish(source, version, **args):
    return source.publish(version, deadline_s=20, **args).wait_committed()


def wait_for(true, seconds=20):
    ends = time.monotonic() + seconds
    while not true() and time.monotonic() < ends:
        time.sleep(0.01)
    assert true()


@pytest.mark.parametrize("transport", ["shm", "gloo", "loopback"])
def test_deltas_give_every_engine_the_trainers_weights_and_anchors_come_when_they_are_due(key_file, transport):
    tensors = weights()
    with make_source(tensors, key_file, transport=transport, delta_anchor_every=3) as source:
        with Engine(source.store, key_file, "x") as x, Engine(source.store, key_file, "y", FP8) as y:
            reports = []
            for version in range(1, 8):
                step(tensors, version)
                reports.append(publish(source, version, min_replicas=2))
                assert x.holds(tensors)
                assert y.holds(tensors)
                assert (x.errors, y.errors) == ([], [])
    assert [r.is_delta for r in reports] == [False, True, True, False, True, True, False]
    for report in reports:
        sent = report.sent
        if report.is_delta:
            assert sent.delta_buckets > 0
            assert 0.004 < sent.density < 0.02
            assert sent.delta_bytes + sent.dense_bytes < report.wire_bytes / 10
        else:
            assert sent == Sent(dense_buckets=sent.dense_buckets, dense_bytes=sent.dense_bytes)
            assert sent.dense_bytes >= report.wire_bytes


def test_deltas_go_with_the_second_read_of_a_publish(key_file):
    tensors = weights()
    with make_source(tensors, key_file, write_check="digest") as source, Engine(source.store, key_file) as engine:
        for version in (1, 2, 3):
            step(tensors, version)
            assert publish(source, version).is_delta == (version > 1)
            assert engine.holds(tensors)


def test_a_bucket_that_changed_everywhere_travels_whole_in_a_delta(key_file):
    tensors = weights()
    with make_source(tensors, key_file) as source, Engine(source.store, key_file) as engine:
        publish(source, 1)
        tensors["a"].copy_(weights(1)["a"])
        report = publish(source, 2)
        assert engine.holds(tensors)
    assert report.is_delta
    assert report.sent.dense_buckets > 0
    assert report.sent.delta_buckets > 0


def test_a_scale_that_changed_comes_with_the_codes_that_it_belongs_to(key_file):
    tensors = weights()
    with make_source(tensors, key_file) as source, Engine(source.store, key_file, recipe=FP8) as engine:
        publish(source, 1)
        before = engine.live["a_scale_inv"].clone()
        tensors["a"][3, 5] = 3.0
        assert publish(source, 2).is_delta
        assert int((engine.live["a_scale_inv"] != before).sum()) == 1
        assert engine.holds(tensors)


def test_two_trainer_ranks_encode_what_each_of_them_packs(key_file):
    halves = {n: [t[: len(t) // 2].clone(), t[len(t) // 2 :].clone()] for n, t in weights().items() if len(t) == 256}
    tensors = halves["a"]
    store = f"tcp://127.0.0.1:{free_port()}"
    sources = [None, None]

    def open_rank(rank):
        half = {f"part{rank}": tensors[rank]} | {f"part{1 - rank}": tensors[1 - rank].clone()}
        ordered = {name: half[name] for name in sorted(half)}
        sources[rank] = wsync.Source(
            ordered, store=store, key_file=key_file, rank=rank, world_size=2, transport="shm", options=SMALL, delta=True
        )

    threads = [threading.Thread(target=open_rank, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    live = {f"part{r}": torch.zeros(128, 384, dtype=torch.bfloat16) for r in (0, 1)}
    sink = wsync.Sink(live, store=store, key_file=key_file)
    taker = threading.Thread(target=lambda: [sink.commit(sink.prepare(30)) for _ in range(3)])
    taker.start()
    try:
        for version in (1, 2, 3):
            for source in sources:
                step(dict(zip("pq", source._description.keepalive, strict=True)), version)
            publications = [source.publish(version, deadline_s=20) for source in sources]
            reports = [p.wait_committed() for p in publications]
            assert reports[0].is_delta == (version > 1)
            assert torch.equal(live["part0"], sources[0]._description.keepalive[0])
        taker.join()
    finally:
        sink.close()
        for source in sources:
            source.close()


def test_a_new_engine_makes_the_next_version_whole_for_all(key_file):
    tensors = weights()
    with make_source(tensors, key_file) as source, Engine(source.store, key_file, "x") as x:
        kinds = []
        for version in (1, 2):
            step(tensors, version)
            kinds.append(publish(source, version).is_delta)
        with Engine(source.store, key_file, "y") as y:
            for version in (3, 4):
                step(tensors, version)
                kinds.append(publish(source, version, min_replicas=2).is_delta)
                assert x.holds(tensors)
                assert y.holds(tensors)
        wait_for(lambda: "y" not in source.replicas())
        for version in (5, 6):
            step(tensors, version)
            kinds.append(publish(source, version).is_delta)
            assert x.holds(tensors)
    assert kinds == [False, True, False, True, False, True]


def malformed(*_):
    raise wsync.WireError("injected")


def test_an_engine_that_missed_a_version_gets_the_next_one_whole(key_file):
    tensors = weights()
    with make_source(tensors, key_file) as source, Engine(source.store, key_file, "x") as x:
        with Engine(source.store, key_file, "y") as y:
            publish(source, 1, min_replicas=2)
            y.keeper.take = malformed
            step(tensors, 2)
            report = publish(source, 2)
            assert report.is_delta
            assert report.replicas == {"x": "committed", "y": "old version serving"}
            del y.keeper.take
            for version, is_delta in ((3, False), (4, True)):
                step(tensors, version)
                report = publish(source, version, min_replicas=2)
                assert report.is_delta == is_delta
                assert x.holds(tensors)
                assert y.holds(tensors)


def test_a_base_that_was_damaged_is_found_and_the_next_version_heals_it(key_file):
    tensors = weights()
    with make_source(tensors, key_file) as source, Engine(source.store, key_file) as engine:
        publish(source, 1)
        before = {name: t.clone() for name, t in engine.live.items()}
        engine.keeper._held._memory.view(0, 4096)[1001] ^= 4
        step(tensors, 2)
        with pytest.raises(wsync.CommitError) as error:
            publish(source, 2)
        assert error.value.replicas == {"engine-0": "old version serving"}
        assert type(engine.errors[0]) in (wsync.DigestError, wsync.WireError)
        assert all(torch.equal(engine.live[name], t) for name, t in before.items())
        for version, is_delta in ((3, False), (4, True)):
            step(tensors, version)
            assert publish(source, version).is_delta == is_delta
            assert engine.holds(tensors)


def test_an_engine_that_does_not_hold_the_base_says_so_and_takes_no_byte(key_file):
    tensors = weights()
    with make_source(tensors, key_file) as source, Engine(source.store, key_file) as engine:
        publish(source, 1)
        engine.keeper.forget()
        step(tensors, 2)
        with pytest.raises(wsync.CommitError, match="delta against publish 1 and holds no whole version"):
            publish(source, 2)
        assert publish(source, 3).is_delta is False
        assert engine.holds(tensors)


def test_a_version_that_the_trainer_could_not_pack_is_no_base(key_file):
    tensors = weights()
    with make_source(tensors, key_file) as source, Engine(source.store, key_file) as engine:
        publish(source, 1)
        kept = tensors["norm"][7].clone()
        tensors["norm"][7] = float("nan")
        with pytest.raises(wsync.NonFiniteError):
            publish(source, 2)
        tensors["norm"][7] = kept
        for version, is_delta in ((3, False), (4, True)):
            step(tensors, version)
            assert publish(source, version).is_delta == is_delta
            assert engine.holds(tensors)


def broken(*_):
    raise wsync.DigestError("injected")


def test_a_poisoned_engine_is_healed_by_a_whole_version(key_file, monkeypatch):
    tensors = weights()
    with make_source(tensors, key_file) as source, Engine(source.store, key_file) as engine:
        publish(source, 1)
        with monkeypatch.context() as patch:
            patch.setattr(
                install_module.Installer, "install", lambda *_: (_ for _ in ()).throw(wsync.DigestError("broken"))
            )
            step(tensors, 2)
            with pytest.raises(wsync.CommitError):
                publish(source, 2)
            assert engine.sink.state == "poisoned"
        assert publish(source, 3).is_delta is False
        wait_for(lambda: engine.sink.state == "serving")
        assert engine.holds(tensors)


def test_after_a_superseded_version_the_weights_are_right_whatever_travels(key_file):
    tensors = weights()
    with make_source(tensors, key_file) as source, Engine(source.store, key_file) as engine:
        publish(source, 1)
        for version in range(2, 12):
            step(tensors, version)
            publication = source.publish(version, deadline_s=20)
            publication.wait_released()
        publication.wait_committed()
        assert engine.holds(tensors)


def test_a_restarted_trainer_begins_with_a_whole_version(key_file):
    tensors = weights()
    store = f"tcp://127.0.0.1:{free_port()}"
    source = wsync.Source(tensors, store=store, key_file=key_file, options=SMALL, transport="shm", delta=True)
    with Engine(store, key_file) as engine:
        publish(source, 5)
        step(tensors, 1)
        assert publish(source, 6).is_delta
        source.close()
        with wsync.Source(tensors, store=store, key_file=key_file, options=SMALL, transport="shm", delta=True) as again:
            step(tensors, 2)
            assert publish(again, 1).is_delta is False
            step(tensors, 3)
            assert publish(again, 2).is_delta
            assert engine.holds(tensors)


def test_a_trainer_rank_that_disagrees_about_deltas_is_refused(key_file):
    with make_source(weights(), key_file) as source:
        join = SourceJoin(FORMAT_VERSION, "shm", source._description.manifest, delta=False)
        with pytest.raises(wsync.StateError, match="delta=False, rank 0 says delta=True"):
            source._coordinator._join_source(b"x", join)


def test_weights_are_right_after_every_commit_in_a_storm_of_faults(key_file):
    rng, tensors = random.Random(7), weights()
    with make_source(tensors, key_file, transport="shm", delta_anchor_every=6) as source:
        with Engine(source.store, key_file, "x") as x, Engine(source.store, key_file, "y", FP8) as y:
            publish(source, 1, min_replicas=2)
            num_deltas = 0
            for version in range(2, 42):
                step(tensors, version, share=rng.choice((0.0, 0.001, 0.02, 0.7)))
                sick, fault = rng.choice((x, y)), rng.choice(("none", "none", "flip", "forget"))
                if fault == "flip":
                    sick.keeper._held._memory.view(0, 4096)[rng.randrange(4096)] ^= 1 << rng.randrange(8)
                elif fault == "forget":
                    sick.keeper.forget()
                report = publish(source, version)
                num_deltas += report.is_delta
                for name, engine in (("x", x), ("y", y)):
                    if report.replicas[name] == "committed":
                        assert engine.holds(tensors), (version, name)
                    wait_for(lambda engine=engine: engine.sink.state == "serving")
            assert num_deltas > 5
