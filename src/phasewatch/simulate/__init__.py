"""Simulated episodes: a seed becomes a store of bundles in the formats of recorded ones.

Input: numbers of hosts and episodes, a seed and a fault rate. Output: a store, and beside it the ground truth
`STORE.truth.jsonl`. Nothing here is a measurement: each manifest has `origin: simulated`.
"""

from phasewatch.simulate.generator import SimulationSettings
from phasewatch.simulate.store import SimulationResult, simulate

__all__ = ["SimulationResult", "SimulationSettings", "simulate"]
