"""docs/guides/describe.md: its commands print what it shows, its tables list what the code knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wsync.cli.main import main
from wsync.describe.engines import KEYS
from wsync.describe.models.builtin import BUILTIN
from wsync.describe.trainers import TRAINERS

TEXT = (Path(__file__).parents[2] / "docs" / "guides" / "describe.md").read_text()
SESSIONS = re.findall(r"```console\n(.*?)```", TEXT, re.S)


def rows(heading):
    section = re.split(rf"^#+ {re.escape(heading)}$", TEXT, flags=re.M)[1]
    section = re.split(r"^#", section, flags=re.M)[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown(text):
    """Without the size of a file, which depends on the version of zlib, and what follows from its width."""
    lines = [line.rstrip() for line in text.strip().splitlines() if "│ manifest " not in line]
    return "\n".join(lines)


def test_there_are_commands():
    assert sum(session.count("$ wsync describe ") for session in SESSIONS) == 3


@pytest.mark.parametrize("session", SESSIONS)
def test_every_command_prints_what_the_document_shows(session, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    for part in re.split(r"^\$ wsync ", session, flags=re.M)[1:]:
        command, _, expected = part.partition("\n")
        status = main(command.split())
        out, err = capsys.readouterr()
        assert shown(out + err) == shown(expected)
        is_refused = expected.startswith("error: ")
        assert status == (2 if is_refused else 0)
        assert (tmp_path / command.split("-o ")[1]).exists() is not is_refused


def test_the_tables_of_keys_are_those_of_the_code():
    for heading, keys in (*TRAINERS.items(), ("Layouts of engines", KEYS)):
        assert {name.strip("`"): meaning for name, meaning in rows(heading)} == dict(keys)


def test_the_table_of_models_is_that_of_the_code():
    found = {row[0].strip("`"): row[1:] for row in rows("Models")}
    assert list(found) == list(BUILTIN)
    for name, (_, parameters, repo, confirmed) in found.items():
        model = BUILTIN[name]
        assert (int(parameters), repo, confirmed) == (model.num_parameters, f"`{model.repo}`", model.confirmed)
