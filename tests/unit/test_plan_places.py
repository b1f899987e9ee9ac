"""Which GPU the planner takes a rank to run on."""

import msgspec
import pytest
from route_cases import cluster_of, gpu_group, hosts

from wsync.describe import describe_sink, describe_source, load_model, positions
from wsync.errors import ConfigError
from wsync.plan import make_plan
from wsync.plan.nodes import find_nodes, nodes_of
from wsync.plan.replan import Planner
from wsync.spec import RankInfo, SinkManifest
from wsync.testing.generators import dense_tensors, fsdp_source, tp_sink

TINY = dense_tensors(2, 256, 4, 2, 64, 512, 1000)


def gpus(nodes):
    return [x.gpu for x in nodes.sources], [x.gpu for x in nodes.sinks]


def test_ranks_of_both_sides_run_on_different_gpus_if_there_are_enough():
    a = gpu_group("a", 1, 8)
    assert gpus(nodes_of(["a-0"] * 4, ["a-0"] * 4, cluster_of(a))) == ([0, 1, 2, 3], [4, 5, 6, 7])


def test_ranks_of_both_sides_share_gpus_if_there_are_too_few():
    a = gpu_group("a", 2, 4)
    places = ["a-0"] * 4 + ["a-1"] * 2
    found = nodes_of(places, ["a-1"] * 3 + ["a-0"], cluster_of(a))
    assert gpus(found) == ([0, 1, 2, 3, 0, 1], [0, 1, 2, 0])


def test_ranks_that_name_their_gpus_run_there_and_others_on_those_that_are_left():
    a = gpu_group("a", 1, 4)
    cluster = cluster_of(a)
    assert gpus(nodes_of(["a-0"] * 2, ["a-0"] * 2, cluster, [0, 1], [0, 1])) == ([0, 1], [0, 1])
    assert gpus(nodes_of(["a-0"] * 2, ["a-0"] * 2, cluster, None, [0, 2])) == ([1, 3], [0, 2])
    assert gpus(nodes_of(["a-0"] * 3, ["a-0"] * 2, cluster, None, [0, 2])) == ([0, 1, 2], [0, 2])


@pytest.mark.parametrize("gpu", [4, -1])
def test_a_gpu_that_the_node_does_not_have_is_refused(gpu):
    a = gpu_group("a", 1, 4)
    with pytest.raises(ConfigError, match=rf"sink 1 says that it runs on GPU {gpu}, but .* 'a' have GPUs 0 to 3"):
        nodes_of(["a-0"], ["a-0"] * 2, cluster_of(a), None, [0, gpu])


def test_a_rank_that_names_a_gpu_which_its_node_does_not_have_is_refused_by_itself():
    a, b = gpu_group("a", 1, 4), gpu_group("b", 1, 4)
    sink = tp_sink(TINY, [["b-0"] * 2])
    planner = Planner(fsdp_source(TINY, hosts(a)), cluster_of(a, b))
    good, bad = (
        msgspec.structs.replace(r, info=msgspec.structs.replace(r.info, gpu=gpu))
        for r, gpu in zip(sink.ranks, (3, 4), strict=True)
    )
    planner.accept(good)
    with pytest.raises(
        ConfigError, match=rf"rank 1 of replica '{bad.replica}' says that it runs on GPU 4, but .* 0 to 3"
    ):
        planner.accept(bad)
    elsewhere = msgspec.structs.replace(bad, info=RankInfo("elsewhere", gpu=4))
    planner.accept(elsewhere)  # a host that the cluster does not have is for the plan to refuse
    Planner(fsdp_source(TINY, hosts(a))).accept(bad)


def test_a_replica_that_names_its_gpus_keeps_them_when_another_leaves_its_node():
    a, b = gpu_group("a", 1, 4), gpu_group("b", 1, 4)
    source = fsdp_source(TINY, hosts(a))
    both = tp_sink(TINY, [["b-0"] * 2, ["b-0"] * 2])
    named = [msgspec.structs.replace(r, info=msgspec.structs.replace(r.info, gpu=i)) for i, r in enumerate(both.ranks)]
    nodes = find_nodes(source, SinkManifest(tuple(named[2:])), cluster_of(a, b))
    assert [x.gpu for x in nodes.sinks] == [2, 3]


def test_bytes_on_the_own_gpu_of_a_sink_stay_there_only_if_ranks_share_it():
    a = gpu_group("a", 1, 4)
    source, sink = fsdp_source(TINY, ["a-0"] * 2), tp_sink(TINY, [["a-0"] * 2])
    apart = make_plan(source, sink, cluster_of(a))
    here = [msgspec.structs.replace(r, gpu=i) for i, r in enumerate(source.ranks)]
    there = [msgspec.structs.replace(r, info=msgspec.structs.replace(r.info, gpu=i)) for i, r in enumerate(sink.ranks)]
    shared = make_plan(msgspec.structs.replace(source, ranks=tuple(here)), SinkManifest(tuple(there)), cluster_of(a))
    assert apart.lower_bound_s > 1.5 * shared.lower_bound_s


def test_described_ranks_run_where_it_is_said():
    model = load_model("Qwen3-0.6B")
    source = describe_source(model, "fsdp=2", ["h", "h"], gpus=[1, 0])
    assert source.ranks == (RankInfo("h", 0, gpu=1), RankInfo("h", 1, gpu=0))
    sink = describe_sink(model, "tp=2,replicas=2", ["h", "i", "h", "i"], "bf16", positions(["h", "i", "h", "i"]))
    assert [r.info.gpu for r in sink.ranks] == [0, 0, 1, 1]
    assert all(r.gpu is None for r in describe_source(model, "fsdp=2", ["h", "h"]).ranks)
    with pytest.raises(ConfigError, match="1 gpus are given for 2 ranks"):
        describe_source(model, "fsdp=2", ["h", "h"], gpus=[0])
