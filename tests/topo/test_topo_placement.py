"""``wsync topo plan``: published rates follow from constants fitted without them, and placements from topologies."""

from __future__ import annotations

import dataclasses
import json

import machines as m
import pytest
from msgspec.structs import replace

from wsync.cli.main import main
from wsync.describe import describe_sink, describe_source, load_model
from wsync.errors import ConfigError
from wsync.plan import encode_plan, make_plan
from wsync.spec.cluster import Cluster, load_cluster
from wsync.topo.parse import read_texts
from wsync.topo.placement import place_senders, reached_nics, sync_step
from wsync.topo.placement_rates import (
    COLLECTIVE_SHARE,
    NETWORK,
    NVLINK,
    PUBLISHED,
    SOFTWARE_BOUND,
    collective_share,
    efficiency,
    is_software_bound,
    predict_without,
)
from wsync.topo.to_cluster import Overrides, to_group

GRACE = dataclasses.replace(m.gb200(), nic_gbit=(200,) * 4)


def machine(box: m.Box, *more: str):
    texts = [m.topo_m(box), m.system_xml(box), m.query_all(box), *more]
    return read_texts((f"f{i}", t) for i, t in enumerate(texts)).machines[0]


@pytest.mark.parametrize("point", PUBLISHED, ids=lambda p: p.name)
def test_a_published_rate_follows_from_a_constant_that_was_fitted_without_its_study(point):
    assert predict_without(point) == pytest.approx(point.achieved_gbps, rel=0.15)


@pytest.mark.parametrize("point", [p for p in PUBLISHED if "verl" in p.study], ids=lambda p: p.name)
def test_the_model_of_a_whole_machine_gives_the_published_rate(point):
    share = efficiency(NETWORK, (point.study,))
    group = to_group(machine(GRACE), "t", 1, Overrides(measured={"nic": 25.0 * share})).group
    senders = range(round(point.spec_gbps / 25.0))
    step = sync_step(group, replace(group, name="e"), list(senders), 140_000_000_000)
    assert step.send_gbps == pytest.approx(point.achieved_gbps, rel=0.15)
    assert 140 / step.time_s == pytest.approx(point.achieved_gbps, rel=0.15)


def test_adding_nvlink_peers_is_advised_as_verl_found_it():
    group = to_group(machine(GRACE), "t").group
    placement = place_senders(group, replace(group, name="e"), [0], 140_000_000_000)
    assert placement.advice.startswith("add 3 NVLink peers as senders (GPU1, GPU2, GPU3): 22.94 -> 91.76 GB/s")
    assert [len(s.nics) for s in placement.ladder] == [2, 3, 4]
    assert placement.ladder[-1].send_gbps == pytest.approx(90, rel=0.15)


def test_a_rate_that_no_topology_explains_is_bound_by_software():
    _, spec_gbps, achieved_gbps = SOFTWARE_BOUND
    assert is_software_bound(achieved_gbps, spec_gbps * efficiency(NETWORK))
    assert not any(is_software_bound(p.achieved_gbps, predict_without(p)) for p in PUBLISHED)


def test_leaving_out_all_studies_leaves_nothing_to_fit():
    with pytest.raises(ConfigError, match="no published rate of 'nvlink' is left"):
        efficiency(NVLINK, {p.study for p in PUBLISHED})


def test_the_share_of_collectives_meets_its_points_and_grows_between_them():
    for size, share in COLLECTIVE_SHARE:
        assert collective_share(size) == pytest.approx(share)
    shares = [collective_share(1 << i) for i in range(10, 40)]
    assert shares == sorted(shares)


def test_a_machine_becomes_a_group_with_sources_for_every_rate():
    found = to_group(machine(m.h100()), "gpu", 4)
    group = found.group
    assert (group.num_gpus, group.nvlink_domain, group.count, len(group.nics)) == (8, 8, 4, 8)
    assert group.nvlink_gbps == pytest.approx(18 * 25 * efficiency(NVLINK), abs=0.01)
    assert [[(p.gpu, p.path) for p in n.gpus] for n in group.nics] == [[(i, "PIX")] for i in range(8)]
    assert found.nics == tuple(f"mlx5_{i}" for i in range(8))
    sources = {r.part: r.source for r in found.rates}
    assert sources["memory"] == "data sheet of h100-sxm"
    assert sources["mlx5_0"].startswith("200 Gbit/s (of the port)")
    assert "63.008 GB/s of the slowest port" in sources["pcie"]


