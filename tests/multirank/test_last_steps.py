"""Engines that repack what they load: scratch memory is filled, checked and packed before the vote, and put in place by
the commit; a version that is not committed leaves no trace."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest
import torch
from packing_engine import SHAPE, PackingEngine, same
from packing_worlds import NAMES, Pair, World, change, make_weights, one, simple, wait_until

import wsync
from wsync.plan.types import PlanOptions
from wsync.session import install as install_module


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bucket_bytes", [2048, 4096, 4 << 20])
@pytest.mark.parametrize("transport", ["loopback", "shm"])
def test_repacks_see_exactly_the_published_bytes(key_file, transport, bucket_bytes, shared):
    engine = simple(shared=shared)
    with one(key_file, engine, transport=transport, bucket_bytes=bucket_bytes) as world:
        for seed in (1, 2, 3):
            change(world.weights, seed)
            engine.events.clear()
            assert world.sync().committed == ("engine-0",)
            assert engine.holds(world.weights)
            assert engine.events == [*(f"prepare {r}" for r in range(3)), *(f"commit {r}" for r in range(3)), "refresh"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_tensor_may_have_a_live_home_and_homes_in_several_repacks(key_file, shared):
    engine = PackingEngine(["a", "a", "a", "a", "b", "c"], [[1, 2], [3, 5]], shared=shared)
    with one(key_file, engine, bucket_bytes=4096) as world:
        for seed in (1, 2):
            change(world.weights, seed)
            world.sync()
            assert engine.holds(world.weights)


def test_an_engine_may_repack_everything_or_only_refresh(key_file):
    for packed in ([[0], [1, 2, 3, 4, 5]], []):
        engine = PackingEngine(list(NAMES), packed)
        with one(key_file, engine) as world:
            world.sync()
            change(world.weights, 5)
            world.sync()
            assert engine.holds(world.weights)


def test_preparing_runs_beside_the_engine_and_commits_on_its_thread(key_file):
    engine = simple()
    with one(key_file, engine) as world:
        sink = world.sinks["engine-0"]
        sink.start()
        publication = world.publish()
        ticket = sink.wait(1, 20)
        assert engine.events == ["prepare 0", "prepare 1", "prepare 2"]
        assert not any(a.any() for a in engine.serving)
        sink.commit(ticket)
        publication.wait_committed()
        main = threading.current_thread().name
        assert {engine.threads[f"commit {r}"] for r in range(3)} | {engine.threads["refresh"]} == {main}
        assert main not in {engine.threads[f"prepare {r}"] for r in range(3)}


def test_the_report_and_the_sink_tell_the_phases(key_file):
    engine = simple()
    engine.before = {"prepare 1": lambda: time.sleep(0.05), "refresh": lambda: time.sleep(0.1)}
    with one(key_file, engine) as world:
        sink = world.sinks["engine-0"]
        assert (sink.last_stamps, sink.bytes_installed) == ({}, 0)
        seconds = world.sync().seconds
        assert sink.last_stamps.keys() == {"receive", "verify", "repack", "decide", "install", "finish"}
        for name, spent in sink.last_stamps.items():
            assert seconds[name] == pytest.approx(spent)
        assert seconds["repack"] >= 0.05
        assert seconds["finish"] >= 0.1
        assert seconds["pause"] == pytest.approx(seconds["decide"] + seconds["install"] + seconds["finish"])
        assert sink.last_pause_s >= seconds["pause"]
        world.sync()
        assert sink.bytes_installed == 2 * len(NAMES) * 2 * SHAPE[0] * SHAPE[1]


# ---- what goes wrong while the old version serves


def test_an_engine_that_cannot_prepare_is_named_and_the_old_version_serves(key_file):
    engine = simple(shared=True)
    with one(key_file, engine) as world:
        world.sync()
        old, before = {n: t.clone() for n, t in world.weights.items()}, engine.snapshot()
        change(world.weights, 1)
        engine.events.clear()
        engine.fail_at = "prepare 1"
        with pytest.raises(wsync.CommitError, match=r"engine-0/0: preparing 'layer1' failed: RuntimeError: prepare 1"):
            world.sync()
        assert [type(e) for e in world.errors] == [wsync.CommitError]
        assert world.errors[0].replicas == {"engine-0": "old version serving"}
        assert engine.events == ["prepare 0", "prepare 1", "discard 0", "discard 1"]
        assert engine.prepared == {}
        assert same(engine.snapshot(), before)
        assert engine.holds(old)
        sink = world.sinks["engine-0"]
        assert (sink.state, sink.version) == ("serving", 1)
        engine.fail_at = ""
        world.sync()
        assert engine.holds(world.weights)


def corrupting(monkeypatch, scratch_only_of, how):
    """Make the kernel that fills this scratch memory go wrong once."""
    unpack = install_module.kernels.unpack
    low = scratch_only_of.ctypes.data
    done = []

    def broken(descs, base, num_threads):
        inside = [d for d in descs if low <= int(d["dst"]) < low + scratch_only_of.nbytes]
        if done or not inside:
            return unpack(descs, base, num_threads)
        done.append(True)
        return how(unpack, descs, base, num_threads, inside[0])

    monkeypatch.setattr(install_module.kernels, "unpack", broken)
    return done


def flip(address):
    cell = ctypes.c_ubyte.from_address(int(address))
    cell.value ^= 16


def flip_staged(unpack, descs, base, num_threads, desc):
    """A bit of staging memory flips between verifying and unpacking."""
    flip(base + int(desc["src_offset"]) + 5)
    try:
        return unpack(descs, base, num_threads)
    finally:
        flip(base + int(desc["src_offset"]) + 5)


def misplace(unpack, descs, base, num_threads, desc):
    """The right bytes come to lie in the wrong order."""
    digest = unpack(descs, base, num_threads)
    flip(desc["dst"])
    return digest


@pytest.mark.parametrize(
    ("how", "match"), [(flip_staged, "unpacked for 'layer1'"), (misplace, "scratch memory of 'layer1'")]
)
def test_corrupt_scratch_memory_is_found_before_the_vote_and_nothing_is_written(key_file, monkeypatch, how, match):
    engine = simple()
    with one(key_file, engine, transport="loopback") as world:
        before = engine.snapshot()
        done = corrupting(monkeypatch, engine.scratch[1], how)
        with pytest.raises(wsync.CommitError, match=f"published .*{match}"):
            world.sync()
        assert done
        assert isinstance(world.errors[0], wsync.DigestError)
        assert engine.events == ["prepare 0", "discard 0"]
        assert same(engine.snapshot(), before)
        assert world.sinks["engine-0"].state == "serving"
        world.sync()
        assert engine.holds(world.weights)


def test_bytes_that_differ_only_in_the_live_part_are_found_when_they_are_installed(key_file, monkeypatch):
    engine = simple()
    with one(key_file, engine, transport="loopback") as world:
        world.sync()
        change(world.weights, 1)
        corrupting(monkeypatch, engine.memory[0], flip_staged)
        with pytest.raises(wsync.CommitError) as error:
            world.sync()
        assert error.value.replicas == {"engine-0": "poisoned"}
        assert isinstance(world.errors[0], wsync.DigestError)
        assert engine.prepared == {}
        assert [e for e in engine.events if e.startswith("discard")] == ["discard 0", "discard 1", "discard 2"]
        world.sync()
        assert engine.holds(world.weights)


def test_a_prepared_version_that_another_rank_fails_is_withdrawn_and_the_next_one_is_staged(key_file):
    engines = [simple(), simple()]
    with World(key_file, {}) as world, Pair(world, key_file, engines) as pair:
        first = world.publish()
        assert pair.commit(1) == []
        first.wait_committed()
        before = engines[0].snapshot()
        change(world.weights, 1)
        engines[0].events.clear()
        voted = threading.Event()
        engines[0].before = {"prepare 2": voted.set}
        engines[1].before = {"prepare 2": lambda: (voted.wait(20), time.sleep(0.1))}
        engines[1].fail_at = "prepare 2"
        publication = world.publish()
        with pytest.raises(wsync.CommitError, match="preparing 'layer2' failed") as error:
            publication.wait_committed()
        assert error.value.replicas == {"pair": "old version serving"}
        # Nobody calls commit, and yet rank 0 forgets the version and says why.
        wait_until(lambda: not pair.sinks[0].prepared)
        with pytest.raises(
            wsync.CommitError, match=r"version 2 was not committed: .*preparing 'layer2' failed"
        ) as error:
            pair.sinks[0].wait(2, 20)
        assert error.value.replicas == {"pair": "old version serving"}
        assert engines[0].events == [*(f"prepare {r}" for r in range(3)), *(f"discard {r}" for r in range(3))]
        assert engines[0].prepared == {}
        assert same(engines[0].snapshot(), before)
        assert [s.state for s in pair.sinks] == ["serving", "serving"]
        with pytest.raises(wsync.CommitError, match="preparing 'layer2' failed"):
            pair.sinks[1].wait(2, 20)
        engines[1].fail_at = ""
        third = world.publish()
        assert pair.commit(3) == []
        third.wait_committed()
        assert all(e.holds(world.weights) for e in engines)


def test_a_superseded_version_is_discarded_on_ranks_that_had_prepared_it(key_file):
    engines = [simple(), simple()]
    with World(key_file, {}) as world, Pair(world, key_file, engines) as pair:
        inside, go = threading.Event(), threading.Event()
        engines[1].before = {"prepare 1": lambda: (inside.set(), go.wait(20))}
        old = world.publish()
        ticket = pair.sinks[0].wait(1, 20)
        old.wait_released()
        assert inside.wait(20)
        change(world.weights, 1)
        new = world.publish()
        with pytest.raises(wsync.CommitError, match="superseded by version 2"):
            old.wait_committed()
        wait_until(lambda: engines[0].events.count("discard 0"))
        go.set()
        # A commit that comes too late is told, and costs nothing.
        with pytest.raises(wsync.CommitError, match="superseded by version 2"):
            pair.sinks[0].commit(ticket)
        assert pair.commit(2) == []
        new.wait_committed()
        assert all(e.holds(world.weights) for e in engines)
        assert engines[0].events[:6] == [*(f"prepare {r}" for r in range(3)), *(f"discard {r}" for r in range(3))]
        # Rank 1 learnt of it between two repacks.
        assert engines[1].events[:4] == ["prepare 0", "prepare 1", "discard 0", "discard 1"]


def test_closing_discards_what_waits_for_its_commit(key_file):
    engine = simple()
    with one(key_file, engine) as world:
        sink = world.sinks["engine-0"]
        publication = world.publish()
        sink.prepare(20)
        sink.close()
        assert [e for e in engine.events if e.startswith("discard")] == ["discard 0", "discard 1", "discard 2"]
        with pytest.raises(wsync.CommitError):
            publication.wait_committed()


def test_an_engine_that_cannot_discard_is_warned_of_and_goes_on(key_file):
    engine = simple()
    with one(key_file, engine) as world:
        sink = world.sinks["engine-0"]
        publication = world.publish()
        sink.prepare(20)
        engine.fail_at = "discard 0"
        with pytest.warns(RuntimeWarning, match=r"discarding 'layer0' failed: RuntimeError"):
            sink.close()
        assert engine.events[-3:] == ["discard 0", "discard 1", "discard 2"]
        with pytest.raises(wsync.CommitError):
            publication.wait_committed()


# ---- what goes wrong in the commit


@pytest.mark.parametrize("where", ["commit 0", "commit 2", "refresh"])
def test_a_last_step_that_fails_poisons_and_the_next_publish_heals(key_file, where):
    engine = simple(shared=True)
    with one(key_file, engine) as world:
        world.sync()
        change(world.weights, 1)
        engine.events.clear()
        engine.fail_at = where
        with pytest.raises(wsync.CommitError, match=f"RuntimeError: {where} went wrong") as error:
            world.sync()
        assert error.value.replicas == {"engine-0": "poisoned"}
        assert [e.replicas for e in world.errors] == [{"engine-0": "poisoned"}]
        sink = world.sinks["engine-0"]
        assert (sink.state, sink.version) == ("poisoned", None)
        done = engine.events.index(where)
        left = [e.split()[1] for e in ("commit 0", "commit 1", "commit 2") if e not in engine.events[:done]]
        assert engine.events[done + 1 :] == [f"discard {r}" for r in left]
        assert engine.prepared.keys() == set()
        engine.fail_at = ""
        change(world.weights, 2)
        world.sync()
        assert (sink.state, sink.version) == ("serving", 3)
        assert engine.holds(world.weights)


# ---- what it costs


def test_without_repacks_a_bucket_is_digested_once_and_unpacked_once(key_file, monkeypatch):
    weights = make_weights(0)
    live = {n: torch.zeros_like(t) for n, t in weights.items()}
    with wsync.Source(
        weights, store="tcp://127.0.0.1:0", key_file=key_file, options=PlanOptions(bucket_bytes=2048)
    ) as source:
        with wsync.Sink(live, store=source.store, key_file=key_file) as sink:

            def sync(version):
                engine = threading.Thread(target=lambda: sink.commit(sink.prepare(20)))
                engine.start()
                source.publish(version, deadline_s=20).wait_committed()
                engine.join()

            sync(1)
            calls = []
            for name in ("digest", "unpack", "installed_digest"):
                kernel = getattr(install_module.kernels, name)
                monkeypatch.setattr(
                    install_module.kernels, name, lambda *a, n=name, k=kernel: (calls.append(n), k(*a))[1]
                )
            change(weights, 1)
            sync(2)
            num_buckets = len(source._session._slice.buckets)
            assert num_buckets > 3
            assert sorted(calls) == ["digest"] * num_buckets + ["unpack"] * num_buckets
    assert all(torch.equal(live[n], weights[n]) for n in weights)


def test_scratch_memory_is_read_back_once_in_each_epoch(key_file, monkeypatch):
    engine = simple(shared=True)
    read = []
    kernel = install_module.kernels.installed_digest

    def counted(descs, num_threads):
        read.append(len(descs))
        return kernel(descs, num_threads)

    monkeypatch.setattr(install_module.kernels, "installed_digest", counted)
    with one(key_file, engine) as world:
        world.sync()
        assert read == [2, 1, 1, 2]  # pieces of each repack, and of live memory
        world.sync()
        assert len(read) == 4


def test_a_loader_beside_an_engine_that_records_itself_is_refused(key_file):
    with World(key_file, {}) as world:
        with pytest.raises(wsync.ConfigError, match="one loader"):
            wsync.Sink(simple(), lambda weights: None, store=world.source.store, key_file=key_file)
