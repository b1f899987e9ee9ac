"""The report and the road of a tensor, for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wsync.cli.plan_explain import Explanation, Passage
from wsync.cli.plan_report import Load, PlanReport, Side
from wsync.plan.flows import LOCAL

_NUM_PASSAGES = 8
_NUM_HOPS = 24


def print_report(report: PlanReport, console: Console) -> None:
    """The report as tables."""
    console.print(_summary(report))
    console.print(_loads(report))
    console.print(_sides(report))
    console.print("what would make it faster", style="bold")
    for line in report.advice:
        console.print(Text(f"  {line}"), soft_wrap=True)
    size = report.size
    console.print(
        f"planned in {report.plan_wall_s:.2f} s, {_bytes(report.peak_memory_bytes)} of memory: {size.classes} classes, "
        f"{size.groups} groups, {size.trees} trees, {size.flows} flows, about {size.buckets} buckets of "
        f"{_bytes(report.bucket_bytes)}; the plan has {_bytes(size.encoded_bytes)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _summary(report: PlanReport) -> Table:
    table = _grid("wsync plan", ("", "left"), ("", "right"), ("", "left"))
    fill = f"fill {_seconds(report.fill_s)}, amaxes {_seconds(report.amax_s)}"
    rows = [
        ("predicted", _seconds(report.time_s), f"busiest part {_seconds(report.busiest_s)}, {fill}"),
        ("lower bound", _seconds(report.lower_bound_s), report.binding_cut),
        ("score", f"{report.score:.3f}", "predicted over lower bound; 1 is optimal"),
        ("bound without relays", _seconds(report.bound_without_relays_s), ""),
        ("bound with a bf16 wire", _seconds(report.bound_bf16_wire_s), ""),
        *_on_device(report),
        ("on the wire", _bytes(report.wire_bytes), "packed once by trainer ranks"),
        ("needed", _bytes(report.needed_bytes), "by engine ranks, each counted"),
        ("delivered over needed", f"{report.delivered_ratio:.3f}", _bytes(report.delivered_bytes)),
    ]
    return _filled(table, rows)


def _on_device(report: PlanReport) -> Iterable[tuple[str, str, str]]:
    if report.trainer.host_ranks or report.engine.host_ranks:
        predicted = f"and {_seconds(report.time_on_device_s)} predicted: nothing kept in host memory"
        yield "bound on the GPUs", _seconds(report.bound_on_device_s), predicted


def _loads(report: PlanReport) -> Table:
    """Parts of one kind in one row: names that differ in numbers only."""
    kinds: dict[str, list[Load]] = {}
    for load in report.loads:
        kinds.setdefault(re.sub(r"\d+", "*", load.name), []).append(load)
    columns = [("kind of part", "left"), ("parts", "right"), ("busiest", "left"), ("bytes", "right")]
    columns += [("seconds", "right"), ("of the time", "right"), ("mean", "right")]
    table = _grid("loads (--json has every part)", *columns)
    rows = []
    for kind, loads in kinds.items():
        top, mean = loads[0], sum(x.share for x in loads) / len(loads)
        cells = (top.name, _bytes(top.nbytes), _seconds(top.seconds), f"{100 * top.share:.0f} %", f"{100 * mean:.0f} %")
        rows.append((kind, str(len(loads)), *cells))
    return _filled(table, rows)


def _sides(report: PlanReport) -> Table:
    table = _grid(
        "sides", ("", "left"), ("ranks", "right"), ("nodes", "right"), ("memory of the rank with most of it", "left")
    )
    engine = report.engine
    return _filled(
        table,
        [
            (
                "trainer",
                *_counts(report.trainer),
                f"{_bytes(report.trainer.memory_bytes)} of buckets{_in_host(report.trainer, 'weights')}",
            ),
            (
                f"engine, {engine.replicas} replica{'s' * (engine.replicas != 1)}",
                *_counts(engine),
                f"{_bytes(engine.memory_bytes)} staged, or a ring of {_bytes(engine.ring_bytes)} paused"
                f"{_in_host(engine, 'this')}",
            ),
        ],
    )


def _in_host(side: Side, what: str) -> str:
    """Who of a side keeps something in host memory."""
    who = "all ranks" if side.host_ranks == side.ranks else f"{side.host_ranks} ranks"
    return f"; {what} in host memory on {who}" if side.host_ranks else ""


def _counts(side: Side) -> tuple[str, str]:
    return str(side.ranks), str(side.nodes)


def print_explanation(found: Explanation, console: Console) -> None:
    """The road of a tensor."""

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    same = "" if found.travels_as == found.tensor else f", shares the memory of {found.travels_as} and travels as that"
    say(f"{found.tensor}: {_shape(found.shape)} {found.dtype}{same}")
    if found.shared_class > 1:
        say(f"{found.shared_class} tensors of equal shape and placement go the same way")
    say("held by")
    for held in found.held[:_NUM_PASSAGES]:
        ranks = f"{_plural('trainer rank', held.ranks)} {_some(held.ranks)}"
        say(f"  {_box(held.offset, held.shape)}: {ranks} on {_some(held.hosts)}")
    _say_rest(say_count=len(found.held) - _NUM_PASSAGES, what="boxes", console=console)
    if not found.passages:
        say("no engine rank takes it")
    for passage in found.passages[:_NUM_PASSAGES]:
        _print_passage(passage, console)
    _say_rest(say_count=len(found.passages) - _NUM_PASSAGES, what="passages", console=console)


def _say_rest(say_count: int, what: str, console: Console) -> None:
    if say_count > 0:
        console.print(Text(f"  and {say_count} other {what} (--json has all)"))


def _print_passage(p: Passage, console: Console) -> None:
    head = f"{p.part} {_box(p.offset, p.shape)}, {p.recipe}, {_bytes(p.nbytes)}, {p.planned}, {p.how}"
    sender = f"{p.sender} on {p.host}{', from host memory' if p.offloaded else ''}"
    lines = [head, f"  packed by {sender}, about in bucket {p.bucket + 1} of {p.num_buckets} of its flow"]
    for hop in p.hops[:_NUM_HOPS]:
        way = "inside the node" if hop.rail == LOCAL else f"rail {hop.rail}"
        relay = ", relayed" if hop.relay else ""
        lines.append(f"  {hop.src} on {hop.src_host} -> {hop.dst} on {hop.dst_host} ({way}{relay})")
    if len(p.hops) > _NUM_HOPS:
        lines.append(f"  and {len(p.hops) - _NUM_HOPS} other hops (--json has all)")
    for land in p.landings[:_NUM_HOPS]:
        where = f"{land.sink} on {land.host}{', by way of host memory' if land.in_host else ''}"
        lines.append(f"  lands in {land.storage} ({land.dtype}) from element {land.first}, {where}")
    if len(p.landings) > _NUM_HOPS:
        lines.append(f"  and {len(p.landings) - _NUM_HOPS} other places (--json has all)")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _grid(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(name for name, _ in columns))
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _filled(table: Table, rows: Iterable[tuple[str, ...]]) -> Table:
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _some(values: Sequence[object], limit: int = 8) -> str:
    shown = ", ".join(str(v) for v in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"


def _plural(what: str, values: Sequence[object]) -> str:
    return what if len(values) == 1 else what + "s"


def _box(offset: tuple[int, ...], shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(offset, shape, strict=True)) + "]"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape) or "scalar"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def _bytes(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
