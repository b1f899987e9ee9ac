"""``wsync bench``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsync.bench.options import (
    BASELINES,
    PRESETS,
    RECIPES,
    check_counts,
    load_model_config,
    parse_baselines,
    parse_fault,
    parse_names,
    parse_recipes,
)
from wsync.bench.vllm_options import MODES, VLLMOptions, check_options
from wsync.cli.output import EXIT_FAILED, EXIT_OK, check_writable, stderr_console, stdout_console, write_json
from wsync.errors import ConfigError

if TYPE_CHECKING:
    from wsync.bench.e2e import Progress, Request
    from wsync.bench.result import Result
    from wsync.bench.vllm_result import VLLMResult

_TABLE_WIDTH = 130

_DESCRIPTION = """Trainer processes hold an FSDP2-sharded model, engine processes hold it fused and tensor-parallel.
Each row takes the same new weights from the first to the second, and is verified byte for byte against an engine that
loaded a checkpoint. docs/measurement.md defines every row and column."""

_VLLM_DESCRIPTION = """A trainer gives new weights to a real vLLM server while clients generate: with wsync, with vLLM's
own reload of a checkpoint in memory, and with a packed broadcast. After each repeat the server must answer as a server
that was started with those weights. docs/measurement.md defines every row and column."""


def add_parser(commands: Any) -> None:
    """Add ``bench`` and its subcommands."""
    parser = commands.add_parser("bench", help="measure on this machine", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    e2e = kinds.add_parser(
        "e2e",
        help="the main job end to end, against what people do today",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    _add_model(e2e)
    e2e.add_argument("--trainers", type=int, default=2, metavar="N", help="trainer processes (default: %(default)s)")
    e2e.add_argument("--engines", type=int, default=2, metavar="N", help="engine processes (default: %(default)s)")
    e2e.add_argument("--recipes", default=",".join(RECIPES), metavar="LIST", help="default: %(default)s")
    e2e.add_argument(
        "--baselines", default="all", metavar="LIST", help=f"all, none or some of {','.join(BASELINES)} (default: all)"
    )
    _add_run(e2e)
    e2e.add_argument(
        "--quantise-on",
        default="trainer",
        choices=("trainer", "engine"),
        help="where baselines quantise (default: trainer)",
    )
    e2e.add_argument("--workdir", metavar="DIR", help="where the disk baseline writes (default: the temporary folder)")
    e2e.add_argument("--chart", metavar="FILE", help="write a bar chart (PNG)")
    e2e.add_argument("--trace", metavar="FILE", help="write the phases as a Chrome/Perfetto trace (JSON)")
    e2e.set_defaults(run=run_e2e)
    vllm = kinds.add_parser(
        "vllm",
        help="a real vLLM server that serves, against its own reload",
        description=_VLLM_DESCRIPTION,
        allow_abbrev=False,
    )
    _add_model(vllm)
    vllm.add_argument(
        "--modes", default=",".join(MODES), metavar="LIST", help="how linear weights are held (default: %(default)s)"
    )
    vllm.add_argument("--clients", type=int, default=4, metavar="N", help="that generate (default: %(default)s)")
    _add_run(vllm)
    vllm.set_defaults(run=run_vllm)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="tiny", choices=tuple(PRESETS), help="model (default: %(default)s)")
    parser.add_argument("--config", metavar="FILE", help="config.json of a Hugging Face model, instead of a preset")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed repeats (default: %(default)s)")
    parser.add_argument("--transport", default="shm", choices=("shm", "gloo"), help="of wsync (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the result as JSON (-: to stdout)")
    parser.add_argument(
        "--deadline",
        type=float,
        default=120.0,
        metavar="S",
        help="of every wait, once the processes are up (default: %(default)s)",
    )
    parser.add_argument("--fault", help=argparse.SUPPRESS)


def run_e2e(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if a verdict is wrong."""
    request = _request(args)
    for target, option in ((args.json, "--json"), (args.chart, "--chart"), (args.trace, "--trace")):
        check_writable(target, option)
    if args.chart and Path(args.chart).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--chart {args.chart}: the name must end in .png, .pdf or .svg")
    _require_libraries("bench e2e", ["matplotlib"] if args.chart else [], "bench")

    from wsync.bench.e2e import run
    from wsync.bench.table import print_result
    from wsync.bench.trace import write_trace

    with _progress() as progress:
        result, spans = run(request, sys.argv, progress)
    if args.trace:
        write_trace(result.options, spans, Path(args.trace))
    if args.chart:
        from wsync.bench.chart import write_chart

        write_chart(result, Path(args.chart))
    return _deliver(result, args.json, lambda: print_result(result, stdout_console(_TABLE_WIDTH)))


def run_vllm(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if a verdict of wsync is wrong."""
    model, model_name = load_model_config(args.preset, args.config)
    options = check_options(
        VLLMOptions(
            model=model,
            model_name=model_name,
            modes=parse_names(args.modes, tuple(MODES), "mode"),
            num_clients=args.clients,
            repeats=args.repeats,
            transport=args.transport,
            deadline_s=args.deadline,
            fault=args.fault or "",
        )
    )
    check_writable(args.json, "--json")
    _require_libraries("bench vllm", ["vllm"], "bench,vllm")

    from wsync.bench.vllm_run import run
    from wsync.bench.vllm_table import print_vllm_result

    with _progress() as progress:
        result = run(options, sys.argv, progress)
    return _deliver(result, args.json, lambda: print_vllm_result(result, stdout_console(_TABLE_WIDTH)))


def _deliver(result: Result | VLLMResult, json: str | None, show: Callable[[], None]) -> int:
    """Write what was asked for, and return the exit status."""
    if json:
        write_json(result, json)
    if json != "-":
        show()
    return EXIT_OK if result.verdict == "ok" else EXIT_FAILED


def _request(args: argparse.Namespace) -> Request:
    from wsync.bench.e2e import Request

    check_counts(args.trainers, args.engines, args.repeats, args.deadline)
    model, model_name = load_model_config(args.preset, args.config)
    return Request(
        model=model,
        model_name=model_name,
        num_trainers=args.trainers,
        num_engines=args.engines,
        recipes=parse_recipes(args.recipes),
        baselines=parse_baselines(args.baselines),
        repeats=args.repeats,
        transport=args.transport,
        quantise_on=args.quantise_on,
        workdir=Path(args.workdir) if args.workdir else None,
        deadline_s=args.deadline,
        fault=parse_fault(args.fault),
    )


def _require_libraries(command: str, further: list[str], extra: str) -> None:
    """Refuse what could not run. A folder that happens to have the name of a package has no origin."""
    from importlib.util import find_spec

    specs = {name: find_spec(name) for name in ("torch", "transformers", "safetensors", *further)}
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise ConfigError(f"{command} needs {', '.join(missing)}", hint=f"pip install 'wsync-rl[{extra}]'")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal; on anything else one line for each row."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = stderr_console()
    if not console.is_terminal:
        yield _line_progress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting the processes", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _line_progress() -> Progress:
    said = ""

    def say(what: str, done: int, total: int) -> None:
        nonlocal said
        if what.endswith("warm-up") and what != said:
            said = what
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what} ({done} of {total})\n")

    return say
