"""``wsync plan``: what it says of a job, and what it refuses."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from plan_files import ENGINES, TENSORS, TRAINERS, WAN, cluster_of, write_job

from wsync.cli.main import main
from wsync.plan import decode_plan, make_plan, plan_digest
from wsync.spec.manifest_file import load_sink, load_source, save_manifest
from wsync.testing.generators import fsdp_source, tp_sink

FIELDS = {
    "format_version",
    "plan_digest",
    "time_s",
    "busiest_s",
    "fill_s",
    "amax_s",
    "lower_bound_s",
    "score",
    "binding_cut",
    "bound_without_relays_s",
    "bound_bf16_wire_s",
    "bound_on_device_s",
    "time_on_device_s",
    "cuts",
    "loads",
    "bucket_bytes",
    "wire_bytes",
    "needed_bytes",
    "delivered_bytes",
    "delivered_ratio",
    "amax_elements",
    "trainer",
    "engine",
    "advice",
    "size",
    "plan_wall_s",
    "peak_memory_bytes",
}
"""Frozen: a field may be added here on purpose, and never be taken away."""


def report_of(arguments, capsys):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_the_promised_fields_and_their_sums_agree(tmp_path, capsys):
    report = report_of(write_job(tmp_path), capsys)
    assert set(report) == FIELDS
    assert report["format_version"] == 1
    total = report["busiest_s"] + report["fill_s"] + report["amax_s"]
    assert report["time_s"] == pytest.approx(total)
    assert report["score"] == pytest.approx(report["time_s"] / report["lower_bound_s"])
    assert report["loads"][0]["seconds"] == report["busiest_s"]
    assert report["cuts"][0] == {"name": report["binding_cut"], "seconds": report["lower_bound_s"]}


def test_needed_bytes_are_those_of_the_engines_weights(tmp_path, capsys):
    report = report_of(write_job(tmp_path), capsys)
    sink = tp_sink(TENSORS, ENGINES)
    assert report["needed_bytes"] == sum(2 * c.box.num_elements for rank in sink.ranks for c in rank.copies)
    assert report["delivered_bytes"] == report["needed_bytes"]
    assert report["delivered_ratio"] == 1.0


def test_nics_carry_what_the_engine_nodes_need(tmp_path, capsys):
    report = report_of(write_job(tmp_path), capsys)
    entering = sum(
        x["nbytes"] for x in report["loads"] if x["name"].startswith("nic ") and "of node e0 in" in x["name"]
    )
    unique = sum(2 * math.prod(t.shape) for t in TENSORS if not t.alias_of)
    assert unique <= entering < unique * 1.01  # with padding to whole pieces


def test_a_bf16_wire_is_slower_than_fp8_by_twice(tmp_path, capsys):
    report = report_of(write_job(tmp_path, recipe="fp8_block128"), capsys)
    assert 1.3 < report["bound_bf16_wire_s"] / report["lower_bound_s"] < 2.0


def test_relays_halve_what_the_trainer_sends(tmp_path, capsys):
    report = report_of(write_job(tmp_path), capsys)
    assert report["bound_without_relays_s"] == pytest.approx(2 * report["lower_bound_s"])
    assert report["binding_cut"] in ("egress of node t0", "ingress of node e0")
    alone = report_of([*write_job(tmp_path), "--no-relay"], capsys)
    assert alone["lower_bound_s"] == pytest.approx(report["bound_without_relays_s"])
    assert alone["binding_cut"] == "egress of node t0"
    assert "--no-relay" in alone["advice"][0]


def test_a_shared_link_binds_by_name_and_advice_says_what_helps(tmp_path, capsys):
    report = report_of(write_job(tmp_path, cluster=cluster_of(WAN)), capsys)
    assert report["binding_cut"] == "link wan from trainers"
    assert report["lower_bound_s"] == pytest.approx(report["wire_bytes"] / 12.5e9)
    assert any("faster link or fewer bytes" in line for line in report["advice"])
    assert any("fp8_block128" in line for line in report["advice"])


def test_a_density_lowers_the_time(tmp_path, capsys):
    arguments = write_job(tmp_path, cluster=cluster_of(WAN))
    dense = report_of(arguments, capsys)
    sparse = report_of([*arguments, "--density", "0.01"], capsys)
    some = report_of([*arguments, "--density", "model.layers.0.=0.01"], capsys)
    assert sparse["lower_bound_s"] < some["lower_bound_s"] < dense["lower_bound_s"]


def test_without_a_cluster_file_the_default_machines_are_taken(tmp_path, capsys):
    arguments = write_job(tmp_path)[:3]
    assert report_of(arguments, capsys)["lower_bound_s"] > 0


def test_the_plan_is_written_whole_and_is_the_librarys(tmp_path, capsys):
    arguments = write_job(tmp_path)
    target = tmp_path / "plan.wsync"
    report = report_of([*arguments, "-o", str(target)], capsys)
    plan = decode_plan(target.read_bytes())
    same = make_plan(load_source(arguments[1]), load_sink(arguments[2]), cluster_of())
    assert report["plan_digest"] == plan_digest(plan) == plan_digest(same)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_report_for_people_names_time_cut_and_advice(tmp_path, capsys):
    assert main(write_job(tmp_path, cluster=cluster_of(WAN))) == 0
    text = capsys.readouterr().out
    for word in ("predicted", "lower bound", "link wan from trainers", "what would make it faster", "replica"):
        assert word in text


def test_explaining_a_tensor_follows_it_from_its_holders_to_live_memory(tmp_path, capsys):
    arguments = write_job(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    found = report_of([*arguments, "--explain", name], capsys)
    assert [h["ranks"] for h in found["held"]] == [[0], [1], [2], [3]]
    rows = sorted(tuple(p["offset"]) for p in found["passages"])
    assert rows[0] == (0, 0)
    for passage in found["passages"]:
        assert passage["sender"] in {f"trainer rank {r}" for r in range(4)}
        reached = {passage["sender"]}
        for hop in passage["hops"]:
            assert hop["src"] in reached
            reached.add(hop["dst"])
        landed = {x["sink"] for x in passage["landings"]}
        assert landed == reached - {passage["sender"]}
        assert {x["storage"] for x in passage["landings"]} == {name}
    elements = sum(p["shape"][0] * p["shape"][1] for p in found["passages"])
    shape = next(t.shape for t in TENSORS if t.name == name)
    assert elements == shape[0] * shape[1]


def test_explaining_lands_at_the_element_that_the_engine_copies_to(tmp_path, capsys):
    found = report_of([*write_job(tmp_path), "--explain", "model.layers.1.mlp.up_proj.weight"], capsys)
    sink = tp_sink(TENSORS, ENGINES)
    for passage in found["passages"]:
        for land in passage["landings"]:
            replica, rank = land["sink"].removeprefix("replica ").split(" rank ")
            of_rank = next(r for r in sink.ranks if (r.replica, r.rank) == (replica, int(rank)))
            copy = next(c for c in of_rank.copies if c.tensor == found["tensor"])
            rows = passage["offset"][0] - copy.box.offset[0]
            assert land["first"] == rows * copy.dst_strides[0]


def test_explaining_a_tied_tensor_says_under_which_name_it_travels(tmp_path, capsys):
    (tied,) = [t for t in TENSORS if t.alias_of]
    found = report_of([*write_job(tmp_path), "--explain", tied.name], capsys)
    assert found["travels_as"] == tied.alias_of
    assert found["passages"]


def test_explaining_for_people_says_where_it_lands(tmp_path, capsys):
    assert main([*write_job(tmp_path), "--explain", "model.norm.weight"]) == 0
    text = capsys.readouterr().out
    assert "held by" in text
    assert "lands in model.norm.weight" in text


def refused(arguments, capsys):
    """The error's text; nothing on stdout, no file beside those that were there."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    return err


