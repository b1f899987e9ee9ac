"""What each parser promises: safety, limits, and the formats' corners."""

from __future__ import annotations

import machines as m
import msgspec
import pytest

from wsync.errors import ConfigError, FormatVersionError
from wsync.topo.merge import merge_machines
from wsync.topo.model import Gpu, Machine, NvLink
from wsync.topo.parse import detect, parse_text, read_files, read_texts
from wsync.topo.parse.saved import encode_topology
from wsync.topo.parse.text import MAX_INPUT_BYTES, bus_id, bus_id_of_number, clean, expand, numbers
from wsync.topo.parse.xml_tree import MAX_DEPTH, parse_xml

BOMB = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<system version="1"><cpu numaid="0">&b;</cpu></system>"""
OUTSIDE = '<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><system>&f;</system>'


@pytest.mark.parametrize("text", [BOMB, OUTSIDE], ids=["entities", "files"])
def test_xml_with_a_document_type_is_refused_before_anything_of_it_is_expanded(text):
    with pytest.raises(ConfigError, match="document type"):
        parse_text(text, "file")


def test_xml_deeper_or_longer_than_any_machine_is_refused():
    with pytest.raises(ConfigError, match="limits"):
        parse_xml("<a>" * (MAX_DEPTH + 1) + "</a>" * (MAX_DEPTH + 1), "file")


def test_xml_errors_name_the_line_and_what_is_open():
    with pytest.raises(ConfigError, match=r"<system> > <cpu> is not closed, line 3"):
        parse_text('\n<system version="1">\n<cpu numaid="0">', "file")
    with pytest.raises(ConfigError, match="XML of a <html>"):
        parse_text("<html></html>", "file")


def test_input_over_the_limit_is_refused(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(b" " * (MAX_INPUT_BYTES + 1))
    (machine,) = read_files([path]).machines
    assert machine.gaps[0].fatal
    assert str(MAX_INPUT_BYTES) in machine.gaps[0].what


def test_what_cannot_be_read_does_not_hide_what_can(tmp_path):
    (tmp_path / "topo").write_text(m.topo_m(m.h100()))
    (tmp_path / "noise").write_text("hello\n")
    (tmp_path / "empty").write_text("\n")
    (machine,) = read_files([tmp_path / n for n in ("topo", "noise", "empty", "absent")]).machines
    assert len(machine.gpus) == 8
    assert [g.source for g in machine.gaps if g.fatal] == ["noise", "empty", "absent"]


def test_formats_are_told_apart_by_content():
    box = m.h100()
    of = {
        "nvidia-smi topo -m": m.topo_m(box),
        "nvidia-smi topo -p2p": m.p2p(box),
        "nvidia-smi nvlink": m.nvlink_s(box),
        "nvidia-smi -q": m.query_all(box),
        "XML": m.system_xml(box),
        "JSON": encode_topology(read_texts([("x", m.topo_m(box))])).decode(),
    }
    assert {name: detect(text) for name, text in of.items()} == {name: name for name in of}
    assert detect("nothing of the kind") is None


def test_utf16_as_windows_writes_it_is_read(tmp_path):
    path = tmp_path / "topo"
    path.write_bytes(m.topo_m(m.dgx1()).encode("utf-16"))
    assert len(read_files([path]).machines[0].gpus) == 8


def test_a_saved_topology_is_read_back_equal_and_other_versions_are_refused():
    topology = read_texts([(n, w(m.gb200())) for n, w in (("m", m.topo_m), ("s", m.nvlink_s), ("x", m.system_xml))])
    text = encode_topology(topology).decode()
    assert read_texts([("saved", text)]).machines == topology.machines
    with pytest.raises(FormatVersionError, match="99"):
        parse_text(text.replace('"format_version": 1', '"format_version": 99'), "saved")
    with pytest.raises(ConfigError, match="damaged"):
        parse_text(text.replace('"gpus": [', '"gpus": [7, ', 1), "saved")
    with pytest.raises(ConfigError, match="truncated"):
        parse_text(text[:-20], "saved")


def test_nics_of_the_header_are_renamed_by_the_legend_and_joined_with_other_inputs():
    ports = "Infiniband device 'mlx5_3' port 1 status:\n\tstate: 4: ACTIVE\n\trate: 400 Gb/sec\n"
    box = m.h100()
    (machine,) = read_texts([("topo", m.topo_m(box)), ("ib", ports)]).machines
    assert len(machine.nics) == len(box.nics)
    nic = next(n for n in machine.nics if n.label == "mlx5_3")
    assert (nic.alias, nic.rate_gbit, nic.state) == ("NIC3", 400.0, "ACTIVE")


def test_facts_of_one_gpu_are_joined_by_bus_id_before_index():
    parts = [Machine(gpus=(Gpu(0, bus_id="0000:81:00.0", name="A"), Gpu(1, bus_id="0000:01:00.0"))),
             Machine(gpus=(Gpu(0, bus_id="0000:01:00.0", sm=90),)),
             Machine(gpus=(Gpu(1, nvlinks=(NvLink(0, True),)),))]  # fmt: skip
    (machine,) = merge_machines(parts)
    assert [(g.index, g.name, g.sm, bool(g.nvlinks)) for g in machine.gpus] == [
        (0, "A", None, False),
        (1, None, 90, True),
    ]


def test_hosts_are_kept_apart_and_loose_files_belong_to_the_only_one():
    a, b, loose = Machine(host="a"), Machine(host="b"), Machine(arch="arm64")
    assert merge_machines([a, loose])[0].host == "a"
    assert merge_machines([a, loose])[0].arch == "arm64"
    assert [x.host for x in merge_machines([a, loose, b])] == ["a", "b", None]


def test_bus_ids_and_lists_are_read_in_every_spelling():
    assert bus_id("00000000:19:00.0") == bus_id("19:00.0") == bus_id("PCI:0000:19:00") == "0000:19:00.0"
    assert bus_id("fffffff:ff:ff.0") == "fffffff:ff:ff.0"
    assert bus_id("0009:06:00.0") == "0009:06:00.0"
    assert bus_id("none") is None
    assert bus_id_of_number(0x1905000) == "0019:05:00.0"
    assert bus_id_of_number(0xE000) == "0000:0e:00.0"
    assert expand("0,3-5") == (0, 3, 4, 5)
    assert expand("N/A") is None
    assert expand("5-3") is None
    assert expand("0-99999999") is None
    assert numbers([0, 1, 2, 5]) == "0-2, 5"


def test_the_cell_of_a_gpu_without_cpus_stays_empty():
    text = m.topo_m(m.h100()).replace("\t0-31\t0\t", "\t\t0\t")
    (machine,) = parse_text(text, "file")
    assert [g.cpus for g in machine.gpus] == [""] * 4 + ["32-63"] * 4
    assert [g.numa for g in machine.gpus] == [(0,)] * 4 + [(1,)] * 4


def test_tables_of_old_drivers_are_read():
    text = "\tGPU0\tGPU1\tmlx5_0\tCPU Affinity\nGPU0\t X \tSOC\tPHB\t0-7\nGPU1\tSOC\t X \tSOC\t8-15\n"
    text += "mlx5_0\tPHB\tSOC\t X \t\n"
    (machine,) = parse_text(text, "file")
    assert {(p.a, p.b): p.kind for p in machine.paths}["GPU0", "GPU1"] == "SYS"
    assert [n.label for n in machine.nics] == ["mlx5_0"]
    assert machine.gaps == ()


def test_cleaning_removes_only_what_is_no_text():
    assert clean("\x1b[4mGPU0\x1b[0m\r\nA\xa0B\x00") == "GPU0\nA B"
    assert clean("> a\n> b") == "a\nb"


def test_every_value_of_the_model_survives_json():
    topology = read_texts([("x", m.system_xml(m.dgx1())), ("q", m.query_all(m.dgx1())), ("p", m.p2p(m.dgx1()))])
    assert msgspec.json.decode(msgspec.json.encode(topology), type=type(topology)) == topology
