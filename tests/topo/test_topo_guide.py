"""The guide explains every finding, and findings link to where it does."""

from __future__ import annotations

import re
from pathlib import Path

from wsync.topo.findings import GUIDE, guide_link

ROOT = Path(__file__).parents[2]
AREAS = (
    "input|sources|platform|host|nvlink|nvswitch|matrix|p2p|gpu|fabric|xid|pcie|vm|nic|numa|nccl|lint|probe|bandwidth"
)


def test_every_finding_has_a_heading_and_every_heading_a_finding():
    sources = "".join(p.read_text() for p in (ROOT / "wsync" / "topo").rglob("*.py"))
    ids = set(re.findall(rf'"((?:{AREAS})\.[a-z0-9-]+)"', sources))
    headings = re.findall(r"^#### (\S+)$", (ROOT / GUIDE).read_text(), re.M)
    assert sorted(headings) == sorted(ids)


def test_links_lead_to_the_headings_anchor():
    # GitHub makes an anchor of a heading by lower case, and drops dots.
    assert guide_link("nvlink.gpu-isolated") == "docs/guides/topo.md#nvlinkgpu-isolated"
