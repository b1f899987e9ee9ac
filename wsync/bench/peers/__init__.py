"""Planners of other systems that install and run on a CPU: the same small case through each, against wsync's plan.

``pip install 'wsync-rl[peers]'`` brings them; what is missing is skipped by name.
"""

from wsync.bench.peers.case import PeerCase, PeerPlan, small_case
from wsync.bench.peers.planners import PEERS, Peer, missing_of

__all__ = ["PEERS", "Peer", "PeerCase", "PeerPlan", "missing_of", "small_case"]
