"""``wsync describe``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import msgspec

from wsync import __version__
from wsync.cli.describe_hosts import Hosts, parse_hosts
from wsync.cli.output import EXIT_OK, check_writable, stdout_console, write_json
from wsync.errors import ConfigError
from wsync.spec.manifest import DEVICE

if TYPE_CHECKING:
    from wsync.describe import ModelShape, Summary
    from wsync.spec.manifest import SinkManifest, SourceManifest

FORMAT_VERSION = 1
TRAINER, ENGINE = "trainer", "engine"
_TABLE_WIDTH = 100

_DESCRIPTION = """Describes one side of a sync without running it: what every rank of a trainer holds, or what every
rank of an engine's replicas needs and where in its memory that goes. The manifest goes to `wsync plan` and `wsync
simulate`. Without --trainer and --engine: the model alone."""

_EPILOG = """layouts are key=value pairs, such as fsdp=32,tp=8 (FSDP2), tp=8,pp=4,ep=32 (Megatron-Core), zero3=64 and,
of an engine, tp=8,ep=8,replicas=4. docs/guides/describe.md has all keys."""


class ModelReport(msgspec.Struct, frozen=True):
    """A model.

    Attributes:
        name: of the model.
        num_tensors: tied ones once.
        num_parameters: elements of all tensors.
        nbytes: of all tensors.
        bytes_by_dtype: dtype -> bytes.
        source: where the facts are from.
    """

    name: str
    num_tensors: int
    num_parameters: int
    nbytes: int
    bytes_by_dtype: dict[str, int]
    source: str


class Report(msgspec.Struct, frozen=True):
    """What ``wsync describe --json`` writes.

    Attributes:
        format_version: of this report.
        wsync: version.
        model: the model.
        side: ``trainer``, ``engine`` or None.
        layout: as it was given.
        recipe: of the engine's weights, or None.
        memory: ``device`` or ``host``: where the weights are, or what is received; None without a side.
        summary: sums over the side's ranks, or None.
        manifest: the file that was written, or None.
        manifest_bytes: its size.
    """

    format_version: int
    wsync: str
    model: ModelReport
    side: str | None
    layout: str | None
    recipe: str | None
    memory: str | None
    summary: Summary | None
    manifest: str | None
    manifest_bytes: int


class ListReport(msgspec.Struct, frozen=True):
    """What ``wsync describe --list --json`` writes."""

    format_version: int
    wsync: str
    models: list[ModelReport]


def add_parser(commands: Any) -> None:
    """Add ``describe``."""
    parser = commands.add_parser(
        "describe",
        help="the manifest of a trainer or of engines, from a model and a parallel layout",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a built-in model, a config.json, a safetensors file or index, or a folder of them",
    )
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--trainer", metavar="LAYOUT", help="describe a trainer")
    side.add_argument("--engine", metavar="LAYOUT", help="describe the replicas of an engine")
    side.add_argument("--list", action="store_true", help="the built-in models")
    parser.add_argument("--recipe", metavar="NAME", help="of the engine's linear weights (default: bf16)")
    parser.add_argument("--dtype", metavar="NAME", help="of the trainer's parameters (default: bfloat16)")
    parser.add_argument(
        "--memory",
        choices=("device", "host"),
        help="where a trainer's weights are, or what an engine receives until it installs it (default: device)",
    )
    parser.add_argument("--mtp", action="store_true", help="with the layers that predict further tokens")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks of a host (default: 8)")
    parser.add_argument(
        "--gpus", metavar="LIST", help="GPUs of each host that ranks use, such as 4-7 (default: the planner chooses)"
    )
    parser.add_argument("--host-prefix", metavar="TEXT", help="hosts are TEXT0, TEXT1, ... (default: t, or e)")
    parser.add_argument(
        "--hosts", metavar="FILE", help="names of the hosts instead, a line NAME or NAME:GPUS for each rank or node"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the manifest")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write the sums as JSON (-: to stdout)")
    parser.set_defaults(run=run_describe)


def run_describe(args: argparse.Namespace) -> int:
    """Describe, write the manifest, print the sums. Nothing is written unless all of it worked."""
    _check(args)
    if args.list:
        _list(args.json)
        return EXIT_OK
    from wsync.describe import load_model, save_manifest, summarise

    model = load_model(args.model, mtp=args.mtp)
    manifest = _manifest(args, model)
    has_side = args.trainer is not None or args.engine is not None
    report = Report(
        format_version=FORMAT_VERSION,
        wsync=__version__,
        model=_model_report(model),
        side=TRAINER if args.trainer is not None else ENGINE if args.engine is not None else None,
        layout=args.engine if args.trainer is None else args.trainer,
        recipe=(args.recipe or "bf16") if args.engine is not None else None,
        memory=(args.memory or DEVICE) if has_side else None,
        summary=None if manifest is None else summarise(manifest),
        manifest=args.output,
        manifest_bytes=0,
    )
    if args.output is not None and manifest is not None:
        manifest_bytes = save_manifest(manifest, args.output)
        report = msgspec.structs.replace(report, manifest_bytes=manifest_bytes)
    if args.json:
        write_json(report, args.json)
    if args.json != "-":
        _print(report)
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    if args.model is None and not args.list:
        raise ConfigError("describe needs a MODEL", hint="wsync describe --list has the built-in ones")
    if args.output is not None and args.trainer is None and args.engine is None:
        raise ConfigError(f"-o {args.output}: a model alone has no manifest", hint="give --trainer or --engine")
    if args.recipe is not None and args.engine is None:
        raise ConfigError(f"--recipe {args.recipe} is for --engine: a trainer's tensors have no recipe")
    if args.dtype is not None and args.trainer is None:
        raise ConfigError(f"--dtype {args.dtype} is for --trainer: the recipe says what an engine holds")
    if args.memory is not None and args.trainer is None and args.engine is None:
        raise ConfigError(f"--memory {args.memory} is for --trainer or --engine: a model alone is nowhere")
    _hosts(args)
    check_writable(args.output, "-o")
    check_writable(args.json, "--json")


def _manifest(args: argparse.Namespace, model: ModelShape) -> SourceManifest | SinkManifest | None:
    from wsync.describe import describe_sink, describe_source, engine_ranks, trainer_ranks

    if args.trainer is not None:
        hosts, gpus = _hosts(args).place(trainer_ranks(args.trainer), "t")
        return describe_source(model, args.trainer, hosts, args.dtype or "bfloat16", gpus, args.memory or DEVICE)
    if args.engine is not None:
        hosts, gpus = _hosts(args).place(engine_ranks(args.engine), "e")
        return describe_sink(model, args.engine, hosts, args.recipe or "bf16", gpus, args.memory or DEVICE)
    return None


def _hosts(args: argparse.Namespace) -> Hosts:
    return parse_hosts(args.hosts, args.host_prefix, args.gpus_per_node, args.gpus)


def _model_report(model: ModelShape) -> ModelReport:
    return ModelReport(
        name=model.name,
        num_tensors=sum(t.alias_of is None for t in model.tensors),
        num_parameters=model.num_parameters,
        nbytes=model.nbytes,
        bytes_by_dtype=model.bytes_by_dtype,
        source=model.source,
    )


def _list(target: str | None) -> None:
    from wsync.describe import known_models, load_model

    models = [_model_report(load_model(name)) for name, _, _ in known_models()]
    if target:
        write_json(ListReport(FORMAT_VERSION, __version__, models), target)
    if target != "-":
        from wsync.cli.describe_tables import print_models

        print_models(models)


def _print(report: Report) -> None:
    from wsync.cli.describe_tables import report_table

    stdout_console(_TABLE_WIDTH).print(report_table(report))
