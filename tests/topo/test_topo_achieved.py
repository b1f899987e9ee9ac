"""``wsync topo achieved``: a publish against its prediction."""

from __future__ import annotations

import json
from pathlib import Path

import machines as m
import msgspec
import pytest

from wsync.cli.main import main
from wsync.describe import describe_sink, describe_source, load_model
from wsync.errors import ConfigError, FormatVersionError
from wsync.plan import encode_plan, make_plan
from wsync.plan.timing import LinkLoad
from wsync.session.messages import RankStamps, Stamp
from wsync.session.report import PublishReport
from wsync.spec.serde import FORMAT_VERSION
from wsync.topo.achieved import Prediction, compare_run, decode_prediction, decode_runs

RECORD = Path(__file__).parents[2] / "bench" / "records" / "e2e_qwen3_0.6b.json"
LINKS = (
    LinkLoad("sending of trainer rank 0 to other nodes", 50_000_000_000, 1.0),
    LinkLoad("nic 0 of node engine-0 in", 25_000_000_000, 0.9),
    LinkLoad("NVLink of sink 1 in", 25_000_000_000, 0.1),
)
REAL = (
    '{"version":3,"committed":["engine-0"],"dropped":{},"replicas":{"engine-0":"committed"},"seconds":{"total"'
    ':0.008958988000813406,"stall":0.0012205029997858219,"receive":0.00011970700143137947,"verify":0.000030635'
    '0011669565,"repack":6.549998943228275e-6,"decide":0.005963406001683325,"install":0.00006500599920400418,"'
    'finish":5.156998668098822e-6,"pause":0.006033568999555428,"pack":0.0002795450018311385,"flush":4.03600279'
    '2418003e-6},"logical_bytes":67588,"wire_bytes":67588,"sink_bytes":67588,"staging_bytes":4194304,"ranks":['
    '["engine-0/0",[["receive",18987.125804198,18987.125923905],["verify",18987.125897555998,18987.125928191],'
    '["repack",18987.125930945,18987.125937495],["decide",18987.126123861,18987.132087267],["install",18987.13'
    '2100416,18987.132165422],["finish",18987.132168888,18987.132174045]]],["trainer/0",[["pack",18987.1254888'
    '05,18987.12576835],["flush",18987.126004419,18987.126008455]]]],"sent":[0,0,0,0,0,0],"is_delta":false}'
)
"""What a publish of ``examples/plain_loop.py`` reported: one trainer and one engine on one host."""
PREDICTION = Prediction(1.1, 50_000_000_000, LINKS)


def report(
    wire_s: float, *, pack_s: float = 0.1, install_s: float = 0.05, slow_sink: float = 1.0, nbytes=50_000_000_000
):
    trainer = (Stamp("pack", 5.0, 5.0 + pack_s), Stamp("flush", 5.0 + pack_s, 5.0 + wire_s))
    ranks = [RankStamps("trainer/0", trainer)]
    for i in range(4):
        receive = wire_s * (slow_sink if i == 1 else 1.0)
        stamps = (Stamp("receive", 900.0, 900.0 + receive), Stamp("install", 950.0, 950.0 + install_s))
        ranks.append(RankStamps(f"engine/{i}", stamps))
    total = wire_s * max(slow_sink, 1.0) + install_s
    return PublishReport(3, ("engine",), {}, {"engine": "committed"}, {"total": total}, nbytes, nbytes, 2 * nbytes, 0,
                         tuple(ranks))  # fmt: skip


def run_of(value: PublishReport):
    (run,) = decode_runs(msgspec.json.encode(value), "r.json")
    return run


def test_a_publish_as_fast_as_predicted_is_good():
    found = compare_run(run_of(report(1.15)), PREDICTION)
    assert (found.verdict, found.bound, found.losses) == ("OK", "links", ())
    assert found.wire_gbps == pytest.approx(50 / 1.15)
    by_name = {link.name: link for link in found.links}
    assert by_name["sending of trainer rank 0 to other nodes"].achieved_gbps == pytest.approx(50 / 1.15, abs=0.01)
    assert by_name["nic 0 of node engine-0 in"].share == pytest.approx(0.9 / 1.15, abs=0.01)


def test_below_half_the_links_are_not_the_reason():
    found = compare_run(run_of(report(6.0, pack_s=5.0)), PREDICTION)
    assert (found.verdict, found.bound) == ("WARN", "software")
    assert found.losses[0].startswith("software bound: the wire takes 18%")
    assert "the longest of its phases is pack (5 s)" in found.losses[0]


def test_a_rank_that_is_slower_than_its_peers_is_named_and_its_link_too():
    found = compare_run(run_of(report(1.1, slow_sink=1.6)), PREDICTION)
    assert found.verdict == "WARN"
    assert any("engine/1 takes 1.76 s to receive, the usual rank 1.1 s" in loss for loss in found.losses)
    shares = {link.name: link.share for link in found.links}
    assert shares["NVLink of sink 1 in"] == pytest.approx(0.1 / 1.76, abs=0.01)
    assert shares["sending of trainer rank 0 to other nodes"] == pytest.approx(1.0 / 1.1, abs=0.01)


def test_what_passes_outside_of_the_wire_is_named_by_phase():
    found = compare_run(run_of(report(1.1, install_s=0.7)), PREDICTION)
    assert found.verdict == "OK"
    assert any("0.7 of 1.8 s pass outside of the wire" in loss and "install 0.7 s" in loss for loss in found.losses)