def test_measured_rates_win_and_unknown_parts_are_refused():
    found = to_group(machine(m.h100()), "g", 1, Overrides(measured={"nvlink": 340.0, "nic": 46.0}))
    assert (found.group.nvlink_gbps, found.group.nics[0].rate_gbps) == (340.0, 46.0)
    assert {r.source for r in found.rates if r.part in ("nvlink", "mlx5_3")} == {"measured"}
    with pytest.raises(ConfigError, match="measured rates of wan, known are nic, nvlink"):
        to_group(machine(m.h100()), "g", 1, Overrides(measured={"wan": 1.0}))
    with pytest.raises(ConfigError, match="has no GPU"):
        to_group(read_texts([("hca", "NCCL_IB_HCA=mlx5_0")]).machines[0], "g")


def test_what_a_cluster_file_cannot_say_is_a_note():
    dead = to_group(machine(m.isolate(m.b200(), 2)), "g")
    assert dead.group.nvlink_domain == 0
    assert "not all 8 GPUs" in dead.notes[0]
    crossed = to_group(machine(m.rtx3090_pairs()), "g")
    assert "{GPU0, GPU2} and {GPU1, GPU3}" in crossed.notes[0]
    assert any("no NIC is known" in n for n in crossed.notes)
    assert to_group(machine(m.a100_bridges()), "g").group.nvlink_domain == 2
    assert to_group(machine(m.gb200()), "g", 18, Overrides(domain=72)).group.nodes_per_domain == 18


def test_senders_reach_their_own_nics_and_with_relays_those_of_their_peers():
    group = to_group(machine(m.move_nics(m.a100(), 0)), "g").group
    assert reached_nics(group, [0]) == (0, 1)
    assert reached_nics(group, [0, 2]) == (0, 1, 2, 3)
    assert reached_nics(group, [5]) == ()
    assert reached_nics(group, [5], relay=True) == (0, 1, 2, 3)
    with pytest.raises(ConfigError, match="the senders are near no NIC"):
        sync_step(group, group, [5], 1 << 30)
    with pytest.raises(ConfigError, match="senders 9: nodes of 'g' have GPUs 0 to 7"):
        sync_step(group, group, [9], 1 << 30)


def test_one_gpu_sends_no_more_than_its_own_port_carries():
    box = dataclasses.replace(m.a100(), nic_gbit=(200,) * 8)
    group = to_group(machine(box), "g").group
    step = sync_step(group, replace(group, name="e"), [0], 1 << 34)
    assert len(step.nics) == 2
    assert step.send_gbps == pytest.approx(group.pcie_gbps, abs=0.01)


def test_the_slowest_way_decides():
    group = to_group(machine(m.h100()), "g").group
    every = list(range(8))
    assert sync_step(replace(group, count=4), group, every, 10**11).slowest == "NICs of one engine node"
    slow = replace(group, nvlink_gbps=10.0)
    assert sync_step(group, slow, every, 10**11).slowest == "NVLink of one engine GPU"


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "node.json"
    inputs = []
    for name, text in (("t", m.topo_m(m.h100())), ("x", m.system_xml(m.h100())), ("q", m.query_all(m.h100()))):
        (tmp_path / name).write_text(text)
        inputs.append(str(tmp_path / name))
    assert main(["topo", "save", *inputs, "--output", str(path)]) == 0
    return str(path)


LAYOUTS = ["--trainer", "fsdp=8", "--engine", "tp=8,replicas=2", "--engine-nodes", "2"]


