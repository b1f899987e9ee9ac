"""Tables of documents, made from committed records: ``python -m wsync.bench.markdown RECORD DOCUMENT...``.

A document has ``<!-- table: e2e -->`` and ``<!-- end: e2e -->`` for records of ``wsync bench e2e``; what stands between
them is replaced. ``vllm`` is for those of ``wsync bench vllm``, ``delta`` for those of ``make record-delta``,
``kernels`` for those of ``make record-kernels``, ``planning`` for those of ``python -m wsync.bench.planning``,
``shootout`` for those of ``make record-shootout``, ``topo`` for those of ``python bench/record_topo.py`` and
``simulator`` for those of ``pytest bench/test_simulator.py --benchmark-json``. A test compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from wsync.bench.delta_result import DeltaResult, delta_table_of
from wsync.bench.kernel_result import KernelResult, kernel_table_of
from wsync.bench.options import WSYNC
from wsync.bench.planning_result import PlanningResult, planning_table_of
from wsync.bench.result import Result, RowResult
from wsync.bench.shootout_result import ShootoutResult, shootout_table_of
from wsync.bench.simulator_result import SimulatorResult, simulator_table_of
from wsync.bench.topo_result import TopoResult, topo_table_of
from wsync.bench.vllm_result import VLLMResult, VLLMRow
from wsync.errors import ConfigError, FormatVersionError

_E2E, _VLLM, _DELTA, _KERNELS, _PLANNING = "e2e", "vllm", "delta", "kernels", "planning"
_SHOOTOUT, _TOPO, _SIMULATOR = "shootout", "topo", "simulator"

_R = TypeVar(
    "_R",
    Result,
    VLLMResult,
    DeltaResult,
    KernelResult,
    PlanningResult,
    ShootoutResult,
    TopoResult,
    SimulatorResult,
)


def load_record(path: Path) -> Result:
    """A record that ``wsync bench e2e --json`` wrote.

    Raises:
        ConfigError: it cannot be read.
        FormatVersionError: it has another format.
    """
    return _load(path, Result)


def load_vllm_record(path: Path) -> VLLMResult:
    """A record that ``wsync bench vllm --json`` wrote; raises as `load_record`."""
    return _load(path, VLLMResult)


def load_delta_record(path: Path) -> DeltaResult:
    """A record that ``make record-delta`` wrote; raises as `load_record`."""
    return _load(path, DeltaResult)


def load_kernel_record(path: Path) -> KernelResult:
    """A record that ``make record-kernels`` wrote; raises as `load_record`."""
    return _load(path, KernelResult)


def load_shootout_record(path: Path) -> ShootoutResult:
    """A record that ``make record-shootout`` wrote; raises as `load_record`."""
    return _load(path, ShootoutResult)


def load_planning_record(path: Path) -> PlanningResult:
    """A record that ``python -m wsync.bench.planning --json`` wrote; raises as `load_record`."""
    return _load(path, PlanningResult)


def load_topo_record(path: Path) -> TopoResult:
    """A record that ``python bench/record_topo.py`` wrote; raises as `load_record`."""
    return _load(path, TopoResult)


def load_simulator_record(path: Path) -> SimulatorResult:
    """A record that ``pytest bench/test_simulator.py --benchmark-json`` wrote; raises as `load_record`."""
    return _load(path, SimulatorResult)


def _load(path: Path, kind: type[_R]) -> _R:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as e:
        raise ConfigError(f"record {path} cannot be read: {e.strerror}") from e
    except msgspec.MsgspecError as e:
        raise FormatVersionError(f"record {path} is not of the format that this wsync reads: {e}") from e


def table_of(result: Result) -> str:
    """One row for each way of moving the weights, one column for each recipe, in Markdown."""
    recipes = list(dict.fromkeys(row.recipe for row in result.rows))
    titles = list(dict.fromkeys(row.title for row in result.rows))
    by_key = {(row.title, row.recipe): row for row in result.rows}
    lines = [
        "| publish to last replica committed | " + " | ".join(f"`{r}`" for r in recipes) + " |",
        "|---|" + "---:|" * len(recipes),
    ]
    for title in titles:
        name = f"**{title}**" if title == "wsync" else title
        lines.append(f"| {name} | " + " | ".join(_cell(by_key[(title, r)]) for r in recipes) + " |")
    limits = {row.recipe: row for row in result.rows if row.title == "wsync"}
    lines.append("| limit (memcpy) | " + " | ".join(f"{1000 * limits[r].limit_s:.0f} ms" for r in recipes) + " |")
    options, machine = result.options, result.machine
    verdict = "every byte of every row verified" if result.verdict == "ok" else "A VERDICT IS WRONG"
    lines += [
        "",
        f"{options.model_name} ({result.trainer_bytes / 1e9:.2f} GB in bf16), {options.num_trainers} FSDP2 trainer "
        f"processes to {options.num_engines} tensor-parallel engine processes on one machine, {machine['cpu']}, "
        f"{machine['num_cores']} cores, memcpy {result.memcpy.gbps:.1f} GB/s, no GPU; p50 of {options.repeats}; "
        f"{verdict}. `wsync bench e2e --preset {options.model_name}`, "
        "record `bench/records/e2e_qwen3_0.6b.json`.",
    ]
    return "\n".join(lines)


def _cell(row: RowResult) -> str:
    text = _short(row.seconds.p50)
    if row.title == "wsync":
        return f"**{text}** ({100 * row.limit_share:.0f} % of the limit)"
    return f"{text} ({row.ratio:.1f} x)"


def vllm_table_of(result: VLLMResult) -> str:
    """One row for each way of moving the weights into a vLLM server, one pair of columns for each mode, in Markdown."""
    head = "| until the server generates with the new weights |"
    lines = [
        head + "".join(f" {m.mode} | paused |" for m in result.modes),
        "|---|" + "---:|---:|" * len(result.modes),
    ]
    for row in result.modes[0].rows:
        cells = [_vllm_cells(m.row(row.row), m.row(WSYNC).seconds.p50) for m in result.modes]
        lines.append(f"| {'**wsync**' if row.row == WSYNC else row.title} | " + " | ".join(cells) + " |")
    generation = [f"{mode.row(WSYNC).tokens_before.p50:.0f} tokens/s" for mode in result.modes]
    lines.append("| generation before | " + " | ".join(f"{text} |" for text in generation) + " |")
    options, machine = result.options, result.machine
    verdict = "every version of wsync verified" if result.verdict == "ok" else "A VERDICT IS WRONG"
    lines += [
        "",
        f"{options.model_name} ({result.trainer_bytes / 1e9:.2f} GB in bf16), one trainer process, vLLM "
        f"{result.vllm_version}, {options.num_clients} clients, on one machine, {machine['cpu']}, "
        f"{machine['num_cores']} cores, memcpy {result.memcpy.gbps:.1f} GB/s, no GPU; p50 of {options.repeats}; "
        f"{verdict}. `wsync bench vllm --preset {options.model_name}`, "
        "record `bench/records/vllm_qwen3_0.6b.json`.",
    ]
    return "\n".join(lines)


def _vllm_cells(row: VLLMRow, wsync_s: float) -> str:
    """The seconds, and how long the server is paused in them. A baseline that leaves wrong weights says so."""
    seconds, pause = _short(row.seconds.p50), _short(row.server_pause_s.p50)
    if row.row == WSYNC:
        return f"**{seconds}** | **{pause}**"
    return f"{seconds} ({row.seconds.p50 / wsync_s:.1f} x){'' if row.verdict == 'ok' else ', wrong'} | {pause}"


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def splice(document: str, table: str, name: str = _E2E) -> str:
    """The document with the table of that name replaced.

    Raises:
        ConfigError: it has no place for one.
    """
    begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(end), re.S)
    if not pattern.search(document):
        raise ConfigError(f"the document has no {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", document)


def main(argv: list[str]) -> int:
    """Put the record's table into the documents."""
    if len(argv) < 2:
        raise ConfigError(f"give a record and at least one document, got {len(argv)} arguments")
    name, table = table_in(Path(argv[0]))
    for document in argv[1:]:
        path = Path(document)
        path.write_text(splice(path.read_text(), table, name))
    return 0


def table_in(record: Path) -> tuple[str, str]:
    """The name and the text of the table that a record makes.

    Raises:
        ConfigError: the record cannot be read.
        FormatVersionError: it is of no format that this wsync reads.
    """
    makers: tuple[tuple[str, Callable[[], str]], ...] = (
        (_E2E, lambda: table_of(load_record(record))),
        (_VLLM, lambda: vllm_table_of(load_vllm_record(record))),
        (_DELTA, lambda: delta_table_of(load_delta_record(record))),
        (_KERNELS, lambda: kernel_table_of(load_kernel_record(record))),
        (_TOPO, lambda: topo_table_of(load_topo_record(record))),
        (_PLANNING, lambda: planning_table_of(load_planning_record(record))),
        (_SHOOTOUT, lambda: shootout_table_of(load_shootout_record(record))),
        (_SIMULATOR, lambda: simulator_table_of(load_simulator_record(record))),
    )
    errors = []
    for name, make in makers:
        try:
            return name, make()
        except FormatVersionError as e:
            errors.append(e)
    raise errors[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
