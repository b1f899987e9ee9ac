"""What ``wsync plan`` says would make a sync faster: the part that binds decides, and seconds are checked by hand."""

from __future__ import annotations

import json
import re

import pytest
from plan_files import TRAINERS, WAN, cluster_of, group, write_job

from wsync.cli.main import main
from wsync.spec.cluster import Cluster, Nic, NicPath
from wsync.spec.manifest_file import save_manifest
from wsync.testing.generators import dense_tensors, fsdp_source

LARGE = dense_tensors(4, 2048, 16, 8, 128, 8192, 32768)


@pytest.fixture
def advice(tmp_path, capsys):
    """Run it for large tensors in bf16; the report."""

    def run(*options, cluster=None, recipe="bf16", trainers=TRAINERS):
        arguments = write_job(tmp_path, tensors=LARGE, cluster=cluster, recipe=recipe)
        save_manifest(fsdp_source(LARGE, trainers), arguments[1])
        assert main([*arguments, *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def seconds_in(line):
    return [float(x) for x in re.findall(r"(\d[\d.e-]*) s\b", line)]


def line_of(report, words):
    (line,) = [x for x in report["advice"] if words in x]
    return line


def fast_trainers(nic_gbps, **engines):
    machines = cluster_of(**engines)
    return Cluster((group("trainers", ["t0"], nic_gbps=nic_gbps), machines.groups[1]), alpha_s=machines.alpha_s)


def test_where_engines_take_longest_replicas_over_more_nodes_help(advice):
    report = advice(cluster=fast_trainers(200.0))
    line = line_of(report, "ingress of node e0 binds")
    assert report["advice"][0] == line
    bound, wider = seconds_in(line)
    assert bound == pytest.approx(report["lower_bound_s"], rel=0.01)
    assert wider == pytest.approx(bound / 2, rel=0.01)
    assert "spans 1 node;" in line


def test_where_trainers_send_longest_copies_on_more_nodes_help(advice):
    report = advice(cluster=cluster_of(nic_gbps=100.0))
    line = line_of(report, "egress of node t0 binds")
    assert report["advice"][0] == line
    assert "more trainer nodes" in line
    next_limit = line_of(report, "next limit of another kind")
    assert "ingress of node e0" in next_limit
    assert seconds_in(next_limit) == [pytest.approx(report["lower_bound_s"] / 2, rel=0.01)]


def test_twice_the_trainer_nodes_lower_a_bound_of_egress_as_advised(advice):
    machines = cluster_of(nic_gbps=100.0)
    wide = Cluster((group("trainers", ["t0", "t1"]), machines.groups[1]), alpha_s=machines.alpha_s)
    alone, both = advice(cluster=machines), advice(cluster=wide, trainers=["t0", "t0", "t1", "t1"])
    assert both["lower_bound_s"] == pytest.approx(alone["lower_bound_s"] / 2, rel=0.05)
    assert not any("egress of node t0 binds" in line for line in both["advice"])


def test_where_one_nic_of_a_node_binds_it_is_named_with_the_seconds_of_all_of_them(advice):
    far = (Nic(100.0, 0, (NicPath(0, "PIX"),)), Nic(25.0, 1, (NicPath(1, "PIX"),)))
    report = advice(cluster=cluster_of(nvlink_gbps=None, nvlink_domain=0, nics=far))
    assert report["binding_cut"] == "ingress of nics 1 of node e0"
    line = line_of(report, "reach no other NIC")
    bound, even = seconds_in(line)
    # One of two ranks takes half of the bytes at 25 GB/s; both NICs together would take all of them at 125.
    assert bound / even == pytest.approx(125 / 50, rel=0.02)
    linked = advice(cluster=cluster_of(nics=far))
    assert linked["lower_bound_s"] == pytest.approx(even, rel=0.01)


def test_nics_that_a_plan_loads_unevenly_are_named_with_their_average(advice):
    report = advice("--bucket-bytes", str(32 << 20), cluster=fast_trainers(200.0))
    line = line_of(report, "spread the bytes more evenly")
    busiest, mean = seconds_in(line)
    same = [x["seconds"] for x in report["loads"] if re.fullmatch(r"nic \d of node e0 in", x["name"])]
    assert busiest == pytest.approx(report["busiest_s"], rel=0.01)
    assert busiest > 1.03 * mean
    assert mean == pytest.approx(sum(same) / 4, rel=0.01)
    finer = advice("--bucket-bytes", str(1 << 20), cluster=fast_trainers(200.0))
    assert finer["busiest_s"] < report["busiest_s"]


def test_where_a_link_binds_only_a_faster_one_or_fewer_bytes_help(advice):
    report = advice(cluster=cluster_of(WAN))
    assert report["advice"][0] == line_of(report, "link wan from trainers binds")
    assert "every byte crosses it once already" in report["advice"][0]


def test_a_wire_in_16_bits_is_told_what_fp8_would_take(advice):
    told = seconds_in(line_of(advice(cluster=cluster_of(WAN)), "fp8_block128"))[0]
    fp8 = advice(cluster=cluster_of(WAN), recipe="fp8_block128")
    # The told one has the embedding in fp8 as well, which engines take in 16 bits: 32768 of 2048 at 1 byte and scales.
    embedding_s = 32768 * 2048 * (1 - 4 / 128**2) / 12.5e9
    assert told == pytest.approx(fp8["lower_bound_s"] - embedding_s, rel=0.01)
    assert fp8["bound_bf16_wire_s"] == pytest.approx(advice(cluster=cluster_of(WAN))["lower_bound_s"], rel=0.01)
