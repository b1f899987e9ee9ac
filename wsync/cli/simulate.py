"""``wsync simulate``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import msgspec

from wsync.cli.output import (
    EXIT_FAILED,
    EXIT_OK,
    check_apart,
    check_writable,
    stderr_console,
    stdout_console,
    write_data,
    write_json,
)
from wsync.errors import ConfigError

if TYPE_CHECKING:
    from wsync.sim.presets import Preset
    from wsync.sim.result import SimResult
    from wsync.sim.scenario import Scenario

LIST_VERSION = 1
_MAX_REPLICAS = 16
_MAX_RESOURCES = 12

_DESCRIPTION = """Plan one update of weights on a cluster that need not be there, and simulate it: ports, NVLink and
memory with contention, bucket by bucket. docs/guides/simulate.md says what is modelled."""


class PresetRow(msgspec.Struct, frozen=True):
    """One preset in ``wsync simulate --list --json``."""

    name: str
    title: str
    model: str
    trainer_layout: str
    engine_layout: str
    recipe: str
    published_s: float | None
    published_by: str
    bound_s: float | None
    assumptions: tuple[str, ...]


class PresetList(msgspec.Struct, frozen=True):
    """What ``wsync simulate --list --json`` writes."""

    presets: list[PresetRow]
    format_version: int = LIST_VERSION


def add_parser(commands: Any) -> None:
    """Add ``simulate``."""
    parser = commands.add_parser(
        "simulate", help="simulate an update on a cluster", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("scenario", nargs="?", metavar="PRESET|FILE", help="a preset's name or a scenario file")
    parser.add_argument("--list", action="store_true", help="name the presets")
    parser.add_argument(
        "--straggler", action="append", default=[], metavar="NODE:FACTOR", help="all rates of a node times a factor"
    )
    parser.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="NODE[/NIC]@SECONDS",
        help="a node or one of its ports fails then",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="REPLICA",
        help="a replica that is not there: plan for the others",
    )
    parser.add_argument("--install", choices=("staged", "in_place"), help="when engines write live memory")
    parser.add_argument("--detect", metavar="SECONDS", help="from a failure until peers act on it")
    parser.add_argument("--jitter", metavar="SHARE", help="spread of every service time, from 0 to 0.99")
    parser.add_argument("--seed", metavar="N", help="of the jitter")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the result as JSON (-: to stdout)")
    parser.add_argument("--chart", metavar="FILE", help="write a Gantt chart (.png)")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev (JSON)")
    parser.set_defaults(run=run_simulate)


def run_simulate(args: argparse.Namespace) -> int:
    """Plan, simulate, print; 1 if no replica committed."""
    if args.list:
        _check_list(args)
        return _list_presets(args)
    if args.scenario is None:
        raise ConfigError("simulate needs a preset or a scenario file", hint="wsync simulate --list names the presets")
    _check_outputs(args)
    from wsync.sim.run import Simulation
    from wsync.sim.scenario import open_scenario

    scenario = open_scenario(args.scenario)
    scenario.options = _options(args, scenario)
    scenario.drop_replicas(scenario.options.without)
    plan, plan_wall_s = scenario.make_plan()
    spans = bool(args.chart or args.trace)
    simulation = Simulation(plan, scenario.source, scenario.sink, scenario.cluster, scenario.options, spans=spans)
    result = simulation.run(scenario.name, plan_wall_s, scenario.published_s)
    _write_files(args, result, simulation.resources)
    if args.json != "-":
        _print(result, scenario)
    return EXIT_OK if result.committed else EXIT_FAILED


def _check_list(args: argparse.Namespace) -> None:
    """``--list`` names presets and does nothing else."""
    from wsync.sim.options import shown

    if args.scenario is not None:
        raise ConfigError(f"--list names all presets, it takes none; got {shown(args.scenario)}")
    others = ("straggler", "fail", "without", "install", "detect", "jitter", "seed", "chart", "trace")
    given = [f"--{name}" for name in others if getattr(args, name) not in (None, [])]
    if given:
        raise ConfigError(f"--list simulates nothing: it goes with --json only, not with {', '.join(given)}")
    _check_target(args.json, "--json")


def _check_outputs(args: argparse.Namespace) -> None:
    targets = {f"--{name}": getattr(args, name) for name in ("json", "chart", "trace")}
    for option, target in targets.items():
        _check_target(target, option)
    check_apart(targets, {"the scenario": args.scenario})


def _check_target(target: str | None, option: str) -> None:
    """Refuse a file that cannot be written, before a long run."""
    from wsync.sim.options import shown

    if target is None:
        return
    if not target:
        raise ConfigError(f"{option} needs the name of a file, got ''")
    if target == "-" and option != "--json":
        raise ConfigError(f"{option} - is not possible: only --json goes to stdout")
    if option == "--chart" and not target.endswith(".png"):
        raise ConfigError(f"--chart {shown(target)} must end in .png")
    try:
        check_writable(target, option)
    except OSError as e:
        raise ConfigError(f"{option} {shown(target)} cannot be written: {e.strerror}") from e


def _options(args: argparse.Namespace, scenario: Scenario) -> Any:
    """Those of the scenario with what the command line says on top, checked."""
    from wsync.sim.options import check_options, parse_failure, parse_index, parse_number, parse_straggler

    changes: dict[str, Any] = {
        "stragglers": (*scenario.options.stragglers, *map(parse_straggler, args.straggler)),
        "failures": (*scenario.options.failures, *map(parse_failure, args.fail)),
        "without": (*scenario.options.without, *args.without),
    }
    if args.install is not None:
        changes["install"] = args.install
    if args.detect is not None:
        changes["detect_s"] = parse_number(args.detect, "--detect")
    if args.jitter is not None:
        changes["jitter"] = parse_number(args.jitter, "--jitter")
    if args.seed is not None:
        changes["seed"] = parse_index(args.seed, "--seed")
    options = msgspec.structs.replace(scenario.options, **changes)
    check_options(options)
    return options


def _write_files(args: argparse.Namespace, result: SimResult, resources: Any) -> None:
    """All of them or, if one cannot be made, none that was not written before it."""
    from wsync.sim.chart import chart_png
    from wsync.sim.trace import trace_of

    chart = chart_png(result, resources) if args.chart else None
    trace = msgspec.json.encode(trace_of(result, resources)) if args.trace else None
    if chart is not None:
        write_data(args.chart, chart)
    if trace is not None:
        write_data(args.trace, trace)
    if args.json:
        write_json(result, args.json)


def _list_presets(args: argparse.Namespace) -> int:
    from wsync.sim.presets import PRESETS

    if args.json:
        write_json(PresetList([_row(p) for p in PRESETS.values()]), args.json)
    if args.json != "-":
        _print_presets(list(PRESETS.values()))
    return EXIT_OK


def _row(preset: Preset) -> PresetRow:
    published = preset.published
    return PresetRow(
        preset.name,
        preset.title,
        preset.model,
        preset.trainer_layout,
        preset.engine_layout,
        preset.recipe,
        published.seconds if published else None,
        published.source if published else "",
        preset.bound_s,
        preset.assumptions,
    )


def _print_presets(presets: list[Preset]) -> None:
    from rich.table import Table

    table = Table(title="presets", title_justify="left")
    for name in ("name", "what", "published s"):
        table.add_column(name, overflow="fold", justify="right" if name.endswith(" s") else "left")
    for preset in presets:
        table.add_row(preset.name, preset.title, f"{preset.published.seconds:g}" if preset.published else "")
    stdout_console().print(table)


def _print(result: SimResult, scenario: Scenario) -> None:
    from wsync.cli.simulate_table import print_result

    for line in scenario.text:
        stderr_console().print(f"assumed: {line}", markup=False, highlight=False, soft_wrap=True)
    print_result(result, stdout_console(), max_replicas=_MAX_REPLICAS, max_resources=_MAX_RESOURCES)
