"""Rules for NCCL's environment: what was left set, misspelt, or reads otherwise than it looks.

Source: NCCL 2.30.7, ``ncclGetLevel`` of ``src/graph/paths.cc`` and ``ncclLoadParam`` of ``src/misc/param.cc``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from wsync.topo.checks import Case
from wsync.topo.checks.lint import check_hca
from wsync.topo.findings import Finding, Severity, Subject, guide_link
from wsync.topo.lint_hca import lint_hca
from wsync.topo.lint_names import BUILD_NAMES, INTEGERS, KNOWN, LEVEL_NAMES, LEVELS, NOT_OF_NCCL, PLUGIN_PREFIXES
from wsync.topo.model import HcaList, Machine
from wsync.topo.parse.host_files import parse_hca
from wsync.topo.parse.text import UTF16_MARKS, decode

_ASSIGNMENT = re.compile(r"(?<![\w.])(NCCL_\w+)=(?:\"([^\"\n]*)\"|'([^'\n]*)'|([^\s\"';]*))")
_TABLE = re.compile(r"[^\n]*\tNCCL_IB_HCA\b")
_NUMBER = re.compile(r"\s*[+-]?(?:0[xX][0-9a-fA-F]+|\d+)\s*")
_SIZE = re.compile(r"\s*(\d{1,12})([KMG])(?:i?B)?\s*", re.I)
_START = re.compile(r"\s*([+-]?\d+)")


class Assignment(NamedTuple):
    """One variable; ``line`` is 0 where there are none."""

    name: str
    value: str
    line: int = 0


LEFT_SET: dict[str, tuple[str, Severity, str]] = {
    "NCCL_P2P_DISABLE": ("1", "WARN", "no NVLink and no PCIe peer access: GPUs of a host exchange through host memory"),
    "NCCL_SHM_DISABLE": ("1", "WARN", "ranks without peer access exchange over the network, even inside a host"),
    "NCCL_IB_DISABLE": ("1", "WARN", "no RDMA: all traffic between hosts goes over TCP"),
    "NCCL_PXN_DISABLE": ("1", "WARN", "a GPU without a near NIC cannot send through its NVLink peers"),
    "NCCL_NVLS_ENABLE": ("0", "WARN", "no NVLink SHARP: an all-reduce inside a host loses about a quarter"),
    "NCCL_MNNVL_ENABLE": ("0", "WARN", "hosts of one NVLink domain exchange over the network"),
    "NCCL_CUMEM_ENABLE": ("0", "WARN", "without cuMem there is neither NVLS nor NVLink between hosts"),
    "NCCL_DMABUF_ENABLE": ("0", "INFO", "GPUDirect RDMA needs nvidia_peermem then"),
    "NCCL_NET_GDR_READ": ("0", "INFO", "what is sent takes a copy through host memory"),
    "NCCL_IGNORE_DISABLED_P2P": ("1", "WARN", "NCCL would say that peer access is off between NVLinked GPUs, and is "
                                 "told not to"),
    "NCCL_IGNORE_CPU_AFFINITY": ("1", "INFO", "threads go where NCCL's file says, whatever the job's cgroup is"),
    "NCCL_NET_DISABLE_INTRA": ("1", "INFO", "no network inside a host"),
}  # fmt: skip
"""Switches that turn something off -> the value that does, how bad that is, what follows."""

PINNED = {
    "NCCL_ALGO": "NCCL may not choose the algorithm by size",
    "NCCL_PROTO": "NCCL may not choose the protocol by size",
    "NCCL_NTHREADS": "a tuning of an old version holds on newer GPUs",
    "NCCL_MIN_NRINGS": "replaced by NCCL_MIN_NCHANNELS",
    "NCCL_MAX_NRINGS": "replaced by NCCL_MAX_NCHANNELS",
    "NCCL_GRAPH_FILE": "NCCL takes the graph from the file, whatever the machine has become since",
    "NCCL_LL_THRESHOLD": "no longer read since 2.5",
    "NCCL_TREE_THRESHOLD": "no longer read since 2.5",
    "NCCL_SINGLE_RING_THRESHOLD": "no longer read since 2.3",
    "NCCL_IB_CUDA_SUPPORT": "replaced by NCCL_NET_GDR_LEVEL",
}
"""Variables that are tuned once and outlive their reason."""


def parse_environment(data: bytes, source: str) -> tuple[Assignment, ...]:
    """Assignments of NCCL's variables in the output of ``env``, a shell script, a command line, ``/etc/nccl.conf`` or
    ``/proc/PID/environ``.

    Raises:
        ConfigError: too long.
    """
    text = decode(data, source)
    if b"\x00" in data and data[:2] not in UTF16_MARKS:
        # As it stands: a value of /proc/PID/environ may have line ends.
        pairs = [entry.partition("=") for entry in data.decode("utf-8", "replace").split("\x00")]
        return tuple(Assignment(name, value) for name, _, value in pairs if name.startswith("NCCL_"))
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") and "NCCL_IB_HCA" not in line:
            continue
        for match in _ASSIGNMENT.finditer(line):
            value = next((g for g in match.groups()[1:] if g is not None), "")
            found.append(Assignment(match[1], value, number))
    return tuple(found)


def assignments_of(environment: Mapping[str, str]) -> tuple[Assignment, ...]:
    """NCCL's variables of an environment."""
    return tuple(Assignment(name, environment[name]) for name in sorted(environment) if name.startswith("NCCL_"))


