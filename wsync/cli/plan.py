"""``wsync plan``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from wsync.cli.output import (
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
    from wsync.plan.types import PlanOptions

_TABLE_WIDTH = 120

_DESCRIPTION = """Plans the sync of two manifests on a cluster, moves nothing, and says how long it would take, how far
that is from the best that any plan could do, which part of the cluster is the limit, and what would make it faster.
Manifests come from `wsync describe` or from a job, cluster files from `wsync topo`."""


def add_parser(commands: Any) -> None:
    """Add ``plan``."""
    parser = commands.add_parser(
        "plan",
        help="seconds, lower bound and loads of a sync, from two manifests and a cluster file",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="manifest of the trainer")
    parser.add_argument("sink", metavar="SINK", help="manifest of the engines")
    parser.add_argument("--cluster", metavar="FILE", help="the machines (default: one slow port for each host)")
    parser.add_argument("--bucket-bytes", type=int, metavar="N", help="size of a bucket (default: the best one)")
    parser.add_argument("--no-relay", action="store_true", help="engine ranks pass nothing on to other nodes")
    parser.add_argument(
        "--density",
        action="append",
        metavar="[PREFIX=]SHARE",
        help="share of the elements that a step changes, of all tensors or of those of a prefix; may be repeated",
    )
    parser.add_argument("--explain", metavar="TENSOR", help="the road of one tensor, in place of the report")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write it as JSON (-: to stdout)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the plan itself")
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    """Plan and report. Nothing is written unless all of it worked."""
    _check_outputs(args)
    options = _options(args)

    from wsync.cli.plan_explain import explain
    from wsync.cli.plan_report import plan_and_report
    from wsync.cli.plan_tables import print_explanation, print_report
    from wsync.plan.plans import encode_plan
    from wsync.spec.cluster import load_cluster
    from wsync.spec.manifest_file import load_sink, load_source

    source, sink = load_source(args.source), load_sink(args.sink)
    cluster = None if args.cluster is None else load_cluster(args.cluster)
    check_prefixes(options.density, (t.name for t in source.tensors))
    plan, report = plan_and_report(source, sink, cluster, options)
    found = None if args.explain is None else explain(plan, source, sink, args.explain)
    if args.output:
        write_data(args.output, encode_plan(plan))
    if args.json:
        write_json(report if found is None else found, args.json)
    if args.json != "-":
        if cluster is None:
            _say_default()
        console = stdout_console(_TABLE_WIDTH)
        if found is None:
            print_report(report, console)
        else:
            print_explanation(found, console)
    return EXIT_OK


def _check_outputs(args: argparse.Namespace) -> None:
    outputs = {"--json": args.json, "--output": args.output}
    for option, target in outputs.items():
        check_writable(target, option)
    if args.output == "-":
        raise ConfigError("--output - is not possible: only --json goes to stdout")
    check_apart(outputs, {"SOURCE": args.source, "SINK": args.sink, "--cluster": args.cluster})


def _say_default() -> None:
    from wsync.spec.cluster import DEFAULT_HOST_GBPS, DEFAULT_NIC_GBPS

    text = f"assumed: each host has no GPUs, one port of {DEFAULT_NIC_GBPS:g} GB/s and memory of {DEFAULT_HOST_GBPS:g}"
    stderr_console().print(f"{text} GB/s, as no --cluster is given", markup=False, highlight=False, soft_wrap=True)


def check_prefixes(density: float | dict[str, float] | None, names: Iterable[str]) -> None:
    """Refuse a prefix of ``--density`` that would change nothing.

    Raises:
        ConfigError: no tensor's name begins with it; names the nearest one.
    """
    if not isinstance(density, dict):
        return
    known = list(names)
    for prefix in density:
        if not any(name.startswith(prefix) for name in known):
            from difflib import get_close_matches

            close = get_close_matches(prefix, dict.fromkeys(name[: len(prefix) + 1] for name in known), 1, 0.5)
            raise ConfigError(
                f"--density names {prefix!r}, but none of the {len(known)} tensors of the trainer begins so",
                hint=f"did you mean {close[0]!r}?" if close else "",
            )


def _options(args: argparse.Namespace) -> PlanOptions:
    from wsync.plan.types import PlanOptions

    return PlanOptions(args.bucket_bytes, parse_density(args.density or []), not args.no_relay)


def parse_density(texts: list[str]) -> float | dict[str, float] | None:
    """One share for all tensors, or by prefix of their names.

    Raises:
        ConfigError: not a number, or a prefix twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        prefix, _, share = text.rpartition("=")
        if prefix in found:
            raise ConfigError(f"--density names {prefix or 'all tensors'!r} twice: {found[prefix]} and {share}")
        try:
            found[prefix] = float(share)
        except ValueError:
            raise ConfigError(f"--density is {text!r}, allowed are SHARE or PREFIX=SHARE with 0 to 1") from None
    return found or None
