"""The exact optimum of fractional delivery with relays, by linear programming: an oracle for routing and cuts.

Source: Edmonds' theorem on packing arborescences. Bytes reach all their needers at once if and only if the capacities
that are set aside for them carry a flow of all of them to each needer alone; needers may pass on what they receive.
"""

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix


class _Program:
    """Minimise variable 0, the seconds."""

    def __init__(self):
        self.count = 1
        self.rows = {True: [], False: []}

    def variable(self):
        self.count += 1
        return self.count - 1

    def add(self, terms, limit, equal=False):
        """The sum of coefficient * variable is at most, or equal to, ``limit``."""
        self.rows[equal].append((terms, limit))

    def solve(self):
        cost = np.zeros(self.count)
        cost[0] = 1.0
        (a_ub, b_ub), (a_eq, b_eq) = (self._matrix(self.rows[e]) for e in (False, True))
        found = linprog(cost, a_ub, b_ub, a_eq, b_eq, bounds=(0, None), method="highs")
        assert found.status == 0, found.message
        return found.x[0]

    def _matrix(self, rows):
        if not rows:
            return None, None
        entries = [(i, j, x) for i, (terms, _) in enumerate(rows) for j, x in terms]
        i, j, x = zip(*entries, strict=True)
        return coo_matrix((x, (i, j)), shape=(len(rows), self.count)), [limit for _, limit in rows]


def optimum_s(groups, nodes, relay=True):
    """Seconds of the best fractional plan, if only the NICs of islands and shared links limit it."""
    program = _Program()
    rates = [0.0] * len(nodes.island_names)
    for nic in nodes.nics:
        rates[nodes.island[nic.node]] += nic.rate_gbps
    zone = {nodes.island[n]: nodes.zone[n] for n in range(len(nodes.names))}
    out, into, links = {}, {}, {}
    for group in groups:
        held = sorted({nodes.island[nodes.source_node[r]] for r in group.holders})
        need = sorted({nodes.island[nodes.sink_node[s]] for s in group.sinks} - set(held))
        for (u, v), variable in _capacities(program, held, need, relay, group.nbytes / 1e9).items():
            out.setdefault(u, []).append(variable)
            into.setdefault(v, []).append(variable)
            for link in nodes.zones.crossed[zone[u]][zone[v]]:
                links.setdefault(link, []).append(variable)
    for used, rate_of in ((out, rates.__getitem__), (into, rates.__getitem__), (links, _link_rate(nodes))):
        for part, variables in used.items():
            program.add([(x, 1.0) for x in variables] + [(0, -rate_of(part))], 0.0)
    return program.solve()