def lint_tables(data: bytes, machine: Machine | None, source: str) -> tuple[Finding, ...]:
    """Lint a table with a column ``NCCL_IB_HCA``, as vendors keep it by shape; nothing of other texts."""
    text = decode(data, source)
    if _TABLE.match(text) is None:
        return ()
    lists = tuple(h for h in parse_hca(text, source).hca_lists if h.name)
    return tuple(_listed(lists, machine))


def _listed(lists: tuple[HcaList, ...], machine: Machine | None) -> Iterator[Finding]:
    yield from check_hca(Case(replace(machine or Machine(), hca_lists=lists)))


def lint_environment(
    environment: Sequence[Assignment], machine: Machine | None = None, source: str = "environment"
) -> tuple[Finding, ...]:
    """Lint assignments.

    Args:
        environment: in their order; a later one overrides.
        machine: the host's own, for names of devices and for what it would lose; or None.
        source: where they stand.
    """
    found = list(_twice(environment, source))
    last = {a.name: a for a in environment}
    for assignment in last.values():
        found += _lint_one(assignment, machine, _place(assignment, source))
    found += _pairs({name: a.value for name, a in last.items()}, source)
    return tuple(found)


def _lint_one(assignment: Assignment, machine: Machine | None, where: str) -> Iterator[Finding]:
    name, value = assignment.name, assignment.value
    if name not in KNOWN:
        yield from _unknown(name, where)
        return
    if name == "NCCL_IB_HCA":
        yield from lint_hca(value, _device_names(machine), where)
    if name in LEVEL_NAMES:
        yield from _level(name, value, where)
    if (name in INTEGERS or name in LEFT_SET) and value and _NUMBER.fullmatch(value) is None:
        started = _START.match(value)
        yield _finding(
            "lint.env-value",
            "WARN",
            name,
            f"{name}={value} in {where}: no number; NCCL reads {started[1] if started else 0}",
            "a whole number",
            _number_remedy(name, value),
        )
    if name in LEFT_SET:
        yield from _left_set(name, value, machine, where)
    if name == "NCCL_NET" and value.lower() == "socket":
        text = f"{name}={value} in {where}: no RDMA: all traffic between hosts goes over TCP"
        yield _finding("lint.env-left-set", "WARN", name, text, "unset", "unset it unless the hosts have no RDMA")
    if name in PINNED:
        text = f"{name}={value} in {where}: {PINNED[name]}"
        yield _finding("lint.env-pinned", "INFO", name, text, "unset", "unset it and measure")


def _number_remedy(name: str, value: str) -> str:
    """What was meant, where a unit tells; NCCL reads digits and stops."""
    size = _SIZE.fullmatch(value)
    if size is not None:
        meant = int(size[1]) << 10 * (1 + "KMG".index(size[2].upper()))
        return f"NCCL knows no units: write {meant} if {value} was meant, or unset it"
    if name in LEFT_SET:
        return "NCCL says so nowhere; write 0 or 1"
    return "NCCL says so nowhere; write the number, or unset it"


