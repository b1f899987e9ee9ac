"""What only a live reading tells: calls that hang or are missing, links that NCCL would skip, ACS, IOMMU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from wsync.topo.checks.base import Case
from wsync.topo.findings import Finding, Severity
from wsync.topo.model import Gpu, Nic, Oddity


class _Rule(NamedTuple):
    """What an oddity of a live reading means; ``each``: one finding for each subject instead of one for all."""

    finding: str
    severity: Severity
    expected: str
    remedy: str
    each: bool = False


RULES: dict[str, _Rule] = {
    "probe-hang": _Rule(
        "probe.hang", "CRIT", "an answer in milliseconds",
        "drain the node; nvidia-smi will hang, too: see the kernel log for Xid, power-cycle, and replace the device if "
        "it comes back so", True,
    ),
    "probe-crash": _Rule(
        "probe.crash", "UNKNOWN", "an answer",
        "run nvidia-smi; if it crashes, too, reinstall the driver; nothing is said of what was not read", True,
    ),
    "probe-garbled": _Rule(
        "probe.garbled", "UNKNOWN", "records of wsync's own probe",
        "see what else runs inside the probe (LD_PRELOAD, sitecustomize)", True,
    ),
    "probe-late": _Rule(
        "probe.late", "UNKNOWN", "the end before the deadline",
        "give more --timeout; drivers start slowly without persistence mode (nvidia-smi -pm 1)", True,
    ),
    "no-gpu": _Rule("gpu.none", "UNKNOWN", "GPUs", "see lspci -d 10de: and the kernel log; a container asks for them"),
    "call-missing": _Rule("probe.call-missing", "INFO", "all calls", "a newer driver, or nvidia-ml-py, has them"),
    "call-essential": _Rule(
        "probe.call-missing", "UNKNOWN", "the call that tells which links are up",
        "update the driver or nvidia-ml-py; nothing is said of NVLinks until then",
    ),
    "sysfs-hidden": _Rule(
        "probe.sysfs-hidden", "WARN", "the PCIe tree of the host in /sys",
        "mount the host's /sys (and say --root where it is): NCCL reads it, too, and places NICs blindly without",
    ),
    "nccl-skips-link": _Rule(
        "nvlink.nccl-skips", "CRIT", "links that NCCL takes, as it asks for them",
        "drain the node and reset the GPU: NCCL passes over these links without a word", True,
    ),
    "bandwidth-mode": _Rule(
        "nvlink.bandwidth-mode", "WARN", "full", "nvidia-smi nvlink --set-bandwidth-mode FULL, without a job running"
    ),
    "gpu-not-listed": _Rule(
        "gpu.not-listed", "INFO", "", "a container or a job's cgroup hides it, or the driver could not start it: see "
        "the kernel log for RmInitAdapter",
    ),
    "gpu-without-driver": _Rule(
        "gpu.not-listed", "WARN", "a driver", "load the driver for it, or see the kernel log for why it refused"
    ),
    "acs-redirect": _Rule(
        "pcie.acs", "WARN", "ACS redirection off in switches above GPUs (bare metal)",
        "switch ACS off in the firmware or with setpci: traffic between peers goes up to the CPU and down again",
    ),
    "iommu-translates": _Rule(
        "pcie.iommu", "INFO", "passthrough (iommu=pt), unless virtual machines need translation",
        "add iommu=pt to the kernel's command line",
    ),
}  # fmt: skip
"""By kind of `Oddity`, which `wsync.topo.live` makes."""


HOST_CHOICES = ("acs-redirect", "iommu-translates")
"""What virtual machines need, and what Grace is made for."""


def check_probes(case: Case) -> Iterator[Finding]:
    """What a live reading found out besides the devices themselves."""
    for kind, rule in RULES.items():
        found = [o for o in case.machine.oddities if o.kind == kind]
        if not found or (kind in HOST_CHOICES and (case.virtual_signs or case.coherent)):
            continue
        for group in [[o] for o in found] if rule.each else [found]:
            devices = [d for o in group if (d := _device(case, o)) is not None]
            texts = list(dict.fromkeys(o.text for o in group))
            what = ", ".join(d if isinstance(d, str) else d.label for d in devices[:8])
            told = "; ".join(texts[:4])
            evidence = told if rule.each or not what else f"{what}: {told}"
            yield case.finding(rule.finding, rule.severity, devices, evidence, rule.expected, rule.remedy)


def _device(case: Case, oddity: Oddity) -> Gpu | Nic | str | None:
    """The device that an oddity concerns; None for the host."""
    if oddity.subject == "host":
        return None
    devices: list[Gpu | Nic] = [*case.view.gpus, *case.view.nics]
    return next((d for d in devices if oddity.subject in (d.bus_id, d.label)), oddity.subject)
