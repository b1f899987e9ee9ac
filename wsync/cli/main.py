"""The ``wsync`` command."""

from __future__ import annotations

import argparse
import sys

from wsync import __version__
from wsync.cli import bench, describe, doctor, keygen, plan, simulate, topo
from wsync.cli.output import EXIT_INTERRUPTED, EXIT_USAGE, exit_status, print_error
from wsync.errors import WsyncError

_EPILOG = """exit status:
  0  done
  1  the job ran and failed, a verdict is wrong, or a core requirement is missing
  2  usage or configuration error; nothing was moved
  3  a peer, a connection or a deadline was lost

Data goes to stdout, logs and progress to stderr. NO_COLOR is honoured."""


def build_parser() -> argparse.ArgumentParser:
    """The parser, with every subcommand. Imports no torch."""
    parser = argparse.ArgumentParser(
        prog="wsync",
        description="Weights of a trainer into running inference engines: in place, atomic per replica.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wsync {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bench.add_parser(commands)
    describe.add_parser(commands)
    doctor.add_parser(commands)
    keygen.add_parser(commands)
    plan.add_parser(commands)
    simulate.add_parser(commands)
    topo.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status; never a traceback for a `WsyncError` unless ``--debug``."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    try:
        return int(args.run(args))
    except WsyncError as e:
        if args.debug:
            for note in getattr(e, "__notes__", []):
                sys.stderr.write(note)
            raise
        print_error(e)
        unknown = topo.usage_status(argv) if exit_status(e) == EXIT_USAGE else None
        return exit_status(e) if unknown is None else unknown
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parsed arguments; wrong ones of ``wsync topo`` exit with what its readers take for UNKNOWN, see its help."""
    try:
        return build_parser().parse_args(argv)
    except SystemExit as e:
        status = topo.usage_status(argv)
        if e.code != EXIT_USAGE or status is None:
            raise
        raise SystemExit(status) from e


if __name__ == "__main__":
    sys.exit(main())