def test_a_delta_is_compared_by_the_byte():
    found = compare_run(run_of(report(0.22, nbytes=10_000_000_000)), PREDICTION)
    assert (found.verdict, found.predicted_s) == ("OK", pytest.approx(0.22))
    assert "0.2 times the plan's bytes" in found.losses[0]


def test_the_report_of_a_real_publish_is_read():
    (run,) = decode_runs(REAL.encode(), "report.json")
    assert list(run.ranks) == ["engine-0/0", "trainer/0"]
    assert run.wire_bytes == 67588
    found = compare_run(run, PREDICTION)
    assert found.bound == "software"
    assert any("decide 0.00596 s" in loss for loss in found.losses)


def test_a_publish_that_did_not_use_the_links_is_told():
    found = compare_run(run_of(report(0.2)), PREDICTION)
    assert (found.verdict, "did not go over them" in found.losses[0]) == ("OK", True)


def test_a_recorded_benchmark_is_read_row_by_row():
    runs = decode_runs(RECORD.read_bytes(), "record")
    assert [r.name for r in runs] == ["bf16", "fp8_block128", "fp8_block128_f32"]
    assert runs[0].wire_bytes == 1192099840
    assert {"trainer/0", "engine/0"} <= set(runs[0].ranks)
    assert 0 < runs[0].wire_s < runs[0].total_s


@pytest.fixture
def plan(tmp_path):
    node = tmp_path / "node"
    node.write_text(m.topo_m(m.h100()))
    path = tmp_path / "plan.json"
    layouts = ["--trainer", "fsdp=8", "--engine", "tp=8", "--model", "Qwen3-0.6B"]
    assert main(["topo", "plan", str(node), *layouts, "--json", str(path)]) == 0
    return path


def test_the_command_compares_a_benchmark_with_a_plan(plan, capsys):
    capsys.readouterr()
    assert main(["topo", "achieved", str(RECORD), "--plan", str(plan)]) == 1
    out = capsys.readouterr().out
    # A laptop's loopback is far below eight NICs.
    assert "bf16: " in out
    assert "bound by software" in out
    assert main(["topo", "achieved", str(RECORD), "--plan", str(plan), "--json"]) == 1
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["bf16", "fp8_block128", "fp8_block128_f32"]


def test_the_command_is_content_with_what_was_predicted(plan, tmp_path, capsys):
    predicted = decode_prediction(plan.read_bytes(), "plan")
    path = tmp_path / "report.json"
    good = report(predicted.time_s, pack_s=0.0, install_s=0.0, nbytes=predicted.wire_bytes)
    path.write_bytes(msgspec.json.encode(good))
    assert main(["topo", "achieved", str(path), "--plan", str(plan)]) == 0
    assert "OK report.json" in capsys.readouterr().out


def test_a_prediction_without_layouts_has_its_senders_as_the_only_link(tmp_path):
    node, path = tmp_path / "node", tmp_path / "plan.json"
    node.write_text(m.topo_m(m.h100()))
    assert main(["topo", "plan", str(node), "--bytes", "1e10", "--json", str(path)]) == 0
    found = decode_prediction(path.read_bytes(), "plan")
    assert [link.name for link in found.links] == ["NICs that the senders reach"]


def test_an_encoded_plan_predicts_too_though_not_link_by_link(tmp_path, capsys):
    model = load_model("Qwen3-0.6B")
    sides = describe_source(model, "fsdp=2", ["a"] * 2), describe_sink(model, "tp=2", ["b"] * 2, "bf16")
    plan = make_plan(*sides)
    path, told = tmp_path / "plan.bin", tmp_path / "report.json"
    path.write_bytes(encode_plan(plan))
    for times, status in ((1.0, 0), (3.0, 1)):
        good = report(times * plan.time_s, pack_s=0.0, install_s=0.0, nbytes=plan.wire_bytes)
        told.write_bytes(msgspec.json.encode(good))
        assert main(["topo", "achieved", str(told), "--plan", str(path), "--json"]) == status
        (found,) = json.loads(capsys.readouterr().out)
        assert found["predicted_s"] == pytest.approx(plan.time_s)
        assert [link["name"] for link in found["links"]] == ["all of it (host memory of node b)"]


def test_what_is_no_report_is_named(plan, tmp_path):
    for data, message in ((b"{", "truncated"), (b"[]", "JSON of a list"), (b"{}", "no report of a publish")):
        with pytest.raises(ConfigError, match=message):
            decode_runs(data, "r")
    with pytest.raises(FormatVersionError, match="version 9"):
        decode_prediction(b'{"format_version": 9}', "p")
    with pytest.raises(ConfigError, match="not what `wsync topo plan --json` writes"):
        decode_prediction(b'{"format_version": 1}', "p")
    for data in (b"", b"[]", b"GPU0 GPU1", msgspec.msgpack.encode({"format_version": FORMAT_VERSION})):
        with pytest.raises(ConfigError, match="p is neither what `wsync topo plan --json` writes nor an encoded plan"):
            decode_prediction(data, "p")
    with pytest.raises(FormatVersionError):
        decode_prediction(msgspec.msgpack.encode({"format_version": 99}), "p")
    assert main(["topo", "achieved", str(tmp_path / "no"), "--plan", str(plan)]) == 3
    with pytest.raises(ConfigError, match="moved 0 bytes"):
        compare_run(run_of(report(1.0, nbytes=0)), PREDICTION)
