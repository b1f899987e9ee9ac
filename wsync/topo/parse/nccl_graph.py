"""NCCL's graph XML (``NCCL_GRAPH_DUMP_FILE``): what its search found for this machine.

Source: NCCL 2.30 ``src/graph/xml.cc``; device numbers are decimal or, in new versions, hexadecimal.
"""

from __future__ import annotations

from wsync.topo.model import Gpu, Machine, NcclGraph, NcclView, Oddity
from wsync.topo.parse.xml_tree import Node


def parse_graphs(root: Node, source: str) -> Machine:
    """Read a ``<graphs>``: its GPUs are those of its channels."""
    graphs = []
    oddities = []
    for node in root.all("graph"):
        graph = _graph(node)
        if graph is None:
            oddities.append(Oddity("graph-malformed", f"line {node.line}", str(node.attributes)[:200], source))
        else:
            graphs.append(graph)
    devices = sorted({d for g in graphs for c in g.channels for d in c})
    return Machine(
        gpus=tuple(Gpu(d) for d in devices if 0 <= d < 4096),
        nccl=NcclView(graphs=tuple(graphs)),
        oddities=tuple(oddities),
        sources=(source,),
    )


def _graph(node: Node) -> NcclGraph | None:
    number, pattern, channels = node.number("id"), node.number("pattern"), node.number("nchannels")
    if number is None or pattern is None or channels is None:
        return None
    members = (tuple(g.number("dev") for g in c.all("gpu")) for c in node.all("channel"))
    return NcclGraph(
        number,
        pattern,
        channels,
        node.real("speedintra") or 0.0,
        node.real("speedinter") or 0.0,
        node.get("typeintra") or "",
        node.get("typeinter") or "",
        tuple(tuple(d for d in devs if d is not None) for devs in members),
    )
