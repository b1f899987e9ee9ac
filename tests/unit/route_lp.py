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
