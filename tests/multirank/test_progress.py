"""Both sides hear early: the trainer how far each replica is, an engine when its ticket is ready or void."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import wsync
from wsync.session.membership import ReplicaStatus
from wsync.testing.processes import free_port


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


def make(value=1.0):
    return {name: torch.full((256, 64), value, dtype=torch.bfloat16) for name in ("a", "b")}


def holds(live, value):
    return all(bool((t == value).all()) for t in live.values())


class Replica:
    """A Sink that prepares in the background and commits when it is told to."""

    def __init__(self, source, key_file, name, **args):
        self.live = make(0.0)
        self.sink = wsync.Sink(self.live, store=source.store, key_file=key_file, replica=name, **args)
        self.sink.start()

    def commit(self, version):
        self.sink.commit(self.sink.wait(version, 20))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sink.close()


@pytest.fixture
def weights():
    return make()


@pytest.fixture
def source(weights, key_file):
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        yield source


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- the trainer's side


def test_threads_of_the_trainer_commit_each_replica_when_it_is_prepared(source, key_file):
    with Replica(source, key_file, "a") as a, Replica(source, key_file, "b") as b:
        heard: dict[str, list[str]] = {"a": [], "b": [], "nobody": []}
        publication = source.publish(1, min_replicas=2, deadline_s=20)

        def drive(name, replica):
            heard[name].append(publication.wait_replica(name))
            if replica is not None:
                assert holds(replica.live, 0.0)
                replica.commit(1)
                wait_until(lambda: publication.replicas[name] == "committed")
                heard[name].append(publication.wait_replica(name))

        drive("nobody", None)  # known before anything is committed
        assert not publication.over
        drive("a", a)
        wait_until(lambda: publication.replicas["b"] == "prepared")
        assert publication.replicas == {"a": "committed", "b": "prepared"}
        assert not publication.over
        threads = [threading.Thread(target=drive, args=("b", b))]
        threads += [threading.Thread(target=publication.wait_replica, args=("b",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert publication.wait_committed().committed == ("a", "b")
        assert heard == {"a": ["prepared", "committed"], "b": ["prepared", "committed"], "nobody": ["absent"]}
        assert publication.replicas == {"a": "committed", "b": "committed"}
        assert publication.dropped == {}
        assert holds(a.live, 1.0)
        assert holds(b.live, 1.0)


def test_every_trainer_rank_hears_of_every_replica(key_file):
    store = f"tcp://127.0.0.1:{free_port()}"
    sources: dict[int, wsync.Source] = {}

    def join(rank):
        sources[rank] = wsync.Source(make(), store=store, key_file=key_file, rank=rank, world_size=2)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        with Replica(sources[0], key_file, "a") as a:
            both = [sources[rank].publish(1, deadline_s=20) for rank in (0, 1)]
            assert [p.wait_replica("a", 20) for p in both] == ["prepared", "prepared"]
            a.commit(1)
            for publication in both:
                publication.wait_committed()
            with pytest.raises(wsync.StateError, match="trainer rank 1: only rank 0"):
                sources[1].replicas()
            assert sources[0].replicas().keys() == {"a"}
    finally:
        for source in sources.values():
            source.close()


class _SlowFlush:
    """A source's transport end whose flush lasts until it is told to end."""

    def __init__(self, end, entered, let_go):
        self._end, self._entered, self._let_go = end, entered, let_go

    def flush(self, deadline, cancelled):
        self._entered.set()
        while not self._let_go.wait(0.01):
            cancelled()
        self._end.flush(deadline, cancelled)

    def __getattr__(self, name):
        return getattr(self._end, name)


def test_a_trainer_rank_that_still_flushes_hears_of_replicas_too(source, key_file):
    entered, let_go = threading.Event(), threading.Event()
    opened = source._session._open_transport
    source._session._open_transport = lambda name: _SlowFlush(opened(name), entered, let_go)
    with Replica(source, key_file, "a") as a:
        publication = source.publish(1, deadline_s=20)
        assert entered.wait(20)
        assert publication.wait_replica("a", 20) == "prepared"
        a.commit(1)
        wait_until(lambda: publication.wait_replica("a") == "committed")
        assert not publication.over
        let_go.set()
        publication.wait_committed()


def test_a_replica_that_fails_is_dropped_at_once_and_the_reason_is_there(source, key_file):
    with Replica(source, key_file, "a") as a, Replica(source, key_file, "b") as b:
        first = source.publish(1, min_replicas=2, deadline_s=20)
        for replica in (a, b):
            replica.commit(1)
        first.wait_committed()

        def broken(*_):
            raise wsync.DigestError("injected")

        b.sink._session._staging.installer.verify = broken
        publication = source.publish(2, deadline_s=20)
        assert publication.wait_replica("b", 20) == "dropped"
        assert publication.dropped == {"b": "DigestError: injected"}
        assert publication.wait_replica("a", 20) == "prepared"
        assert not publication.over  # the one that was decided has its chance
        a.commit(2)
        assert publication.wait_committed().committed == ("a",)
        assert publication.replicas == {"a": "committed", "b": "dropped"}


