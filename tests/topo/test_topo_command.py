"""``wsync topo``: what it prints and how it exits."""

from __future__ import annotations

import json

import machines as m
import pytest

from wsync.cli.main import main


@pytest.fixture
def write(tmp_path):
    def put(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return str(path)

    return put


def test_exit_statuses_are_those_of_nagios(write, capsys):
    good = write("good", m.topo_m(m.h100()))
    assert main(["topo", "check", good]) == 0
    assert main(["topo", "check", write("warn", m.topo_m(m.h100_vm()))]) == 1
    assert main(["topo", "check", write("crit", m.topo_m(m.isolate(m.h100(), 2)))]) == 2
    assert main(["topo", "check", write("cut", m.system_xml(m.h100())[:500])]) == 3
    assert main(["topo", "check", good, "/nowhere/at/all"]) == 3
    capsys.readouterr()
    assert main(["topo", "check", good, "--platform", "z9000"]) == 3
    assert "known are" in capsys.readouterr().err


def test_the_table_says_who_why_and_what_to_do(write, capsys):
    assert main(["topo", "check", write("a.xml", m.system_xml(m.isolate(m.gb200(), 1))), "--host", "node7"]) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "CRIT node7: 4 GPUs, 4 NICs, gb200, NVSwitch, 18 links each" in text
    assert "nvlink.gpu-isolated" in text
    assert m.gpu_bus(m.gb200(), 1) in text
    assert "rank 1" in text
    assert "drain the node" in text


def test_json_is_versioned_and_goes_to_stdout_alone(write, capsys):
    assert main(["topo", "check", write("a", m.topo_m(m.isolate(m.b200(), 5))), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["format_version"] == 1
    assert report["verdict"] == "CRIT"
    (machine,) = report["machines"]
    (finding,) = machine["findings"]
    assert (finding["id"], finding["subject"]["devices"]) == ("nvlink.gpu-isolated", ["GPU5"])
    assert finding["link"].startswith("docs/guides/topo.md#")
    assert machine["nic_of_gpu"]["GPU0"] == "mlx5_0"


def test_files_are_one_machine_and_folders_one_each(write, tmp_path, capsys):
    for i in range(3):
        box = m.isolate(m.h100(), 1) if i == 1 else m.h100()
        write(f"node{i}/topo.txt", m.topo_m(box))
        write(f"node{i}/links.txt", m.nvlink_s(box))
    assert main(["topo", "check", *(str(tmp_path / f"node{i}") for i in range(3)), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert [(r["host"], r["verdict"]) for r in report["machines"]] == [
        ("node0", "OK"),
        ("node1", "CRIT"),
        ("node2", "OK"),
    ]
    assert report["findings"][0]["id"] == "host.outlier"
    (tmp_path / "void").mkdir()
    assert main(["topo", "check", str(tmp_path / "void")]) == 3


def test_what_was_saved_gets_the_same_verdict(write, tmp_path, capsys):
    box = m.isolate(m.h100(), 6)
    files = [write("topo", m.topo_m(box)), write("links", m.nvlink_s(box))]
    saved = str(tmp_path / "saved.json")
    assert main(["topo", "save", *files, "--host", "n1", "--output", saved]) == 0
    main(["topo", "check", *files, "--host", "n1", "--json"])
    direct = capsys.readouterr().out
    main(["topo", "check", saved, "--json"])
    assert capsys.readouterr().out == direct
    assert main(["topo", "save", write("noise", "hello"), "--output", saved]) == 3
    assert "none of the formats" in capsys.readouterr().err


def test_a_platform_that_is_said_wins(write):
    text = write("a", m.topo_m(m.a800(), legend=False))
    assert main(["topo", "check", text]) == 0
    assert main(["topo", "check", text, "--platform", "a800"]) == 0
    assert main(["topo", "check", text, "--platform", "A100"]) == 2
