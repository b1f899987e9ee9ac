"""Servers and trainers die, publishes overtake each other, bytes are damaged: two real servers fed by one trainer.

After each of it the servers hold, byte for byte, what a fresh engine of a version holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time

import pytest

import wsync.session.source
from vllm_cpu.fleets import APPEAR_S, DEADLINE_S, Trainer, again, servers
from vllm_cpu.harness import compare_dumps
from wsync import kernels
from wsync.errors import CommitError, StateError
from wsync.integrations.vllm import Fleet, HTTPServer
from wsync.testing.processes import free_port

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(900)]

FAMILY = "llama"
OLD, NEW = 1, 2
"""Weights; versions count on."""
SURVIVOR, VICTIM = "engine-0", "engine-1"
BUCKET_BYTES = 256 << 10
HOLDING = ("--worker-extension-cls", "vllm_cpu.holding.HoldingProbe")


class Client(HTTPServer):
    """Tells the test of every call of a publish: ``hooks["before pause"]()``, ``hooks["after pause"]()``."""

    def __init__(self, base_url):
        super().__init__(base_url)
        self.hooks = {}

    def _told(self, name, call, *args):
        self.hooks.get(f"before {name}", lambda: None)()
        call(*args)
        self.hooks.get(f"after {name}", lambda: None)()

    def start_weight_update(self):
        self._told("start_weight_update", super().start_weight_update)

    def pause(self, mode="keep", clear_cache=True):
        self._told("pause", super().pause, mode, clear_cache)

    def update_weights(self, update_info):
        self._told("update_weights", super().update_weights, update_info)

    def finish_weight_update(self, weight_version=None):
        self._told("finish_weight_update", super().finish_weight_update, weight_version)

    def resume(self):
        self._told("resume", super().resume)


class Stage:
    """Two servers, their trainer and its fleet.

    Attributes:
        servers, clients: by name.
    """

    def __init__(self, model_dir, folder, pair):
        self.model_dir, self.folder = model_dir, folder
        self.servers = dict(zip((SURVIVOR, VICTIM), pair, strict=True))
        for server in pair:
            server.complete("x", 1)  # layers make some tables when they first run
        self.store = f"tcp://127.0.0.1:{free_port()}"
        self.version = 0
        self.begin()

    def begin(self):
        """A new trainer process, as far as anybody outside of it can see."""
        self.trainer = Trainer(FAMILY, self.folder, store=self.store, bucket_bytes=BUCKET_BYTES)
        self.clients = {name: Client(server.url) for name, server in self.servers.items()}
        self.fleet = Fleet(self.trainer.source, list(self.clients.values()), key_file=self.trainer.key_file)

    def publish(self, weights, **options):
        """Train to the weights and publish them as the next version."""
        self.trainer.train_to(weights)
        self.version += 1
        return self.fleet.publish(self.version, **{"deadline_s": DEADLINE_S} | options)

    def take_both_to(self, weights):
        """Both servers serve the weights."""
        report = self.publish(weights, min_replicas=2).wait_committed()
        assert report.serving == (SURVIVOR, VICTIM), report.servers

    def hold(self, name, place):
        """Hold a server's worker when it comes to the place."""
        file = self.folder / f"held-{time.monotonic_ns()}"
        self.servers[name].request("/collective_rpc", {"method": "wsync_test_hold", "args": [place, str(file)]})
        return Hold(file)

    def kill(self, name):
        """The server's machine is gone."""
        self.servers[name].kill()
        self.servers[name].close()

    def restart(self, name):
        """Start a server again at its address, with the checkpoint that it had; it has not joined then."""
        self.servers[name] = again(self.servers[name], self.model_dir, HOLDING)
        self.servers[name].wait_healthy()
        self.servers[name].complete("x", 1)

    def dump(self, name):
        """What a server holds."""
        return self.servers[name].dump()

    def close(self):
        self.fleet.close()
        self.trainer.close()
        for server in self.servers.values():
            server.close()


class Hold:
    """A place that a worker is held at, or will be."""

    def __init__(self, file):
        self._file = file

    def wait(self):
        """Until the worker is there."""
        end = time.monotonic() + APPEAR_S
        while not self._file.exists():
            assert time.monotonic() < end, "the worker did not come to the place"
            time.sleep(0.01)

    def let_go(self):
        """Let it go on."""
        self._file.unlink()


