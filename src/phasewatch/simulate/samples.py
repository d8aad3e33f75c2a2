"""Which samples a simulated campaign draws from: the registry's, by sample group."""

from __future__ import annotations

from functools import cache

from phasewatch.profiles import PROFILES, SAMPLE_GROUPS
from phasewatch.vocab import SampleKind

GROUPS = SAMPLE_GROUPS
BENIGN = "benign"
IDLE = "idle"


@cache
def benign_samples(group: int) -> tuple[str, ...]:
    """Give the benign kinds of a group."""
    (benign,) = (profile for profile in PROFILES if profile.kind is SampleKind.BENIGN)
    return tuple(sample.name for sample in benign.samples[group::GROUPS])


@cache
def malicious_samples(group: int) -> tuple[tuple[str, str], ...]:
    """Give (profile, sample) of a group."""
    return tuple(
        (profile.name, sample.name)
        for profile in PROFILES
        if profile.kind is SampleKind.EMULATED
        for sample in profile.samples[group::GROUPS]
    )
