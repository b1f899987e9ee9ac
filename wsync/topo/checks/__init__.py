"""Structural checks: pure functions of a `Case`, without tolerance. Each yields findings; none knows of another.

To add one, write a function of `Check`'s type and put it into `CHECKS`. What several findings have in common is found
afterwards, in `wsync.topo.roots`.
"""

from __future__ import annotations

from wsync.topo.checks import (
    completeness,
    direct,
    kernel_log,
    links,
    lint,
    live,
    nccl,
    network,
    numa,
    pairs,
    pcie,
    state,
    views,
    wiring,
)
from wsync.topo.checks.base import Case, Check
from wsync.topo.findings import Finding

CHECKS: tuple[Check, ...] = (
    completeness.check_gaps,
    completeness.check_something,
    state.check_gpus,
    state.check_switches,
    links.check_counts,
    links.check_rates,
    links.check_remotes,
    links.check_errors,
    wiring.check_symmetry,
    wiring.check_conflicts,
    wiring.check_wiring,
    pairs.check_p2p,
    state.check_fabric,
    kernel_log.check_xids,
    kernel_log.check_sxids,
    pcie.check_width,
    pcie.check_speed,
    pcie.check_platform_speed,
    pcie.check_uplinks,
    pcie.check_zero_widths,
    network.check_ports,
    network.check_locality,
    network.check_compute_set,
    network.check_sockets,
    direct.check_direct,
    numa.check_hidden,
    numa.check_affinity,
    numa.check_kernel,
    nccl.check_channels,
    nccl.check_warnings,
    nccl.check_edges,
    nccl.check_net_paths,
    nccl.check_graphs,
    lint.check_oddities,
    lint.check_masks,
    lint.check_hca,
    live.check_probes,
    views.check_views,
)


def run_checks(case: Case) -> list[Finding]:
    """Findings of all checks, in the order of `CHECKS`."""
    return [finding for check in CHECKS for finding in check(case)]


__all__ = ["CHECKS", "Case", "Check", "run_checks"]
