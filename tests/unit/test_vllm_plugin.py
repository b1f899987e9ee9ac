"""The entry point, and that what is implemented is what the installed vLLM calls."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import entry_points

import pytest

from wsync.integrations.vllm import plugin, signatures
from wsync.integrations.vllm.trainer import WsyncTrainer
from wsync.integrations.vllm.worker import WsyncWorkerBackend

FACTORIES = "vllm.distributed.weight_transfer.factory"


class Registry:
    """vLLM's factory, by what a plug-in uses of it."""

    def __init__(self):
        self._registry = {}
        self.__name__ = "Factory"

    def register_engine(self, name, module, class_name):
        if name in self._registry:
            raise ValueError(f"{name} is already registered")
        self._registry[name] = (module, class_name)


@pytest.fixture
def no_metrics(monkeypatch):
    monkeypatch.setattr("wsync.integrations.vllm.metrics.serve_metrics", lambda: None)


def factories(monkeypatch, **members):
    monkeypatch.setitem(sys.modules, FACTORIES, types.SimpleNamespace(**members))


def test_registering_twice_registers_once(monkeypatch, no_metrics):
    worker, trainer = Registry(), Registry()
    factories(monkeypatch, WeightTransferEngineFactory=worker, WeightTransferTrainerFactory=trainer)
    plugin.register()
    plugin.register()
    assert worker._registry == {"wsync": ("wsync.integrations.vllm.worker", "WsyncWorkerBackend")}
    assert trainer._registry == {"wsync": ("wsync.integrations.vllm.trainer", "WsyncTrainer")}


def test_a_vllm_without_a_registry_of_trainers_gets_the_worker_alone(monkeypatch, no_metrics):
    worker = Registry()
    factories(monkeypatch, WeightTransferEngineFactory=worker)
    plugin.register()
    assert "wsync" in worker._registry


def test_a_vllm_without_weight_transfer_goes_on_without_wsync(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, FACTORIES, None)
    plugin.register()
    assert "wsync is not registered" in caplog.text


def test_metrics_that_fail_do_not_end_the_server(monkeypatch, caplog):
    def fail():
        raise OSError("disk full")

    factories(monkeypatch, WeightTransferEngineFactory=Registry())
    monkeypatch.setattr("wsync.integrations.vllm.metrics.serve_metrics", fail)
    plugin.register()
    assert "disk full" in caplog.text


def test_the_entry_point_is_declared_and_leads_to_the_function():
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "wsync"]
    assert found
    assert found[0].load() is plugin.register


def test_the_package_imports_without_vllm_and_without_torch():
    code = (
        "import sys; sys.modules['vllm'] = None; sys.modules['torch'] = None\n"
        "from wsync.integrations.vllm import HTTPServer, InProcessServer, Fleet, FleetReport, ServerReport\n"
        "from wsync.integrations.vllm import WsyncTrainer, WsyncTrainerInitInfo\n"
        "from wsync.integrations.vllm.plugin import register\n"
        "HTTPServer('http://127.0.0.1:1'); register()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- signatures


class Theirs:
    needed: int

    def __init__(self, config, vllm_config): ...

    def update(self, update_info, *, urgent=False): ...

    def shutdown(self): ...


def test_equal_members_make_no_difference():
    class Ours:
        needed = 1

        def __init__(self, config, vllm_config): ...

        def update(self, update_info, *, urgent=False, more=None): ...

        def shutdown(self): ...

    assert signatures.differences(Ours, Theirs) == []


def test_a_missing_member_a_missing_argument_and_one_too_many_are_named():
    class Ours:
        def __init__(self, config, vllm_config, device): ...

        def update(self, update_info): ...

    assert signatures.differences(Ours, Theirs) == [
        "__init__ needs 'device', which nobody passes",
        "needed is missing",
        "shutdown is missing",
        "update takes no 'urgent'",
    ]


def test_the_installed_vllm_calls_what_is_implemented():
    base = pytest.importorskip("vllm.distributed.weight_transfer.base")
    assert signatures.differences(WsyncWorkerBackend, base.WeightTransferEngine) == []
    assert signatures.differences(WsyncTrainer, base.TrainerWeightTransferEngine) == []
    assert signatures.vllm_version() in signatures.describe_differences(["x"])


def test_a_renamed_member_of_the_installed_vllm_would_be_noticed():
    base = pytest.importorskip("vllm.distributed.weight_transfer.base")

    class Next(base.WeightTransferEngine):
        def receive_tensors(self): ...

        def update_weights(self, update_info, stream): ...

    found = signatures.differences(WsyncWorkerBackend, Next)
    assert found == ["receive_tensors is missing", "update_weights takes no 'stream'"]


def test_the_installed_vllm_finds_the_backend_by_its_name():
    factory = pytest.importorskip("vllm.distributed.weight_transfer.factory")
    plugin.register()
    assert factory.WeightTransferEngineFactory._registry["wsync"]() is WsyncWorkerBackend
    assert factory.WeightTransferTrainerFactory._registry["wsync"]() is WsyncTrainer
