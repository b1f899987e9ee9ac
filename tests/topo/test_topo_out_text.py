"""Nagios line, metrics, JUnit, JSON: what other programs read of a report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import machines as m
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import FIXTURES, needs_fixtures

from wsync.topo.findings import GUIDE, Finding, Subject, worst
from wsync.topo.model import Topology
from wsync.topo.parse import read_texts
from wsync.topo.render.junit import junit_xml
from wsync.topo.render.nagios import nagios_line
from wsync.topo.render.prometheus import METRICS, prometheus_text
from wsync.topo.render.summary import host_names, root_findings, verdict_from
from wsync.topo.report import REPORT_VERSION, MachineReport, Report, check_files, check_topology

GUIDE_TEXT = (Path(__file__).parents[2] / GUIDE).read_text()
NASTY = st.text(st.characters(), max_size=40)
FINDINGS = st.builds(
    Finding,
    st.sampled_from(["nvlink.gpu-isolated", "nic.down", "host.outlier", "input.incomplete"]),
    st.sampled_from(["INFO", "UNKNOWN", "WARN", "CRIT"]),
    st.builds(Subject, st.none() | NASTY, st.lists(NASTY, max_size=3).map(tuple)),
    NASTY,
    NASTY,
    NASTY,
)


@st.composite
def reports(draw):
    def machine():
        findings = tuple(draw(st.lists(FINDINGS, max_size=4)))
        return MachineReport(
            draw(st.none() | st.sampled_from(["a", "b"]) | NASTY), worst(findings), draw(st.booleans()), "h100-sxm",
            "switch", 18, 8, 8, ((0, 1),), (), {}, findings, ("x",),
        )  # fmt: skip

    machines = tuple(machine() for _ in range(draw(st.integers(0, 3))))
    between = tuple(draw(st.lists(FINDINGS, max_size=2)))
    return Report(worst([*between, *(f for x in machines for f in x.findings)]), machines, between)


def report_of(*boxes):
    machines = [read_texts([("t", m.topo_m(b))], f"n{i}").machines[0] for i, b in enumerate(boxes)]
    return check_topology(Topology(tuple(machines)))


# ---- Nagios


PERFDATA = re.compile(r"^[a-z_]+=\d+(;[\d.]*){0,4}$")


@settings(max_examples=200, deadline=None)
@given(reports())
def test_any_report_is_one_line_with_one_bar_and_readable_performance_data(report):
    line = nagios_line(report)
    assert line.isprintable() or not any(c in line for c in "\n\r\v\f\x85  ")
    text, bar, data = line.partition(" | ")
    assert bar
    assert "|" not in text + data
    assert re.match(r"TOPO (OK|WARNING|CRITICAL|UNKNOWN) - ", text)
    assert len(line.encode()) <= 4096
    assert all(PERFDATA.match(value) for value in data.split(" "))


def test_the_line_tells_the_worst_finding_first_and_counts_the_rest():
    line = nagios_line(report_of(m.h100(), m.isolate(m.h100(), 2), m.h100()))
    # That the host differs from others is no better news than what is wrong with it.
    assert line.startswith(
        "TOPO CRITICAL - n1 GPU2: nvlink.gpu-isolated: GPU2 reaches every other GPU over NODE and SYS"
    )
    assert "(+1 more)" in line
    values = dict(v.split("=") for v in line.partition(" | ")[2].split())
    assert values["hosts"].startswith("3;")
    assert values["hosts_not_ok"] == "1;;;0;3"
    assert values["crit"].split(";")[0] == "1"
    assert values["gpus"].startswith("24;")


def test_a_healthy_machine_says_what_was_looked_at():
    assert nagios_line(report_of(m.h100())).startswith("TOPO OK - 1 host, 8 GPUs, 10 NICs, nothing above INFO | ")


# ---- Prometheus

SAMPLE = re.compile(r'^([a-z_:][a-z0-9_:]*)(\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*\})? (-?\d+(?:\.\d+)?)$')


def samples(text):
    """Name, labels as written and value of each sample, by the rules of the text format."""
    found = []
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if not line.startswith("# "):
            match = SAMPLE.match(line)
            assert match, line
            found.append((match[1], match[2] or "", float(match[3])))
    return found


@settings(max_examples=200, deadline=None)
@given(reports(), st.floats(0, 4e9))
def test_any_report_gives_metrics_that_the_collector_takes(report, now_s):
    text = prometheus_text(report, now_s)
    found = samples(text)
    keys = [(name, labels) for name, labels, _ in found]
    assert len(set(keys)) == len(keys)
    assert {name for name, _ in keys} <= set(METRICS)
    names = [name for name, _ in keys]
    assert [n for i, n in enumerate(names) if i == 0 or names[i - 1] != n] == list(dict.fromkeys(names))


@settings(max_examples=100, deadline=None)
@given(reports(), st.floats(0, 4e9))
def test_the_clients_own_parser_reads_what_was_written(report, now_s):
    parser = pytest.importorskip("prometheus_client.parser")
    families = {f.name: f for f in parser.text_string_to_metric_families(prometheus_text(report, now_s))}
    assert set(families) == set(METRICS)
    assert all(f.type == "gauge" and f.documentation for f in families.values())
    names = host_names(report)
    verdicts = {s.labels["host"]: s.value for s in families["wsync_topo_verdict"].samples}
    wanted = {"OK": 0, "WARN": 1, "CRIT": 2, "UNKNOWN": 3}
    assert list(verdicts.values()) == [wanted[x.verdict] for x in report.machines]
    assert all(host.startswith(shown(name)) for host, name in zip(verdicts, names, strict=True))
    devices = {s.labels["devices"] for s in families["wsync_topo_finding"].samples}
    assert devices == {shown(" ".join(f.subject.devices)) for f in report.all_findings() if f.severity != "INFO"}


def shown(text):
    """What a label keeps of a text: no control character but the line feed."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", "\ufffd", text)