@pytest.fixture(scope="module")
def stage(lab, tmp_path_factory):
    model_dir = lab.model(FAMILY, 0)
    given = {"model_dir": model_dir, "options": HOLDING}
    with servers(given, given) as pair, contextlib.closing(Stage(model_dir, tmp_path_factory.mktemp("t"), pair)) as s:
        yield s


@pytest.fixture
def both(stage):
    """The stage, with both servers at the old weights."""
    if not stage.servers[VICTIM].is_healthy():  # a test before this one failed
        stage.trainer.close()
        stage.restart(VICTIM)
        stage.begin()
    stage.take_both_to(OLD)
    yield stage
    for client in stage.clients.values():
        client.hooks.clear()


def assert_holds(stage, name, reference):
    assert [str(d) for d in compare_dumps(stage.dump(name), reference.dump)] == []


# ---- versions that overtake each other


def test_a_publish_supersedes_one_that_a_server_is_still_staging(lab, both):
    stage = both
    held = stage.hold(VICTIM, "staging")
    first = stage.publish(3)
    held.wait()
    first.wait_released()
    second = stage.publish(NEW, min_replicas=2)
    held.let_go()
    left = first.servers[VICTIM]
    assert (left.state, left.paused) == ("old version serving", False)
    assert f"superseded by version {second.version}" in left.error
    assert second.wait_committed().serving == (SURVIVOR, VICTIM)
    for name in (SURVIVOR, VICTIM):
        assert_holds(stage, name, lab.fresh(FAMILY, NEW))


def test_a_version_that_is_prepared_is_committed_before_the_one_that_follows_it(lab, both):
    stage = both
    prepared = {name: threading.Event() for name in (SURVIVOR, VICTIM)}
    go_on = threading.Event()

    def wait_for_the_second():
        prepared[VICTIM].set()
        assert go_on.wait(DEADLINE_S)

    stage.clients[VICTIM].hooks["before start_weight_update"] = wait_for_the_second
    stage.clients[SURVIVOR].hooks["before start_weight_update"] = prepared[SURVIVOR].set
    first = stage.publish(3)
    for name in (SURVIVOR, VICTIM):  # one that still stages when the second comes would leave the first for it
        assert prepared[name].wait(DEADLINE_S)
    first.wait_released()
    for name in (SURVIVOR, VICTIM):
        stage.clients[name].hooks.clear()
    second = stage.publish(NEW, min_replicas=2)
    go_on.set()
    assert first.wait_committed().serving == (SURVIVOR, VICTIM)
    assert second.wait_committed().serving == (SURVIVOR, VICTIM)
    for name in (SURVIVOR, VICTIM):
        assert stage.clients[name].weight_info() == {"weight_version": str(second.version)}
        assert_holds(stage, name, lab.fresh(FAMILY, NEW))


# ---- bytes


def test_bytes_that_change_after_they_were_packed_are_committed_nowhere(lab, both, monkeypatch):
    stage = both
    damaged = []

    def pack(descs, address, *args, **options):
        result = kernels.pack(descs, address, *args, **options)
        if not damaged:
            ctypes.c_uint8.from_address(address).value ^= 1
            damaged.append(address)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(wsync.session.source, "kernels", Kernels(pack))
        publication = stage.publish(NEW)
        with pytest.raises(CommitError) as caught:
            publication.wait_committed()
    assert damaged
    assert set(caught.value.replicas.values()) == {"old version serving"}
    for name, report in publication.servers.items():
        assert (report.state, report.paused) == ("old version serving", False)
        assert "DigestError" in report.error
        assert_holds(stage, name, lab.fresh(FAMILY, OLD))
    stage.take_both_to(NEW)
    for name in (SURVIVOR, VICTIM):
        assert_holds(stage, name, lab.fresh(FAMILY, NEW))


def test_what_is_written_once_released_is_in_no_version(lab, both):
    stage = both
    held = stage.hold(VICTIM, "staging")
    publication = stage.publish(NEW, min_replicas=2)
    publication.wait_released()
    stage.trainer.train_to(3)
    held.wait()
    held.let_go()
    assert publication.wait_committed().serving == (SURVIVOR, VICTIM)
    for name in (SURVIVOR, VICTIM):
        assert_holds(stage, name, lab.fresh(FAMILY, NEW))


