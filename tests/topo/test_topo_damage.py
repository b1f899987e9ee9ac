"""Texts as they arrive: damage is read over, what cannot be read is named, and a real change is never read over."""

from __future__ import annotations

import contextlib
import dataclasses

import machines as m
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.errors import WsyncError
from wsync.topo.findings import SEVERITY_RANK
from wsync.topo.parse import FORMATS, parse_text, read_texts
from wsync.topo.report import Report, check_topology

BOXES = {name: make() for name, make in m.HEALTHY.items()}
MATRICES = {name: m.topo_m(box) for name, box in BOXES.items()}

boxes = st.sampled_from(sorted(BOXES))
wired = st.sampled_from(sorted(n for n, b in BOXES.items() if b.links))
switched = st.sampled_from(sorted(n for n, b in BOXES.items() if b.switches))


def judge(*texts: str, platform: str | None = None) -> Report:
    return check_topology(read_texts((f"file{i}", t) for i, t in enumerate(texts)), platform)


def alarms(report: Report) -> set[str]:
    return {f.id for f in report.all_findings() if SEVERITY_RANK[f.severity]}


def model(text: str):
    """What matters of a matrix."""
    (machine,) = parse_text(text, "file")
    cells = {(p.a, p.b): (p.kind, p.links) for p in machine.paths}
    return machine.gpus, {n.label for n in machine.nics}, cells, machine.gaps


def rows_of(text: str) -> tuple[str, list[str], str]:
    """Header, rows, and what follows them."""
    head, rest = text.split("\n", 1)
    table, gap, tail = rest.partition("\n\nLegend")
    return head, table.split("\n"), gap + tail


# Damage that is absorbed


