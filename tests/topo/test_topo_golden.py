"""``wsync topo golden`` and ``wsync topo compare``: what is the same on two hosts, and what is not."""

from __future__ import annotations

import dataclasses
import json
import re

import machines as m
import pytest
from recorded import needs_fixtures, recorded

from wsync.cli.main import main
from wsync.errors import ConfigError, DigestError, FormatVersionError
from wsync.topo.compare import compare
from wsync.topo.golden import check_golden, decode_golden, encode_golden, make_golden, save_golden
from wsync.topo.golden_facts import differences, facts_of, fingerprint
from wsync.topo.parse import read_texts


def machine(box: m.Box, host: str | None = None, **changes):
    texts = [m.topo_m(box), m.nvlink_s(box), m.query_all(box, **changes)]
    return read_texts(((f"f{i}", t) for i, t in enumerate(texts)), host).machines[0]


def moved(box: m.Box, host: str):
    """The same machine with other bus ids, UUIDs and name."""
    text = m.query_all(box)
    text = re.sub(r"0000:([0-9a-f]{2}):00.0", lambda f: f"0001:{int(f[1], 16) ^ 0x80:02x}:00.0", text)
    links = m.nvlink_s(box).replace("UUID: GPU-0", "UUID: GPU-f")
    return read_texts([("a", m.topo_m(box)), ("b", links), ("c", text)], host).machines[0]


@pytest.mark.parametrize("box", m.HEALTHY.values(), ids=m.HEALTHY)
def test_names_uuids_and_bus_ids_do_not_count(box):
    here, there = machine(box(), "n1"), moved(box(), "n2")
    assert here.gpus[0].bus_id != there.gpus[0].bus_id
    assert facts_of(here) == facts_of(there)


def test_machines_of_different_kinds_have_different_fingerprints():
    prints = {fingerprint(facts_of(machine(box()))) for box in m.HEALTHY.values()}
    assert len(prints) == len(m.HEALTHY)


