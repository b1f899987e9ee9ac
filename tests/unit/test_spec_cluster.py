"""The cluster file: strict in both directions, and every refusal names what it found and what it allows."""

import math

import msgspec
import pytest

from wsync.errors import ConfigError, FormatVersionError
from wsync.spec import (
    Cluster,
    Link,
    Nic,
    NicPath,
    NodeGroup,
    check_cluster,
    decode_cluster,
    default_cluster,
    dump_cluster,
    encode_cluster,
    load_cluster,
)
from wsync.spec.serde import FORMAT_VERSION

GPU_NODE = NodeGroup(
    name="trainers",
    count=2,
    host_gbps=200.0,
    num_gpus=8,
    hbm_gbps=3350.0,
    pcie_gbps=55.0,
    nvlink_gbps=450.0,
    nvlink_domain=8,
    nics=tuple(Nic(50.0, rail, (NicPath(rail, "PIX"),)) for rail in range(8)),
)
FULL = Cluster(
    (GPU_NODE, NodeGroup("engines", 1, 100.0, hosts=("e0",), nics=(Nic(25.0),))),
    (Link("wan", ("trainers",), ("engines",), 12.5),),
    alpha_s=5e-6,
)


def test_a_cluster_survives_its_file(tmp_path):
    path = tmp_path / "cluster.json"
    dump_cluster(FULL, path)
    assert load_cluster(path) == FULL
    assert b'"format_version": %d' % FORMAT_VERSION in path.read_bytes()


def test_rates_follow_from_the_parts():
    assert GPU_NODE.network_gbps == 400.0
    assert GPU_NODE.local_gbps == 450.0
    assert msgspec.structs.replace(GPU_NODE, nvlink_domain=0).local_gbps == 55.0
    assert FULL.groups[1].local_gbps == 100.0
    assert GPU_NODE.node_names == ("trainers-0", "trainers-1")
    assert FULL.groups[1].node_names == ("e0",)


def test_a_domain_may_span_consecutive_nodes():
    rack = msgspec.structs.replace(GPU_NODE, count=18, num_gpus=4, nvlink_domain=72, nics=())
    check_cluster(Cluster((rack,)))
    assert rack.nodes_per_domain == 18
    assert GPU_NODE.nodes_per_domain == 1
    assert msgspec.structs.replace(GPU_NODE, nvlink_domain=4).nodes_per_domain == 1


def test_hosts_find_their_group_and_strangers_are_named():
    assert FULL.group_by_host(["e0", "trainers-1"]) == {"e0": FULL.groups[1], "trainers-1": GPU_NODE}
    with pytest.raises(ConfigError, match=r"host 'x9'.*trainers-0, trainers-1, e0"):
        FULL.group_by_host(["x9"])


def test_the_default_has_one_node_for_each_distinct_host():
    cluster = default_cluster(["b", "a", "b"])
    assert cluster.groups[0].node_names == ("b", "a")
    check_cluster(cluster)
    with pytest.raises(ConfigError, match="at least 1 host, got 0"):
        default_cluster([])


@pytest.mark.parametrize("length", [0, 1, 10, 200, -2])
def test_a_truncated_file_is_a_named_error(length):
    data = encode_cluster(FULL)
    with pytest.raises(ConfigError, match=r"cluster file \(\d+ bytes\) is not a cluster description"):
        decode_cluster(data[:length])


def test_a_file_that_is_not_utf8_is_a_named_error():
    data = encode_cluster(FULL).replace(b'"name": "', b'"name": "\xff', 1)
    with pytest.raises(ConfigError, match="is not a cluster description"):
        decode_cluster(data)


def test_every_proper_prefix_of_a_file_is_refused():
    data = encode_cluster(FULL).rstrip()
    for length in range(len(data)):
        with pytest.raises(ConfigError):
            decode_cluster(data[:length])


