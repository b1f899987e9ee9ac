"""The worked example of ``docs/guides/plan.md``: its commands run, and print the figures that it shows."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from wsync.cli.main import main
from wsync.plan import decode_plan

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "plan.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.S)


def figures_of(text):
    """The rows of the summary, without rulers and padding; what differs from machine to machine is not in them."""
    names = "predicted|lower bound|score|bound with.*?|on the wire|needed|delivered.*?"
    rows = re.findall(rf"│ ({names}) *│ *(.*?) *│ *(.*?) *│", text)
    return "\n".join(["| | | |", "|---|---:|---|", *(f"| {' | '.join(row)} |" for row in rows)])


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each command of the guide prints."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "cluster.json").write_text(blocks("json")[0])
    out = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in "".join(blocks("sh")).splitlines():
            out[line] = _run(shlex.split(line)[1:])
    return folder, out


def _run(arguments):
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert main(arguments) == 0
    return stdout.getvalue()


def test_the_figures_of_the_guide_are_what_the_commands_print(printed):
    text = next(text for line, text in printed[1].items() if line.endswith("-o kimi.plan"))
    shown = re.search(r"<!-- figures: plan -->\n(.*?)<!-- end: plan -->", GUIDE.read_text(), re.S)
    assert shown[1].strip() == figures_of(text)


def test_the_plan_that_the_guide_writes_can_be_read(printed):
    folder, _ = printed
    plan = decode_plan((folder / "kimi.plan").read_bytes())
    assert (plan.num_sources, plan.num_sinks) == (256, 128)
    assert plan.score < 1.05


def test_explaining_the_guides_tensor_ends_in_the_engines_stacked_experts(printed):
    text = next(text for line, text in printed[1].items() if "--explain" in line)
    assert "trainer rank" in text
    assert "w13_weight" in text
