"""What users of the command line rely on."""

import argparse
import os
import subprocess
import sys

import pytest

from wsync import __version__
from wsync.cli.main import build_parser, main

OPTIONS = {
    "wsync": {"--debug", "--help", "--version", "-h"},
    "wsync bench": {"--help", "-h"},
    "wsync bench e2e": {
        "--baselines",
        "--chart",
        "--config",
        "--deadline",
        "--engines",
        "--fault",
        "--help",
        "--json",
        "--preset",
        "--quantise-on",
        "--recipes",
        "--repeats",
        "--trace",
        "--trainers",
        "--transport",
        "--workdir",
        "-h",
    },
    "wsync bench vllm": {
        "--clients",
        "--config",
        "--deadline",
        "--fault",
        "--help",
        "--json",
        "--modes",
        "--preset",
        "--repeats",
        "--transport",
        "-h",
    },
    "wsync describe": {
        "--dtype",
        "--engine",
        "--gpus",
        "--gpus-per-node",
        "--help",
        "--host-prefix",
        "--hosts",
        "--json",
        "--list",
        "--memory",
        "--mtp",
        "--output",
        "--recipe",
        "--trainer",
        "-h",
        "-o",
    },
    "wsync doctor": {"--help", "--json", "-h"},
    "wsync keygen": {"--help", "-h"},
    "wsync plan": {
        "--bucket-bytes",
        "--cluster",
        "--density",
        "--explain",
        "--help",
        "--json",
        "--no-relay",
        "--output",
        "-h",
        "-o",
    },
    "wsync simulate": {
        "--chart",
        "--detect",
        "--fail",
        "--help",
        "--install",
        "--jitter",
        "--json",
        "--list",
        "--seed",
        "--straggler",
        "--trace",
        "--without",
        "-h",
    },
    "wsync topo": {"--help", "-h"},
    "wsync topo check": {
        "--exit-style",
        "--fail-on",
        "--help",
        "--host",
        "--json",
        "--junit",
        "--live",
        "--matrix",
        "--nagios",
        "--platform",
        "--png",
        "--prometheus",
        "--quiet",
        "--root",
        "--svg",
        "--timeout",
        "-h",
    },
    "wsync topo save": {"--help", "--host", "--live", "--output", "--root", "--timeout", "-h", "-o"},
    "wsync topo compare": {"--exit-style", "--fail-on", "--help", "--json", "-h"},
    "wsync topo golden": {"--help", "-h"},
    "wsync topo golden save": {"--help", "--host", "--live", "--output", "--root", "--timeout", "-h", "-o"},
    "wsync topo golden check": {"--exit-style", "--fail-on", "--help", "--json", "-h"},
    "wsync topo golden diff": {"--exit-style", "--fail-on", "--help", "--json", "-h"},
    "wsync topo lint": {"--env", "--exit-style", "--fail-on", "--help", "--json", "--machine", "--sysfs", "-h"},
    "wsync topo advise": {
        "--export",
        "--fabric",
        "--help",
        "--host",
        "--json",
        "--live",
        "--platform",
        "--root",
        "--timeout",
        "-h",
    },
    "wsync topo plan": {
        "--bytes",
        "--collective",
        "--engine",
        "--engine-nodes",
        "--help",
        "--json",
        "--measured",
        "--model",
        "--nic-gbit",
        "--nodes",
        "--nvlink-domain",
        "--output",
        "--plan",
        "--platform",
        "--recipe",
        "--relay",
        "--senders",
        "--trainer",
        "-h",
        "-o",
    },
    "wsync topo import-bandwidth": {"--exit-style", "--fail-on", "--gpu", "--help", "--json", "-h"},
    "wsync topo achieved": {"--exit-style", "--fail-on", "--help", "--json", "--plan", "-h"},
}
"""Frozen: an option may be added here on purpose, and never be taken away."""


def options_of(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    found = {parser.prog: {text for action in parser._actions for text in action.option_strings}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found.update(options_of(child))
    return found


def test_no_option_comes_or_goes_by_accident():
    assert options_of(build_parser()) == OPTIONS


@pytest.mark.parametrize("argv", [["--help"], ["bench", "--help"], ["bench", "e2e", "--help"], ["doctor", "--help"]])
def test_help_works_without_importing_torch(argv):
    code = (
        "import sys\n"
        "from wsync.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as e:\n    sys.exit(e.code or ('torch' in sys.modules) or ('transformers' in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: wsync" in done.stdout


def test_help_lists_the_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "exit status" in text
    assert "--fault" not in text


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--version"])
    assert e.value.code == 0
    assert capsys.readouterr().out == f"wsync {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bench", "e2e", "--recipes", "fp9"], "'fp9' is unknown; known are bf16"),
        (["bench", "e2e", "--recipes", "bf16,nvfp4"], "holds bf16, fp8_block128, fp8_block128_f32, but recipe 'nvfp4'"),
        (["bench", "e2e", "--baselines", "floppy"], "'floppy' is unknown; known are disk"),
        (["bench", "e2e", "--trainers", "0"], "--trainers is 0"),
        (["bench", "e2e", "--deadline", "-1"], "--deadline is -1"),
        (["bench", "e2e", "--config", "/nowhere/config.json"], "cannot be read: No such file"),
        (["bench", "e2e", "--workdir", "/nowhere"], "/nowhere is not a folder"),
        (["bench", "e2e", "--json", "/nowhere/r.json"], "--json /nowhere/r.json: the folder /nowhere does not exist"),
        (["bench", "e2e", "--chart", "/nowhere/r.png"], "--chart"),
    ],
)
def test_mistakes_are_named_on_stderr_without_a_traceback(argv, words, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert words in captured.err.replace("\n", " ")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("argv", [[], ["bench"], ["fly"], ["bench", "e2e", "--repeat", "3"], ["doctor", "--wings"]])
def test_usage_errors_end_with_status_two(argv, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    assert capsys.readouterr().out == ""


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="fp9"):
        main(["--debug", "bench", "e2e", "--recipes", "fp9"])


@pytest.mark.parametrize(
    ("option", "target", "words"),
    [
        ("--json", ".", "cannot be written"),
        ("--trace", "/proc/nothing.json", "cannot be written"),
        ("--chart", "chart.txt", "must end in .png"),
        ("--json", "no/such/folder/r.json", "does not exist"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_run(tmp_path, option, target, words):
    command = [sys.executable, "-m", "wsync.cli.main", "bench", "e2e", option, target]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_key_file_in_a_missing_folder_is_a_named_error(tmp_path):
    command = [sys.executable, "-m", "wsync.cli.main", "keygen", str(tmp_path / "no" / "k")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def run_into(stdout, argv):
    """Exit status and what stderr got."""
    command = [sys.executable, "-m", "wsync.cli.main", *argv]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("argv", [["simulate", "--list"], ["simulate", "--list", "--json"], ["describe", "--list"]])
def test_data_that_cannot_be_written_are_a_named_error(argv):
    with open("/dev/full", "w") as full:
        assert run_into(full, argv) == (2, "error: stdout cannot be written: No space left on device\n")


@pytest.mark.parametrize("argv", [["simulate", "--list"], ["simulate", "--list", "--json"]])
def test_a_reader_that_has_gone_is_no_error(argv):
    reader, writer = os.pipe()
    os.close(reader)
    assert run_into(writer, argv) == (0, "")
    os.close(writer)
