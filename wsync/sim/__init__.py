"""An event-driven simulation of a plan on a cluster that need not be there."""

from wsync.sim.options import Failure, HostCosts, SimOptions, Straggler
from wsync.sim.result import SimResult
from wsync.sim.run import Simulation, simulate

__all__ = ["Failure", "HostCosts", "SimOptions", "SimResult", "Simulation", "Straggler", "simulate"]
