"""``wsync topo plan``."""

from __future__ import annotations

import argparse
import re
from typing import Any

import msgspec

from wsync.cli.output import EXIT_OK, check_writable, write_json
from wsync.cli.topo.hosts import read_hosts
from wsync.cli.topo.lines import say
from wsync.errors import ConfigError
from wsync.spec.cluster import Cluster, NodeGroup, check_cluster, dump_cluster
from wsync.topo.files import read_regular
from wsync.topo.placement import CURVE, Placement, as_collective, own_nics, place_senders
from wsync.topo.placement_plan import PLACEMENT_VERSION, Planned, plan_on, read_plan, replay_on
from wsync.topo.to_cluster import PARTS, Converted, Overrides, Rate, to_group

TRAINER, ENGINE = "trainer", "engine"


class TopoPlan(msgspec.Struct, frozen=True):
    """What ``--json`` has."""

    nbytes: int
    placement: Placement
    plan: Planned | None
    cluster: Cluster
    rates: dict[str, tuple[Rate, ...]]
    nics: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]
    format_version: int = PLACEMENT_VERSION


def add_parser(commands: Any) -> None:
    """Add ``plan``."""
    parser = commands.add_parser(
        "plan", help="predict a sync on this topology, and the placement that would be faster", allow_abbrev=False
    )
    parser.add_argument(
        "machines",
        nargs="+",
        metavar="MACHINE",
        help="what `wsync topo save` wrote, or a folder or file of one host: of a trainer node and, if it differs, of "
        "an engine node",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME", help="built-in model, config.json or checkpoint, see `wsync describe`")
    what.add_argument("--plan", metavar="FILE", help="an encoded plan, as `wsync plan -o` writes it")
    what.add_argument("--bytes", metavar="N", type=float, help="bytes that every engine node needs")
    parser.add_argument("--trainer", metavar="LAYOUT", help="such as fsdp=8; with --engine the planner plans, too")
    parser.add_argument("--engine", metavar="LAYOUT", help="such as tp=8,replicas=2")
    parser.add_argument("--recipe", default="bf16", help="of the engine's weights (default: bf16)")
    parser.add_argument("--nodes", metavar="N", type=int, default=1, help="trainer nodes (default: 1)")
    parser.add_argument("--engine-nodes", metavar="M", type=int, default=1, help="engine nodes (default: 1)")
    parser.add_argument(
        "--senders",
        metavar="GPUS",
        help="GPUs of each trainer node that send, such as 0-3 (default: all with --trainer, else one near a NIC)",
    )
    parser.add_argument("--relay", action="store_true", help="senders also reach NICs of NVLink peers (NCCL's PXN)")
    parser.add_argument(
        "--collective", metavar="BYTES", type=int, help="weights go by NCCL's collectives of this payload"
    )
    parser.add_argument("--platform", metavar="NAME", help="GPU model, instead of the one that was recognised")
    parser.add_argument("--nic-gbit", metavar="R", type=float, help="rate of the NICs, in Gbit/s")
    parser.add_argument(
        "--nvlink-domain", metavar="N", type=int, help="GPUs of one NVLink domain, where it spans nodes"
    )
    parser.add_argument(
        "--measured", metavar="PART=GBPS", action="append", default=[], help=f"measured rate of {', '.join(PARTS)}"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the cluster file")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write all of it as JSON (-: to stdout)")
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    """Print the prediction.

    Raises:
        WsyncError: an input cannot be read, or a layout, model or machine does not fit.
    """
    check_writable(args.json, "--json")
    check_writable(args.output, "--output")
    sides = _convert(args)
    trainer, engine = sides[TRAINER].group, sides[ENGINE].group
    cluster = Cluster((trainer, engine))
    check_cluster(cluster)
    planned, nbytes = _plan(args, trainer, engine, cluster)
    notes = list(dict.fromkeys(n for side in sides.values() for n in side.notes))
    if args.collective is not None:
        trainer, engine = (as_collective(g, args.collective) for g in (trainer, engine))
        notes.append(f"senders as of a hierarchical collective of {args.collective} bytes: {CURVE}")
    placement = place_senders(trainer, engine, _senders(args, trainer), nbytes, args.relay)
    rates = {name: side.rates for name, side in sides.items()}
    nics = {name: side.nics for name, side in sides.items()}
    result = TopoPlan(nbytes, placement, planned, cluster, rates, nics, tuple(notes))
    if args.output:
        dump_cluster(cluster, args.output)
    if args.json:
        write_json(result, args.json)
    if args.json != "-":
        _print(result)
    return EXIT_OK


def _convert(args: argparse.Namespace) -> dict[str, Converted]:
    machines = read_hosts(args.machines)
    for gap in (g for m in machines for g in m.gaps if g.fatal):
        raise ConfigError(gap.what)
    if not 1 <= len(machines) <= 2:
        raise ConfigError(f"plan takes a trainer node and at most one other, an engine node; got {len(machines)} hosts")
    known = Overrides(args.platform, args.nic_gbit, args.nvlink_domain, _measured(args.measured))
    return {
        TRAINER: to_group(machines[0], TRAINER, args.nodes, known),
        ENGINE: to_group(machines[-1], ENGINE, args.engine_nodes, known),
    }


def _measured(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        part, _, rate = text.partition("=")
        try:
            found[part] = float(rate)
        except ValueError:
            raise ConfigError(f"--measured {text!r} is not PART=GBPS, such as nvlink=340") from None
    return found


def _senders(args: argparse.Namespace, trainer: NodeGroup) -> list[int]:
    if args.senders is None:
        every = list(range(trainer.num_gpus))
        near = [g for g in every if own_nics(trainer, g)]
        return every if args.trainer or args.plan else near[:1] or [0]
    found: list[int] = []
    for part in args.senders.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if match is None:
            raise ConfigError(f"--senders {args.senders!r}: {part!r} is no GPU and no range of GPUs, such as 0-3")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(found))


def _plan(
    args: argparse.Namespace, trainer: NodeGroup, engine: NodeGroup, cluster: Cluster
) -> tuple[Planned | None, int]:
    if (args.trainer is None) != (args.engine is None):
        raise ConfigError(f"the planner needs both layouts: --trainer is {args.trainer!r}, --engine {args.engine!r}")
    if args.bytes is not None:
        if not 0 < args.bytes < 1e16:
            raise ConfigError(f"--bytes is {args.bytes:g}, allowed is more than 0 and less than 1e16")
        return None, int(args.bytes)
    if args.plan is not None:
        planned = replay_on(read_plan(read_regular(args.plan), args.plan), trainer, engine, cluster)
        return planned, planned.wire_bytes
    from wsync.describe import describe_sink, describe_source, load_model

    model = load_model(args.model)
    if args.trainer is None:
        return None, model.nbytes
    source = describe_source(model, args.trainer, _hosts(trainer))
    planned = plan_on(source, describe_sink(model, args.engine, _hosts(engine), args.recipe), cluster)
    return planned, planned.wire_bytes


def _hosts(group: NodeGroup) -> list[str]:
    return [name for name in group.node_names for _ in range(group.num_gpus)]


def _print(result: TopoPlan) -> None:
    now = result.placement.now
    names = result.nics[TRAINER]
    say(f"{result.nbytes / 1e9:.4g} GB to every engine node: {now.time_s:.3g} s, limited by {now.slowest}")
    senders = ", ".join(f"GPU{g}" for g in now.gpus)
    say(
        f"  senders {senders} of each of {result.cluster.groups[0].count} trainer nodes reach "
        f"{len(now.nics)} of {len(names)} NICs ({', '.join(names[i] for i in now.nics[:8])}): {now.send_gbps:g} GB/s"
    )
    for step in result.placement.ladder:
        say(f"  {len(step.gpus)} senders, {len(step.nics)} NICs: {step.send_gbps:g} GB/s, {step.time_s:.3g} s")
    say(f"faster: {result.placement.advice}" if result.placement.advice else "no set of senders is faster")
    if result.plan is not None:
        plan = result.plan
        bound = f"no plan is below {plan.lower_bound_s:.3g} s ({plan.bound})"
        say(f"planned: {plan.time_s:.3g} s for {plan.wire_bytes / 1e9:.4g} GB; {bound}")
        for link in plan.links[:5]:
            rate = link.nbytes / 1e9 / link.seconds if link.seconds else 0.0
            say(f"  {link.name}: {link.nbytes / 1e9:.4g} GB, {link.seconds:.3g} s ({rate:.4g} GB/s)")
    for side in dict.fromkeys(result.rates):
        say(f"rates of {side} nodes, GB/s")
        for part in _unique(result.rates[side]):
            say(f"  {part.part}: {part.gbps:g}  ({part.source})")
        if result.rates[TRAINER] == result.rates[ENGINE]:
            break
    for note in result.notes:
        say(f"note: {note}")


def _unique(rates: tuple[Rate, ...]) -> list[Rate]:
    """Equal NICs in one line."""
    found: dict[tuple[float, str], list[str]] = {}
    for rate in rates:
        found.setdefault((rate.gbps, rate.source), []).append(rate.part)
    return [Rate(", ".join(parts), gbps, source) for (gbps, source), parts in found.items()]