def test_a_newer_file_reads_as_newer_even_with_unknown_fields():
    data = encode_cluster(FULL).replace(b'"format_version": %d' % FORMAT_VERSION, b'"format_version": 7, "flux": 1')
    with pytest.raises(FormatVersionError, match=f"format version 7, this wsync reads version {FORMAT_VERSION}"):
        decode_cluster(data)


def test_unknown_fields_are_refused_by_name():
    data = encode_cluster(FULL).replace(b'"rail": 3', b'"rail": 3, "speed": 4')
    with pytest.raises(ConfigError, match="speed"):
        decode_cluster(data)


def test_a_file_that_is_not_there_is_a_named_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        dump_cluster(FULL, tmp_path / "no" / "folder.json")


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan, 1e9])
def test_impossible_rates_name_the_field_the_value_and_the_limit(rate):
    group = msgspec.structs.replace(GPU_NODE, nics=(Nic(rate),))
    with pytest.raises(
        ConfigError, match=r"nics\[0\].rate_gbps is .* GB/s, allowed is more than 0 and at most 1e\+06"
    ) as e:
        check_cluster(Cluster((group,)))
    assert repr(rate) in str(e.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 0}, "count is 0, allowed is 1"),
        ({"count": -4}, "count is -4"),
        ({"num_gpus": -1, "nvlink_domain": 0}, "num_gpus is -1"),
        ({"nvlink_domain": 9}, "nvlink_domain is 9, allowed is 0 to 8 .num_gpus., or a multiple of 8"),
        ({"nvlink_domain": -8}, "nvlink_domain is -8, allowed is 0"),
        ({"nvlink_domain": 1 << 21}, "nvlink_domain is 2097152, allowed is 0 to"),
        ({"nvlink_domain": 8, "num_gpus": 0}, "nvlink_domain is 8, allowed is 0 to 0"),
        ({"host_gbps": 0.0}, "host_gbps is 0.0"),
        ({"hbm_gbps": None}, "hbm_gbps is missing, but num_gpus is 8"),
        ({"nvlink_gbps": None}, "nvlink_gbps is missing"),
        ({"hosts": ("only",)}, "count is 2, but 1 hosts"),
        ({"nics": (Nic(1.0, -1),)}, "rail is -1"),
        ({"nics": (Nic(1.0, 0, (NicPath(8, "SYS"),)),)}, "gpus is 8, allowed is 0 to 7"),
        ({"hosts": ("a", "a")}, "node 'a' is in group 'trainers' and again"),
    ],
)
def test_impossible_nodes_are_refused_with_both_values(changes, says):
    with pytest.raises(ConfigError, match=says):
        check_cluster(Cluster((msgspec.structs.replace(GPU_NODE, **changes),)))


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        (Cluster(()), "at least 1 group of nodes, got 0"),
        (Cluster((GPU_NODE, GPU_NODE)), "two groups are both named 'trainers'"),
        (Cluster((GPU_NODE,), alpha_s=-1.0), "alpha_s is -1.0"),
        (Cluster((GPU_NODE,), alpha_s=math.nan), "alpha_s is nan"),
        (
            Cluster((GPU_NODE,), (Link("l", ("trainers",), ("x",), 1.0),)),
            "link 'l' names group 'x'; the file has trainers",
        ),
        (Cluster((GPU_NODE,), (Link("l", ("trainers",), ("trainers",), 1.0),)), "two sides without overlap"),
        (Cluster((GPU_NODE,), (Link("l", ("trainers",), (), -2.0),)), "rate_gbps is -2.0"),
    ],
)
def test_impossible_clusters_are_refused(cluster, says):
    with pytest.raises(ConfigError, match=says):
        check_cluster(cluster)


def test_an_unknown_path_to_a_nic_is_refused():
    data = encode_cluster(FULL).replace(b'"PIX"', b'"WIFI"', 1)
    with pytest.raises(ConfigError, match="WIFI"):
        decode_cluster(data)
