"""Make-believe episodes: a seed becomes a store of bundles in the formats of recorded ones, faults and their truth included.

Comes in: how many hosts and episodes, a seed, a rate of faults. Goes out: a store, and beside it `STORE.truth.jsonl`.
Nothing here is a measurement: every manifest says `origin: simulated`.
"""

from phasewatch.simulate.generator import SimulationSettings
from phasewatch.simulate.store import SimulationResult, simulate

__all__ = ["SimulationResult", "SimulationSettings", "simulate"]