def test_the_command_plans_and_writes_the_cluster_file(saved, tmp_path, capsys):
    cluster = tmp_path / "cluster.json"
    assert main(["topo", "plan", saved, "--model", "Qwen3-0.6B", *LAYOUTS, "-o", str(cluster), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format_version"] == 1
    assert [g.count for g in load_cluster(cluster).groups] == [1, 2]
    # The planner itself, over the file that was written, says the same.
    model, read = load_model("Qwen3-0.6B"), load_cluster(cluster)
    sinks = [f"engine-{i}" for i in range(2) for _ in range(8)]
    plan = make_plan(
        describe_source(model, "fsdp=8", ["trainer-0"] * 8),
        describe_sink(model, "tp=8,replicas=2", sinks, "bf16"),
        read,
    )
    assert found["plan"]["time_s"] == pytest.approx(plan.time_s)
    assert found["plan"]["lower_bound_s"] == pytest.approx(plan.lower_bound_s)
    busiest = found["plan"]["links"][0]
    assert busiest[2] <= plan.time_s
    assert len(found["placement"]["now"]["nics"]) == 8
    # An encoded plan is judged alike.
    encoded = tmp_path / "plan"
    encoded.write_bytes(encode_plan(plan))
    assert main(["topo", "plan", saved, "--plan", str(encoded), "--engine-nodes", "2", "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)
    links = [link for link in found["plan"]["links"] if not link[0].startswith("memory of GPU")]
    assert again["plan"]["links"] == links
    for data, message in ((b'{"format_version": 1}', "is no encoded plan"), (b"", "is no encoded plan")):
        encoded.with_suffix(".json").write_bytes(data)
        assert main(["topo", "plan", saved, "--plan", str(encoded.with_suffix(".json"))]) == 3
        assert message in capsys.readouterr().err
    assert main(["topo", "plan", saved, "--plan", str(encoded)]) == 3
    assert "the plan has 16 engine ranks, 1 nodes of 8 GPUs have room for 8" in capsys.readouterr().err


def test_the_model_and_the_planner_agree_where_the_network_is_the_limit(saved, capsys):
    assert main(["topo", "plan", saved, "--model", "Qwen3-32B", *LAYOUTS, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    # A tenth apart: the planner also counts messages and the filling of its pipelines.
    assert found["plan"]["time_s"] == pytest.approx(found["placement"]["now"]["time_s"], rel=0.1)


def test_the_command_says_what_would_be_faster(saved, capsys):
    assert main(["topo", "plan", saved, "--model", "Qwen3-32B", "--senders", "0"]) == 0
    out = capsys.readouterr().out
    assert "reach 1 of 8 NICs (mlx5_0): 22.94 GB/s" in out
    assert "faster: add 7 NVLink peers as senders" in out
    assert main(["topo", "plan", saved, "--bytes", "1e11", "--senders", "0-7"]) == 0
    assert "no set of senders is faster" in capsys.readouterr().out
    assert main(["topo", "plan", saved, "--bytes", "1e11", "--collective", str(16 << 20), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["placement"]["now"]["send_gbps"] == pytest.approx(25 * 0.125, abs=0.01)
    assert "EFA" in found["notes"][-1]
    assert main(["topo", "plan", saved, "--bytes", "1e11", "--senders", "0", "--relay"]) == 0
    assert "no set of senders is faster" in capsys.readouterr().out


WRONG = [
    (["--bytes", "0"], "--bytes is 0"),
    (["--bytes", "1e9", "--senders", "a"], "is no GPU"),
    (["--bytes", "1e9", "--senders", "8"], "senders 8"),
    (["--bytes", "1e9", "--measured", "nvlink"], "is not PART=GBPS"),
    (["--bytes", "1e9", "--nodes", "0"], "count is 0"),
    (["--bytes", "1e9", "--nic-gbit", "-1"], "rate_gbps is"),
    (["--bytes", "1e9", "--nvlink-domain", "12"], "nvlink_domain is 12"),
    (["--model", "Qwen3-0.6B", "--trainer", "fsdp=8"], "needs both layouts"),
    (["--model", "Qwen3-0.6B", "--trainer", "fsdp=4", "--engine", "tp=8"], "has 4 ranks"),
    (["--model", "nobody"], "neither a built-in model nor a file"),
    (["--plan", "/nowhere"], "cannot be read"),
]


@pytest.mark.parametrize(("args", "message"), WRONG, ids=[w[1] for w in WRONG])
def test_what_does_not_fit_is_named(saved, args, message, capsys):
    assert main(["topo", "plan", saved, *args]) == 3
    assert message in capsys.readouterr().err


def test_a_machine_without_gpus_or_with_unread_files_is_refused(tmp_path, capsys):
    noise = tmp_path / "noise"
    noise.write_text("hello")
    assert main(["topo", "plan", str(noise), "--bytes", "1e9"]) == 3
    assert "none of the formats" in capsys.readouterr().err


def test_clusters_of_all_healthy_machines_are_valid():
    from wsync.spec.cluster import decode_cluster, encode_cluster

    for box in m.HEALTHY.values():
        cluster = Cluster((to_group(machine(box()), "a").group,))
        assert decode_cluster(encode_cluster(cluster)) == cluster