FAULTS = {
    "a dead GPU": (m.isolate(m.h100(), 3), {"nvlink", "pairs"}, ("GPU3",)),
    "a lost link": (m.weaken_gpu(m.h100(), 5), {"nvlink", "pairs"}, ("GPU5",)),
    "a moved NIC": (
        dataclasses.replace(m.h100(), nics=(m.Place(1, 0, 0), *m.h100().nics[1:])), {"paths to NICs"}, ("mlx5_0",),
    ),
    "other GPUs": (dataclasses.replace(m.h100(), model="NVIDIA H200"), {"models"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("box", "categories", "devices"), FAULTS.values(), ids=FAULTS)
def test_what_differs_is_named_with_its_device(box, categories, devices):
    golden = make_golden([machine(m.h100())])
    report = check_golden(golden, [machine(box, "n7")])
    assert {f.evidence.partition(":")[0] for f in report.findings} == categories
    assert all(f.subject.host == "n7" for f in report.findings)
    assert devices is None or all(f.subject.devices == devices for f in report.findings)
    assert report.verdict == ("CRIT" if "nvlink" in categories else "WARN")


def test_a_narrow_port_counts_and_an_idle_one_does_not():
    golden = make_golden([machine(m.h100())])
    assert check_golden(golden, [machine(m.h100(), gen=1, state="P8")]).findings == ()
    report = check_golden(golden, [machine(m.h100(), width=8)])
    assert [f.evidence[:34] for f in report.findings] == ["PCIe widths: GPU0: x8 (expected x1"]


def test_what_was_not_recorded_is_said_and_not_compared():
    golden = make_golden([machine(m.h100())])
    only_links = read_texts([("l", m.nvlink_s(m.h100()))], "n1").machines[0]
    report = check_golden(golden, [only_links])
    assert (report.verdict, [f.id for f in report.findings]) == ("OK", ["host.not-compared"])
    nothing = check_golden(golden, [read_texts([("l", "NCCL_IB_HCA=mlx5_0")]).machines[0]])
    assert nothing.verdict == "UNKNOWN"


def test_a_golden_file_is_versioned_strict_and_sealed():
    data = encode_golden(make_golden([machine(m.b200())]))
    assert decode_golden(data, "g") == make_golden([machine(m.b200())])
    with pytest.raises(FormatVersionError, match="version 7, this wsync reads 1"):
        decode_golden(data.replace(b'"format_version": 1', b'"format_version": 7'), "g")
    with pytest.raises(DigestError, match="its facts have the fingerprint"):
        decode_golden(data.replace(b"NV18", b"NV17", 1), "g")
    with pytest.raises(ConfigError, match="no golden file"):
        decode_golden(data.replace(b'"facts"', b'"fakts"'), "g")
    with pytest.raises(ConfigError, match="no golden file"):
        decode_golden(data[:-40], "g")
    with pytest.raises(ConfigError, match="no golden file"):
        decode_golden(b"[" * 100_000, "g")


def test_a_golden_file_is_made_of_whole_and_equal_machines():
    with pytest.raises(ConfigError, match=r"n2 \(.*\) is not like n1 \(.*NV18"):
        make_golden([machine(m.h100(), "n1"), machine(m.isolate(m.h100(), 2), "n2")])
    cut = read_texts([("t", "\n".join(m.topo_m(m.h100()).splitlines()[:4]))]).machines[0]
    with pytest.raises(ConfigError, match="t lacks the rows"):
        make_golden([cut])
    with pytest.raises(ConfigError, match="got 0"):
        make_golden([])


def test_a_golden_file_that_cannot_be_written_leaves_the_old_one_and_no_rest(tmp_path):
    golden = make_golden([machine(m.h100())])
    target = tmp_path / "g.json"
    save_golden(golden, target)
    save_golden(golden, target)
    assert [p.name for p in tmp_path.iterdir()] == ["g.json"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        save_golden(golden, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "g.json"]


def test_the_majority_is_right_and_outliers_are_named():
    hosts = [machine(m.h100(), f"n{i}") for i in range(6)]
    hosts[4] = machine(m.isolate(m.h100(), 1), "n4")
    found = compare(hosts)
    assert [len(g.hosts) for g in found.groups] == [5, 1]
    assert {(f.subject.host, f.subject.devices) for f in found.findings} == {("n4", ("GPU1",))}
    assert found.verdict == "CRIT"
    assert "n0 and 4 others of 6 hosts" in found.findings[0].expected


def test_without_a_majority_nobody_is_blamed_alone():
    found = compare([machine(m.h100(), "a"), machine(m.h100_mesh(), "b")])
    assert found.findings[0].id == "host.no-majority"
    assert compare([machine(m.h100(), "a"), machine(m.h100(), "b")]).findings == ()


def test_hosts_with_other_inputs_are_compared_in_what_they_share():
    less = read_texts([("t", m.topo_m(m.h100()))], "n2").machines[0]
    found = compare([machine(m.h100(), "n1"), less])
    assert (found.verdict, len(found.groups)) == ("OK", 1)
    assert {f.id for f in found.findings} == {"host.not-compared"}
    assert "pairs" in found.categories


def test_differences_have_both_values():
    (first, *_) = differences({"pairs": {"GPU0-GPU1": "NV18"}}, {"pairs": {"GPU0-GPU1": "SYS"}})
    assert str(first) == "GPU0-GPU1: SYS (expected NV18)"


@pytest.fixture
def hosts(tmp_path):
    for i in range(4):
        folder = tmp_path / f"n{i}"
        folder.mkdir()
        box = m.weaken_gpu(m.b200(), 6) if i == 2 else m.b200()
        (folder / "topo").write_text(m.topo_m(box))
        (folder / "links").write_text(m.nvlink_s(box))
    return [str(tmp_path / f"n{i}") for i in range(4)]


def test_the_commands(hosts, tmp_path, capsys):
    golden = str(tmp_path / "golden.json")
    assert main(["topo", "golden", "save", *hosts[:2], "--output", golden]) == 0
    print_of_golden = capsys.readouterr().out.strip()
    assert main(["topo", "golden", "check", golden, *hosts]) == 2
    out = capsys.readouterr().out
    assert "n2: host.golden-differs  GPU6" in out
    assert "n3" not in out
    assert main(["topo", "golden", "check", golden, hosts[3]]) == 0
    assert main(["topo", "golden", "diff", golden, hosts[2], "--json", str(tmp_path / "d.json")]) == 2
    report = json.loads((tmp_path / "d.json").read_text())
    assert (report["format_version"], report["fingerprint"]) == (1, print_of_golden)
    assert main(["topo", "golden", "diff", golden, hosts[1]]) == 0
    capsys.readouterr()
    assert main(["topo", "compare", *hosts]) == 2
    out = capsys.readouterr().out
    assert "CRIT 4 hosts, 2 kinds" in out
    assert "3 hosts: n0, n1, n3" in out
    assert "GPU6: 17 x 53.125 GB/s (expected 18 x 53.125 GB/s)" in out
    assert main(["topo", "golden", "save", *hosts, "--output", golden]) == 3
    assert main(["topo", "compare", hosts[0]]) == 3
    assert main(["topo", "golden", "check", hosts[0] + "/topo", hosts[1]]) == 3


def test_hosts_that_were_saved_elsewhere_are_compared(hosts, tmp_path, capsys):
    files = []
    for i, folder in enumerate(hosts):
        files.append(str(tmp_path / f"host{i}.json"))
        inputs = [f"{folder}/topo", f"{folder}/links"]
        assert main(["topo", "save", *inputs, "--host", f"rack1-{i}", "--output", files[-1]]) == 0
    assert main(["topo", "compare", *files]) == 2
    assert "rack1-2: host.differs  GPU6" in capsys.readouterr().out


@needs_fixtures
def test_recorded_hosts_of_one_kind_are_alike_although_one_text_is_damaged(capsys):
    files = [str(recorded(f"topo_m/h100_8x_12nic_numa_off_host{h}.txt")) for h in ("A_0007", "B_0008_glued")]
    assert main(["topo", "compare", *files]) == 0
    assert "all alike" in capsys.readouterr().out


@needs_fixtures
def test_the_corrected_dump_differs_from_the_one_with_slow_uplinks_in_its_ports():
    good, bad = (recorded(f"nccl_xml/oci_h100_{n}.xml") for n in ("32GTs", "5GTs_upstream"))
    assert main(["topo", "golden", "diff", str(good), str(bad)]) == 1