@settings(deadline=None)
@given(boxes, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(name, random):
    head, rows, tail = rows_of(MATRICES[name])
    random.shuffle(rows)
    assert model("\n".join([head, *rows]) + tail)[:3] == model(MATRICES[name])[:3]


@settings(deadline=None)
@given(boxes, st.data())
def test_cells_glued_together_are_taken_apart(name, data):
    box = BOXES[name]
    head, rows, tail = rows_of(MATRICES[name])
    row = data.draw(st.integers(0, len(rows) - 1))
    fields = rows[row].split("\t")
    num_cells = len(box.gpus) + len(box.nics)
    at = data.draw(st.integers(1, num_cells - 1)) if num_cells > 1 else 1
    # A terminal that wraps drops the tab; the self cell keeps one of its blanks.
    fields[at : at + 2] = [fields[at].rstrip() + fields[at + 1].lstrip()] if fields[at].strip() != "X" else [
        " X " + fields[at + 1].lstrip()
    ]  # fmt: skip
    rows[row] = "\t".join(fields)
    assert model("\n".join([head, *rows]) + tail)[:3] == model(MATRICES[name])[:3]


@settings(deadline=None)
@given(
    boxes,
    st.sampled_from(["ansi", "spaces", "crlf", "quoted", "no tab", "no legend", "hard spaces", "pasted in a log"]),
)
def test_what_terminals_and_chats_do_to_a_table_is_read_over(name, how):
    text = MATRICES[name]
    known = model(text)
    if how == "ansi":
        text = text.replace("\tGPU0", "\t\x1b[4mGPU0", 1).replace("GPU NUMA ID", "GPU NUMA ID\x1b[0m", 1)
    elif how == "spaces":
        text = "\n".join(
            "".join(f.ljust(max(8, len(f) + 2)) for f in line.split("\t") if f or not line[:1].isalpha())
            for line in text.split("\n")
        )
    elif how == "crlf":
        text = text.replace("\n", "\r\n")
    elif how == "quoted":
        text = "\n".join("> " + line for line in text.split("\n"))
    elif how == "no tab":
        text = text.lstrip("\t")
    elif how == "no legend":
        text = m.topo_m(BOXES[name], legend=False)
        known = model(text)
    elif how == "hard spaces":
        text = text.replace(" X ", "\xa0X\xa0")
    else:
        text = "$ nvidia-smi topo -m\n" + text + "\n$ exit\n"
    assert model(text)[1:] == known[1:]
    assert [g.index for g in model(text)[0]] == [g.index for g in known[0]]
    assert [g.numa for g in model(text)[0]] == [g.numa for g in known[0]]


@settings(deadline=None)
@given(boxes, st.data())
def test_a_row_that_a_terminal_wrapped_is_joined(name, data):
    head, rows, tail = rows_of(MATRICES[name])
    row = data.draw(st.integers(0, len(rows) - 1))
    fields = rows[row].split("\t")
    box = BOXES[name]
    at = data.draw(st.integers(2, len(box.gpus) + len(box.nics)))
    rows[row] = "\t".join(fields[:at]) + "\n" + "\t".join(fields[at:])
    assert model("\n".join([head, *rows]) + tail)[1:3] == model(MATRICES[name])[1:3]


@settings(deadline=None)
@given(wired)
def test_a_table_without_its_header_is_read_and_the_header_is_named_as_missing(name):
    box = dataclasses.replace(BOXES[name], nics=BOXES[name].nics)
    text = m.topo_m(box, legend=False)
    without = text.split("\n", 1)[1]
    gpus, nics, cells, gaps = model(without)
    assert (nics, cells) == model(text)[1:3]
    assert len(gpus) == len(box.gpus)
    assert any("header" in g.what for g in gaps)
    assert judge(without).verdict == "OK"


# What is missing is named


@settings(deadline=None)
@given(boxes, st.data())
def test_cut_lines_are_named_and_never_make_an_alarm(name, data):
    head, rows, _ = rows_of(MATRICES[name])
    num_gpus = len(BOXES[name].gpus)
    keep = data.draw(st.integers(1, len(rows)))
    report = judge("\n".join([head, *rows[:keep]]) + "\n", platform="l40s" if name == "l40s" else None)
    (machine,) = report.machines
    assert machine.complete == (keep in (num_gpus, len(rows)))
    assert report.verdict == ("OK" if 2 * keep >= num_gpus else "UNKNOWN")
    named = [f for f in report.all_findings() if f.id == "input.incomplete"]
    assert len(named) == (not machine.complete)
    if keep < num_gpus:
        assert named[0].subject.devices == tuple(f"GPU{i}" for i in range(keep, num_gpus))


@settings(deadline=None)
@given(boxes, st.data())
def test_a_table_cut_anywhere_gives_no_alarm_of_a_fault(name, data):
    text = MATRICES[name]
    cut = data.draw(st.integers(0, text.index("Legend")))
    report = judge(text[:cut], platform="l40s" if name == "l40s" else None)
    assert alarms(report) <= {"input.incomplete", "input.unreadable", "input.nothing-to-judge"}
    assert report.verdict in ("OK", "UNKNOWN")


@settings(deadline=None)
@given(boxes, st.data())
def test_a_cell_that_was_lost_makes_its_row_untrusted_and_not_wrong(name, data):
    box = BOXES[name]
    head, rows, tail = rows_of(MATRICES[name])
    row = data.draw(st.integers(1, len(rows) - 1))
    fields = rows[row].split("\t")
    del fields[data.draw(st.integers(1, row))]
    rows[row] = "\t".join(fields)
    report = judge("\n".join([head, *rows]) + tail, platform="l40s" if name == "l40s" else None)
    assert not report.machines[0].complete
    assert alarms(report) <= {"input.incomplete"}
    assert len(report.machines[0].islands) == len(judge(MATRICES[name]).machines[0].islands) or len(box.gpus) <= 2


@settings(deadline=None)
@given(switched, st.data())
def test_a_listing_cut_anywhere_gives_no_alarm_of_a_fault(name, data):
    text = m.nvlink_s(BOXES[name])
    report = judge(text[: data.draw(st.integers(0, len(text)))])
    # A whole GPU may be missing at the end; that the board should have more is all that can be said.
    assert alarms(report) <= {"input.incomplete", "input.unreadable", "input.nothing-to-judge", "gpu.count"}


@settings(deadline=None)
@given(boxes, st.data())
def test_xml_cut_anywhere_is_unknown_and_says_what_is_not_closed(name, data):
    text = m.system_xml(BOXES[name])
    cut = data.draw(st.integers(1, len(text.rstrip()) - 1))
    report = judge(text[:cut])
    assert report.verdict == "UNKNOWN"
    (finding,) = report.all_findings()
    assert finding.id == "input.unreadable"
    assert "XML" in finding.evidence or "none of the formats" in finding.evidence


# Real changes change the verdict


@settings(deadline=None)
@given(wired, st.data())
def test_a_link_less_anywhere_is_an_alarm_that_names_its_gpus(name, data):
    box = BOXES[name]
    pairs = [(i, j) for i, row in enumerate(box.nv) for j, n in enumerate(row) if n and i < j]
    a, b = data.draw(st.sampled_from(pairs))
    report = judge(m.topo_m(m.weaken(box, a, b)), m.nvlink_s(box))
    blamed = {d for f in report.all_findings() if f.severity == "CRIT" for d in f.subject.devices}
    assert {f"GPU{a}", f"GPU{b}"} == blamed


@settings(deadline=None)
@given(wired, st.data())
def test_one_asymmetric_cell_is_an_alarm_that_names_its_pair(name, data):
    box = BOXES[name]
    pairs = [(i, j) for i, row in enumerate(box.nv) for j, n in enumerate(row) if n > 1]
    if not pairs:
        return
    a, b = data.draw(st.sampled_from(pairs))
    report = judge(m.topo_m(m.skew(box, a, b)))
    (finding,) = [f for f in report.all_findings() if f.id == "matrix.asymmetric"]
    assert set(finding.subject.devices) == {f"GPU{a}", f"GPU{b}"}
    assert report.verdict == "CRIT"


@settings(deadline=None)
@given(wired, st.data())
def test_an_inactive_link_in_a_listing_is_an_alarm_that_names_its_gpu(name, data):
    box = BOXES[name]
    gpu, link = data.draw(st.integers(0, len(box.gpus) - 1)), data.draw(st.integers(0, box.links - 1))
    report = judge(m.nvlink_s(dataclasses.replace(box, lost_links={gpu: frozenset([link])})))
    (finding,) = [f for f in report.all_findings() if SEVERITY_RANK[f.severity]]
    assert (finding.id, finding.subject.devices) == ("nvlink.links-missing", (f"GPU{gpu}",))
    assert str(link) in finding.evidence


@settings(deadline=None)
@given(boxes, st.data())
def test_a_lane_less_is_an_alarm_that_names_its_gpu(name, data):
    box = BOXES[name]
    gpu, width = data.draw(st.integers(0, len(box.gpus) - 1)), data.draw(st.sampled_from([1, 2, 4, 8]))
    text = "".join(m.query(box, i, width=width if i == gpu else 16) for i in range(len(box.gpus)))
    (finding,) = [f for f in judge("NVSMI LOG\n" + text).all_findings() if SEVERITY_RANK[f.severity]]
    assert (finding.id, finding.subject.devices) == ("pcie.width-reduced", (f"GPU{gpu}",))


@settings(deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True), st.data())
def test_a_device_that_is_listed_twice_is_an_alarm_and_the_same_list_without_it_is_none(devices, data):
    names = [f"mlx5_{i}" for i in devices]
    assert judge("NCCL_IB_HCA==" + ",".join(names) + "\n").verdict == "OK"
    twice = data.draw(st.sampled_from(names))
    at = data.draw(st.integers(0, len(names)))
    report = judge("NCCL_IB_HCA=" + ",".join([*names[:at], twice, *names[at:]]) + "\n")
    (finding,) = report.all_findings()
    assert (finding.id, finding.subject.devices) == ("lint.hca-twice", (twice,))