@pytest.mark.parametrize("char", ["\r", "\x00", "\x0b", "\x1b", "\x7f", "\x85", "\u2028", "\udcff"])
def test_no_control_character_of_a_name_reaches_a_label(char):
    """Each of them ends a line or the text for some reader, and a surrogate is no UTF-8."""
    machine = MachineReport(
        f"no{char}de", "CRIT", True, "h100-sxm", "switch", 18, 8, 8, (), (), {},
        (Finding("nic.down", "CRIT", Subject(devices=(f"mlx5{char}_0",)), ""),), ("x",),
    )  # fmt: skip
    text = prometheus_text(Report("CRIT", (machine,), ()), 1.0)
    assert text.encode().decode().isascii() is False
    assert [line for line in text.splitlines() if line.startswith("wsync")] == [
        line for line in text.split("\n") if line.startswith("wsync")
    ]
    assert 'host="no\ufffdde"' in text
    assert 'devices="mlx5\ufffd_0"' in text
    assert all(c == "\n" or c.isprintable() for c in text)


def test_hosts_whose_names_differ_in_control_characters_alone_stay_apart():
    """Two equal samples would make the collector refuse the whole file."""
    report = report_of(m.h100(), m.h100())
    machines = tuple(msgspec.structs.replace(x, host=h) for x, h in zip(report.machines, ("a\r", "a\x00"), strict=True))
    keys = [key[:2] for key in samples(prometheus_text(msgspec.structs.replace(report, machines=machines), 1.0))]
    assert len(set(keys)) == len(keys)


def test_the_guide_lists_every_metric_with_its_meaning():
    for name, text in METRICS.items():
        assert f"| `{name}` |" in GUIDE_TEXT, name
        assert text.partition(":")[0].rstrip(".") in GUIDE_TEXT, name