def test_an_unknown_tensor_to_explain_is_named_with_the_nearest(tmp_path, capsys):
    err = refused([*write_job(tmp_path), "--explain", "model.norm.weigth"], capsys)
    assert "model.norm.weigth" in err
    assert "did you mean model.norm.weight?" in err


def test_a_tensor_that_the_trainer_does_not_have_is_named(tmp_path, capsys):
    arguments = write_job(tmp_path)
    save_manifest(fsdp_source(TENSORS[1:], TRAINERS), arguments[1])
    err = refused([*arguments, "-o", str(tmp_path / "plan")], capsys)
    assert TENSORS[0].name in err
    assert not (tmp_path / "plan").exists()


def test_layouts_that_do_not_cover_are_refused_with_the_box(tmp_path, capsys):
    arguments = write_job(tmp_path)
    source = load_source(arguments[1])
    holes = ((), *source.shards[0][1:])
    save_manifest(msgspec.structs.replace(source, shards=(holes, *source.shards[1:])), arguments[1])
    err = refused(arguments, capsys)
    assert TENSORS[0].name in err
    assert "no trainer rank holds" in err


def test_manifests_in_the_wrong_order_are_refused(tmp_path, capsys):
    plan, source, sink, *rest = write_job(tmp_path)
    err = refused([plan, sink, source, *rest], capsys)
    assert "sink" in err
    assert "source" in err