def test_a_replica_that_does_not_set_up_is_dropped_before_the_others_commit(source, key_file):
    with Replica(source, key_file, "a") as a:
        with wsync.Sink(make(0.0), store=source.store, key_file=key_file, replica="idle"):
            publication = source.publish(1, deadline_s=4)
            assert publication.wait_replica("idle", 20) == "dropped"
            assert publication.wait_replica("a", 20) == "prepared"
            a.commit(1)
            assert "did not set up" in publication.dropped["idle"]
            publication.wait_committed()


def test_waiting_for_a_replica_ends_with_the_publish_or_the_deadline(source, key_file):
    publication = source.publish(1, deadline_s=1)
    with pytest.raises(wsync.DeadlineError, match=r"replica 'a' to prepare version 1: it is not taking part yet"):
        publication.wait_replica("a", 0.1)
    assert publication.wait_replica("a") == "absent"
    assert publication.over
    with Replica(source, key_file, "a") as a:
        publication = source.publish(2, deadline_s=20)
        publication.wait_replica("a")
        a.commit(2)
        publication.wait_committed()


def test_waiting_for_a_replica_ends_when_the_source_is_closed(weights, key_file):
    source = wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file)
    publication = source.publish(1, deadline_s=20)
    errors = []

    def wait():
        try:
            publication.wait_replica("a")
        except wsync.WsyncError as e:
            errors.append(e)

    thread = threading.Thread(target=wait)
    thread.start()
    source.close()
    thread.join(10)
    assert not thread.is_alive()
    assert "closed" in errors[0].message


def test_the_source_says_which_replicas_are_there(source, key_file):
    assert source.replicas() == {}
    with Replica(source, key_file, "a"), Replica(source, key_file, "b", rank=1, world_size=2):
        with pytest.raises(wsync.MissingTensorError):
            wsync.Sink(make() | {"extra": torch.zeros(2)}, store=source.store, key_file=key_file, replica="odd")
        assert source.replicas()["a"] == ReplicaStatus(1, (0,), True, False, False, {})
        assert source.replicas()["b"] == ReplicaStatus(2, (1,), False, False, False, {})
        wait_until(lambda: source.replicas()["odd"].refused)  # its word is on the way when its constructor raises
        assert "extra" in source.replicas()["odd"].refused[0]
        assert not source.replicas()["odd"].complete
    wait_until(lambda: source.replicas().keys() == {"odd"})
    source.close()
    with pytest.raises(wsync.StateError, match="closed"):
        source.replicas()


def test_the_source_says_who_sleeps_and_who_is_poisoned(source, key_file, monkeypatch):
    with Replica(source, key_file, "a") as a:
        with wsync.Sink(make(0.0), store=source.store, key_file=key_file, replica="idle"):
            publication = source.publish(1, deadline_s=3)
            publication.wait_replica("a")
            ticket = a.sink.wait(1, 20)

            def broken(*_):
                raise wsync.DigestError("injected")

            monkeypatch.setattr(a.sink._session._staging.installer, "install", broken)
            with pytest.raises(wsync.DigestError):
                a.sink.commit(ticket)
            with pytest.raises(wsync.CommitError):
                publication.wait_committed()
            status = source.replicas()
    assert (status["a"].asleep, status["a"].poisoned) == (False, True)
    assert (status["idle"].asleep, status["idle"].poisoned) == (True, False)


# ---- the engine's side


def test_an_engine_that_is_told_too_early_waits_for_its_own_thread(source, key_file):
    with Replica(source, key_file, "a") as a:
        tickets = []
        engine = threading.Thread(target=lambda: tickets.append(a.sink.wait(1, 20)))
        engine.start()
        time.sleep(0.1)
        assert not a.sink.prepared
        publication = source.publish(1, deadline_s=20)
        engine.join()
        assert a.sink.prepared
        assert a.sink.wait(1) == tickets[0]
        a.sink.commit(tickets[0])
        assert not a.sink.prepared
        publication.wait_committed()
        with pytest.raises(wsync.StateError, match="version 1 is committed already"):
            a.sink.wait(1)


def test_waiting_for_another_version_ends_with_both_named(source, key_file):
    with Replica(source, key_file, "a") as a:
        with pytest.raises(wsync.DeadlineError, match=r"a/0 waited 0.1 s for version 7, but no version is prepared"):
            a.sink.wait(7, 0.1)
        publication = source.publish(1, deadline_s=20)
        a.sink.wait(1, 20)
        with pytest.raises(wsync.DeadlineError, match=r"for version 7, but version 1 is prepared"):
            a.sink.wait(7, 0.1)
        a.commit(1)
        publication.wait_committed()


