"""The tables of ``wsync describe``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from wsync.cli.output import stdout_console
from wsync.spec.manifest import HOST

if TYPE_CHECKING:
    from wsync.cli.describe import ModelReport, Report

_LIST_WIDTH = 140


def print_models(models: Sequence[ModelReport]) -> None:
    """The built-in models."""
    table = Table(title="built-in models", title_justify="left")
    table.add_column("model", no_wrap=True)
    for name in ("tensors", "parameters", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for model in models:
        size = f"{model.nbytes / 1e9:,.1f} GB"
        billions = f"{model.num_parameters / 1e9:,.1f} B"
        table.add_row(model.name, f"{model.num_tensors:,}", billions, size, Text(model.source))
    stdout_console(_LIST_WIDTH).print(table)


def report_table(report: Report) -> Table:
    """One model, and one side of a sync."""
    table = Table(title=f"wsync describe {report.model.name}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(report):
        table.add_row(name, Text(value))
    return table


def _rows(report: Report) -> list[tuple[str, str]]:
    model = report.model
    rows = [
        ("model", f"{model.num_tensors:,} tensors, {model.num_parameters:,} parameters, {_bytes(model.nbytes)}"),
        ("", _by_dtype(model.bytes_by_dtype)),
        ("source", model.source),
    ]
    found = report.summary
    if found is not None:
        what = "holds" if report.side == "trainer" else "receives"
        recipe = f" in {report.recipe}" if report.recipe else ""
        rows += [
            (str(report.side), f"{report.layout}{recipe}: {found.num_ranks:,} ranks on {found.num_hosts:,} hosts"),
            *([("memory", _in_host(report))] if report.memory == HOST else []),
            ("classes", f"{found.num_classes:,} of tensors, {found.num_rank_classes:,} of ranks"),
            ("boxes", f"{found.num_boxes:,}"),
            ("one copy", _by_dtype(found.bytes_by_dtype)),
            (f"a rank {what}", f"{_bytes(found.rank_bytes_min)} to {_bytes(found.rank_bytes_max)}"),
            ("all ranks", _bytes(found.total_bytes)),
        ]
    if report.manifest is not None:
        rows.append(("manifest", f"{report.manifest}, {_bytes(report.manifest_bytes)}"))
    return rows


def _in_host(report: Report) -> str:
    if report.side == "trainer":
        return "the host's: weights cross PCIe to be packed"
    return "the host's: what is received crosses PCIe to be installed"


def _by_dtype(nbytes: dict[str, int]) -> str:
    return ", ".join(f"{dtype} {_bytes(n)}" for dtype, n in nbytes.items())


def _bytes(n: int) -> str:
    """With three or four figures."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= factor:
            return f"{n / factor:,.2f} {unit}"
    return f"{n} B"
