"""What a sync takes on a topology, and where its senders should be.

The model: ``T = max(W / E_send, W / E_receive, W / B_nvlink) + buckets * alpha``. ``E_send`` is the sum of the NICs
that the senders reach, at most what their own ports carry, at the cluster file's rates, which are what links achieve;
``E_receive`` that of one engine node's NICs, ``B_nvlink`` one GPU's NVLinks. Published rates follow from it within
15 %, see `wsync.topo.placement_rates`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from wsync.errors import ConfigError
from wsync.spec.cluster import DEFAULT_ALPHA_S, NodeGroup
from wsync.topo.placement_rates import NETWORK, collective_share, efficiency

BUCKET_BYTES = 64 << 20
CURVE = "all-reduce over 4 nodes of B200 with EFA, stas00/ml-engineering"
"""What `as_collective` takes its share from."""


class Step(msgspec.Struct, frozen=True):
    """A set of senders on each trainer node, and what it reaches.

    Attributes:
        gpus: that send.
        nics: indices of the ports that they reach.
        send_gbps: of all nodes' senders together.
        time_s: of the sync.
        slowest: what takes that time.
    """

    gpus: tuple[int, ...]
    nics: tuple[int, ...]
    send_gbps: float
    time_s: float
    slowest: str


class Placement(msgspec.Struct, frozen=True):
    """The senders as they are, and sets of senders that would be faster, the smallest first."""

    now: Step
    ladder: tuple[Step, ...]
    advice: str = ""


def own_nics(group: NodeGroup, gpu: int) -> tuple[int, ...]:
    """Ports that a GPU reaches itself; a port that lists no GPU is reached by all."""
    return tuple(i for i, n in enumerate(group.nics) if not n.gpus or any(p.gpu == gpu for p in n.gpus))


def reached_nics(group: NodeGroup, gpus: Sequence[int], relay: bool = False) -> tuple[int, ...]:
    """Ports that senders reach.

    Args:
        group: of the node.
        gpus: that send.
        relay: also those of their NVLink peers, as NCCL's PXN and wsync's planner do.
    """
    size = group.nvlink_domain if relay and 1 < group.nvlink_domain <= group.num_gpus else 1
    senders = {p for g in gpus for p in range(g // size * size, (g // size + 1) * size)} if size > 1 else set(gpus)
    return tuple(sorted({i for g in senders for i in own_nics(group, g)}))


def _ports_gbps(group: NodeGroup, gpus: Sequence[int], relay: bool) -> float:
    """What leaves the GPUs over PCIe or C2C, their NVLink peers' ports included where those relay."""
    count = len(set(gpus))
    if relay and 1 < group.nvlink_domain <= group.num_gpus:
        count = len({g // group.nvlink_domain for g in gpus}) * group.nvlink_domain
    return count * (group.pcie_gbps or math.inf)


def as_collective(group: NodeGroup, nbytes: int) -> NodeGroup:
    """The group with what a hierarchical collective of a payload achieves of its ports.

    Raises:
        ConfigError: no payload.
    """
    if nbytes <= 0:
        raise ConfigError(f"a collective of {nbytes} bytes moves nothing, allowed is 1 or more")
    factor = collective_share(nbytes) / efficiency(NETWORK)
    nics = tuple(replace(n, rate_gbps=round(n.rate_gbps * factor, 4)) for n in group.nics)
    return replace(group, nics=nics)


def sync_step(
    trainer: NodeGroup,
    engine: NodeGroup,
    gpus: Sequence[int],
    nbytes: int,
    alpha_s: float = DEFAULT_ALPHA_S,
    bucket_bytes: int = BUCKET_BYTES,
    relay: bool = False,
) -> Step:
    """Predict a sync of ``nbytes`` from these GPUs of each trainer node to every engine node.

    Raises:
        ConfigError: a GPU that the node does not have, or no port on the way.
    """
    wrong = [g for g in gpus if not 0 <= g < trainer.num_gpus]
    if wrong or not gpus:
        raise ConfigError(
            f"senders {', '.join(map(str, wrong)) or 'none'}: nodes of {trainer.name!r} have GPUs 0 to "
            f"{trainer.num_gpus - 1}"
        )
    nics = reached_nics(trainer, gpus, relay)
    network = trainer.count * math.fsum(trainer.nics[i].rate_gbps for i in nics)
    ports = trainer.count * _ports_gbps(trainer, gpus, relay)
    send = min(network, ports)
    if not send or not engine.nics:
        near = [f"GPU{g}" for g in range(trainer.num_gpus) if own_nics(trainer, g)]
        where = "the senders are near no NIC" if not send else f"nodes of {engine.name!r} have no NIC"
        raise ConfigError(
            f"{where}: GPUs {', '.join(map(str, gpus))} of {trainer.name!r} cannot send to {engine.name!r}",
            hint=f"near a NIC: {', '.join(near) or 'no GPU'}; --relay counts those of NVLink peers",
        )
    ways = {
        "NICs that the senders reach": network,
        "PCIe of the senders": ports,
        "NICs of one engine node": engine.network_gbps,
    }
    if engine.nvlink_gbps is not None and engine.nvlink_domain > 1:
        ways["NVLink of one engine GPU"] = engine.nvlink_gbps
    slowest = min(ways, key=ways.__getitem__)
    time_s = nbytes / (ways[slowest] * 1e9) + math.ceil(nbytes / bucket_bytes) * alpha_s
    return Step(tuple(sorted(gpus)), nics, round(send, 2), time_s, slowest)


def place_senders(
    trainer: NodeGroup, engine: NodeGroup, gpus: Sequence[int], nbytes: int, relay: bool = False
) -> Placement:
    """The senders as they are, and the GPUs that should send, too: each adds the ports that add most."""
    now = sync_step(trainer, engine, gpus, nbytes, relay=relay)
    ladder: list[Step] = []
    chosen = list(gpus)
    while len(chosen) < trainer.num_gpus:
        rest = [g for g in range(trainer.num_gpus) if g not in chosen]
        steps = [sync_step(trainer, engine, [*chosen, g], nbytes, relay=relay) for g in rest]
        best = max(range(len(rest)), key=lambda i: (steps[i].send_gbps, -rest[i]))
        if steps[best].send_gbps <= (ladder[-1] if ladder else now).send_gbps:
            break
        chosen.append(rest[best])
        ladder.append(steps[best])
    return Placement(now, tuple(ladder), _advice(trainer, now, ladder))


def _advice(trainer: NodeGroup, now: Step, ladder: Sequence[Step]) -> str:
    faster = [s for s in ladder if s.time_s < 0.99 * now.time_s]
    if not faster:
        return ""
    fastest = min(s.time_s for s in faster)
    step = next(s for s in faster if s.time_s <= 1.01 * fastest)
    added = [g for g in step.gpus if g not in now.gpus]
    linked = trainer.nvlink_domain > 1 and all(
        any(g // trainer.nvlink_domain == s // trainer.nvlink_domain for s in now.gpus) for g in added
    )
    names = ", ".join(f"GPU{g}" for g in added)
    return (
        f"add {len(added)} {'NVLink peers' if linked else 'GPUs'} as senders ({names}): {now.send_gbps:g} -> "
        f"{step.send_gbps:g} GB/s, {now.time_s:.3g} -> {step.time_s:.3g} s"
    )