def test_waiting_for_a_version_that_failed_here_raises_the_reason(source, weights, key_file):
    with Replica(source, key_file, "a") as a:
        weights["a"][3, 4] = float("nan")
        with pytest.raises(wsync.NonFiniteError):
            source.publish(1, deadline_s=20).wait_committed()
        with pytest.raises(wsync.NonFiniteError, match=r"'a' is not finite at index \(3, 4\)"):
            a.sink.wait(1, 20)
        weights["a"][3, 4] = 1.0
        # The same version may be tried again, and then counts by its second outcome.
        publication = source.publish(1, deadline_s=20)
        assert publication.wait_replica("a") == "prepared"
        a.commit(1)
        publication.wait_committed()


def test_waiting_needs_a_background_thread_and_an_open_sink(source, key_file):
    sink = wsync.Sink(make(0.0), store=source.store, key_file=key_file)
    with pytest.raises(wsync.StateError, match=r"wait\(version=1\) before start"):
        sink.wait(1)
    assert not sink.prepared
    publication = source.publish(1, deadline_s=20)
    ticket = sink.prepare(20)
    assert sink.prepared
    sink.commit(ticket)
    publication.wait_committed()
    sink.start()
    sink.close()
    with pytest.raises(wsync.StateError, match="closed"):
        sink.wait(1)


def test_a_ticket_that_is_used_twice_is_committed_already(source, key_file):
    with Replica(source, key_file, "a") as a:
        publication = source.publish(1, deadline_s=20)
        ticket = a.sink.wait(1, 20)
        a.sink.commit(ticket)
        publication.wait_committed()
        with pytest.raises(wsync.StateError, match="version 1 is committed already"):
            a.sink.commit(ticket)
        publication = source.publish(2, deadline_s=20)
        a.sink.wait(2, 20)
        with pytest.raises(wsync.StateError, match="version 1 is committed already"):
            a.sink.commit(ticket)
        assert a.sink.prepared  # the one that waits is not touched
        a.commit(2)
        publication.wait_committed()


def test_a_ticket_that_nobody_commits_is_withdrawn_and_does_not_keep_the_engine_from_the_next(source, key_file):
    with Replica(source, key_file, "a") as a:
        publication = source.publish(1, deadline_s=1.5)
        assert publication.wait_replica("a", 20) == "prepared"
        with pytest.raises(wsync.CommitError):
            publication.wait_committed()
        wait_until(lambda: not a.sink.prepared)
        with pytest.raises(wsync.CommitError, match="version 1 was decided and a/0 did not commit it") as error:
            a.sink.wait(1, 20)
        # A rank that is its whole replica knows that nothing was written.
        assert error.value.replicas == {"a": "old version serving"}
        assert a.sink.state == "serving"
        publication = source.publish(2, deadline_s=20)
        a.commit(2)
        publication.wait_committed()


def test_a_rank_of_several_that_did_not_commit_what_was_decided_does_not_know_the_others(source, key_file):
    with (
        Replica(source, key_file, "a", rank=0, world_size=2) as a,
        Replica(source, key_file, "a", rank=1, world_size=2),
    ):
        publication = source.publish(1, deadline_s=1.5)
        assert publication.wait_replica("a", 20) == "prepared"
        with pytest.raises(wsync.CommitError):
            publication.wait_committed()
        wait_until(lambda: not a.sink.prepared)
        with pytest.raises(wsync.CommitError, match="did not commit it") as error:
            a.sink.wait(1, 20)
        assert error.value.replicas == {"a": "poisoned"}
        assert a.sink.state == "poisoned"


def test_a_trainer_that_restarts_before_the_commit_finds_its_engines_again(weights, key_file):
    port = free_port()
    first = wsync.Source(weights, store=f"tcp://127.0.0.1:{port}", key_file=key_file)
    with Replica(first, key_file, "a") as a:
        first.publish(5, deadline_s=20)
        ticket = a.sink.wait(5, 20)
        first.close()
        with wsync.Source(make(2.0), store=f"tcp://127.0.0.1:{port}", key_file=key_file) as second:
            publication = second.publish(1, deadline_s=20)
            assert publication.wait_replica("a") == "prepared"
            with pytest.raises(wsync.CommitError, match=r"version 5 .*(the trainer restarted|trainer/0 .* left)"):
                a.sink.commit(ticket)
            a.commit(1)
            publication.wait_committed()
        assert holds(a.live, 2.0)


def test_two_live_engines_of_one_name_are_told_how_to_part(source, key_file):
    first = wsync.Sink(make(0.0), store=source.store, key_file=key_file)
    with wsync.Sink(make(0.0), store=source.store, key_file=key_file):
        with pytest.raises(wsync.StateError, match="was joined by pid") as error:
            first.prepare(30)
        assert "replica name of its own" in error.value.hint
    first.close()
