"""What is said to people and shells: no control codes, no harmful advice, the true reason."""

from __future__ import annotations

import io

import machines as own
import pytest

from wsync.cli.main import main
from wsync.cli.output import PrintableConsole, printable
from wsync.spec.cluster import Nic, NicPath, NodeGroup
from wsync.topo.advise import advise
from wsync.topo.checks import Case, run_checks
from wsync.topo.lint_env import Assignment, lint_environment
from wsync.topo.parse import read_texts
from wsync.topo.placement import sync_step
from wsync.topo.to_cluster import to_group


def test_control_characters_of_names_are_spelt_out():
    assert printable("a\x1b[31m\nb") == "a\\x1b[31m\\nb"


def test_the_console_sends_no_escape_code_of_a_text_to_the_terminal():
    from rich.text import Text

    out = io.StringIO()
    PrintableConsole(file=out).print(Text("a\x1b[31mb\x9b5m"))
    assert out.getvalue() == "a\\x1b[31mb\\x9b5m\n"


def test_a_hosts_name_cannot_write_to_the_terminal_nor_add_a_line(tmp_path, capsys):
    (tmp_path / "m.txt").write_text(own.topo_m(own.isolate(own.h100(), 2)))
    main(["topo", "check", str(tmp_path / "m.txt"), "--host", "a\x1b[2J\nOK b"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not any(line.startswith("OK b") for line in out.splitlines())


def test_an_error_cannot_write_to_the_terminal(tmp_path, capsys):
    main(["topo", "save", str(tmp_path / "a\x1b[2J.txt"), "-o", str(tmp_path / "o.json")])
    assert "\x1b" not in capsys.readouterr().err


def test_export_prints_neither_what_is_to_be_measured_nor_a_file_that_is_not_there(tmp_path, capsys):
    (tmp_path / "m.txt").write_text(own.topo_m(own.h100_vm()))
    machine = read_texts([("m", own.topo_m(own.h100_vm()))]).machines[0]
    assert any(a.name == "NCCL_TOPO_FILE" for a in advise(machine).advice)
    assert main(["topo", "advise", "--export", str(tmp_path / "m.txt")]) == 0
    assert "export" not in capsys.readouterr().out
    (tmp_path / "n.txt").write_text(own.topo_m(own.l40s()))
    main(["topo", "advise", "--export", "--fabric", "shared", str(tmp_path / "n.txt")])
    assert "export NCCL_CROSS_NIC" not in capsys.readouterr().out


@pytest.mark.parametrize(("value", "nbytes"), [("4M", 4 << 20), ("512k", 512 << 10), ("1GiB", 1 << 30)])
def test_a_size_with_a_unit_is_answered_with_its_bytes(value, nbytes):
    (found,) = [f for f in lint_environment([Assignment("NCCL_BUFFSIZE", value)]) if f.id == "lint.env-value"]
    assert f"write {nbytes} " in found.remedy
    assert "0 or 1" not in found.remedy


def test_senders_that_pcie_holds_back_are_not_said_to_lack_nics():
    trainer = NodeGroup("t", 1, 25.0, num_gpus=1, pcie_gbps=10.0, nics=(Nic(40.0, 0, (NicPath(0, "PIX"),)),))
    engine = NodeGroup("e", 1, 25.0, num_gpus=1, pcie_gbps=50.0, nics=(Nic(40.0, 0, (NicPath(0, "PIX"),)),))
    assert sync_step(trainer, engine, [0], 1 << 30).slowest == "PCIe of the senders"


def test_an_assumed_pcie_rate_is_noted_and_that_of_eighteen_links_is_gen5():
    machine = read_texts([("m", own.topo_m(own.h100()))]).machines[0]
    made = to_group(machine, "t")
    assert any("32 GT/s" in n for n in made.notes)
    machine = read_texts([("m", own.topo_m(own.l40s()))]).machines[0]
    assert any("16 GT/s" in n for n in to_group(machine, "t").notes)


def ibstatus(down: int) -> str:
    return "".join(
        f"Infiniband device 'mlx5_{i}' port 1 status:\n\tstate:\t\t {'1: DOWN' if i == down else '4: ACTIVE'}\n"
        f"\tphys state:\t 5: LinkUp\n\trate:\t\t 400 Gb/sec\n\tlink_layer:\t InfiniBand\n\n"
        for i in range(8)
    )


def compute_set(*texts: str):
    (machine,) = read_texts([(str(i), t) for i, t in enumerate(texts)]).machines
    return next(f for f in run_checks(Case(machine)) if f.id == "nic.compute-set")


def test_a_port_that_is_down_is_left_out_for_that_and_not_for_its_place():
    assert "mlx5_3 is DOWN" in compute_set(own.topo_m(own.h100()), ibstatus(3)).evidence


def test_numbers_of_nics_are_no_names_for_nccl():
    assert "NIC0" not in compute_set(own.topo_m(own.h100(), legend=False)).remedy


def test_how_many_variables_were_read_is_said_once(tmp_path, capsys):
    (tmp_path / "env.sh").write_text("NCCL_BUFFSIZE=4M\nNCCL_NVLS_ENABLE=0\n")
    main(["topo", "lint", "--env", str(tmp_path / "env.sh")])
    out = capsys.readouterr().out
    assert out.count("2 variables of NCCL") == 1
    assert "env.sh, line 1" in out