def _unknown(name: str, where: str) -> Iterator[Finding]:
    if name in BUILD_NAMES or name.startswith(PLUGIN_PREFIXES):
        return
    near = difflib.get_close_matches(name, sorted(KNOWN), n=1, cutoff=0.86)
    if name in NOT_OF_NCCL:
        yield _finding("lint.env-unknown", "INFO", name, f"{name} in {where}: {NOT_OF_NCCL[name]}", "", "")
    elif near:
        text = f"{name} in {where} is no variable of NCCL; {near[0]} is"
        yield _finding(
            "lint.env-misspelt", "WARN", name, text, near[0], f"NCCL ignores it: write {near[0]}, or unset it"
        )
    else:
        text = f"{name} in {where} is no variable of NCCL 2.30; a plugin or a newer version may read it"
        yield _finding("lint.env-unknown", "INFO", name, text, "", "")


def _level(name: str, value: str, where: str) -> Iterator[Finding]:
    off = "peer access" if name == "NCCL_P2P_LEVEL" else "GPUDirect RDMA"
    if value in LEVELS or value[:1].isdigit():
        if value == "LOC" or value == "0":
            text = f"{name}={value} in {where}: {off} is never used"
            yield _finding("lint.env-left-set", "WARN", name, text, "unset", "unset it")
        elif value[:1].isdigit():
            text = f"{name}={value} in {where}: digits count by an old list without NVL (1 PIX, 2 PXB, 3 PHB, 4 SYS)"
            yield _finding("lint.env-value", "INFO", name, text, " ".join(LEVELS), "write the name")
    elif value:
        right = next((k for k in LEVELS if k == value.strip().upper()), None)
        hint = f"write {right}" if right else f"write one of {' '.join(LEVELS)}"
        text = f"{name}={value} in {where}: no such level; NCCL ignores it"
        yield _finding("lint.env-value", "WARN", name, text, " ".join(LEVELS), hint)


def _left_set(name: str, value: str, machine: Machine | None, where: str) -> Iterator[Finding]:
    off, severity, effect = LEFT_SET[name]
    number = _NUMBER.fullmatch(value)
    if number is None or int(value, 0 if "x" in value.lower() else 10) != int(off):
        return
    if name in ("NCCL_P2P_DISABLE", "NCCL_NVLS_ENABLE") and machine is not None and _without_nvlink(machine):
        severity, effect = "INFO", f"{effect}; this host has no NVLink, so that less is lost"
    text = f"{name}={value} in {where}: {effect}"
    yield _finding(
        "lint.env-left-set", severity, name, text, "unset", "unset it, unless a fault is being worked around"
    )


def _pairs(variables: Mapping[str, str], source: str) -> Iterator[Finding]:
    """Variables that contradict each other."""
    for low, high in (("NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS"), ("NCCL_MIN_CTAS", "NCCL_MAX_CTAS")):
        a, b = variables.get(low, ""), variables.get(high, "")
        if a.isdecimal() and b.isdecimal() and int(a) > int(b):
            text = f"{low}={a} is above {high}={b} in {source}"
            yield _finding("lint.env-value", "WARN", low, text, f"{low} at most {high}", "correct one of them")


def _twice(environment: Sequence[Assignment], source: str) -> Iterator[Finding]:
    values: dict[str, list[Assignment]] = {}
    for assignment in environment:
        values.setdefault(assignment.name, []).append(assignment)
    for name, found in values.items():
        if len({a.value for a in found}) > 1:
            text = ", ".join(f"{a.value!r} in line {a.line}" for a in found)
            yield _finding(
                "lint.env-twice", "WARN", name, f"{name} in {source}: {text}", "one value", "the last one counts"
            )


def _place(assignment: Assignment, source: str) -> str:
    return f"{source}, line {assignment.line}" if assignment.line else source


def _device_names(machine: Machine | None) -> tuple[str, ...]:
    """RDMA devices by name; none where the inputs only number them."""
    names = [n.label.partition(":")[0] for n in machine.nics if n.rdma is not False] if machine else []
    numbered = any(n.startswith(("NIC", "nic@", "NET/", "net")) for n in names)
    return () if numbered else tuple(dict.fromkeys(names))


def _without_nvlink(machine: Machine) -> bool:
    known = [p for p in machine.paths if p.a.startswith("GPU") and p.b.startswith("GPU") and p.a != p.b]
    return bool(known) and all(p.kind != "NV" for p in known)


def _finding(finding_id: str, severity: Severity, name: str, evidence: str, expected: str, remedy: str) -> Finding:
    return Finding(finding_id, severity, Subject(devices=(name,)), evidence, expected, remedy, guide_link(finding_id))


def names_of(environment: Iterable[Assignment]) -> tuple[str, ...]:
    """Names of the variables, each once."""
    return tuple(dict.fromkeys(a.name for a in environment))
