"""Where the report goes: tables, one line, JSON, metrics, JUnit, pictures; one option each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

from wsync.cli.output import print_error, write_data, write_json
from wsync.cli.topo.judged import written
from wsync.cli.topo.table import print_report
from wsync.errors import ConfigError, WsyncError
from wsync.topo.findings import Finding, Subject, Verdict, guide_link
from wsync.topo.model import Topology
from wsync.topo.render.junit import junit_xml
from wsync.topo.render.nagios import nagios_line, status_text
from wsync.topo.render.prometheus import prometheus_text
from wsync.topo.report import MachineReport, Report

STDOUT = "-"


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all of them."""
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the report as JSON (-: to stdout)")
    parser.add_argument("--nagios", action="store_true", help="print one line with performance data instead of tables")
    parser.add_argument("--quiet", action="store_true", help="print only what is above INFO")
    parser.add_argument(
        "--matrix", action="store_true", help="print how each GPU sees every GPU and NIC, faults marked with ! and !!"
    )
    parser.add_argument(
        "--prometheus",
        metavar="FILE",
        type=_ending("prom"),
        help="write metrics for node_exporter's textfile collector: FILE.prom, replaced as a whole (-: to stdout)",
    )
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML (-: to stdout)")
    parser.add_argument(
        "--svg", metavar="FILE", type=_ending("svg"), help="draw the topology, links coloured by health"
    )
    parser.add_argument("--png", metavar="FILE", type=_ending("png"), help="the same as PNG (needs matplotlib)")


def _ending(suffix: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not text.endswith(f".{suffix}") and not (text == STDOUT and suffix != "png"):
            raise argparse.ArgumentTypeError(f"{text!r} must end in .{suffix}")
        return text

    return check


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse what cannot be done together.

    Raises:
        ConfigError: more than one output to stdout.
    """
    named = [f"--{name} -" for name in ("json", "prometheus", "junit", "svg") if getattr(args, name) == STDOUT]
    if args.nagios:
        named.append("--nagios")
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} both write to stdout", hint="give one of them a file")


def write_outputs(report: Report, topology: Topology, args: argparse.Namespace, verdict: Verdict) -> bool:
    """Print and write all that was asked for; one that fails is named on stderr and does not stop the others.

    Args:
        report: what was found.
        topology: the machines, in the order of the report.
        args: with what `add_output_arguments` added.
        verdict: of what counts under ``--fail-on``.

    Returns:
        Whether all could be written.
    """
    done = True
    for write in _writers(report, topology, args, verdict):
        done &= written(args, write)
    return done


def _writers(
    report: Report, topology: Topology, args: argparse.Namespace, verdict: Verdict
) -> Iterator[Callable[[], None]]:
    if args.nagios:
        yield lambda: print(nagios_line(report, verdict))
    elif STDOUT not in (args.json, args.prometheus, args.junit, args.svg):
        yield lambda: _print_tables(report, topology, args)
    yield from _file_writers(report, args)
    if args.svg or args.png:
        yield lambda: _draw(report, topology, args)


def _file_writers(report: Report, args: argparse.Namespace) -> Iterator[Callable[[], None]]:
    if args.json:
        yield lambda: write_json(report, args.json)
    if args.prometheus:
        yield lambda: write_output(args.prometheus, prometheus_text(report, time.time()).encode())
    if args.junit:
        yield lambda: write_output(args.junit, junit_xml(report).encode())


def _print_tables(report: Report, topology: Topology, args: argparse.Namespace) -> None:
    print_report(report, args.quiet)
    if args.matrix:
        from wsync.cli.topo.matrix import print_matrix

        for machine, judged in zip(topology.machines, report.machines, strict=True):
            print_matrix(machine, judged)


def _draw(report: Report, topology: Topology, args: argparse.Namespace) -> None:
    from wsync.topo.render.picture import draw_topology
    from wsync.topo.render.svg import svg_text

    scene = draw_topology(topology, report)
    if args.svg:
        write_output(args.svg, svg_text(scene).encode())
    if args.png:
        from wsync.topo.render.png import png_bytes

        write_output(args.png, png_bytes(scene))


def print_unjudged(error: WsyncError, args: argparse.Namespace, host: str | None) -> None:
    """Say why nothing was judged, also where monitoring systems look for it: the last file may say that all was well.

    Args:
        error: why.
        args: with what `add_output_arguments` added.
        host: that should have been judged.
    """
    print_error(error)
    if args.nagios:
        written(args, lambda: print(status_text("UNKNOWN", error.message)))
    try:
        check_outputs(args)
    except ConfigError:
        return
    for write in _file_writers(_unjudged(error, host), args):
        written(args, write)


def _unjudged(error: WsyncError, host: str | None) -> Report:
    name = "input.unreadable"
    finding = Finding(name, "UNKNOWN", Subject(host), error.message, "", error.hint or "", guide_link(name))
    machine = MachineReport(host, "UNKNOWN", False, "unknown", "unknown", None, 0, 0, (), (), {}, (finding,), ())
    return Report("UNKNOWN", (machine,))


def write_output(target: str, data: bytes) -> None:
    """Write a file that everyone may read, whole; ``-`` is stdout. Raises as `write_data`."""
    write_data(target, data, 0o644)