@pytest.mark.parametrize(
    ("field", "value"), [("rate_gbps", 0.0), ("rate_gbps", -1.0), ("rate_gbps", 1e9), ("rail", -1)]
)
def test_absurd_machines_are_refused_with_the_value(tmp_path, capsys, field, value):
    arguments = write_job(tmp_path)
    path = tmp_path / "cluster.json"
    machines = json.loads(path.read_text())
    machines["groups"][0]["nics"][0][field] = value
    path.write_text(json.dumps(machines))
    err = refused(arguments, capsys)
    assert field in err
    assert repr(value) in err


def test_a_host_that_the_cluster_does_not_have_is_refused(tmp_path, capsys):
    arguments = write_job(tmp_path, engines=[["e7"] * 2])
    assert "e7" in refused(arguments, capsys)


def test_a_cluster_without_a_path_is_refused(tmp_path, capsys):
    arguments = write_job(tmp_path, cluster=cluster_of(nics=()))
    err = refused(arguments, capsys)
    assert "e0" in err
    assert "nics" in err


def test_a_truncated_manifest_is_refused_and_nothing_written(tmp_path, capsys):
    arguments = write_job(tmp_path)
    path = tmp_path / "source.wsync"
    path.write_bytes(path.read_bytes()[:-10])
    err = refused([*arguments, "-o", str(tmp_path / "plan"), "--json", str(tmp_path / "report")], capsys)
    assert "source.wsync" in err
    assert not (tmp_path / "plan").exists()
    assert not (tmp_path / "report").exists()


def test_a_file_of_a_newer_version_says_so_with_both_numbers(tmp_path, capsys):
    arguments = write_job(tmp_path)
    path = tmp_path / "sink.wsync"
    line, _, body = path.read_bytes().partition(b"\n")
    header = json.loads(line)
    newer = {**header, "format_version": header["format_version"] + 1}
    path.write_bytes(json.dumps(newer).encode() + b"\n" + body)
    err = refused(arguments, capsys)
    assert str(header["format_version"]) in err
    assert str(header["format_version"] + 1) in err


def test_files_that_are_not_there_are_named(tmp_path, capsys):
    plan, source, sink, *rest = write_job(tmp_path)
    assert "nowhere" in refused([plan, str(tmp_path / "nowhere"), sink, *rest], capsys)
    assert "nowhere" in refused([plan, source, sink, "--cluster", str(tmp_path / "nowhere")], capsys)


@pytest.mark.parametrize("share", ["2", "-0.1", "nan", "half", "model.=x"])
def test_a_density_that_is_no_share_is_refused(tmp_path, capsys, share):
    assert "density" in refused([*write_job(tmp_path), "--density", share], capsys)


def test_a_bucket_size_that_cannot_be_is_refused(tmp_path, capsys):
    assert "1000" in refused([*write_job(tmp_path), "--bucket-bytes", "1000"], capsys)


def test_a_folder_that_does_not_exist_is_refused_before_planning(tmp_path, capsys):
    err = refused([*write_job(tmp_path), "-o", str(tmp_path / "no" / "plan")], capsys)
    assert "does not exist" in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["-o", "-"], "--output - is not possible"),
        (["--json", "both", "-o", "./both"], "--output is to be written to ./both, but --json is written to that file"),
        (["-o", "source.wsync"], "--output is to be written to source.wsync, but SOURCE is read from that file"),
        (["--json", "cluster.json"], "--json is to be written to cluster.json, but --cluster is read from that file"),
        (["--explain", ""], "the source has no tensor ''"),
        (["--density", "model.layer.=0.1"], "names 'model.layer.', but none of the"),
        (["--cluster", ""], "cluster file '' cannot be read"),
    ],
)
def test_results_over_inputs_and_names_of_nothing_are_refused(changes, words, tmp_path, capsys, monkeypatch):
    arguments = write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert main([*arguments, *changes]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_plan_without_a_cluster_file_says_what_it_assumes(tmp_path, capsys):
    arguments = write_job(tmp_path)
    assert main(arguments[:3]) == 0
    assert "one port of 12.5 GB/s and memory of 10 GB/s" in capsys.readouterr().err
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