def test_hosts_of_one_name_stay_apart():
    report = report_of(m.h100(), m.h100())
    for hosts, names in (
        (["n", "n"], ["n", "n #2"]),
        ([None, None], ["machine 1", "machine 2"]),
        (["n", "n #2", "n"], ["n", "n #2", "n #3"]),
        (["n", "n", "n #2"], ["n", "n #3", "n #2"]),
        (["machine 2", None], ["machine 2", "machine 2 #2"]),
    ):
        machines = tuple(msgspec.structs.replace(report.machines[0], host=host) for host in hosts)
        assert host_names(msgspec.structs.replace(report, machines=machines)) == names


# ---- verdicts that count


@settings(max_examples=200, deadline=None)
@given(reports())
def test_thresholds_only_take_away(report):
    rank = {"OK": 0, "UNKNOWN": 1, "WARN": 2, "CRIT": 3}
    found = [verdict_from([f.severity for f in report.all_findings()], least) for least in ("INFO", "WARN", "CRIT")]
    if report.machines:
        assert found[1] == report.verdict
    assert [rank[v] for v in found] == sorted((rank[v] for v in found), reverse=True)
    assert (found[2] == "CRIT") == any(f.severity == "CRIT" for f in report.all_findings())


def test_of_equal_findings_the_one_that_explains_most_comes_first():
    small, big = (Finding("nic.down", "CRIT", Subject(devices=(d,)), d) for d in ("a", "b"))
    big = msgspec.structs.replace(big, symptoms=(small, small))
    outlier = Finding("host.outlier", "CRIT", Subject("h"), "o", symptoms=(small,) * 5)
    warn = Finding("nic.slow", "WARN", Subject(), "w", symptoms=(small,) * 9)
    ordered = root_findings(Report("CRIT", (), (warn, outlier, small, big)))
    assert [f.evidence for f in ordered] == ["b", "a", "o", "w"]


# ---- JUnit


@settings(max_examples=200, deadline=None)
@given(reports())
def test_any_report_is_junit_that_adds_up(report):
    root = ElementTree.fromstring(junit_xml(report).encode())
    found = {kind: len(root.findall(f".//{kind}")) for kind in ("failure", "error", "system-out")}
    severities = [f.severity for f in report.all_findings()]
    assert found == {
        "failure": severities.count("WARN") + severities.count("CRIT"),
        "error": severities.count("UNKNOWN"),
        "system-out": severities.count("INFO"),
    }
    for suite in root:
        assert int(suite.get("tests")) == len(suite)
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        assert int(suite.get("errors")) == len(suite.findall("testcase/error"))


# ---- JSON


def test_json_reads_back_as_the_report_and_has_its_version():
    report = report_of(m.isolate(m.h100(), 2), m.h100(), m.h100())
    data = msgspec.json.encode(report)
    assert msgspec.json.decode(data, type=Report) == report
    value = json.loads(data)
    assert value["format_version"] == REPORT_VERSION == 1
    assert value["machines"][0]["findings"][0]["subject"]["devices"] == ["GPU2"]


@pytest.mark.parametrize("kind", [Report, MachineReport, Finding, Subject])
def test_the_guide_has_every_field_of_the_json(kind):
    """A field that comes or goes needs a line in the guide, and one that goes or changes a new version."""
    section = GUIDE_TEXT.split("### JSON\n")[1].split("\n### ")[0]
    rows = re.findall(rf"^\| {kind.__name__} \| `(\w+)` \|", section, re.M)
    assert rows == [f.name for f in msgspec.structs.fields(kind)]


# ---- recorded machines


@needs_fixtures
def test_every_recorded_file_can_be_written_in_every_way():
    for path in sorted(FIXTURES.rglob("*")):
        if path.is_file() and path.suffix in (".txt", ".xml", ".log", ".json"):
            report = check_files([path])
            assert samples(prometheus_text(report, 0.0))
            assert nagios_line(report).startswith("TOPO ")
            ElementTree.fromstring(junit_xml(report).encode())
