"""``wsync topo import-bandwidth``: what benchmarks print, against published rates and against itself."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import needs_fixtures, recorded

from wsync.cli.main import main
from wsync.errors import ConfigError
from wsync.topo.bandwidth import REFERENCES, judge_tables
from wsync.topo.bandwidth_parse import parse_tables

FACTORS = {"all_reduce": 2 * 7 / 8, "all_gather": 7 / 8, "reduce_scatter": 7 / 8, "broadcast": 1.0, "reduce": 1.0}
OPERATORS = {"all_reduce": "sum -1", "all_gather": "none -1", "reduce_scatter": "sum -1", "broadcast": "none 0",
             "reduce": "sum 0"}  # fmt: skip


def nccl_tests(test: str, busbw: float, *, gpu: str = "NVIDIA A100-SXM4-80GB", ranks: int = 8, wrong: int = 0,
               size: int = 8 << 30, named: bool = False) -> str:  # fmt: skip
    lines = [f"# Collective test starting: {test}_perf"] if named else []
    lines += [
        f"#  Rank {i:2} Group  0 Pid  10 on node{i // 8} device {i % 8:2} [0x{i:02x}] {gpu}" for i in range(ranks)
    ]
    lines += ["#       size         count      type   redop    root     time   algbw   busbw #wrong",
              "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)"]  # fmt: skip
    factor = FACTORS[test] if ranks == 8 else 2 * (ranks - 1) / ranks
    for nbytes, share in ((size // 64, 0.4), (size // 8, 0.8), (size, 1.0)):
        bus = busbw * share
        row = f"{bus / factor:8.3f} {bus:7.2f}"
        lines.append(
            f"  {nbytes:12} {nbytes // 4:12}  float  {OPERATORS[test]}  100.0 {row}      0   99.0 {row}  {wrong:5}"
        )
    return "\n".join([*lines, "# Out of bounds values : 0 OK", "# Avg bus bandwidth    : 100.0", ""])


def nvbandwidth(
    cells: list[list[float | None]], test: str = "device_to_device_memcpy_write_ce", gpu="NVIDIA A100"
) -> str:
    width = len(cells[0])
    lines = ["nvbandwidth Version: v0.8", *(f"Device {i}: {gpu} (00000000:{i:02x}:00)" for i in range(width)), "",
             f"Running {test}.", "memcpy CE GPU(row) <- GPU(column) bandwidth (GB/s)",
             "    " + " ".join(f"{i:9}" for i in range(width))]  # fmt: skip
    for i, row in enumerate(cells):
        lines.append(f"{i:2} " + " ".join("      N/A" if c is None else f"{c:9.2f}" for c in row))
    return "\n".join([*lines, "", f"SUM {test} 1.0", ""])


def square(n: int = 8, rate: float = 276.0) -> list[list[float | None]]:
    return [[None if i == j else rate for j in range(n)] for i in range(n)]


def judge(text: str, model: str | None = None, name: str = "run.log"):
    return judge_tables(parse_tables(text.encode(), name), model)


@pytest.mark.parametrize("test", ["all_reduce", "all_gather", "broadcast"])
@pytest.mark.parametrize(
    ("share", "verdict"), [(1.0, "OK"), (0.91, "OK"), (0.89, "WARN"), (0.81, "WARN"), (0.79, "CRIT")]
)
def test_the_bands_are_those_of_the_design(test, share, verdict):
    published = next(r.gbps for r in REFERENCES if (r.model, r.test) == ("A100", test))
    report = judge(nccl_tests(test, published * share))
    (result,) = report.results
    assert (result.test, report.verdict, result.verdict) == (test, verdict, verdict)
    assert [f.id for f in report.findings] == ([] if verdict == "OK" else ["bandwidth.low"])


@pytest.mark.parametrize("test", FACTORS)
def test_what_ran_is_known_from_its_factor_its_name_or_the_file(test):
    assert judge(nccl_tests(test, 100.0)).results[0].test == test
    assert judge(nccl_tests(test, 100.0, named=True)).results[0].test == test
    assert judge(nccl_tests("broadcast", 100.0), name="h.sendrecv_perf.log").results[0].test == "sendrecv"


def test_wrong_results_are_critical_however_fast():
    report = judge(nccl_tests("all_reduce", 240.0, wrong=3))
    assert [(f.id, f.severity) for f in report.findings] == [("bandwidth.wrong-results", "CRIT")]
    assert "9 wrong elements" in report.findings[0].evidence


def test_a_ring_where_nvlink_sharp_should_be_is_named_so():
    report = judge(nccl_tests("all_reduce", 366.0, gpu="NVIDIA H200"))
    assert [(f.id, f.severity) for f in report.findings] == [("bandwidth.no-nvls", "WARN")]
    assert judge(nccl_tests("all_reduce", 473.0, gpu="NVIDIA H200")).verdict == "OK"
    assert judge(nccl_tests("all_reduce", 300.0, gpu="NVIDIA H200")).verdict == "CRIT"


def test_small_payloads_are_not_judged():
    (result,) = judge(nccl_tests("all_reduce", 100.0, size=1 << 26)).results
    assert (result.verdict, "the largest payload is 67108864 bytes" in result.note) == ("UNKNOWN", True)


def test_nodes_count_and_an_unknown_size_has_no_reference():
    assert judge(nccl_tests("all_reduce", 27.0, gpu="NVIDIA H100 80GB HBM3", ranks=16)).verdict == "CRIT"
    (result,) = judge(nccl_tests("all_reduce", 27.0, gpu="NVIDIA H100 80GB HBM3", ranks=24)).results
    assert (result.reference_gbps, result.note) == (None, "no published rate of all_reduce on H100")
    assert "an unknown GPU" in judge(nccl_tests("all_reduce", 27.0, gpu="Graphics Device")).results[0].note


def test_rates_that_nothing_is_known_of_get_no_verdict():
    for text in (nccl_tests("all_reduce", 3.0, gpu="Graphics Device"), nvbandwidth(square(rate=3.0), gpu="Graphics")):
        report = judge(text)
        assert (report.verdict, [f.id for f in report.findings]) == ("UNKNOWN", ["bandwidth.not-judged"])
        assert {r.verdict for r in report.results} == {"UNKNOWN"}
    # One line that is judged is a verdict.
    texts = (nccl_tests("all_reduce", 235.0), nvbandwidth(square(rate=3.0), gpu="Graphics"))
    tables = [t for i, text in enumerate(texts) for t in parse_tables(text.encode(), f"file{i}")]
    assert judge_tables(tables).verdict == "OK"


@pytest.mark.parametrize(("rate", "verdict"), [(475.0, "OK"), (366.0, "WARN"), (300.0, "CRIT")])
def test_eight_h100_are_judged_by_what_azure_accepts(rate, verdict):
    report = judge(nccl_tests("all_reduce", rate, gpu="NVIDIA H100 80GB HBM3"))
    assert (report.verdict, report.results[0].reference_gbps) == (verdict, 460.0)


@pytest.mark.parametrize(
    ("gpu", "rate"),
    [("NVIDIA H100 80GB HBM3", 351.0), ("NVIDIA H200", 351.0), ("NVIDIA H800", 156.0), ("NVIDIA B200", 702.0)],
)
def test_pairs_are_judged_by_the_links_of_their_model(gpu, rate):
    for share, verdict in ((1.0, "OK"), (0.89, "WARN"), (0.79, "CRIT")):
        report = judge(nvbandwidth(square(rate=rate * share), gpu=gpu))
        assert (report.verdict, report.results[0].reference_gbps) == (verdict, pytest.approx(rate))


@pytest.mark.parametrize(
    ("gpu", "num"), [("NVIDIA H100 PCIe", 8), ("NVIDIA H100 80GB HBM3", 4), ("Tesla V100-SXM2", 8)]
)
def test_pairs_of_bridges_and_meshes_are_not(gpu, num):
    assert judge(nvbandwidth(square(num, 50.0), gpu=gpu)).verdict == "UNKNOWN"


def test_every_row_of_a_matrix_is_judged():
    cells = square()
    cells[2] = [None if i == 2 else 230.0 for i in range(8)]
    report = judge(nvbandwidth(cells))
    assert [r.verdict for r in report.results] == ["OK", "OK", "WARN", *["OK"] * 5]
    assert {f.id for f in report.findings} == {"bandwidth.low", "bandwidth.outlier"}
    assert report.measured == {"nvlink": 230.0}


def test_cells_that_share_a_gpu_blame_it_and_a_lone_cell_its_pair():
    cells = square(rate=720.0)
    for i in range(8):
        if i != 5:
            cells[5][i] = cells[i][5] = 20.0
    (finding,) = [f for f in judge(nvbandwidth(cells, gpu="NVIDIA B200")).findings if f.id == "bandwidth.outlier"]
    assert (finding.id, finding.severity, finding.subject.devices) == ("bandwidth.outlier", "CRIT", ("GPU5",))
    cells = square(rate=720.0)
    cells[1][6] = 640.0
    (finding,) = judge(nvbandwidth(cells, gpu="NVIDIA B200")).findings
    assert (finding.severity, finding.subject.devices) == ("WARN", ("GPU1", "GPU6"))


def test_json_of_nvbandwidth_reads_as_its_text():
    cells = square(4)
    cells[0][1] = 200.0
    matrix = [["N/A" if c is None else str(c) for c in row] for row in cells]
    case = {"name": "device_to_device_memcpy_write_ce", "status": "Passed", "bandwidth_matrix": matrix, "sum": 1.0}
    devices = [f"{i}: NVIDIA A100-SXM4-80GB (00000000:0{i}:00): (host)" for i in range(4)]
    waived = {"name": "x", "status": "Waived"}
    data = {"nvbandwidth": {"version": "v0.8", "GPU Device list": devices, "testcases": [waived, case]}}
    a, b = judge(json.dumps(data)), judge(nvbandwidth(cells))
    assert [(r.subject, r.gbps, r.verdict) for r in a.results] == [(r.subject, r.gbps, r.verdict) for r in b.results]
    assert [f.subject for f in a.findings] == [f.subject for f in b.findings]


def test_nvloom_names_the_process_whose_row_is_slow():
    lines = ["nvloom_cli 1.3.0", "git commit: x"]
    lines += [
        f"Process {i:03} (node{i // 4}): device {i % 4}: NVIDIA GB200 (00000008:01:00); rackGuid: a1" for i in range(8)
    ]
    lines += ["", "Running gpu_to_rack_device_to_device_unidir_write_sm", "\ta1\t| \tb2\t"]
    lines += [f"{i:03}\t{300.0 if i == 6 else 780.0:.2f}\t|\t{310.0 if i == 6 else 775.0:.2f}\t" for i in range(8)]
    lines += ["ExecutionTime gpu_to_rack_device_to_device_unidir_write_sm 3.1 s", "Done x", ""]
    report = judge("\n".join(lines))
    assert len(report.results) == 8
    (finding,) = report.findings
    assert (finding.severity, finding.subject.devices) == ("CRIT", ("process 006",))


def test_columns_without_a_device_are_said_and_not_judged():
    text = nvbandwidth([[369.0, 100.0, 400.0]], "host_to_device_memcpy_ce", "NVIDIA GH200 480GB")
    text = text.replace(
        "Device 1: NVIDIA GH200 480GB (00000000:01:00)\nDevice 2: NVIDIA GH200 480GB (00000000:02:00)\n", ""
    )
    report = judge(text)
    assert ([f.id for f in report.findings], report.verdict) == (["bandwidth.columns-odd"], "OK")
    assert report.results[0].gbps == 369.0


@pytest.mark.parametrize(
    ("text", "message"),
    [("hello", "no output of nccl-tests"), ("busbw\n", "no table of rates"), ("{", "not JSON, or truncated"),
     ("{}", "JSON without nvbandwidth's testcases"),
     ('{"nvbandwidth": {"testcases": [{"bandwidth_matrix": [[{}]]}]}}', "row 0")],
)  # fmt: skip
def test_what_is_no_output_is_refused(text, message, tmp_path, capsys):
    with pytest.raises(ConfigError, match=message):
        parse_tables(text.encode(), "f")
    path = tmp_path / "f"
    path.write_text(text)
    assert main(["topo", "import-bandwidth", str(path)]) == 3


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_output_gives_tables_or_a_named_error(data):
    text = data.draw(st.sampled_from([nccl_tests("all_reduce", 200.0), nvbandwidth(square())]))
    at = data.draw(st.integers(0, len(text)))
    cut = text[:at] + data.draw(st.text(max_size=9)) + text[at + data.draw(st.integers(0, 200)) :]
    with contextlib.suppress(ConfigError):
        assert judge(cut).results


def test_the_command_prints_a_line_for_each_rate(tmp_path, capsys):
    path = tmp_path / "d2d.txt"
    path.write_text(nvbandwidth(square(4, 240.0)))
    assert main(["topo", "import-bandwidth", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.count("87% of 276 GB/s (nvbandwidth README)") == 8
    assert "--measured nvlink=240" in out
    assert main(["topo", "import-bandwidth", str(path), "--gpu", "H100", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["format_version"] == 1
    assert main(["topo", "import-bandwidth", str(tmp_path / "no")]) == 3


RECORDED = {
    "a100_sxm4_40g_8x.all_reduce_perf.log": [("all_reduce", 235.26, 235.0)],
    "a100_sxm4_40g_8x.broadcast_perf.log": [("broadcast", 234.7, 233.0)],
    "a100_sxm4_40g_8x.all_gather_perf.log": [("all_gather", 230.07, 223.0)],
    "gb200_72_144_1440_all_reduce_excerpt.md": [
        ("all_reduce", 846.82, 847.0), ("all_reduce", 820.36, 820.0), ("all_reduce", 405.74, 406.0),
    ],
}  # fmt: skip


@needs_fixtures
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs_are_as_published(name):
    report = judge_tables(parse_tables(recorded(f"bench/{name}").read_bytes(), name))
    assert [(r.test, r.gbps, r.reference_gbps) for r in report.results] == RECORDED[name]
    assert (report.verdict, report.findings) == ("OK", ())


@needs_fixtures
def test_a_recorded_matrix_needs_its_model_and_is_then_as_published():
    data = recorded("bench/a100_8x.nvbandwidth_d2d_write_ce.txt").read_bytes()
    report = judge_tables(parse_tables(data, "d2d"), "A100")
    assert [(r.gbps, r.reference_gbps) for r in report.results][6] == (274.89, 276.0)
    assert (len(report.results), report.verdict, report.findings) == (8, "OK", ())
    assert judge_tables(parse_tables(data, "d2d")).results[0].reference_gbps is None


@needs_fixtures
def test_a_recorded_log_that_its_authors_edited_is_read_in_full():
    tables = parse_tables(recorded("bench/gh200_1x.nvbandwidth.log").read_bytes(), "gh200")
    assert tables[0].cells == ((369.36, 269.33, 412.11), (323.36, 299.33, 312.11))
    assert len({t.test for t in tables}) == len(tables)
    report = judge_tables(tables)
    assert report.verdict == "OK"
    assert {f.id for f in report.findings} == {"bandwidth.columns-odd"}
