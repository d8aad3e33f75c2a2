"""The arithmetic does today what it did when the models were trained."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from phasewatch.binning.align import bin_episode
from phasewatch.channels import BASE_CHANNELS
from phasewatch.features.fingerprint import (
    behaviour_fingerprint,
    build_golden_episodes,
    compute_column_digests,
    compute_feature_digests,
)
from phasewatch.features.schema import schema_hash
from phasewatch.features.stats import episode_stats, window_stats

# Changes only with the contract; then every feature table and model is to be built anew, and the change log says so.
GOLDEN = "1ce88d1d120efd9572a3f50e0ce14fb0d1112c066413ce90fc113e068b8d003a"
# The same of the base channels alone, which models without extended channels depend on.
GOLDEN_BASE = "e8ef7ce5cd940cad73456c424c155a54dea6691b165f48e25d19df9996b0c42a"
# Bins and statistics alone: unchanged since the first version, so what was computed then still compares.
GOLDEN_STATS = "ff18dcf708b51df21763fc4a4b4d3c0751b428ba770d75b2ab45c038734a69b0"

FINDINGS = {
    "a clock that claims to be Unix time": {f"clock-base-repaired:{s}" for s in ("proc", "qmp", "netflow", "guest")},
    "a step of the wall clock": {"clock-step"},
    "monotonic stamps that stand still and step back": {"clock-step"},
    "a step of the wall clock at the last reading": {"clock-step"},
}


def test_the_fingerprint_is_the_golden_one() -> None:
    assert behaviour_fingerprint() == GOLDEN
    assert behaviour_fingerprint(BASE_CHANNELS) == GOLDEN_BASE


def test_digests_of_base_channels_do_not_depend_on_extended_ones() -> None:
    base, extended = (
        compute_feature_digests(names) for names in (["proc.cpu_user"], ["proc.cpu_user", "netflow.rhythm"])
    )

    assert (base.schema_hash, base.behaviour_fingerprint) == (schema_hash(BASE_CHANNELS), GOLDEN_BASE)
    assert (extended.schema_hash, extended.behaviour_fingerprint) == (schema_hash(), GOLDEN)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("proc.cpu_user.mean", "burst.cpu_share@60s"), GOLDEN_BASE),
        (("proc.cpu_user.mean", "netflow.rhythm.p95"), GOLDEN),
        (("proc.cpu_user", "netflow.rhythm"), GOLDEN),  # of a tensor
        (("t_center_s",), GOLDEN_BASE),
    ],
)
def test_a_models_digests_follow_from_its_columns(columns: tuple[str, ...], expected: str) -> None:
    assert compute_column_digests(columns).behaviour_fingerprint == expected


def test_bins_and_statistics_have_the_bits_of_the_first_version() -> None:
    digest = hashlib.sha256()
    for _, episode in build_golden_episodes():
        bins = bin_episode(episode).bins[:, : len(BASE_CHANNELS)]
        for values in (bins, window_stats(bins), episode_stats(bins)):
            digest.update(np.ascontiguousarray(values, "<f4").tobytes())

    assert digest.hexdigest() == GOLDEN_STATS


@pytest.mark.parametrize("name", [name for name, _ in build_golden_episodes()])
def test_a_golden_episode_does_what_its_name_says(name: str) -> None:
    grid = bin_episode(dict(build_golden_episodes())[name])
    unknown = np.isnan(grid.bins)

    assert {f.code for f in grid.findings} == FINDINGS.get(name, set())
    assert not unknown.all()
    assert unknown.any() == (
        name
        not in {
            "jitter",
            "counters beyond 53 bits",
            "ten ticks a second",
            "balloon fields every third tick",
            "a clock that claims to be Unix time",
            "a clock with another name",
            "a step of the wall clock",
            "exactly one window",
            "one bin short of a window",
            "just enough bins for stats",
            "one bin too few for stats",
            "a step of the wall clock at the last reading",
        }
    )
