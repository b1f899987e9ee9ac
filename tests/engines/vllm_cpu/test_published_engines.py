"""An engine that took versions from wsync is, byte for byte, an engine that was started from their checkpoints.

Compared after every publish: all parameters, buffers and tensors that layers refer to, what linear kernels packed for
themselves (read back exactly), what is derived from other weights, greedy tokens, log-probabilities and addresses.
"""

import contextlib

import pytest
import torch

import wsync
from vllm_cpu import models
from vllm_cpu.harness import compare_dumps
from wsync.integrations.vllm import Fleet

pytestmark = pytest.mark.multiproc

VERSIONS = (1, 2, 3)
DEADLINE_S = 60.0

deep = pytest.mark.deep
QUICK = {
    *((family, 1, "native") for family in models.FAMILIES if family != "qwen3_fp8_f32"),
    ("qwen2", 2, "native"),
    ("qwen3moe", 2, "native"),
    ("llama", 1, "avx2"),
    ("dsv3", 1, "avx2"),
}
EVERY = [
    pytest.param(family, tp, cpu, id=f"{family}-tp{tp}-{cpu}", marks=() if (family, tp, cpu) in QUICK else deep)
    for cpu in ("native", "avx2")
    for tp in (1, 2)
    for family in models.FAMILIES
    if family != "qwen3_wide"
]


def recipes_of(family):
    """By checkpoint name, for an engine of the family; None where the engine knows by itself."""
    recipe = models.FAMILIES[family].recipe
    if recipe in (None, "fp8_block128"):
        return None
    return {name: recipe for name in models.tensors(family, 0) if models.is_quantized(name)}


class Client:
    """vLLM's ``VLLMWeightSyncClient`` for an engine in a process of its own, which generates nothing meanwhile."""

    def __init__(self, engine, family):
        self._engine = engine
        self._recipes = recipes_of(family)

    def init_weight_transfer_engine(self, init_info):
        info = init_info | {"recipes": self._recipes}
        self._engine.call("init_weight_transfer_engine", {"init_info": info}, timeout_s=DEADLINE_S)

    def start_weight_update(self):
        self._engine.call("start_weight_update")

    def update_weights(self, update_info):
        self._engine.call("update_weights", {"update_info": update_info}, timeout_s=DEADLINE_S)

    def finish_weight_update(self, weight_version=None):
        self._engine.call("finish_weight_update", weight_version)


class Trainer:
    """The trainer's memory of a family, and a `wsync.Source` over it."""

    def __init__(self, family, folder):
        self.family = family
        self.key_file = folder / "wsync.key"
        wsync.new_key_file(self.key_file)
        self.weights = {name: torch.zeros_like(t) for name, t in models.tensors(family, 0).items()}
        self.source = wsync.Source(
            self.weights, store="tcp://127.0.0.1:0", key_file=self.key_file, rank=0, world_size=1, num_threads=1
        )

    def train_to(self, version):
        """The optimizer's step: every weight is written in place."""
        for name, tensor in models.tensors(self.family, version).items():
            self.weights[name].copy_(tensor)

    def init_info(self):
        """What an engine needs to join."""
        info = {"store": self.source.store, "replica": "engine-0", "key_file": str(self.key_file)}
        return {"init_info": info | {"recipes": recipes_of(self.family)}}

    def publish_to(self, engine, version):
        """Publish a version and make the engine commit it; returns the report."""
        publication = self.source.publish(version, deadline_s=DEADLINE_S)
        engine.call("start_weight_update")
        engine.call("update_weights", {"update_info": {"version": version, "deadline_s": DEADLINE_S}})
        engine.call("finish_weight_update", str(version))
        return publication.wait_committed()


@pytest.fixture
def trainer_of(tmp_path):
    """Makes the trainer of a family; it is closed at the end of the test."""
    made = []

    def make(family):
        made.append(Trainer(family, tmp_path))
        return made[-1]

    yield make
    for trainer in made:
        trainer.source.close()


def same(dump, reference):
    """The differences as text, so that a failure names what differs."""
    return [str(difference) for difference in compare_dumps(dump, reference)]


def moved(before, after):
    """Names of the tensors that lie elsewhere, or came or went.

    Not of the host's copies of scales that stay 1: vLLM's post-processing of an attention layer makes them anew.
    """
    ranks = zip(before, after, strict=True)
    names = {name for a, b in ranks for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    return sorted(name for name in names if not name.endswith(("._k_scale_cpu", "._v_scale_cpu")))


@pytest.mark.parametrize(("family", "tp", "cpu"), EVERY)
def test_an_engine_is_after_each_publish_what_a_fresh_engine_of_that_version_is(lab, trainer_of, family, tp, cpu):
    references = {version: lab.fresh(family, version, tp=tp, cpu=cpu) for version in VERSIONS}
    trainer = trainer_of(family)
    with lab.engine(family, 0, tp=tp, cpu=cpu, backend="wsync") as engine:
        engine.generate()  # layers make some tables when they first run
        addresses, before = engine.pointers(), engine.dump()
        engine.call("init_weight_transfer_engine", trainer.init_info(), timeout_s=DEADLINE_S)
        assert same(engine.dump(), before) == []
        for version, reference in references.items():
            trainer.train_to(version)
            report = trainer.publish_to(engine, version)
            assert report.committed == ("engine-0",)
            assert same(engine.dump(), reference.dump) == []
            assert engine.generate() == reference.outputs
            assert moved(addresses, engine.pointers()) == []
            assert engine.call("get_weight_version") == str(version)


def test_one_publish_feeds_engines_of_different_recipes_and_tensor_parallel_sizes(lab, trainer_of):
    kinds = [("qwen3_wide", 1), ("qwen3_fp8", 1), ("qwen3_fp8_f32", 1), ("qwen3_wide", 2)]
    trainer = trainer_of("qwen3_wide")
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(lab.engine(f, 0, tp=tp, backend="wsync")) for f, tp in kinds]
        clients = [Client(engine, family) for engine, (family, _) in zip(engines, kinds, strict=True)]
        fleet = stack.enter_context(Fleet(trainer.source, clients, key_file=trainer.key_file))
        for version in (1, 2):
            trainer.train_to(version)
            report = fleet.publish(version, min_replicas=len(engines)).wait_committed()
            assert report.publish.committed == ("engine-0", "engine-1", "engine-2", "engine-3")
            for engine, (family, tp) in zip(engines, kinds, strict=True):
                reference = lab.fresh(family, version, tp=tp)
                assert engine.generate() == reference.outputs
                assert same(engine.dump(), reference.dump) == []
                assert engine.call("get_weight_version") == str(version)