def _link_rate(nodes):
    return lambda directed: nodes.cluster.links[directed // 2].rate_gbps


def _capacities(program, held, need, relay, amount):
    """A capacity for each pair of islands that a group may use, large enough for a flow to each needer."""
    senders = held + (need if relay else [])
    capacity = {(u, v): program.variable() for u in senders for v in need if u != v}
    for goal in need:
        flow = {edge: program.variable() for edge in capacity}
        for edge, x in flow.items():
            program.add([(x, 1.0), (capacity[edge], -1.0)], 0.0)
        for v in need:
            terms = [(x, 1.0) for edge, x in flow.items() if edge[1] == v]
            terms += [(x, -1.0) for edge, x in flow.items() if edge[0] == v]
            program.add(terms, amount if v == goal else 0.0, equal=True)
    return capacity


class _Ways:
    """What hops between GPUs load, as variables by part of the cluster."""

    def __init__(self, program, nodes):
        self.program, self.nodes = program, nodes
        self.loads, self.rates = {}, {}

    def load(self, part, rate, variable):
        self.rates[part] = rate
        self.loads.setdefault(part, []).append(variable)

    def hop(self, here, there, variable):
        """A hop of ``variable`` GB from one rank's place to another's."""
        nodes = self.nodes
        a, b = nodes.groups[here.node], nodes.groups[there.node]
        if here.node == there.node and (here.in_host or there.in_host):
            for lane, way in ((here, "out"), (there, "in")):
                if lane.in_host:
                    self.host(lane, variable)
                else:
                    self.load(("pcie", lane.node, lane.gpu, way), a.pcie_gbps, variable)
        elif nodes.island[here.node] != nodes.island[there.node]:
            self.ports(here, "out", variable)
            self.ports(there, "in", variable)
            for link in nodes.zones.crossed[nodes.zone[here.node]][nodes.zone[there.node]]:
                self.load(("link", link), _link_rate(nodes)(link), variable)
        elif here.domain >= 0 and here.domain == there.domain:
            self.load(("nvlink", here.node, here.gpu, "out"), a.nvlink_gbps, variable)
            self.load(("nvlink", there.node, there.gpu, "in"), b.nvlink_gbps, variable)
        else:
            self.load(("pcie", here.node, here.gpu, "out"), a.pcie_gbps, variable)
            self.load(("pcie", there.node, there.gpu, "in"), b.pcie_gbps, variable)

    def ports(self, lane, way, variable):
        """Any split of the hop among the NICs that the rank reaches."""
        group, parts = self.nodes.groups[lane.node], []
        for nic in lane.reach:
            parts.append(self.program.variable())
            self.load(("nic", nic, way), self.nodes.nics[nic].rate_gbps, parts[-1])
            if lane.in_host:
                self.host(lane, parts[-1])
            elif lane.domain >= 0 and nic not in lane.own:
                self.load(("nvlink", lane.node, lane.gpu, way), group.nvlink_gbps, parts[-1])
            else:
                self.load(("pcie", lane.node, lane.gpu, way), group.pcie_gbps, parts[-1])
        self.program.add([(x, 1.0) for x in parts] + [(variable, -1.0)], 0.0, equal=True)

    def host(self, lane, variable):
        """One pass through the memory of a node, which copies, that are two, at its rate."""
        self.load(("host", lane.node), 2 * self.nodes.groups[lane.node].host_gbps, variable)

    def up(self, lane, variable):
        """From the memory of a node to a GPU."""
        self.host(lane, variable)
        self.load(("pcie", lane.node, lane.gpu, "in"), self.nodes.groups[lane.node].pcie_gbps, variable)

    def stage(self, group):
        """Any of the holders packs, with its weights brought to its GPU first; sinks install."""
        amount, parts = group.nbytes / 1e9, []
        for lane in (self.nodes.sources[r] for r in group.holders):
            parts.append(self.program.variable())
            if lane.offloaded:
                self.up(lane, parts[-1])
        self.program.add([(x, 1.0) for x in parts], amount, equal=True)
        for lane in (self.nodes.sinks[s] for s in group.sinks):
            if lane.in_host:
                installed = self.program.variable()
                self.program.add([(installed, 1.0)], amount, equal=True)
                self.up(lane, installed)


def optimum_of_gpus_s(groups, nodes):
    """As `optimum_s`, between GPUs: NVLink, PCIe, each rank's own NICs, memory of nodes and shared links limit it."""
    program = _Program()
    ways = _Ways(program, nodes)
    # Ranks on one GPU have what it has; one that keeps what it receives in host memory is a place of its own.
    source_at = [(x.node, x.gpu, -1) for x in nodes.sources]
    sink_at = [(x.node, x.gpu, i if x.in_host else -1) for i, x in enumerate(nodes.sinks)]
    lane_of = dict(zip((*source_at, *sink_at), (*nodes.sources, *nodes.sinks), strict=True))
    for group in groups:
        ways.stage(group)
        held = sorted({source_at[r] for r in group.holders})
        need = sorted({sink_at[s] for s in group.sinks} - set(held))
        # A sink on a GPU that holds the bytes may pass them on as the holder may.
        for (u, v), variable in _capacities(program, held, need, True, group.nbytes / 1e9).items():
            ways.hop(lane_of[u], lane_of[v], variable)
    for part, variables in ways.loads.items():
        program.add([(x, 1.0) for x in variables] + [(0, -ways.rates[part])], 0.0)
    return program.solve()
