"""``wsync topo advise``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from wsync.cli.output import EXIT_OK, check_writable, printable, stderr_console, write_json
from wsync.cli.topo.inputs import add_arguments, live_options, read_inputs
from wsync.cli.topo.lines import say
from wsync.errors import ConfigError
from wsync.topo.advise import Advice, Advised, advise
from wsync.topo.render.summary import plural


def add_parser(commands: Any) -> None:
    """Add ``advise``."""
    parser = commands.add_parser(
        "advise", help="NCCL variables that differ from NCCL's defaults, with reasons", allow_abbrev=False
    )
    add_arguments(parser)
    parser.add_argument(
        "--platform", metavar="NAME", help="expect this GPU model instead of the one that was recognised"
    )
    parser.add_argument(
        "--fabric",
        choices=("rails", "shared"),
        default="unknown",
        help="rails: NICs of equal position have switches of their own; shared: all NICs of a host are on one switch",
    )
    parser.add_argument(
        "--export",
        action="store_true",
        help="print lines for a shell, what is left out as comments; reasons go to stderr",
    )
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the advice as JSON (-: to stdout)")
    parser.set_defaults(run=run_advise)


def run_advise(args: argparse.Namespace) -> int:
    """Print the advice for each host.

    Raises:
        ConfigError: an input cannot be read, or ``--export`` for several hosts that need different variables.
    """
    check_writable(args.json, "--json")
    topology = read_inputs(args.inputs, args.host, live_options(args))
    for gap in (g for m in topology.machines for g in m.gaps if g.fatal):
        raise ConfigError(gap.what)
    if not topology.machines:
        raise ConfigError("advise needs at least 1 machine, got 0")
    advised = [advise(m, args.platform, args.fabric) for m in topology.machines]
    if args.json:
        write_json(advised, args.json)
    if args.export:
        _print_export(advised)
    elif args.json != "-":
        for one in advised:
            _print(one)
    return EXIT_OK


def _print_export(advised: list[Advised]) -> None:
    wanted = {tuple((a.name, a.value) for a in one.advice if _certain(a)) for one in advised}
    if len(wanted) > 1:
        hosts = ", ".join(str(one.host) for one in advised)
        raise ConfigError(
            f"{len(advised)} hosts ({hosts}) need {len(wanted)} different environments, --export prints 1",
            hint="call it once for each host",
        )
    for one in advised[:1]:
        for advice in filter(_certain, one.advice):
            say(f"export {advice.name}={shlex.quote(advice.value)}")
            stderr_console().print(
                printable(f"{advice.name}: {advice.reason}"), markup=False, highlight=False, soft_wrap=True
            )
    # After what is set: a shell that gets the lines as one would take all behind a comment for a part of it.
    comments = [_comment(a) for one in advised for a in one.advice if not _certain(a)]
    comments += [f"# note: {note}" for one in advised for note in one.notes]
    for comment in dict.fromkeys(comments):
        say(comment)


def _comment(advice: Advice) -> str:
    """What is left out and why, as a line that a shell passes over."""
    why = "measure with and without it" if advice.measure else "there is no such file yet"
    return f"# left out: {advice.name}={shlex.quote(advice.value)} ({why}): {advice.reason}"


def _certain(advice: Advice) -> bool:
    """What a job may set unseen: nothing that is to be measured first, no file that is not there."""
    return not advice.measure and (advice.name != "NCCL_TOPO_FILE" or Path(advice.value).is_file())


def _print(one: Advised) -> None:
    count = plural(len(one.advice), "variable") if one.advice else "NCCL's defaults are right"
    say(f"{one.host or 'this machine'}: {count}")
    for advice in one.advice:
        lines = [
            f"  {advice.name}={advice.value}",
            f"      instead of: {advice.default}",
            f"      because: {advice.reason}",
        ]
        if advice.measure:
            lines.append("      measure with and without it")
        for line in lines:
            say(line)
    for note in one.notes:
        say(f"  note: {note}")
