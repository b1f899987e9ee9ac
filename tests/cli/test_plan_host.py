"""``wsync plan`` of jobs that keep weights or received bytes in host memory, or use parts of nodes."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
from plan_files import TRAINERS, cluster_of, group, write_job

from wsync.cli.main import main
from wsync.plan import make_plan
from wsync.spec.cluster import Cluster, dump_cluster
from wsync.spec.manifest import SinkManifest
from wsync.spec.manifest_file import load_sink, load_source, save_manifest
from wsync.testing.generators import dense_tensors

LARGE = dense_tensors(4, 2048, 16, 8, 128, 8192, 32768)
RATES = {"nic_gbps": 50.0, "pcie_gbps": 60.0}
"""Over PCIe go weights twice as wide as the wire, on which they are in fp8."""


@pytest.fixture
def job(tmp_path):
    """The arguments for large tensors, with what each side keeps in which memory."""

    def write(source_memory="device", sink_memory="device", **rates):
        facts = {**RATES, **rates}
        cluster = cluster_of(**facts)
        cluster = Cluster((group("trainers", ["t0"], **facts), cluster.groups[1]), alpha_s=cluster.alpha_s)
        arguments = write_job(tmp_path, tensors=LARGE, cluster=cluster, recipe="fp8_block128")
        source, sink = load_source(arguments[1]), load_sink(arguments[2])
        ranks = tuple(msgspec.structs.replace(r, memory=source_memory) for r in source.ranks)
        sinks = tuple(
            msgspec.structs.replace(r, info=msgspec.structs.replace(r.info, memory=sink_memory)) for r in sink.ranks
        )
        save_manifest(msgspec.structs.replace(source, ranks=ranks), arguments[1])
        save_manifest(SinkManifest(sinks), arguments[2])
        return arguments

    return write


def report_of(arguments, capsys):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def table_of(arguments, capsys):
    assert main(arguments) == 0
    return capsys.readouterr().out


def line_of(report, words):
    (line,) = [x for x in report["advice"] if words in x]
    return line


def seconds_in(line):
    return [float(x) for x in re.findall(r"(\d[\d.e-]*) s\b", line)]


def test_a_job_that_keeps_all_on_its_gpus_says_nothing_of_host_memory(job, capsys):
    arguments = job()
    report = report_of(arguments, capsys)
    assert report["bound_on_device_s"] == report["lower_bound_s"]
    assert report["time_on_device_s"] == report["time_s"]
    assert report["trainer"]["host_ranks"] == report["engine"]["host_ranks"] == 0
    assert "host memory" not in json.dumps(report)
    assert "host memory" not in table_of(arguments, capsys)


def test_offloaded_weights_bind_and_what_the_gpus_would_save_is_the_plan_without(job, capsys):
    on_device = report_of(job(), capsys)
    arguments = job("host")
    report = report_of(arguments, capsys)
    held = sum(t.shape[0] * (t.shape[1] if len(t.shape) > 1 else 1) * 2 for t in LARGE if t.alias_of is None)
    assert report["binding_cut"].startswith("staged through PCIe of GPU ")
    assert report["lower_bound_s"] == pytest.approx(held / len(TRAINERS) / 60e9, rel=0.01)
    assert report["bound_on_device_s"] == pytest.approx(on_device["lower_bound_s"])
    assert report["time_on_device_s"] == pytest.approx(on_device["time_s"], rel=0.02)
    assert 1.0 <= report["score"] <= 1.2
    assert report["trainer"]["host_ranks"] == len(TRAINERS)
    assert report["advice"][0].startswith(f"{report['binding_cut']} binds")
    line = line_of(report, "kept on the GPUs")
    assert line.startswith(f"the weights of {len(TRAINERS)} trainer ranks: ")
    figures = [report[k] for k in ("time_on_device_s", "time_s", "bound_on_device_s", "lower_bound_s")]
    assert seconds_in(line) == pytest.approx(figures, rel=0.01)
    table = table_of(arguments, capsys)
    assert re.search(r"bound on the GPUs .* predicted: nothing kept in host memory", table)
    assert "weights in host memory on all ranks" in table


def test_engines_that_receive_in_host_memory_are_told_how_long_a_commit_stops_them(job, capsys):
    report = report_of(job("device", "host"), capsys)
    line = line_of(report, "in mode staged")
    (pause_s,) = seconds_in(line)
    installs = [x["seconds"] for x in report["loads"] if re.fullmatch(r"PCIe of GPU \d of node e\d in", x["name"])]
    assert len(installs) == 4
    assert pause_s == pytest.approx(max(installs), rel=0.01)
    assert "what 4 engine ranks receive: kept on the GPUs" in line_of(report, "kept on the GPUs")
    assert report["score"] >= 1.0


def test_where_host_memory_costs_nothing_it_may_stay_there(job, capsys):
    report = report_of(job("host", nic_gbps=1.0), capsys)
    assert not report["binding_cut"].startswith("staged")
    line = line_of(report, "may stay in host memory")
    assert seconds_in(line) == pytest.approx([report["time_on_device_s"], report["time_s"]], rel=0.01)
    assert seconds_in(line)[0] == pytest.approx(seconds_in(line)[1], rel=0.03)


def test_the_road_of_a_tensor_says_where_it_goes_by_way_of_host_memory(job, capsys):
    name = "model.layers.1.mlp.up_proj.weight"
    found = report_of([*job("host", "host"), "--explain", name], capsys)
    assert all(p["offloaded"] for p in found["passages"])
    assert all(land["in_host"] for p in found["passages"] for land in p["landings"])
    table = table_of([*job("host", "host"), "--explain", name], capsys)
    assert re.search(r"packed by trainer rank \d on t0, from host memory, about in bucket", table)
    assert re.search(r"lands in .* on e0, by way of host memory", table)
    assert "host memory" not in table_of([*job(), "--explain", name], capsys)


# ---- GPUs of partly used nodes


@pytest.fixture
def halves(tmp_path, capsys):
    """Describe both sides on one node of eight GPUs with these options, and report the plan, or why there is none."""
    dump_cluster(Cluster((group("n", ["n0"], gpus=8),), alpha_s=5e-6), tmp_path / "cluster")

    def plan(trainer, engine):
        (tmp_path / "hosts").write_text("n0")
        for side, layout, options in (("trainer", "fsdp=4", trainer), ("engine", "tp=4", engine)):
            arguments = ["describe", "Qwen3-0.6B", f"--{side}", layout, "-o", str(tmp_path / side)]
            hosts = [] if "--hosts" in options else ["--hosts", str(tmp_path / "hosts")]
            assert main([*arguments, *hosts, *map(str, options)]) == 0
        capsys.readouterr()
        status = main(
            [
                "plan",
                *(str(tmp_path / x) for x in ("trainer", "engine")),
                "--cluster",
                str(tmp_path / "cluster"),
                "--json",
            ]
        )
        out, err = capsys.readouterr()
        return json.loads(out) if status == 0 else err

    return plan


def gpus(report):
    """On which GPUs trainer ranks pack, and which receive over NVLink."""
    names = [load["name"] for load in report["loads"]]
    patterns = (r"memory of GPU (\d) of node n0", r"NVLink of GPU (\d) of node n0 in")
    return [{int(m[1]) for name in names if (m := re.fullmatch(pattern, name))} for pattern in patterns]


def test_ranks_run_on_the_gpus_that_are_listed(halves, tmp_path):
    by_default = halves((), ())
    assert gpus(by_default) == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    swapped = halves(("--gpus", "4-7"), ("--gpus", "0-3"))
    assert gpus(swapped) == [{4, 5, 6, 7}, {0, 1, 2, 3}]
    (tmp_path / "listed").write_text("n0:7,5,3,1")
    mixed = halves(("--hosts", tmp_path / "listed"), ())
    assert gpus(mixed) == [{1, 3, 5, 7}, {0, 2, 4, 6}]


def test_ranks_of_both_sides_on_one_gpu_exchange_nothing_over_nvlink_that_is_there_already(halves):
    apart, shared = halves(("--gpus", "0-3"), ("--gpus", "4-7")), halves(("--gpus", "0-3"), ("--gpus", "0-3"))
    assert shared["lower_bound_s"] < apart["lower_bound_s"]


def test_a_gpu_that_the_cluster_does_not_have_is_refused(halves):
    err = halves(("--gpus", "6-9"), ())
    assert "trainer rank 2 says that it runs on GPU 8, but nodes of group 'n' have GPUs 0 to 7" in err
    assert "wsync describe --gpus" in err


def test_a_plan_knows_host_memory_by_the_manifests_alone(job):
    arguments = job("host", "host")
    source, sink = load_source(arguments[1]), load_sink(arguments[2])
    # Without a cluster there is no GPU, and then no difference.
    here = tuple(msgspec.structs.replace(r, memory="device") for r in source.ranks)
    infos = tuple(msgspec.structs.replace(r, info=msgspec.structs.replace(r.info, memory="device")) for r in sink.ranks)
    assert make_plan(source, sink) == make_plan(msgspec.structs.replace(source, ranks=here), SinkManifest(infos))