# Anything else


def is_answer(text: str) -> None:
    """Either a verdict, or an error of ours."""
    report = judge(text)
    assert report.verdict in ("OK", "WARN", "CRIT", "UNKNOWN")


SEEDS = [
    *(w(BOXES[n]) for n in ("dgx1", "h100", "gb200") for w in (m.topo_m, m.nvlink_s, m.p2p, m.query_all, m.system_xml)),
    '{"kind": "wsync-topology", "format_version": 1, "machines": [{"gpus": [{"index": 0}]}]}',
    '{"pci": {"0000:07:00.0": {"type": "gpu", "link_speed": ["16 GT/s"], "link_width": "16"}}}',
    "[0] NCCL INFO + PCI[12.0] - PCI/1000\n[0] NCCL INFO GPU/B000 :GPU/0-4000 (2/370.8/NVL) NET/0-0 (4/12.0/PHB)\n",
    "NVRM: Xid (PCI:0000:dc:00): 45, caused by previous Xid 149\nNCCL_IB_HCA=mlx5_0\n",
    "0000:3b:00.0 3D controller [0302]: NVIDIA Corporation GA100 [A100 SXM4 80GB] [10de:20b2] (rev a1)\n"
    "    LnkCap: Port #0, Speed 16GT/s, Width x16\n    LnkSta: Speed 2.5GT/s (downgraded), Width x8\n",
    "Infiniband device 'mlx5_0' port 1 status:\n\tstate: 4: ACTIVE\n\trate: 200 Gb/sec\n",
]  # fmt: skip


