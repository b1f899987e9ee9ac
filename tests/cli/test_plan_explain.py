"""``wsync plan --explain`` of tensors that engines fuse and stack: where they land, by hand from vLLM's layouts."""

from __future__ import annotations

import json

import pytest

from wsync.cli.main import main
from wsync.describe import describe_sink, describe_source, load_model
from wsync.spec.manifest_file import save_manifest


@pytest.fixture
def explained(tmp_path, capsys):
    """The explanation of a tensor of a built-in model: FSDP over two hosts to replicas of one host each."""

    def run(model, layout, num_ranks, tensor, *, recipe="bf16", num_replicas=1):
        shape = load_model(model)
        source, sink = tmp_path / "source", tmp_path / "sink"
        save_manifest(describe_source(shape, "fsdp=4", ["t0", "t0", "t1", "t1"]), source)
        hosts = [f"e{i}" for i in range(num_replicas) for _ in range(num_ranks)]
        save_manifest(describe_sink(shape, f"{layout},replicas={num_replicas}", hosts, recipe), sink)
        assert main(["plan", str(source), str(sink), "--explain", tensor, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def landings(found, part=""):
    """(sink, element) of the first row of each rank's part of the tensor."""
    out = {}
    for passage in found["passages"]:
        if passage["part"] == found["tensor"] + part:
            for land in passage["landings"]:
                first, storage = out.get(land["sink"], (land["first"], land["storage"]))
                out[land["sink"]] = (min(first, land["first"]), storage)
    return out


# Qwen3-0.6B: 16 heads and 8 key/value heads of 128, hidden size 1024. Each of two ranks stacks 1024 rows of q, 512 of k
# and 512 of v.
@pytest.mark.parametrize(("projection", "row"), [("q", 0), ("k", 1024), ("v", 1536)])
def test_a_fused_projection_lands_behind_those_before_it(explained, projection, row):
    found = explained("Qwen3-0.6B", "tp=2", 2, f"model.layers.3.self_attn.{projection}_proj.weight")
    expected = (row * 1024, "model.layers.3.self_attn.qkv_proj.weight")
    assert landings(found) == {f"replica engine-0 rank {r}": expected for r in range(2)}
    assert {p["recipe"] for p in found["passages"]} == {"bf16"}


# Qwen3-30B-A3B: 128 experts of 768 by 2048. Of four ranks the last has experts 96 to 127; 100 is its fifth.
@pytest.mark.parametrize(
    ("projection", "storage", "first", "scale_first"),
    [
        ("gate", "w13_weight", 4 * 1536 * 2048, 4 * 12 * 16),
        ("up", "w13_weight", (4 * 1536 + 768) * 2048, (4 * 12 + 6) * 16),
        ("down", "w2_weight", 4 * 2048 * 768, 4 * 16 * 6),
    ],
)
def test_an_expert_lands_in_its_slot_of_the_stack_on_the_one_rank_that_serves_it(
    explained, projection, storage, first, scale_first
):
    name = f"model.layers.7.mlp.experts.100.{projection}_proj.weight"
    found = explained("Qwen3-30B-A3B", "tp=4,ep=4", 4, name, recipe="fp8_block128", num_replicas=2)
    weights, scales = landings(found), landings(found, "_scale_inv")
    ranks = {f"replica engine-{i} rank 3" for i in range(2)}
    assert set(weights) == set(scales) == ranks
    assert {x for x, _ in weights.values()} == {first}
    assert {x for x, _ in scales.values()} == {scale_first}
    assert all(s.startswith("model.layers.7.mlp.experts.") and s.endswith(storage) for _, s in weights.values())
    assert {p["recipe"] for p in found["passages"]} == {"fp8_block128"}
    assert all({hop["dst"] for hop in p["hops"]} == ranks for p in found["passages"])
