"""NICs: up, fast, and near the GPUs that shall use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from wsync.topo.checks.base import Case, names
from wsync.topo.findings import Finding, Severity
from wsync.topo.model import KIND_RANK, LOCAL_RANK, Gpu, Nic
from wsync.topo.nics import compute_nics, foreign_nics
from wsync.topo.reference import NIC_RATES_GBIT


def check_ports(case: Case) -> Iterator[Finding]:
    """Ports are up; those that a GPU would use are as fast as their peers. Of sockets `check_sockets` tells."""
    if case.view.sockets_only:
        return
    spare = _spare_ports(case)
    for nic in case.view.nics:
        if nic.state is not None and nic.state != "ACTIVE":
            left = [g.label for g in case.view.gpus if case.view.is_local(g, nic) and not _has_other(case, g)]
            known = any(nic.label in paths for paths in case.view.nic_paths.values())
            near = any(case.view.is_local(g, nic) for g in case.view.gpus)
            yield case.finding(
                "nic.down",
                # Ports that nobody plugged in are common; one that a GPU depends on is a fault.
                "CRIT" if left else "WARN" if (near and nic not in spare) or not known else "INFO",
                [nic],
                f"{nic.label} is {nic.state}"
                + (f", and {names(left)} has no other near port that is up" if left else ""),
                "ACTIVE",
                "check cable, transceiver and switch port; take it out of NCCL_IB_HCA until it is up",
            )
    yield from _check_rates(case)


def _spare_ports(case: Case) -> list[Nic]:
    """Near ports that are down while another port of their card is up.

    Ports of one card are known by bus id. Where no input gives it, they are ports one PCIe bridge apart, of which
    one of each pair is down on every card: one cable out is a fault, the same one out everywhere is a choice.
    """
    near = [n for n in case.view.nics if _is_near(case, n)]
    idle = [n for n in near if n.state not in (None, "ACTIVE")]
    used = [n for n in near if n.state == "ACTIVE"]
    cards = {_card(n) for n in used if n.bus_id is not None}
    spare = [n for n in idle if n.bus_id is not None and _card(n) in cards]
    if not spare and len(idle) > 1 and len(idle) == len(used) and not cards:
        partners = [[u.label for u in used if _are_close(case, n, u)] for n in idle]
        if all(partners) and len({label for some in partners for label in some}) == len(used):
            return idle
    return spare


def _card(nic: Nic) -> str:
    return (nic.bus_id or "").rpartition(".")[0]


def _are_close(case: Case, a: Nic, b: Nic) -> bool:
    path = case.view.path(a.label, b.label)
    return path is not None and path.kind == "PIX"


def _has_other(case: Case, gpu: Gpu) -> bool:
    """Whether a GPU has a near port that is not down."""
    return any(n.state in (None, "ACTIVE") and case.view.is_local(gpu, n) for n in case.view.nics)


def _check_rates(case: Case) -> Iterator[Finding]:
    foreign = foreign_nics(case.view)
    yield from _check_layers(case, foreign)
    rated = [n for n in case.view.nics if n.rate_gbit is not None and n not in foreign]
    if not rated:
        return
    near = {n.label for n in rated if any(case.view.is_local(g, n) for g in case.view.gpus)}
    group = [n for n in rated if n.label in near] or rated
    usual = Counter(n.rate_gbit for n in group).most_common(1)[0][0] or 0.0
    fastest = max(n.rate_gbit or 0.0 for n in group)
    layer = Counter(n.link_layer for n in group if n.rate_gbit == fastest).most_common(1)[0][0]
    slow = [n for n in rated if (n.rate_gbit or 0.0) < min(usual, fastest) or (n.rate_gbit or 0.0) * 2 < fastest]
    other = [n for n in slow if n.label not in near and (near or n.link_layer != layer)]
    slow = [n for n in slow if n not in other]
    if slow:
        yield case.finding(
            "nic.slow",
            "INFO" if case.declared else "WARN",
            slow,
            ", ".join(f"{n.label} {n.rate_gbit:g} Gbit/s" for n in slow[:8]),
            f"{usual:g} Gbit/s as the others",
            "check the cable and the switch port's speed, or leave it out of NCCL_IB_HCA",
        )
    if other:
        yield case.finding(
            "nic.not-compute",
            "INFO",
            other,
            ", ".join(f"{n.label} {n.rate_gbit:g} Gbit/s {n.link_layer or ''}".strip() for n in other[:8])
            + f": not of the compute network ({fastest:g} Gbit/s)",
            remedy="leave it out of NCCL_IB_HCA",
        )
    odd = [n for n in rated if n.rate_gbit not in NIC_RATES_GBIT and n not in slow]
    if odd:
        yield case.finding(
            "nic.rate-odd",
            "INFO",
            odd,
            f"{names(odd)} at {odd[0].rate_gbit:g} Gbit/s, which no port is sold with",
            "a standard rate",
            "a port whose lanes or host link are degraded may report so; compare with ibstatus",
        )


def _check_layers(case: Case, foreign: tuple[Nic, ...]) -> Iterator[Finding]:
    """Near ports of another link layer: of another network, or a port of this one that was set wrongly."""
    if not foreign:
        return
    own = [n for n in case.view.nics if n not in foreign and n.link_layer and _is_near(case, n)]
    usual = Counter(n.rate_gbit for n in own).most_common(1)[0][0]
    num_gpus = len(case.view.gpus)
    # As many ports as GPUs, or a share of it, are a whole network; a port of the same rate completes one that is not.
    whole = len(own) % num_gpus == 0 or num_gpus % len(own) == 0
    flipped = [] if whole else [n for n in foreign if n.rate_gbit == usual]
    for nics, finding_id in ((flipped, "nic.layer-differs"), ([n for n in foreign if n not in flipped], "")):
        if nics:
            shown = ", ".join(f"{n.label} {n.link_layer}" for n in nics[:8])
            yield case.finding(
                finding_id or "nic.not-compute",
                "WARN" if finding_id and not case.declared else "INFO",
                nics,
                f"{shown}, the other {len(own)} near ports are {own[0].link_layer}",
                f"{own[0].link_layer} as the others" if finding_id else "",
                "set the port's type with mlxconfig (LINK_TYPE_P1)" if finding_id else "leave it out of NCCL_IB_HCA",
            )


def _is_near(case: Case, nic: Nic) -> bool:
    return any(case.view.is_local(g, nic) for g in case.view.gpus)


def check_locality(case: Case) -> Iterator[Finding]:
    """Every GPU has a NIC on its own PCIe switch, or at least none is worse off than the others."""
    kinds = {g.index: kind for g in case.view.gpus if g.shown and (kind := case.view.nearest(g)) is not None}
    if not kinds or case.coherent or all(n.gdr is False for n in case.view.nics):
        # On Grace distances mean nothing; a socket interface (gdr 0) goes through host memory wherever it sits.
        return
    gpus = [g for g in case.view.gpus if g.index in kinds]
    if 2 * len(gpus) < len(case.view.gpus):
        return
    local = [g for g in gpus if KIND_RANK[kinds[g.index]] <= LOCAL_RANK]
    far = [g for g in gpus if kinds[g.index] == "SYS"]
    if len(far) == len(gpus):
        yield _all_far(case, gpus)
    elif local and len(local) < len(gpus):
        rest = [g for g in gpus if g not in local]
        yield _no_local(case, rest, local, "a NIC on its own PCIe switch")
    elif not local and far:
        nearer = [g for g in gpus if g not in far]
        yield _no_local(case, far, nearer, "a NIC on its own socket")
    elif not local:
        yield case.finding(
            "nic.no-switch-local",
            "INFO",
            gpus,
            f"no GPU has a NIC on its own switch; the nearest is {max(set(kinds.values()), key=KIND_RANK.__getitem__)}",
            remedy="GPUDirect RDMA is off by NCCL's default beyond PXB; host memory carries the traffic",
        )


def _quiet(case: Case) -> Severity:
    return "INFO" if case.declared else "WARN"


def _all_far(case: Case, gpus: list[Gpu]) -> Finding:
    nodes = {g.numa for g in gpus if g.numa}
    if len(nodes) < 2 and not case.virtual_signs and len(gpus) > 1:
        return case.finding(
            "nic.all-far",
            _quiet(case),
            gpus,
            f"every NIC is across the sockets (SYS) for {names(gpus)}",
            "a NIC on the GPUs' socket",
            "move a NIC to the GPUs' socket, or place the senders elsewhere",
        )
    return case.finding(
        "vm.tree-hidden",
        _quiet(case),
        gpus,
        f"all {len(gpus)} GPUs see all {len(case.view.nics)} NICs as SYS: a hypervisor hides the PCIe tree",
        "at least one near NIC",
        "give NCCL the host's topology (NCCL_TOPO_FILE); no single GPU is at fault",
    )


def _no_local(case: Case, without: list[Gpu], have: list[Gpu], expected: str) -> Finding:
    reach = [g.label for g in have if _linked(case, g, without)]
    through = f"let PXN send through {', '.join(reach[:4])}, or p" if reach else "P"
    kinds = sorted({case.view.nearest(g) or "?" for g in without})
    return case.finding(
        "nic.no-local",
        _quiet(case),
        without,
        f"{len(without)} of {len(without) + len(have)} GPUs have no near NIC: {names(without)} ({', '.join(kinds)})",
        expected,
        f"{through}lace the ranks that send on {names(have)}",
    )


def _linked(case: Case, gpu: Gpu, others: list[Gpu]) -> bool:
    island = next((i for i in case.view.islands if gpu.index in i), ())
    return any(g.index in island for g in others)


def check_compute_set(case: Case) -> Iterator[Finding]:
    """NICs that no job should use, where there are some."""
    if case.machine.num_nics_hidden:
        total = case.machine.num_nics_hidden + len(case.view.nics)
        yield case.finding(
            "nic.hidden-by-tool",
            "WARN",
            [],
            f"the matrix shows {len(case.view.nics)} of {total} NICs; virtual functions share a physical NIC",
            "all NICs",
            "hide the virtual functions from the host, or read /sys/class/infiniband",
        )
    chosen = compute_nics(case.view, case.coherent)
    rest = [n for n in case.view.nics if n not in chosen]
    if rest and chosen and not case.view.sockets_only and all(case.view.nic_paths.values()):
        yield case.finding(
            "nic.compute-set",
            "INFO",
            rest,
            _why_not(rest),
            remedy=_hca_remedy(chosen),
        )


def check_sockets(case: Case) -> Iterator[Finding]:
    """A machine whose NICs all lack RDMA: everything between hosts goes over TCP."""
    if case.view.sockets_only:
        yield case.finding(
            "nic.no-rdma",
            "INFO",
            case.view.nics,
            f"no NIC has RDMA ({names(map(_spell_socket, case.view.nics))}): traffic between hosts goes over TCP, "
            "through host memory",
            remedy="load the RDMA driver of the card (mlx5_ib, irdma, bnxt_re, efa), where it has one; "
            "NCCL_SOCKET_IFNAME keeps NCCL to the fast interfaces",
        )


def _spell_socket(nic: Nic) -> str:
    if nic.state == "DOWN":
        return f"{nic.label} is down"
    return f"{nic.label} {nic.rate_gbit:g} Gbit/s" if nic.rate_gbit else nic.label


def _why_not(nics: list[Nic]) -> str:
    down = [n for n in nics if n.state not in (None, "ACTIVE")]
    away = [n for n in nics if n not in down]
    parts = [f"{names([n.label for n in away])}: slower, or not near a GPU (storage or front end)"] if away else []
    parts += [f"{n.label} is {n.state}" for n in down]
    return "; ".join(parts)


def _hca_remedy(nics: tuple[Nic, ...]) -> str:
    """The list for NCCL, where the inputs give names and not only numbers."""
    if any(n.label.startswith(("NIC", "nic@", "NET/")) for n in nics):
        return "add the NIC legend of `nvidia-smi topo -m`: it gives the names for NCCL_IB_HCA"
    return "NCCL_IB_HCA==" + ",".join(n.label for n in nics)
