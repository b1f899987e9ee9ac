"""Faults of one rank, one version or one message: what they cost, and that nothing after them is wrong."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import zmq

import wsync
from wsync.session import install as install_module
from wsync.session import sink as sink_module
from wsync.session import source as source_module
from wsync.session.auth import derive_keys, load_secret
from wsync.testing.processes import free_port


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


def make(value=1.0):
    return {name: torch.full((256, 64), value, dtype=torch.bfloat16) for name in ("a", "b")}


def holds(live, value):
    return all(bool((t == value).all()) for t in live.values())


class Engine:
    """A Sink whose thread takes every version; errors are collected."""

    def __init__(self, store, key_file, **args):
        self.live = make(0.0)
        self.sink = wsync.Sink(self.live, store=store, key_file=key_file, **args)
        self.errors: list[wsync.WsyncError] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop:
            try:
                self.sink.commit(self.sink.prepare(30))
            except wsync.WsyncError as e:
                if self._stop:
                    return
                self.errors.append(e)
                time.sleep(0.05)

    def wait_serving(self, version, seconds=20):
        """The trainer hears first that the replica committed; the engine's thread a message later."""
        end = time.monotonic() + seconds
        while (self.sink.state, self.sink.version) != ("serving", version):
            assert time.monotonic() < end, (self.sink.state, self.sink.version)
            time.sleep(0.005)

    def close(self):
        self._stop = True
        self.sink.close()
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def source(key_file):
    with wsync.Source(make(), store="tcp://127.0.0.1:0", key_file=key_file) as source:
        yield source


def weights_of(source):
    return dict(zip(("a", "b"), source._description.keepalive, strict=True))


def set_weights(source, value):
    for t in source._description.keepalive:
        t.fill_(value)


def test_a_poisoned_replica_stays_poisoned_until_a_commit_is_through(source, key_file, monkeypatch):
    with Engine(source.store, key_file) as engine:
        source.publish(1, deadline_s=20).wait_committed()
        unpack = install_module.kernels.unpack

        def broken(*args, **kwargs):
            raise wsync.DigestError("injected")

        monkeypatch.setattr(install_module.kernels, "unpack", broken)
        with pytest.raises(wsync.CommitError) as error:
            source.publish(2, deadline_s=20).wait_committed()
        assert error.value.replicas == {"engine-0": "poisoned"}
        assert (engine.sink.state, engine.sink.version) == ("poisoned", None)
        monkeypatch.setattr(install_module.kernels, "unpack", unpack)
        weights = weights_of(source)["b"]
        weights[0, 0] = float("nan")
        with pytest.raises(wsync.NonFiniteError):
            source.publish(3, deadline_s=20).wait_committed()
        assert engine.sink.state == "poisoned"
        set_weights(source, 4.0)
        assert source.publish(4, deadline_s=20).wait_committed().replicas == {"engine-0": "committed"}
        engine.wait_serving(4)
        assert holds(engine.live, 4.0)


def test_a_publish_that_is_closed_ends_with_a_named_error_and_no_crash(key_file, monkeypatch):
    source = wsync.Source(make(), store="tcp://127.0.0.1:0", key_file=key_file)
    entered = threading.Event()
    pack = source_module.kernels.pack

    def slow(*args):
        entered.set()
        time.sleep(0.5)
        return pack(*args)

    monkeypatch.setattr(source_module.kernels, "pack", slow)
    with Engine(source.store, key_file):
        publication = source.publish(1, deadline_s=30)
        assert entered.wait(20)
        source.close()
        with pytest.raises(wsync.StateError, match="closed"):
            publication.wait_committed()


def test_closing_a_sink_ends_a_prepare_in_another_thread(source, key_file):
    sink = wsync.Sink(make(0.0), store=source.store, key_file=key_file)
    errors = []

    def prepare():
        try:
            sink.prepare(60)
        except wsync.WsyncError as e:
            errors.append(e)

    thread = threading.Thread(target=prepare)
    thread.start()
    time.sleep(0.2)
    sink.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(errors[0], wsync.StateError)


