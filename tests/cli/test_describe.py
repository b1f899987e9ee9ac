"""``wsync describe``: files, tables, JSON, and what is refused without writing anything."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tracemalloc

import pytest

from wsync import __version__
from wsync.cli.describe_hosts import parse_gpus
from wsync.cli.main import main
from wsync.describe import describe_sink, describe_source, load_model, load_sink, load_source
from wsync.errors import ConfigError

TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 16,
}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def run(*argv):
    return main(["describe", *map(str, argv)])


def json_of(capsys, *argv):
    assert run(*argv, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def refused(capsys, *argv):
    """What stderr says of a command line that is refused; nothing goes to stdout."""
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err


# ---- what is written


def test_a_trainers_file_is_its_manifest(capsys, tmp_path, model):
    found = json_of(capsys, model, "--trainer", "fsdp=2,tp=2", "--gpus-per-node", 2, "-o", tmp_path / "out")
    expected = describe_source(load_model(model), "fsdp=2,tp=2", ["t0", "t0", "t1", "t1"])
    assert load_source(tmp_path / "out") == expected
    assert found["manifest"] == str(tmp_path / "out")
    assert found["manifest_bytes"] == (tmp_path / "out").stat().st_size


def test_an_engines_file_is_its_manifest(capsys, tmp_path, model):
    arguments = ("--engine", "tp=2,ep=2,replicas=2", "--recipe", "fp8_channel", "--host-prefix", "node-")
    json_of(capsys, model, *arguments, "--gpus-per-node", 3, "-o", tmp_path / "out")
    hosts = ["node-0"] * 3 + ["node-1"]
    assert load_sink(tmp_path / "out") == describe_sink(load_model(model), "tp=2,ep=2,replicas=2", hosts, "fp8_channel")


def test_the_json_has_the_sums_of_the_manifest(capsys, model):
    found = json_of(capsys, model, "--engine", "ep=2,replicas=2", "--gpus-per-node", 1)
    assert found.keys() == {
        "format_version",
        "wsync",
        "model",
        "side",
        "layout",
        "recipe",
        "memory",
        "summary",
        "manifest",
        "manifest_bytes",
    }
    assert (found["format_version"], found["wsync"]) == (1, __version__)
    assert (found["side"], found["layout"], found["recipe"]) == ("engine", "ep=2,replicas=2", "bf16")
    shape = load_model(model)
    sizes = {"num_tensors": len(shape.tensors), "num_parameters": shape.num_parameters, "nbytes": shape.nbytes}
    assert found["model"].items() >= sizes.items()
    sink = describe_sink(shape, "ep=2,replicas=2", ["h"] * 4, "bf16")
    received = [sum(2 * c.box.num_elements for c in rank.copies) for rank in sink.ranks]
    summary = found["summary"]
    assert (summary["num_ranks"], summary["num_hosts"], summary["num_rank_classes"]) == (4, 4, 2)
    assert (summary["rank_bytes_min"], summary["rank_bytes_max"]) == (min(received), max(received))
    assert summary["total_bytes"] == sum(received)
    assert summary["bytes_by_dtype"] == {"bfloat16": shape.nbytes}
    assert summary["num_tensors"] == len(shape.tensors)


def test_a_trainers_sums_are_those_of_its_boxes(capsys, model):
    summary = json_of(capsys, model, "--trainer", "fsdp=3,replicate=2", "--dtype", "float32")["summary"]
    source = describe_source(load_model(model), "fsdp=3,replicate=2", ["h"] * 6, "float32")
    held = [sum(4 * b.num_elements for s in source.shards for b in s[rank]) for rank in range(6)]
    assert (summary["rank_bytes_min"], summary["rank_bytes_max"]) == (min(held), max(held))
    assert summary["total_bytes"] == sum(held) == 2 * load_model(model).nbytes * 2
    assert summary["num_boxes"] == sum(len(boxes) for s in source.shards for boxes in s)
    assert summary["num_rank_classes"] == 3
    kinds = {(t.shape, t.dtype, s) for t, s in zip(source.tensors, source.shards, strict=True)}
    assert summary["num_classes"] == len(kinds)


def test_the_table_says_what_the_json_says(capsys, model):
    assert run(model, "--engine", "tp=2", "--recipe", "fp8_channel") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("wsync describe tiny", "tp=2 in fp8_channel: 2 ranks on 1 hosts", "float8_e4m3fn", "a rank receives"):
        assert text in out


def test_a_model_alone_has_no_side(capsys, model):
    found = json_of(capsys, model)
    assert (found["side"], found["summary"], found["manifest"]) == (None, None, None)
    assert found["model"]["source"] == str(model / "config.json")


def test_json_goes_to_a_file_beside_the_table(capsys, tmp_path, model):
    assert run(model, "--trainer", "fsdp=2", "--json", tmp_path / "out.json") == 0
    assert "wsync describe tiny" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["side"] == "trainer"


def test_the_list_has_every_built_in_model_with_its_source(capsys):
    found = json_of(capsys, "--list")
    assert (found["format_version"], found["wsync"]) == (1, __version__)
    by_name = {m["name"]: m for m in found["models"]}
    needed = "Qwen3-0.6B Qwen3-32B Qwen3-30B-A3B Qwen3-235B-A22B DeepSeek-V3 Kimi-K2 GLM-4.5 Llama-3-8B Llama-3-70B"
    assert by_name.keys() >= {*needed.split(), "Llama-3-405B", "gpt-oss-120b", "Magistral-Small"}
    assert by_name["Kimi-K2"]["num_parameters"] == 1_026_408_232_448
    assert all(m["source"].startswith("https://huggingface.co/") for m in found["models"])
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in by_name)


def test_with_mtp_there_are_more_tensors(capsys):
    without, with_mtp = (json_of(capsys, "GLM-4.5", *more)["model"]["num_tensors"] for more in ((), ("--mtp",)))
    assert with_mtp > without


# ---- hosts


def test_hosts_come_from_a_file_by_node_or_by_rank(capsys, tmp_path, model):
    file = tmp_path / "hosts"
    file.write_text("# nodes\na\n\n b \n")
    arguments = (model, "--trainer", "fsdp=4", "--hosts", file, "--gpus-per-node", 2, "-o", tmp_path / "out")
    json_of(capsys, *arguments)
    assert [r.host for r in load_source(tmp_path / "out").ranks] == ["a", "a", "b", "b"]
    file.write_text("a\nb\nc\nd\n")
    json_of(capsys, *arguments)
    assert [r.host for r in load_source(tmp_path / "out").ranks] == ["a", "b", "c", "d"]


def test_a_file_of_hosts_says_how_many_data_parallel_ranks_there_are(capsys, tmp_path, model):
    file = tmp_path / "hosts"
    file.write_text("\n".join("abcdef"))
    assert json_of(capsys, model, "--trainer", "tp=2", "--hosts", file)["summary"]["num_ranks"] == 6


@pytest.mark.parametrize(
    ("lines", "said"),
    [("a\nb\nc", "has 4 ranks .*, but 3 hosts"), ("a", "has 1 hosts, but the layout has 4 ranks on 2 nodes of 2")],
)
def test_hosts_that_are_not_as_many_as_ranks_or_nodes_are_refused(capsys, tmp_path, model, lines, said):
    (tmp_path / "hosts").write_text(lines)
    err = refused(capsys, model, "--trainer", "fsdp=4", "--gpus-per-node", 2, "--hosts", tmp_path / "hosts")
    assert re.search(said, err), err


def test_hosts_that_are_no_list_are_refused(capsys, tmp_path, model):
    arguments = (model, "--trainer", "fsdp=4", "--hosts", tmp_path / "hosts")
    assert "cannot be read" in refused(capsys, *arguments)
    (tmp_path / "hosts").write_bytes(b"\xff\xfe\x00")
    assert "is not a list of hosts" in refused(capsys, *arguments)
    assert "both name the hosts" in refused(capsys, *arguments, "--host-prefix", "t")


# ---- GPUs


def places(manifest):
    infos = [getattr(rank, "info", rank) for rank in manifest.ranks]
    return [(i.host, i.gpu) for i in infos]


def test_without_a_word_of_gpus_the_planner_chooses(capsys, tmp_path, model):
    json_of(capsys, model, "--trainer", "fsdp=4", "-o", tmp_path / "out")
    assert places(load_source(tmp_path / "out")) == [("t0", None)] * 4


def test_gpus_of_every_host_make_as_many_ranks_there(capsys, tmp_path, model):
    json_of(capsys, model, "--engine", "tp=2,replicas=2", "--gpus", "6,4-5", "-o", tmp_path / "out")
    assert places(load_sink(tmp_path / "out")) == [("e0", 6), ("e0", 4), ("e0", 5), ("e1", 6)]


def test_a_file_lists_the_gpus_of_hosts_that_are_used_in_part(capsys, tmp_path, model):
    file = tmp_path / "hosts"
    arguments = (model, "--trainer", "fsdp=6", "--hosts", file, "--gpus-per-node", 2, "-o", tmp_path / "out")
    file.write_text("# the upper half\na:2-3\n b:7,5 \nc\n")
    json_of(capsys, *arguments)
    expected = [("a", 2), ("a", 3), ("b", 7), ("b", 5), ("c", 0), ("c", 1)]
    assert places(load_source(tmp_path / "out")) == expected
    file.write_text("\n".join(f"{host}:{gpu}" for host, gpu in reversed(expected)))
    json_of(capsys, *arguments)
    assert places(load_source(tmp_path / "out")) == expected[::-1]
    file.write_text("a:0-1\nb\nc\n")
    json_of(capsys, *(x for x in arguments if x not in ("--gpus-per-node", 2)), "--gpus", "2,6")
    assert places(load_source(tmp_path / "out"))[2:] == [("b", 2), ("b", 6), ("c", 2), ("c", 6)]


def test_a_file_with_gpus_says_how_many_data_parallel_ranks_there_are(capsys, tmp_path, model):
    (tmp_path / "hosts").write_text("a:4-7\nb:0-1\n")
    assert json_of(capsys, model, "--trainer", "tp=2", "--hosts", tmp_path / "hosts")["summary"]["num_ranks"] == 6


def test_an_address_with_colons_is_a_host(capsys, tmp_path, model):
    (tmp_path / "hosts").write_text("fe80::1\nfe80::2\n")
    json_of(capsys, model, "--trainer", "fsdp=2", "--hosts", tmp_path / "hosts", "-o", tmp_path / "out")
    assert places(load_source(tmp_path / "out")) == [("fe80::1", None), ("fe80::2", None)]


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        ("a:0,3,1-3", (), "hosts, line 1 lists GPU 3 twice"),
        ("# two\na:0-1\nb:1\na:1-2", (), "hosts lists GPU 1 of host 'a' twice"),
        ("a:0-1\na", (), "hosts lists GPU 0 of host 'a' twice"),
        ("a:0-2", (), "hosts lists 3 GPUs, but the layout has 4 ranks"),
        ("a:0-4", (), "has 4 ranks .*, but 5 hosts are given"),
        ("a:x", (), "hosts, line 1: 'x' is no list of GPUs, such as 4-7"),
        ("\na:", (), "hosts, line 2: '' is no list of GPUs"),
        (":1", (), "hosts, line 1: ':1' names no host"),
        ("a:7-4", (), "7-4 is no range of GPUs, allowed are indices from 0 to 4095, ascending"),
        ("a:0-999999", (), "0-999999 is no range of GPUs, allowed are indices from 0 to 4095"),
        ("a:\u0664", (), "is no list of GPUs"),
        (None, ("--gpus", "4-"), "--gpus 4-: '4-' is no list of GPUs"),
        (None, ("--gpus", ""), "--gpus : '' is no list of GPUs"),
        (None, ("--gpus", "1,1"), "--gpus 1,1 lists GPU 1 twice"),
        (None, ("--gpus", "4-7", "--gpus-per-node", "8"), "lists 4 GPUs of a host, but --gpus-per-node is 8"),
    ],
)
def test_gpus_that_cannot_be_are_refused(capsys, tmp_path, model, lines, options, said):
    if lines is not None:
        (tmp_path / "hosts").write_text(lines)
        options = ("--hosts", tmp_path / "hosts")
    err = refused(capsys, model, "--trainer", "fsdp=4", *options, "-o", tmp_path / "out")
    assert re.search(said, err), err
    assert not (tmp_path / "out").exists()


# ---- memory


@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_memory_of_the_host_is_said_of_every_rank(capsys, tmp_path, model, side):
    layout = "fsdp=2" if side == "trainer" else "tp=2"
    load = load_source if side == "trainer" else load_sink
    for options, memory in (((), "device"), (("--memory", "device"), "device"), (("--memory", "host"), "host")):
        found = json_of(capsys, model, f"--{side}", layout, *options, "-o", tmp_path / "out")
        assert found["memory"] == memory
        infos = [getattr(rank, "info", rank) for rank in load(tmp_path / "out").ranks]
        assert {info.memory for info in infos} == {memory}
    assert run(model, f"--{side}", layout, "--memory", "host") == 0
    assert re.search(
        "│ memory .* the host's: .* PCIe to be " + ("packed" if side == "trainer" else "installed"),
        capsys.readouterr().out,
    )
    assert json_of(capsys, model)["memory"] is None


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "describe needs a MODEL"),
        (("Qwen9",), "'Qwen9' is neither a built-in model nor a file"),
        (("Qwen3-0.6B", "-o", "out"), "a model alone has no manifest"),
        (("Qwen3-0.6B", "--trainer", "fsdp=2", "--recipe", "bf16", "-o", "out"), "--recipe bf16 is for --engine"),
        (("Qwen3-0.6B", "--engine", "tp=2", "--dtype", "float32", "-o", "out"), "--dtype float32 is for --trainer"),
        (("Qwen3-0.6B", "--trainer", "fsdp=2", "--gpus-per-node", "0", "-o", "out"), "--gpus-per-node is 0"),
        (("Qwen3-0.6B", "--memory", "host"), "--memory host is for --trainer or --engine"),
        (("Qwen3-0.6B", "--trainer", "tp=3", "-o", "out"), "number of heads is 16, which tp=3 does not divide"),
        (("Qwen3-0.6B", "--trainer", "fspd=3", "-o", "out"), "unknown key 'fspd'"),
        (("Qwen3-0.6B", "--trainer", "ep=2,dp=2", "-o", "out"), "has ep=2, but Qwen3-0.6B has 0 experts"),
        (("Qwen3-0.6B", "--trainer", "fsdp=2", "--dtype", "int8", "-o", "out"), "got 'int8'"),
        (("Qwen3-0.6B", "--engine", "tp=2", "--recipe", "fp9", "-o", "out"), "fp9"),
        (("Qwen3-0.6B", "--engine", "ep=2", "-o", "out"), "has ep=2, but Qwen3-0.6B has 0 experts"),
        (("GLM-4.5", "--engine", "tp=8", "--recipe", "fp8_block128", "-o", "out"), "tp=4,dp=2,ep=8 or tp=4,replicas=2"),
        (("Qwen3-0.6B", "--trainer", "fsdp=2", "-o", "missing/out"), "the folder"),
        (("Qwen3-0.6B", "--trainer", ""), "layout '' has the part '', which is not key=value"),
        (("Qwen3-0.6B", "--engine", "", "--json"), "layout '' has the part '', which is not key=value"),
        (("Qwen3-0.6B", "--trainer", "fsdp=2", "-o", ""), "-o needs the name of a file, got an empty one"),
        (("Qwen3-0.6B", "--json", ""), "--json needs the name of a file, got an empty one"),
        (("Qwen3-0.6B", "--trainer", "fsdp=\u0664"), "has fsdp=\u0664, allowed are whole numbers"),
        (("Qwen3-0.6B", "--trainer", "fsdp=" + "9" * 5000), "has 5005 characters, allowed are 1000"),
        (("Qwen3-0.6B", "--engine", "tp=" + "9" * 5000), "has 5003 characters, allowed are 1000"),
        (("Qwen3-0.6B", "--trainer", "fsdp=" + "9" * 900), "allowed are whole numbers from 1 to 1048576"),
        (("Qwen3-0.6B", "--trainer", "fsdp=1048576"), "has 1048576 ranks, allowed are 131072"),
        (("Qwen3-0.6B", "--trainer", "fsdp=1048576,tp=1048576"), "has 1099511627776 ranks, allowed are 131072"),
        (("Qwen3-0.6B", "--engine", "tp=8,dp=8,replicas=1048576"), "has 67108864 ranks, allowed are 131072"),
        (("x" * 300,), "cannot be read: File name too long"),
        (("Qwen3-0.6B", "--trainer", "fsdp=2", "--hosts", "/dev/zero"), "/dev/zero has 16777217 bytes or more"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values_and_nothing_is_written(
    capsys, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_more_tensors_than_any_model_has_is_refused(capsys, tmp_path):
    config = {**TINY, "num_hidden_layers": 1000, "num_experts": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    err = refused(capsys, tmp_path, "--trainer", "fsdp=2", "-o", tmp_path / "out")
    assert "1000 layers and 4096 experts" in err
    assert "tensors, allowed are 1048576" in err
    assert not (tmp_path / "out").exists()


def test_a_trainer_of_more_lists_of_boxes_than_memory_has_room_for_is_refused(capsys, monkeypatch, model):
    monkeypatch.setattr("wsync.describe.trainers.source.MAX_LISTS", 50)
    err = refused(capsys, model, "--trainer", "fsdp=16")
    assert "gives 16 ranks more than 3 lists of boxes each, allowed are 50 together" in err


def test_an_engine_of_more_copies_than_memory_has_room_for_is_refused(capsys, monkeypatch, model):
    monkeypatch.setattr("wsync.describe.engines.sink.MAX_COPIES", 50)
    err = refused(capsys, model, "--engine", "tp=2,dp=4")
    assert re.search(r"the first \d of the 8 ranks of a replica take \d+ copies, allowed are 50", err), err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "is not the JSON of a config"),
        ("config.json", b'{"model_type": "llama", "vocab_size": -1}', "vocab_size -1"),
        ("x.safetensors", struct.pack("<Q", 1 << 50) + b"{}", "1125899906842624 bytes itself"),
        ("x.safetensors", b"\0\0", "has 2 bytes"),
        ("model.safetensors.index.json", b"[]", "is not the index of a safetensors checkpoint"),
    ],
)
def test_a_broken_file_is_refused_and_an_older_manifest_stays(capsys, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "out").write_text("older")
    assert said in refused(capsys, tmp_path / name, "--trainer", "fsdp=2", "-o", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "older"
    assert {p.name for p in tmp_path.iterdir()} == {name, "out"}


def test_two_sides_at_once_are_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        run("Qwen3-0.6B", "--trainer", "fsdp=2", "--engine", "tp=2")
    assert caught.value.code == 2


def test_a_newer_file_is_a_usage_error():
    from wsync.cli.output import exit_status
    from wsync.errors import FormatVersionError

    assert exit_status(FormatVersionError("newer")) == 2


def test_a_built_in_model_needs_no_torch():
    code = (
        "import sys\nfrom wsync.cli.main import main\n"
        "assert main(['describe', 'Qwen3-0.6B', '--trainer', 'fsdp=2', '--json']) == 0\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_long_list_of_the_same_gpus_is_refused_before_it_is_spelt_out():
    text = ",".join(["0-4095"] * 2000)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="lists GPU 0 twice"):
            parse_gpus(text, "a file")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
