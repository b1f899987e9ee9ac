"""Exit statuses of verdicts, in the manner of whoever runs the check."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from wsync.topo.findings import Severity, Verdict
from wsync.topo.render.summary import verdict_from

NAGIOS: dict[Verdict, int] = {"OK": 0, "WARN": 1, "CRIT": 2, "UNKNOWN": 3}
"""Source: Monitoring Plugins Development Guidelines, plugin return codes."""

STYLES: dict[str, dict[Verdict, int]] = {
    "nagios": NAGIOS,
    # Source: kubernetes/node-problem-detector, custom plugin monitor: 0 OK, 1 NonOK, anything else Unknown.
    "npd": {"OK": 0, "WARN": 1, "CRIT": 1, "UNKNOWN": 2},
    # Source: Slurm, "Prolog and Epilog Guide": a prolog that fails drains the node. Not knowing is no reason to.
    "prolog": {"OK": 0, "WARN": 1, "CRIT": 1, "UNKNOWN": 0},
    "strict": {"OK": 0, "WARN": 1, "CRIT": 1, "UNKNOWN": 1},
}
FAIL_ON: dict[str, Severity] = {"info": "INFO", "warn": "WARN", "crit": "CRIT"}
DEFAULT_FAIL_ON = {"nagios": "warn", "npd": "warn", "prolog": "crit", "strict": "warn"}

EPILOG = """exit status of check, compare, golden check and diff, lint, import-bandwidth and
achieved, and of wrong arguments of theirs, by --exit-style:
                                      nagios  npd  prolog  strict
  OK       nothing above INFO              0    0       0       0
  WARN                                     1    1       0       1
  CRIT                                     2    1       1       1
  UNKNOWN  an input cannot be read, too    3    2       0       1
           much is missing, wrong arguments

save, golden save, plan and advise judge nothing: 0 done, 3 wrong arguments or inputs,
which is no verdict either"""


def add_exit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--exit-style`` and ``--fail-on``."""
    parser.add_argument(
        "--exit-style",
        choices=tuple(STYLES),
        default="nagios",
        help="exit statuses: nagios 0/1/2/3 (default); npd 0/1/2 (node-problem-detector); prolog 1 on CRIT alone "
        "(Slurm drains the node); strict 1 on anything above INFO",
    )
    parser.add_argument(
        "--fail-on",
        choices=tuple(FAIL_ON),
        help="the least severity that counts for the exit status (default: warn; crit with --exit-style prolog); "
        "UNKNOWN keeps its own",
    )


def exit_of(verdict: Verdict, style: str = "nagios") -> int:
    """Exit status of a verdict, which for a style is that of what counts (`counted_verdict`)."""
    return STYLES[style][verdict]


def counted_verdict(severities: Iterable[Severity], style: str, fail_on: str | None) -> Verdict:
    """The verdict of what counts under ``--fail-on``, or by the style's default."""
    return verdict_from(severities, FAIL_ON[fail_on or DEFAULT_FAIL_ON[style]])


def usage_status(argv: Sequence[str]) -> int | None:
    """Exit status of wrong arguments and inputs of ``wsync topo``: UNKNOWN, as 2 reads CRIT. None for other commands.

    The style is looked for in the arguments as they stand, since they could not be parsed.
    """
    words = [a for a in argv if not a.startswith("-")]
    if words[:1] != ["topo"]:
        return None
    style = "nagios"
    for option, value in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, own = option.partition("=")
        if name == "--exit-style":
            style = own if equals else value
    return exit_of("UNKNOWN", style if style in STYLES else "nagios")
