"""The optimiser: source choice, deduplication, relay chains, rails."""

from wsync.plan.route.router import route

__all__ = ["route"]
