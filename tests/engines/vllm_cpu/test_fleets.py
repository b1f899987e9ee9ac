"""One trainer feeds servers of different kinds, which come and go."""

from __future__ import annotations

import contextlib

import pytest

from vllm_cpu.fleets import DEADLINE_S, Trainer, servers
from vllm_cpu.harness import MAX_TOKENS, PROMPTS, compare_dumps
from wsync.integrations.vllm import Fleet

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(900)]

KINDS = {"bf16": ("qwen3_wide", 1), "fp8": ("qwen3_fp8", 1), "bf16-tp2": ("qwen3_wide", 2)}
"""Family and tensor-parallel size of each server, by name. All hold the model of one trainer."""


class Stage:
    """Servers of all kinds, and the fleet of a trainer that feeds the first two."""

    def __init__(self, lab, trainer, found):
        self._lab, self._trainer = lab, trainer
        self.servers = dict(zip(KINDS, found, strict=True))
        self.version = 0
        names = ["bf16", "fp8"]
        self.fleet = Fleet(trainer.source, [self.servers[n].url for n in names], names=names, key_file=trainer.key_file)

    def add(self, name):
        """Take a server in."""
        self.fleet.add(self.servers[name].url, name)

    def publish(self, weights):
        """Publish weights as the next version; returns the names of the servers that it went to."""
        self._trainer.train_to(weights)
        self.version += 1
        publication = self.fleet.publish(self.version, min_replicas=len(self.fleet.servers), deadline_s=DEADLINE_S)
        return publication.wait_committed().serving

    def assert_is(self, name, weights, version):
        """The server says and holds what a fresh engine of the weights does, and labels it with the version."""
        server = self.servers[name]
        family, tp = KINDS[name]
        reference = self._lab.fresh(family, weights, tp=tp)
        for prompt, expected in zip(PROMPTS, reference.outputs, strict=True):
            choice = server.complete(prompt, MAX_TOKENS, return_token_ids=True)
            assert choice["token_ids"] == expected["token_ids"]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected["logprobs"])
        assert [str(d) for d in compare_dumps(server.dump(), reference.dump)] == []
        assert server.request("/weight_info") == {"weight_version": str(version)}


@pytest.fixture(scope="module")
def stage(lab, tmp_path_factory):
    given = [{"model_dir": lab.model(family, 0), "tp": tp} for family, tp in KINDS.values()]
    with servers(*given) as found, Trainer("qwen3_wide", tmp_path_factory.mktemp("trainer")) as trainer:
        stage = Stage(lab, trainer, found)
        yield stage
        stage.fleet.close()


def test_one_publish_feeds_servers_of_all_kinds_and_one_that_joins_later_takes_the_next(stage):
    assert stage.publish(1) == ("bf16", "fp8")
    assert stage.servers["bf16-tp2"].request("/weight_info") == {"weight_version": "default"}
    stage.add("bf16-tp2")
    assert stage.publish(2) == ("bf16", "fp8", "bf16-tp2")
    for name in KINDS:
        stage.assert_is(name, 2, stage.version)


def test_a_server_that_is_removed_serves_on_with_what_it_has_and_may_come_back(stage):
    for name in KINDS.keys() - set(stage.fleet.servers):
        stage.add(name)
    stage.publish(2)
    kept = stage.version
    stage.fleet.remove("bf16")
    assert stage.publish(1) == ("fp8", "bf16-tp2")
    stage.assert_is("bf16", 2, kept)
    for name in ("fp8", "bf16-tp2"):
        assert stage.servers[name].request("/weight_info") == {"weight_version": str(stage.version)}
    stage.add("bf16")
    assert stage.publish(2) == ("fp8", "bf16-tp2", "bf16")
    for name in KINDS:
        stage.assert_is(name, 2, stage.version)


@pytest.mark.deep
def test_each_data_parallel_engine_of_a_dense_model_commits(lab, tmp_path):
    with (
        servers({"model_dir": lab.model("qwen2", 0), "dp": 2}) as (server,),
        Trainer("qwen2", tmp_path) as trainer,
        contextlib.closing(Fleet(trainer.source, [server.url], key_file=trainer.key_file)) as fleet,
    ):
        for version in (1, 2):
            trainer.train_to(version)
            report = fleet.publish(version, min_replicas=2, deadline_s=DEADLINE_S).wait_committed()
            assert report.publish.replicas == {"engine-0.dp0": "committed", "engine-0.dp1": "committed"}
            assert report.serving == ("engine-0",)
        for _ in range(4):  # whichever engine it is
            server.complete("x", 1)
        reference = lab.fresh("qwen2", 2)
        dump = server.dump()
        assert {name.split("/")[0] for name in dump} == {"rank0", "rank1"}
        for rank in ("rank0/", "rank1/"):
            held = {f"rank0/{n.removeprefix(rank)}": h for n, h in dump.items() if n.startswith(rank)}
            assert [str(d) for d in compare_dumps(held, reference.dump)] == []
        assert server.request("/weight_info") == {"weight_version": "2"}