def test_what_is_written_before_it_is_released_reaches_no_server(lab, both, monkeypatch):
    stage = both
    packed, written = [threading.Event() for _ in range(2)]
    num_packed = []

    def pack(*args, **options):
        if len(num_packed) == 1:
            packed.set()
            assert written.wait(DEADLINE_S)
        num_packed.append(1)
        return kernels.pack(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(wsync.session.source, "kernels", Kernels(pack))
        publication = stage.publish(NEW, min_replicas=2)
        assert packed.wait(DEADLINE_S)
        assert not publication.released
        with pytest.raises(StateError, match="not released"):
            stage.fleet.publish(stage.version + 1)
        stage.trainer.train_to(3)
        written.set()
        with pytest.raises(StateError, match=r"was written .* while it was read"):
            publication.wait_committed()
    assert len(num_packed) > 2
    for name in (SURVIVOR, VICTIM):
        assert publication.servers[name].state == "old version serving"
        assert_holds(stage, name, lab.fresh(FAMILY, OLD))
    stage.take_both_to(NEW)
    for name in (SURVIVOR, VICTIM):
        assert_holds(stage, name, lab.fresh(FAMILY, NEW))


class Kernels:
    """The kernels, with another `pack`."""

    def __init__(self, pack):
        self.pack = pack

    def __getattr__(self, name):
        return getattr(kernels, name)


# ---- who dies


def test_a_trainer_that_restarts_at_its_address_counts_from_the_start_and_is_followed(lab, both):
    stage = both
    assert stage.version > 1
    stage.trainer.close()  # it lets nobody go
    stage.version = 0
    stage.begin()
    report = stage.publish(NEW, min_replicas=2).wait_committed()
    assert (report.version, report.serving) == (1, (SURVIVOR, VICTIM))
    for name in (SURVIVOR, VICTIM):
        assert stage.clients[name].weight_info() == {"weight_version": "1"}
        assert_holds(stage, name, lab.fresh(FAMILY, NEW))


def dies_staging(stage):
    """Killed when the first bytes have come."""
    held = stage.hold(VICTIM, "staging")
    return lambda: (held.wait(), stage.kill(VICTIM))


def dies_prepared(stage):
    """Killed when it holds all of the version, before it is asked to pause."""
    stage.clients[VICTIM].hooks["before start_weight_update"] = lambda: stage.kill(VICTIM)


def dies_paused(stage):
    """Killed when it stands, before it is asked to commit."""
    stage.clients[VICTIM].hooks["after pause"] = lambda: stage.kill(VICTIM)


def dies_half_installed(stage):
    """Killed within ``update_weights``, when some tensors are new and some are not."""
    held = stage.hold(VICTIM, "half installed")
    return lambda: (held.wait(), stage.kill(VICTIM))


def dies_committed(stage):
    """Killed when it has committed, before it goes on."""
    stage.clients[VICTIM].hooks["before resume"] = lambda: stage.kill(VICTIM)


@pytest.mark.parametrize(
    ("death", "state", "replica"),
    [
        pytest.param(dies_staging, "lost", "old version serving", id="staging", marks=pytest.mark.deep),
        pytest.param(dies_prepared, "lost", "poisoned", id="prepared", marks=pytest.mark.deep),
        pytest.param(dies_paused, "lost", "poisoned", id="paused", marks=pytest.mark.deep),
        pytest.param(dies_committed, "committed", "committed", id="committed", marks=pytest.mark.deep),
        pytest.param(dies_half_installed, "lost", "poisoned", id="half-installed"),
    ],
)
def test_a_server_that_is_killed_costs_itself_and_comes_back_when_it_is_restarted(lab, both, death, state, replica):
    stage = both
    kill = death(stage)
    began = time.monotonic()
    publication = stage.publish(3)
    if kill:
        kill()
    report = publication.wait_committed()
    assert time.monotonic() - began < DEADLINE_S
    assert report.publish.replicas == {SURVIVOR: "committed", VICTIM: replica}
    assert report.servers[SURVIVOR].state == "committed"
    assert report.serving == (SURVIVOR,)
    assert report.servers[VICTIM].state == state
    stage.clients[VICTIM].hooks.clear()

    report = stage.publish(NEW).wait_committed()
    assert report.servers[VICTIM].state == "absent"
    assert report.serving == (SURVIVOR,)
    assert_holds(stage, SURVIVOR, lab.fresh(FAMILY, NEW))

    stage.restart(VICTIM)
    report = stage.publish(OLD).wait_committed()
    assert (report.servers[VICTIM].state, report.serving) == ("absent", (SURVIVOR,))
    stage.trainer.wait_joined(VICTIM)
    stage.take_both_to(NEW)
    for name in (SURVIVOR, VICTIM):
        assert_holds(stage, name, lab.fresh(FAMILY, NEW))
