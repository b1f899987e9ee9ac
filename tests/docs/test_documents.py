"""Documents are tested: their commands run, their links exist, their programs compile, their figures are committed."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import wsync

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_python_block_compiles_and_names_what_exists(path):
    for block in blocks(path, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "wsync":
                assert node.attr in wsync.__all__, node.attr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_make_target_exists(path):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", path.read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_wsync_command_in_the_readme_is_known():
    text = (ROOT / "README.md").read_text()
    commands = {m.split()[0] for m in re.findall(r"`wsync ([a-z][^`]*)`", text)}
    assert commands
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "wsync.cli.main", command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.multiproc
def test_the_plain_loop_example_gives_the_engine_the_trainers_weights(tmp_path):
    shutil.copy(ROOT / "examples" / "plain_loop.py", tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "wsync.cli.main", "keygen", "wsync.key"], cwd=tmp_path, check=True)
    command = [sys.executable, "plain_loop.py"]
    engine = subprocess.Popen([*command, "engine"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        trainer = subprocess.run(
            [*command, "trainer"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
            check=True,
        )
        engine_out = engine.communicate(timeout=60)[0]
    finally:
        engine.kill()
        engine.wait()
    sums = re.findall(r"checksum (\S+)", trainer.stdout + engine_out)
    assert len(sums) == 2
    assert sums[0] == sums[1]
    assert trainer.stdout.count("('engine-0',) serve version") == 3


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("e2e_qwen3_0.6b", "README.md"),
        ("vllm_qwen3_0.6b", "README.md"),
        ("vllm_qwen3_0.6b", "docs/guides/vllm.md"),
        ("delta_training", "docs/measurement.md"),
        ("kernels_cpu", "docs/measurement.md"),
        ("shootout", "docs/guides/plan.md"),
        ("planning", "docs/measurement.md"),
        ("topo", "docs/measurement.md"),
        ("simulator", "docs/guides/simulate.md"),
    ],
)
def test_a_table_in_a_document_is_that_of_the_committed_record(name, document):
    from wsync.bench.markdown import splice, table_in

    record = ROOT / "bench" / "records" / f"{name}.json"
    title, table = table_in(record)
    found = json.loads(record.read_text())
    verdicts = [b["extra_info"].get("verdict", "ok") for b in found.get("benchmarks", [])] or [found["verdict"]]
    assert set(verdicts) == {"ok"}
    text = (ROOT / document).read_text()
    assert splice(text, table, title) == text


def test_the_example_spends_about_ten_lines_on_wsync():
    text = (ROOT / "examples" / "plain_loop.py").read_text()
    body = text.split('"""', 2)[2]
    used = [line for line in body.splitlines() if re.search(r"wsync|source|sink|publication|report|ticket", line)]
    assert len(used) <= 12
