"""Manifest and cluster files of small jobs, for the tests of ``wsync plan``."""

from __future__ import annotations

from wsync.spec.cluster import Cluster, Link, Nic, NodeGroup, dump_cluster
from wsync.spec.manifest_file import save_manifest
from wsync.testing.generators import dense_tensors, fsdp_source, tp_sink

TENSORS = dense_tensors(2, 256, 4, 2, 64, 512, 1024)
TRAINERS = ["t0"] * 4
ENGINES = [["e0"] * 2, ["e1"] * 2]


def group(name, hosts, *, gpus=4, nic_gbps=50.0, **more):
    facts = {"hbm_gbps": 3000.0, "pcie_gbps": 50.0, "nvlink_gbps": 450.0, "nvlink_domain": gpus}
    nics = tuple(Nic(nic_gbps, i) for i in range(gpus))
    return NodeGroup(name, len(hosts), 300.0, hosts=tuple(hosts), num_gpus=gpus, **{**facts, "nics": nics, **more})


def cluster_of(*links, **engines):
    return Cluster((group("trainers", ["t0"]), group("engines", ["e0", "e1"], **engines)), links, alpha_s=5e-6)


WAN = Link("wan", ("trainers",), ("engines",), 12.5)


def write_job(folder, *, recipe="bf16", cluster=None, tensors=TENSORS, engines=ENGINES):
    """The arguments of ``wsync plan`` for a job of four trainer ranks to two replicas of two."""
    source, sink, machines = folder / "source.wsync", folder / "sink.wsync", folder / "cluster.json"
    save_manifest(fsdp_source(tensors, TRAINERS), source)
    save_manifest(tp_sink(tensors, engines, recipe), sink)
    dump_cluster(cluster or cluster_of(), machines)
    return ["plan", str(source), str(sink), "--cluster", str(machines)]
