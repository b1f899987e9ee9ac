"""What other systems send to whom, written from their public descriptions, so that plans can be compared.

A policy maps demand groups and nodes to `Moves`; nothing of it moves bytes. Where a description leaves a choice open,
the policy gets the better one, and every policy is granted perfect overlap of its phases: what it loses, it loses by
routing.
"""

from wsync.sim.policies.alpa import alpa_broadcast, alpa_send_recv
from wsync.sim.policies.broadcast import checkpoint_engine, rank0_broadcast, stage_broadcast
from wsync.sim.policies.m2n import m2n_node_aware, m2n_uniform
from wsync.sim.policies.moves import Gather, Moves, Policy
from wsync.sim.policies.replicas import round_robin

POLICIES: dict[str, Policy] = {
    "rank-0 broadcast": rank0_broadcast,
    "whole tensor to every rank": stage_broadcast,
    "round-robin replicas": round_robin,
    "checkpoint-engine broadcast": checkpoint_engine,
    "m2n UNIFORM": m2n_uniform,
    "m2n NODE_AWARE": m2n_node_aware,
    "Alpa greedy, send/recv": alpa_send_recv,
    "Alpa greedy, broadcast": alpa_broadcast,
}
"""Every policy, by the name that tables show."""

__all__ = [
    "POLICIES",
    "Gather",
    "Moves",
    "Policy",
    "alpa_broadcast",
    "alpa_send_recv",
    "checkpoint_engine",
    "m2n_node_aware",
    "m2n_uniform",
    "rank0_broadcast",
    "round_robin",
    "stage_broadcast",
]