def test_a_trainer_rank_that_comes_too_late_costs_one_version_only(key_file):
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
        with Engine(store, key_file) as engine:
            with pytest.raises(wsync.DeadlineError, match=r"trainer ranks \[1\] did not call publish"):
                sources[0].publish(1, deadline_s=0.5).wait_committed()
            with pytest.raises(wsync.DeadlineError, match=r"trainer ranks \[1\] did not call publish"):
                sources[1].publish(1, deadline_s=20).wait_committed()
            for value in (2, 3):
                for source in sources.values():
                    set_weights(source, float(value))
                both = [sources[rank].publish(value, deadline_s=20) for rank in (1, 0)]
                for publication in both:
                    publication.wait_committed()
                assert holds(engine.live, float(value))
    finally:
        for source in sources.values():
            source.close()


def test_a_begin_of_a_publish_that_was_given_up_packs_nothing(source, key_file, monkeypatch):
    with Engine(source.store, key_file) as engine:
        source.publish(1, deadline_s=20).wait_committed()
        session = source._session
        begin = sink_module.Begin(99, 7, 1, session._slice.plan_digest, 10.0)
        packed = []
        monkeypatch.setattr(source_module.kernels, "pack", lambda *a: packed.append(a))
        session._replay(begin, source_module.Publication(2, 2, 10.0))
        assert packed == []
        assert engine.errors == []


def test_an_engine_that_the_coordinator_gave_up_joins_again_by_itself(source, key_file):
    with Engine(source.store, key_file) as engine:
        source.publish(1, deadline_s=20).wait_committed()
        members = source._coordinator._members
        for client in members.sinks():
            del members.clients[client.uid]
        set_weights(source, 2.0)
        source.publish(2, deadline_s=20).wait_committed()
        assert holds(engine.live, 2.0)


def test_an_engine_that_was_replaced_learns_it_at_once(source, key_file):
    first = wsync.Sink(make(0.0), store=source.store, key_file=key_file)
    with wsync.Sink(make(0.0), store=source.store, key_file=key_file):
        with pytest.raises(wsync.StateError, match="was joined by pid"):
            first.prepare(30)
    first.close()


def test_an_idle_engine_is_left_out_until_it_prepares_again(source, key_file):
    with Engine(source.store, key_file) as engine:
        idle_live = make(0.0)
        with wsync.Sink(idle_live, store=source.store, key_file=key_file, replica="idle") as idle:
            assert "idle" in source.publish(1, deadline_s=3).wait_committed().dropped
            epoch = source._coordinator._epoch.number
            for version in (2, 3):
                report = source.publish(version, deadline_s=20).wait_committed()
                assert report.committed == ("engine-0",)
                assert report.dropped == {}
            assert source._coordinator._epoch.number == epoch
            awake = threading.Thread(target=lambda: idle.commit(idle.prepare(30)))
            awake.start()
            while source._coordinator._members.sinks("idle")[0].asleep:
                time.sleep(0.01)
            set_weights(source, 4.0)
            assert set(source.publish(4, deadline_s=20).wait_committed().committed) == {"engine-0", "idle"}
            awake.join()
            assert holds(idle_live, 4.0)
            assert holds(engine.live, 4.0)


def test_a_tensor_that_was_replaced_after_the_recording_is_noticed(source, key_file):
    module = torch.nn.Module()
    for name, t in make(0.0).items():
        module.register_parameter(name, torch.nn.Parameter(t, requires_grad=False))
    with wsync.Sink(module, store=source.store, key_file=key_file) as sink:
        publication = source.publish(1, deadline_s=20)
        ticket = sink.prepare(20)
        module.a = torch.nn.Parameter(torch.zeros_like(module.a), requires_grad=False)
        with pytest.raises(wsync.StateError, match="a"):
            sink.commit(ticket)
        assert sink.state == "poisoned"
        with pytest.raises(wsync.CommitError):
            publication.wait_committed()


def test_a_ticket_of_another_version_is_refused_and_the_right_one_still_commits(source, key_file):
    live = make(0.0)
    with wsync.Sink(live, store=source.store, key_file=key_file) as sink:
        publication = source.publish(1, deadline_s=20)
        ticket = sink.prepare(20)
        wrong = wsync.Ticket(9, ticket.incarnation, 9, ticket.deadline_s)
        with pytest.raises(wsync.StateError, match="version=9"):
            sink.commit(wrong)
        sink.commit(ticket)
        publication.wait_committed()
        assert holds(live, 1.0)


