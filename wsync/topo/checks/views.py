"""Where the driver and NCCL see the same GPU differently. NCCL decides what a job gets, and says nothing of it."""

from __future__ import annotations

from collections.abc import Iterator

from wsync.topo.checks.base import Case
from wsync.topo.checks.links import ISOLATED_REMEDY
from wsync.topo.findings import Finding


def check_views(case: Case) -> Iterator[Finding]:
    """Links that the driver calls active are links that NCCL found.

    A GPU of which NCCL found none is without NVLink for every job, whatever the driver says: the fault that started
    with a healthy listing and ended with a communicator at a tenth of its rate.
    """
    for gpu in case.view.gpus:
        active = sum(link.active is True for link in gpu.nvlinks or ())
        if not active or gpu.peers is None or gpu.nvlinks_cut:
            continue
        found = sum(peer.count for peer in gpu.peers)
        if found == 0:
            yield case.finding(
                "nvlink.gpu-isolated",
                "CRIT",
                [gpu],
                f"{gpu.label}: the driver shows {active} active NVLinks, NCCL found none of them",
                f"{active} links in NCCL's topology",
                ISOLATED_REMEDY,
            )
        elif found < active:
            yield case.finding(
                "sources.disagree",
                "WARN",
                [gpu],
                f"{gpu.label}: the driver shows {active} active NVLinks, NCCL found {found}",
                "the same number",
                "record both again at the same time; if they still differ, trust what NCCL sees",
            )
