"""At which rate rows are due: what the manifest promises, and never less than what the format's samplers give."""

from __future__ import annotations

import math

from phasewatch.episode.model import Manifest
from phasewatch.vocab import Source

# What the bins of half a second are made for: a source that reads less often is told of, whatever its manifest promises.
USUAL_HZ = {Source.PROC: 2.0, Source.QMP: 2.0, Source.NETFLOW: 2.0, Source.GUEST: 1.0}
AROUND_S = 300.0  # of sampling before and after the labels, at most


def due_hz(manifest: Manifest, source: Source) -> float:
    """Return at how many rows a second a source is due, in Hz."""
    return max(manifest.nominal_hz.get(source, 0.0), USUAL_HZ[source])


def emitted_limit(manifest: Manifest, source: Source) -> int:
    """Return how many rows a sampler of that rate can have emitted in the episode's time, twice over."""
    return math.ceil(2 * due_hz(manifest, source) * (manifest.duration_s + AROUND_S))
