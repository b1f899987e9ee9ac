"""NUMA: nodes that the kernel or a hypervisor hides, and affinities that say nothing."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case, names
from wsync.topo.findings import Finding
from wsync.topo.parse.text import numbers

BIG_BOARD = 8
"""GPUs from which on a board with NVSwitch hangs from two sockets at least."""


def check_hidden(case: Case) -> Iterator[Finding]:
    """Boards of eight GPUs hang from two sockets; one node for all means that nodes are hidden."""
    gpus = [g for g in case.view.gpus if g.numa is not None]
    nodes = {g.numa for g in gpus if g.numa is not None}
    only = next(iter(nodes)) if len(nodes) == 1 else ()
    crossing = any(p.kind == "SYS" for p in case.machine.paths)
    board = case.shape.joined == "switch" and len(case.view.gpus) >= BIG_BOARD
    if (
        board
        and len(gpus) == len(case.view.gpus)
        and len(nodes) == 1
        and len(next(iter(nodes)) or ()) == 1
        and not crossing
    ):
        cpus = {g.cpus for g in gpus}
        # A command line without numa=off leaves a board with one socket, or a VM; without one, nodes may be hidden.
        innocent = bool(case.machine.kernel) and not any("numa=off" in k.text.split() for k in case.machine.kernel)
        yield case.finding(
            "numa.hidden",
            "INFO" if innocent else "WARN",
            [],
            f"all {len(gpus)} GPUs are on one NUMA node (CPUs {', '.join(sorted(c for c in cpus if c))}) and no path "
            "crosses sockets",
            "two nodes or more, or one socket",
            "with two sockets: remove numa=off from the kernel's command line (give /proc/cmdline to have it judged); "
            "in a VM, expose the NUMA nodes",
        )
    elif not case.coherent and len(gpus) > 1 and len(only) > 1:
        yield case.finding(
            "numa.unspecific",
            "INFO",
            [],
            f"every GPU is near NUMA nodes {numbers(only)}, as VMs show it",
            "one node for each GPU",
            "bind processes by the instance type's documentation",
        )
    spread = len(nodes) > 1 and not crossing and bool(case.view.nics) and not case.coherent
    if spread and all(case.view.nic_paths[g.index] for g in gpus):
        yield case.finding(
            "numa.distance-mismatch",
            "INFO",
            [],
            f"GPUs are on {len(nodes)} NUMA nodes, yet no NIC is across sockets (SYS) for any of them",
            "SYS between the nodes",
            "trust the affinity column less than the NICs' sysfs numa_node",
        )


def check_affinity(case: Case) -> Iterator[Finding]:
    """CPU lists that are empty or a few cores: a container or a job's cgroup cut them."""
    empty = [g for g in case.view.gpus if g.cpus == ""]
    if empty:
        yield case.finding(
            "numa.affinity-empty",
            "INFO",
            empty,
            f"the CPU affinity of {names(empty)} is empty: the job's cgroup has no CPU near",
            "CPUs near each GPU",
            "ask the scheduler for cores on both sockets",
        )
    unknown = [g for g in case.view.gpus if g.numa == ()]
    if unknown and not case.declared:
        yield case.finding(
            "numa.unknown",
            "WARN",
            unknown,
            f"no NUMA node is known of {names(unknown)} (numaid -1)",
            "a node",
            "in a VM, expose the NUMA nodes, or give NCCL the host's topology (NCCL_TOPO_FILE)",
        )


def check_kernel(case: Case) -> Iterator[Finding]:
    """The kernel's command line; where lines of several hosts are given, they agree."""
    lines = case.machine.kernel
    off = [k for k in lines if "numa=off" in k.text.split()]
    if not off:
        return
    hosts = [k.host for k in off if k.host]
    rest = [k.host for k in lines if k not in off and k.host]
    where = f" on {', '.join(hosts)}" if hosts else ""
    differ = f"; not on {', '.join(rest)}: the hosts differ" if rest else ""
    yield case.finding(
        "numa.off",
        "WARN",
        hosts,
        f"numa=off on the kernel's command line{where}{differ}",
        "NUMA on, and the same command line on all hosts",
        "remove numa=off and reboot",
    )
