"""``wsync topo advise``: variables that differ from NCCL's defaults, and none on machines that need none."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess

import machines as m
import pytest
from recorded import needs_fixtures, recorded

from wsync.cli.main import main
from wsync.topo.advise import Advised, advise
from wsync.topo.lint import lint
from wsync.topo.lint_env import Assignment
from wsync.topo.lint_hca import parse_value
from wsync.topo.parse import read_files, read_texts


def of(*texts: str, **kwargs) -> Advised:
    return advise(read_texts((f"f{i}", t) for i, t in enumerate(texts)).machines[0], **kwargs)


def values(advised: Advised) -> dict[str, str]:
    return {a.name.removeprefix("NCCL_"): a.value for a in advised.advice}


NEEDS_NOTHING = ("dgx1", "dgx2", "a100", "a100_mesh", "a800", "h100_mesh", "b200", "gb200", "a100_bridges")


@pytest.mark.parametrize("name", NEEDS_NOTHING)
def test_a_machine_that_nccls_defaults_suit_gets_no_variable(name):
    assert of(m.topo_m(m.HEALTHY[name]())).advice == ()


def test_storage_nics_are_left_out_by_an_exact_list():
    (advice,) = of(m.topo_m(m.h100())).advice
    assert (advice.name, advice.value) == ("NCCL_IB_HCA", "=" + ",".join(f"mlx5_{i}" for i in range(8)))
    assert "mlx5_8 is near no GPU (NODE)" in advice.reason
    assert "all 10" in advice.reason


def test_ports_that_are_down_or_slow_are_left_out_with_their_reason():
    port = "Infiniband device 'mlx5_{}' port 1 status:\n\tstate: {}\n\trate: {} Gb/sec\n"
    text = "".join(port.format(i, "1: DOWN" if i == 1 else "4: ACTIVE", 40 if i == 2 else 400) for i in range(8))
    (advice,) = of(m.topo_m(m.b200()), text).advice
    assert advice.value == "=mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7"
    assert "mlx5_1 is DOWN" in advice.reason
    assert "mlx5_2 is slower (40 Gbit/s)" in advice.reason


def test_without_names_a_list_is_described_and_not_made_up():
    text = re.sub(r"\nNIC Legend.*", "\n", m.topo_m(m.h100()), flags=re.S)
    advised = of(text)
    assert advised.advice == ()
    assert "should use NIC0, NIC1" in advised.notes[0]


def test_of_a_cut_table_no_list_is_made():
    lines = m.topo_m(m.h100()).splitlines(keepends=True)
    advised = of("".join(lines[:4] + lines[9:]))
    assert "IB_HCA" not in values(advised)
    assert any("not all GPUs are described" in n for n in advised.notes)


def test_the_fabric_decides_whether_rails_are_crossed():
    text = m.topo_m(m.b200())
    assert values(of(text, fabric="rails")) == {"CROSS_NIC": "0"}
    assert values(of(text, fabric="shared")) == {"CROSS_NIC": "1"}
    one = dataclasses.replace(m.b200(), nics=m.b200().nics[:1])
    assert "CROSS_NIC" not in values(of(m.topo_m(one), fabric="rails"))


def test_nics_below_the_host_bridge_need_a_longer_reach():
    box = dataclasses.replace(m.l40s(), nics=(m.Place(0, 0), m.Place(1, 0)))
    gdr = next(a for a in of(m.topo_m(box)).advice if a.name == "NCCL_NET_GDR_LEVEL")
    assert (gdr.value, gdr.measure) == ("PHB", True)
    assert values(of(m.topo_m(m.l40s())))["NET_GDR_LEVEL"] == "SYS"


def test_pairs_below_one_host_bridge_may_use_peer_access():
    flat = dataclasses.replace(m.l40s(), gpus=(m.Place(0, 0),) * 4, nics=())
    assert values(of(m.topo_m(flat))) == {"P2P_LEVEL": "PHB"}


def test_peer_access_over_nvlink_only_where_pcie_pairs_refuse_it():
    box = m.a100_bridges()
    refused = m.p2p(box, {(0, 2): "NS", (0, 3): "NS", (1, 2): "NS", (1, 3): "NS"})
    assert values(of(m.topo_m(box), m.nvlink_s(box), refused)) == {"P2P_LEVEL": "NVL"}


def test_a_fabric_that_is_not_ready_turns_nvlink_sharp_off():
    text = m.query_all(m.b200(), fabric=("In Progress", "N/A"))
    assert values(of(m.topo_m(m.b200()), text)) == {"NVLS_ENABLE": "0"}
    ready = m.query_all(m.b200(), fabric=("Completed", "Success"))
    assert values(of(m.topo_m(m.b200()), ready)) == {}


def test_partitions_turn_links_between_hosts_off():
    cliques = [
        m.query(m.b200(), i, fabric=("Completed", "Success")) + f"        CliqueId    : {i % 2}\n" for i in range(8)
    ]
    text = "==============NVSMI LOG==============\n\nAttached GPUs    : 8\n" + "".join(cliques)
    assert values(of(m.topo_m(m.b200()), text)) == {"MNNVL_ENABLE": "0"}


def test_a_hidden_tree_needs_a_topology_file():
    advised = of(m.topo_m(m.h100_vm()))
    assert values(advised) == {"TOPO_FILE": "/etc/nccl/topo.xml"}
    assert any("NCCL_TOPO_DUMP_FILE" in n for n in advised.notes)


def test_no_variable_is_said_to_repair_a_dead_gpu():
    advised = of(m.topo_m(m.isolate(m.b200(), 2)))
    assert advised.advice == ()
    assert any("no variable repairs nvlink.gpu-isolated (GPU2)" in n for n in advised.notes)


@pytest.mark.parametrize("box", [*m.HEALTHY.values(), m.h100_vm], ids=[*m.HEALTHY, "vm"])
def test_what_is_advised_has_nothing_to_lint(box):
    machine = read_texts([("t", m.topo_m(box()))]).machines[0]
    for fabric in ("unknown", "rails", "shared"):
        given = [Assignment(a.name, a.value) for a in advise(machine, fabric=fabric).advice]
        assert {f.id for f in lint((), given, machine).findings} <= {"lint.topo-file-absent"}


def test_the_command_prints_reasons_json_and_lines_for_a_shell(tmp_path, capsys):
    path = tmp_path / "topo"
    path.write_text(m.topo_m(m.h100()))
    assert main(["topo", "advise", str(path), "--host", "n1"]) == 0
    out = capsys.readouterr().out
    assert "n1: 1 variable\n" in out
    assert "because: mlx5_8 is near no GPU" in out
    assert main(["topo", "advise", str(path), "--export"]) == 0
    both = capsys.readouterr()
    assert both.out.startswith("export NCCL_IB_HCA==mlx5_0,mlx5_1")
    assert both.err.startswith("NCCL_IB_HCA: mlx5_8")
    assert main(["topo", "advise", str(path), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["format_version"], one["advice"][0]["name"]) == (1, "NCCL_IB_HCA")
    other = tmp_path / "other"
    other.mkdir()
    (other / "topo").write_text(m.topo_m(m.b200()))
    assert main(["topo", "advise", str(path), str(other), "--export"]) == 3
    assert "2 different environments" in capsys.readouterr().err
    assert main(["topo", "advise", str(tmp_path / "no")]) == 3


def sourced(text, tmp_path):
    """Variables of NCCL after a shell read the lines."""
    (tmp_path / "job.sh").write_text(text)
    script = f". {shlex.quote(str(tmp_path / 'job.sh'))} && env"
    done = subprocess.run(
        ["sh", "-eu", "-c", script], env={"PATH": os.defpath}, capture_output=True, text=True, check=True
    )
    return {line for line in done.stdout.splitlines() if line.startswith("NCCL_")}


def test_exported_lines_say_as_comments_what_was_left_out_and_a_shell_takes_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wsync.topo.advise.DEFAULT_TOPO_FILE", str(tmp_path / "topo.xml"))
    for name, box in (("h100", m.h100()), ("vm", m.h100_vm())):
        (tmp_path / name).write_text(m.topo_m(box))
    assert main(["topo", "advise", str(tmp_path / "h100"), "--fabric", "shared", "--export"]) == 0
    out = capsys.readouterr().out
    *exports, comment = out.splitlines()
    assert comment.startswith("# left out: NCCL_CROSS_NIC=1 (measure with and without it): all NICs")
    assert sourced(out, tmp_path) == {line.removeprefix("export ") for line in exports} != set()
    assert main(["topo", "advise", str(tmp_path / "vm"), "--export"]) == 0
    out = capsys.readouterr().out
    assert f"# left out: NCCL_TOPO_FILE={tmp_path / 'topo.xml'} (there is no such file yet): " in out
    assert "# note: NCCL_TOPO_FILE: dump the topology" in out
    assert sourced(out, tmp_path) == set()


@needs_fixtures
def test_the_list_that_an_operator_set_by_hand_is_reproduced():
    text = recorded("misc/h100_numa_off.kernel_cmdline.txt").read_text()
    by_hand = re.search(r'NCCL_IB_HCA="([^"]*)"', text)
    found = advise(read_files([recorded("topo_m/h100_8x_12nic_numa_off_hostA_0007.txt")]).machines[0])
    assert parse_value(values(found)["IB_HCA"]).devices == tuple(e.lstrip("=") for e in by_hand[1].split(","))


@needs_fixtures
def test_the_list_that_a_vendor_gives_for_the_shape_is_reproduced():
    rows = [line.split("\t") for line in recorded("misc/oci_nccl_ib_hca_by_shape.tsv").read_text().splitlines()]
    of_shape = next(r[1] for r in rows if r[0] == "BM.GPU.H100.8")
    found = advise(read_files([recorded("nccl_xml/oci_h100_5GTs_upstream.xml")]).machines[0])
    assert values(found) == {"IB_HCA": of_shape}
    assert "mlx5_2, mlx5_11" in found.advice[0].reason
