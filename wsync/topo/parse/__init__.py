"""Readers of everything that tells a machine's topology, and the choice among them.

``parse_text`` finds the format by its content; ``read_files`` reads the files of one machine and merges them. A file
that cannot be read or understood does not stop the others: it becomes a fatal `Gap`, which makes the verdict UNKNOWN.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from wsync.errors import ConfigError, WsyncError
from wsync.topo.files import read_regular
from wsync.topo.merge import merge_machines
from wsync.topo.model import Gap, Machine, Topology
from wsync.topo.parse import (
    bench_text,
    host_files,
    lspci,
    matrix,
    nccl_graph,
    nccl_log,
    nccl_xml,
    nvlink,
    p2p,
    saved,
    smi_query,
)
from wsync.topo.parse.text import MAX_INPUT_BYTES, clean, decode
from wsync.topo.parse.xml_tree import parse_xml

Parser = Callable[[str, str], "Machine | tuple[Machine, ...]"]


def _parse_xml(text: str, source: str) -> Machine | tuple[Machine, ...]:
    root = parse_xml(text, source)
    if root.tag == "system":
        return nccl_xml.parse_system(root, source)
    if root.tag == "graphs":
        return nccl_graph.parse_graphs(root, source)
    raise ConfigError(f"{source}: XML of a <{root.tag}>, known are NCCL's <system> and <graphs>")


def _is_xml(text: str) -> bool:
    return text.lstrip()[:1] == "<" and "<" in text


FORMATS: tuple[tuple[str, Callable[[str], bool], Parser], ...] = (
    ("JSON", lambda text: text.lstrip()[:1] == "{", saved.decode_topology),
    ("XML", _is_xml, _parse_xml),
    ("nvidia-smi -q", smi_query.looks_like_query, smi_query.parse_query),
    ("nvidia-smi topo -p2p", p2p.looks_like_p2p, p2p.parse_p2p),
    ("nvidia-smi topo -m", matrix.looks_like_matrix, matrix.parse_matrix),
    ("nvidia-smi nvlink", nvlink.looks_like_nvlink, nvlink.parse_nvlink),
    ("ibstatus", host_files.looks_like_ibstatus, host_files.parse_ibstatus),
    ("NUMA nodes", host_files.looks_like_numa, host_files.parse_numa),
    ("list of GPUs", smi_query.looks_like_csv, smi_query.parse_csv),
    ("NCCL log", nccl_log.looks_like_nccl_log, nccl_log.parse_nccl_log),
    ("kernel", host_files.looks_like_kernel, host_files.parse_kernel),
    ("lspci", lspci.looks_like_lspci, lspci.parse_lspci),
    ("NCCL_IB_HCA", host_files.looks_like_hca, host_files.parse_hca),
    ("bandwidth test", bench_text.looks_like_bench, bench_text.parse_bench),
    ("NCCL log without a topology", nccl_log.is_some_nccl_log, nccl_log.parse_nccl_log),
)
"""Name, test and parser of each format; the first whose test holds is taken."""


def detect(text: str) -> str | None:
    """Name of the format of ``text``, or None."""
    return next((name for name, looks, _ in FORMATS if looks(text)), None)


def parse_text(text: str, source: str) -> tuple[Machine, ...]:
    """Machines that ``text`` describes.

    Args:
        text: content of one file, of any known format.
        source: its name; it appears in findings, and may say which ``-p2p`` table it is.

    Raises:
        WsyncError: of an unknown format, truncated so that nothing can be told, or over the limits.
    """
    if len(text) > MAX_INPUT_BYTES:
        raise ConfigError(f"{source} has {len(text)} characters, allowed are {MAX_INPUT_BYTES}")
    text = clean(text)
    if not text.strip():
        raise ConfigError(f"{source} is empty")
    for _, looks, parse in FORMATS:
        if looks(text):
            parsed = parse(text, source)
            return parsed if isinstance(parsed, tuple) else (parsed,)
    raise ConfigError(
        f"{source}: none of the formats that wsync topo reads",
        hint="known are " + ", ".join(name for name, _, _ in FORMATS),
    )


def read_texts(texts: Iterable[tuple[str, str]], host: str | None = None) -> Topology:
    """Merge ``(source, text)`` inputs of one machine; one that cannot be used becomes a fatal gap.

    Args:
        texts: names and contents.
        host: name of the machine, where no input tells it.
    """
    return _merged(((source, partial(str, text)) for source, text in texts), host)


def read_files(paths: Iterable[str | Path], host: str | None = None) -> Topology:
    """Read the files of one machine and merge them; as `read_texts`."""
    return _merged(((path.name, partial(_read, path)) for path in map(Path, paths)), host)


def _merged(inputs: Iterable[tuple[str, Callable[[], str]]], host: str | None) -> Topology:
    parts: list[Machine] = []
    for source, read in inputs:
        try:
            parts += parse_text(read(), source)
        except WsyncError as e:
            parts.append(Machine(gaps=(Gap(e.message, source, fatal=True),), sources=(source,)))
    return Topology(_named(merge_machines(parts), host))


def _read(path: Path) -> str:
    """A regular file or, for ``-``, stdin."""
    if str(path) == "-":
        return decode(sys.stdin.buffer.read(MAX_INPUT_BYTES + 1), "stdin")
    return decode(read_regular(path, MAX_INPUT_BYTES + 1), str(path))


def _named(machines: tuple[Machine, ...], host: str | None) -> tuple[Machine, ...]:
    from msgspec.structs import replace

    return tuple(replace(m, host=host) if host is not None and m.host is None else m for m in machines)
