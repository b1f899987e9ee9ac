"""Lower bounds: cuts of the cluster that no plan can beat."""

from wsync.plan.cuts.bounds import find_bounds

__all__ = ["find_bounds"]
