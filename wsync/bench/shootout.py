"""The shoot-out: every preset routed by wsync and as peers route it. ``python -m wsync.bench.shootout --json FILE``.

Presets come from `wsync.sim`, and so does the time model: all ways are predicted alike. Planners of other systems that
are installed (``pip install 'wsync-rl[peers]'``) get a small case in addition.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from wsync.bench.machine import describe_machine, package_versions
from wsync.bench.peers import PEERS, PeerCase, missing_of, small_case
from wsync.bench.shootout_result import TOLERANCE, WSYNC, PeerRow, PolicyRow, PresetResult, ShootoutResult
from wsync.plan import Plan, Planner
from wsync.plan.nodes import find_nodes
from wsync.sim.policies import POLICIES
from wsync.sim.policies.cost import Cost, cost_of, cost_of_plan
from wsync.sim.policies.moves import as_packed
from wsync.sim.presets import PRESETS, find_preset

T = TypeVar("T")


def run(names: Sequence[str], say: Callable[[str], None] = lambda _: None) -> ShootoutResult:
    """Shoot it out on presets of these names, and on the small case of the peers' own planners."""
    presets = []
    for name in names:
        say(name)
        presets.append(run_preset(name))
    say("planners of other systems")
    case = small_case()
    peers = run_peers(case)
    beaten = any(p.beaten_by for p in presets) or _is_beaten(peers)
    return ShootoutResult(
        tuple(presets),
        f"{len(case.source.ranks)} trainer ranks to {case.num_replicas} replicas of {case.replica_size}",
        peers,
        describe_machine(),
        package_versions([p.package for p in PEERS]),
        "beaten" if beaten else "ok",
    )


def run_preset(name: str) -> PresetResult:
    """All ways of routing one preset.

    Raises:
        ConfigError: there is no such preset.
    """
    source, sink, cluster, options = find_preset(name).build()
    planner = Planner(source, cluster, options)
    plan, plan_s = _timed(lambda: planner.plan(sink))
    again_s = _timed(lambda: planner.plan(sink, afresh=True))[1]
    needed, nodes = planner.demand(sink), find_nodes(source, sink, cluster)
    groups = as_packed(needed)
    rows = [_row(WSYNC, cost_of_plan(plan, needed, nodes), plan, again_s)]
    for policy_name, policy in POLICIES.items():
        moves, policy_s = _timed(lambda policy=policy: policy(groups, nodes))  # type: ignore[misc]
        rows.append(
            _row(policy_name, cost_of(moves, groups, nodes, plan.bucket_bytes, plan.amax_elements), plan, policy_s)
        )
    sizes = len(source.ranks), len(sink.ranks)
    return PresetResult(name, *sizes, plan.lower_bound_s, plan.binding_cut, plan_s, tuple(rows))


def _row(policy: str, cost: Cost, plan: Plan, plan_s: float) -> PolicyRow:
    score = cost.time_s / plan.lower_bound_s
    return PolicyRow(policy, cost.time_s, score, cost.delivered_ratio, cost.entering_ratio, plan_s)


def run_peers(case: PeerCase) -> tuple[PeerRow, ...]:
    """wsync and every installed planner on one case."""
    planner = Planner(case.source, case.cluster)
    plan, plan_s = _timed(lambda: planner.plan(case.sink))
    groups, nodes = planner.demand(case.sink), find_nodes(case.source, case.sink, case.cluster)
    versions = package_versions([p.package for p in PEERS])
    num_buckets = sum(plan.num_buckets(f) for f in plan.flows)
    cost = cost_of_plan(plan, groups, nodes)
    rows = [_peer_row(WSYNC, versions["wsync-rl"], cost, plan, plan_s, num_buckets)]
    for peer in PEERS:
        missing = missing_of(peer)
        if missing:
            rows.append(PeerRow(peer.name, None, tuple(missing)))
            continue
        answer, peer_s = _timed(peer.plan(case))
        cost = cost_of(answer.moves(nodes), groups, nodes, plan.bucket_bytes)
        rows.append(_peer_row(peer.name, versions[peer.package], cost, plan, peer_s, answer.num_operations))
    return tuple(rows)


def _peer_row(name: str, version: str | None, cost: Cost, plan: Plan, plan_s: float, operations: int) -> PeerRow:
    score = cost.time_s / plan.lower_bound_s
    return PeerRow(name, version, (), cost.time_s, score, cost.delivered_ratio, cost.entering_ratio, plan_s, operations)


def _is_beaten(peers: Sequence[PeerRow]) -> bool:
    ours = next(p.time_s for p in peers if p.planner == WSYNC)
    return ours is not None and any(p.time_s is not None and p.time_s < ours * (1 - TOLERANCE) for p in peers)


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    begin = time.perf_counter()
    found = call()
    return found, time.perf_counter() - begin


def _say(what: str) -> None:
    sys.stderr.write(what + "\n")


def main(argv: list[str]) -> int:
    """Run it; 1 where wsync is beaten."""
    parser = argparse.ArgumentParser(prog="python -m wsync.bench.shootout", description=__doc__)
    parser.add_argument("--presets", metavar="LIST", help="of `wsync simulate --list` (default: all)")
    parser.add_argument("--json", metavar="FILE", default="-", help="where the record goes (default: stdout)")
    args = parser.parse_args(argv)
    names = args.presets.split(",") if args.presets else list(PRESETS)
    result = run(names, lambda what: _say(f"{time.strftime('%H:%M:%S')} {what}"))
    data = msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"
    if args.json == "-":
        sys.stdout.buffer.write(data)
    else:
        Path(args.json).write_bytes(data)
    return 0 if result.verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