def test_the_trainer_learns_why_an_engine_does_not_fit(source, key_file):
    with pytest.raises(wsync.MissingTensorError, match="extra"):
        wsync.Sink(make(0.0) | {"extra": torch.zeros(2)}, store=source.store, key_file=key_file)
    with pytest.raises(wsync.MissingTensorError, match=r"engine-0/0 does not fit.*extra"):
        source.publish(1, deadline_s=0.5).wait_committed()


def test_an_engine_that_does_not_fit_does_not_keep_a_later_one_out(source, key_file):
    with pytest.raises(wsync.MissingTensorError):
        wsync.Sink(make(0.0) | {"extra": torch.zeros(2)}, store=source.store, key_file=key_file, replica="odd")
    publication = source.publish(1, deadline_s=20)
    with Engine(source.store, key_file) as engine:
        assert publication.wait_committed().committed == ("engine-0",)
        assert holds(engine.live, 1.0)


@pytest.mark.parametrize("version", [3.5, "x", None, True])
def test_a_version_that_is_no_whole_number_is_refused_and_costs_nothing(source, key_file, version):
    with pytest.raises(wsync.ConfigError, match="whole number"):
        source.publish(version)
    with Engine(source.store, key_file):
        assert source.publish(torch.tensor(4), deadline_s=20).wait_committed().version == 4


def test_a_recipe_for_a_tensor_that_nobody_has_is_refused(source, key_file):
    with pytest.raises(wsync.UnknownTensorError, match="wieght"):
        wsync.Sink(make(0.0), store=source.store, key_file=key_file, recipes={"wieght": "bf16"})


def test_closed_objects_say_so(source, key_file):
    sink = wsync.Sink(make(0.0), store=source.store, key_file=key_file)
    sink.close()
    for call in (sink.start, sink.poll, sink.prepare):
        with pytest.raises(wsync.StateError, match="closed"):
            call()


def test_an_unknown_transport_is_refused_at_once(key_file):
    with pytest.raises(wsync.ConfigError, match="auto, loopback, shm, gloo"):
        wsync.Source(make(), store="tcp://127.0.0.1:0", key_file=key_file, transport="bogus")


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"\x00" * 300, "type".encode("utf-16"), b"\x81\xa4type\xa4\xff\xfe\xfd\xfc"]
)
def test_garbage_from_one_peer_does_not_disturb_the_others(source, key_file, frame):
    keys = derive_keys(load_secret(key_file))
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.curve_serverkey, socket.curve_publickey = keys.server_public, keys.client_public
    socket.curve_secretkey = keys.client_secret
    socket.connect(source.store)
    socket.send_multipart([frame, frame])
    socket.send(frame)
    with Engine(source.store, key_file) as engine:
        source.publish(1, deadline_s=20).wait_committed()
        assert holds(engine.live, 1.0)
    assert socket.poll(5000)
    context.destroy(linger=0)


@pytest.mark.parametrize("store", ["", "bogus", "tcp://host", "ipc:///tmp/x", "tcp://h:port", "tcp://127.0.0.1:123456"])
def test_a_malformed_store_is_refused(key_file, store):
    with pytest.raises(wsync.ConfigError, match="tcp://host:port"):
        wsync.Sink(make(0.0), store=store, key_file=key_file)


def test_a_background_sink_says_what_ended_it(source, key_file):
    first = wsync.Sink(make(0.0), store=source.store, key_file=key_file)
    first.start()
    with wsync.Sink(make(0.0), store=source.store, key_file=key_file):

        def poll_until_it_raises():
            for _ in range(1000):
                first.poll()
                time.sleep(0.02)

        with pytest.raises(wsync.StateError, match="was joined by pid"):
            poll_until_it_raises()
    first.close()


def test_a_background_sink_keeps_the_reason_of_a_version_that_failed(source, key_file):
    with wsync.Sink(make(0.0), store=source.store, key_file=key_file) as sink:
        sink.start()
        weights_of(source)["a"][3, 4] = float("inf")
        with pytest.raises(wsync.NonFiniteError):
            source.publish(1, deadline_s=20).wait_committed()
        deadline = time.monotonic() + 20
        while sink.last_error is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert isinstance(sink.last_error, wsync.NonFiniteError)
        assert sink.poll() is None


def test_a_failed_version_may_be_published_again(source, key_file):
    with pytest.raises(wsync.DeadlineError):
        source.publish(1, deadline_s=0.3).wait_committed()
    with Engine(source.store, key_file) as engine:
        source.publish(1, deadline_s=20).wait_committed()
        assert holds(engine.live, 1.0)