@settings(deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_text_with_pieces_cut_out_doubled_and_swapped_gets_an_answer(seed, data):
    text = seed
    for _ in range(data.draw(st.integers(1, 6))):
        if not text:
            break
        a = data.draw(st.integers(0, len(text)))
        b = data.draw(st.integers(a, min(len(text), a + 200)))
        how = data.draw(st.sampled_from(["cut", "double", "junk", "digits"]))
        piece = {
            "cut": "",
            "double": text[a:b] * 2,
            "junk": data.draw(st.text(max_size=8)),
            "digits": "".join("9" if c.isdigit() else c for c in text[a:b]),
        }[how]
        text = text[:a] + piece + text[b:]
    is_answer(text)


@settings(deadline=None)
@given(st.text(max_size=400))
def test_any_text_gets_an_answer(text):
    is_answer(text)


WORDS = [
    "GPU0",
    "GPU1",
    "GPU9999",
    "NIC0",
    "mlx5_0",
    "NV12",
    "NV99",
    "SYS",
    "PIX",
    "NODE",
    "OK",
    "NS",
    "N/A",
    "<inactive>",
    "0-3,9",
    "=",
    "{",
    "}",
    "<system>",
    "</system>",
    "-1",
    "+",
    "99999999999",
    "<cpu>",
    "NCCL_IB_HCA=",
    "Legend:",
    "NVRM:",
    "X",
    "25",
]
PHRASES = ["\t", " ", "\n", " X ", "Link 0:", "25 GB/s", "GPU 0: A100", "CPU Affinity", "NUMA Affinity", "NCCL INFO",
           '<pci busid="0:0:0.0">', "+ PCI[12.0] - GPU/1000", "Link 7: Replay Errors: 99999999999999", "NVSMI LOG",
           "all links are inactive", "GPU 00000000:19:00.0", "Attached GPUs : 4"]  # fmt: skip
VOCABULARY = st.sampled_from(WORDS + PHRASES)


@settings(deadline=None)
@given(st.lists(VOCABULARY, max_size=60))
def test_any_sequence_of_our_words_gets_an_answer(words):
    is_answer("".join(words))


@settings(deadline=None)
@given(st.text(alphabet="GPUNICVXSYODE0123456789 \t\n", max_size=300))
def test_every_parser_answers_to_text_that_is_not_its_own(text):
    for _, _, parse in FORMATS:
        with contextlib.suppress(WsyncError):
            parse(text, "file")


@pytest.mark.parametrize("name", BOXES)
def test_a_verdict_is_a_function_of_its_input(name):
    texts = [m.topo_m(m.isolate(BOXES[name], 0)), m.nvlink_s(BOXES[name])]
    assert judge(*texts) == judge(*texts)
