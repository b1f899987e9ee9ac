"""The matrix on terminals of every width, with and without colour."""

from __future__ import annotations

import io
import re

import machines as m
import pytest
from rich.console import Console

from wsync.cli.topo.matrix import print_matrix
from wsync.topo.parse import read_texts
from wsync.topo.report import check_machine


def matrix(box, width, monkeypatch, colour=False):
    if colour:
        monkeypatch.delenv("NO_COLOR", raising=False)
    (machine,) = read_texts([("t", m.topo_m(box))]).machines
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system="standard" if colour else None)
    print_matrix(machine, check_machine(machine), console)
    return out.getvalue()


def cells(text):
    """Row and column to cell, from blocks of any width."""
    found, heads = {}, []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        words = [w.rstrip("!?") if i == 0 else w for i, w in enumerate(line.split())]
        if line.startswith(" ") and words and words[0] != "SYS:":
            heads = [w.rstrip("!?") for w in line.split()]
        elif words and words[0] in {f"GPU{i}" for i in range(16)}:
            found.update({(words[0], head): cell for head, cell in zip(heads, words[1:], strict=True)})
    return found


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_narrow_terminal_gets_blocks_that_fit_and_loses_no_cell(width, monkeypatch):
    text = matrix(m.isolate(m.h100(), 2), width, monkeypatch)
    rows = [line for line in text.splitlines() if line.startswith(("GPU", " "))]
    assert max(map(len, rows)) <= max(width, 20)
    found = cells(text)
    assert len(found) == 8 * (8 + 10)
    assert found["GPU0", "GPU1"] == "NV18"
    assert found["GPU0", "GPU2"].endswith("!!")
    assert found["GPU3", "mlx5_3"] == "PIX"
    assert found["GPU3", "GPU3"] == "X"


def test_faults_are_red_and_marked(monkeypatch):
    text = matrix(m.isolate(m.h100(), 2), 200, monkeypatch, colour=True)
    assert "\x1b[1;31mNODE!!" in text
    assert "\x1b[32mNV18" in text
    assert "\x1b" not in matrix(m.isolate(m.h100(), 2), 200, monkeypatch)


def test_no_color_takes_the_colours_and_leaves_the_marks(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    (machine,) = read_texts([("t", m.topo_m(m.isolate(m.h100(), 2)))]).machines
    out = io.StringIO()
    print_matrix(machine, check_machine(machine), Console(file=out, width=120, force_terminal=True))
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", out.getvalue())
    assert "NODE!!" in out.getvalue()


def test_a_weak_pair_alone_is_marked(monkeypatch):
    found = cells(matrix(m.weaken(m.h100(), 1, 5), 200, monkeypatch))
    marked = {pair for pair, cell in found.items() if "!" in cell}
    assert marked == {("GPU1", "GPU5"), ("GPU5", "GPU1")}


def test_two_gpus_of_a_mesh_that_lack_links_lack_those_between_them(monkeypatch):
    found = cells(matrix(m.weaken(m.dgx1(), 0, 3), 200, monkeypatch))
    assert {pair for pair, cell in found.items() if "!" in cell} == {("GPU0", "GPU3"), ("GPU3", "GPU0")}
