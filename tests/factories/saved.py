"""Bundles as `watch --save` writes them: of unknown phase, on a host that a user watches."""

from __future__ import annotations

from pathlib import Path

from tests.factories.bundles import T0, S, episode
from tests.factories.stores import put

from phasewatch.bundle.model import Episode, RecordingMetadata
from phasewatch.types import EpisodeOrigin, SampleKind

RECORDING = RecordingMetadata(boot_s=0.0, settle_s=0.0, pinning=(), knobs={}, background="", absent={})


def saved(number: int = 1, *, host_id: str = "web01", seconds: float = 60.0) -> Episode:
    """Build what one watch of a VM saved; number n begins n · 1,000 s after the factory's first label."""
    return episode(
        (("unknown", seconds),),
        number=number,
        host_id=host_id,
        agent=False,
        t0_ns=T0 + number * 1000 * S,
        profile="unknown",
        sample_kind=SampleKind.LIVE,
        origin=EpisodeOrigin.RECORDED,
        recording=RECORDING,
    )


def save(store: Path, *numbers: int, host_id: str = "web01", seconds: float = 60.0) -> list[Path]:
    """Store such bundles and return their paths."""
    return [put(store, saved(number, host_id=host_id, seconds=seconds)) for number in numbers]
