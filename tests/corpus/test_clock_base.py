"""The fault that once dropped a whole source without a word, on real telemetry: the card's rows on the monotonic
clock."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pytest

from phasewatch.binning.clocks import rebase_episode
from phasewatch.bundle.archive import pack_bundle, unpack_bundle, unpack_members
from phasewatch.bundle.model import Episode
from phasewatch.channels import BASE_CHANNELS
from phasewatch.types import BundleStatus, ClockBase, SourceKind
from phasewatch.validate.verdict import BundleLocation, validate_bundle

CORPUS = Path(__file__).parents[2] / "corpus" / "lab-v1"
SOME = [sorted(folder.glob("*.tar.zst"))[0] for folder in sorted(CORPUS.iterdir()) if folder.is_dir()]
NETFLOW = [i for i, channel in enumerate(BASE_CHANNELS) if channel.source is SourceKind.NETFLOW]


def judge(whole: Episode, members: dict[str, bytes], *, keep_pairs: bool) -> tuple[BundleLocation, bytes]:
    """Pack an episode whose netflow rows carry monotonic time but claim Unix time."""
    lines = [msgspec.json.decode(line) for line in members["netflow.jsonl"].splitlines()]
    members["netflow.jsonl"] = b"".join(
        msgspec.json.encode({**line, "t_wall_ns": line["t_mono_ns"]}) + b"\n" for line in lines
    )
    clocks = whole.manifest.clocks if keep_pairs else msgspec.structs.replace(whole.manifest.clocks, pairs={})
    data = pack_bundle(msgspec.structs.replace(whole.manifest, clocks=clocks), members, level=3)
    place = BundleLocation(
        path="spoilt",
        host_id=whole.manifest.host.host_id,
        episode_id=whole.manifest.episode_id,
        receipt=sha256(data).hexdigest(),
    )
    return place, data


def spoilt(path: Path, *, keep_pairs: bool) -> tuple[Episode, BundleLocation, bytes]:
    data = path.read_bytes()
    whole = unpack_bundle(data, file=path.name)
    members = {name: bytes(view) for name, view in unpack_members(data, file="").items() if name != "manifest.json"}
    return whole, *judge(whole, members, keep_pairs=keep_pairs)


@pytest.mark.parametrize("path", SOME, ids=lambda path: path.parent.name)
def test_rows_on_the_monotonic_clock_are_put_back_by_the_manifests_pairs(path: Path) -> None:
    whole, place, data = spoilt(path, keep_pairs=True)
    found = validate_bundle(data, place)
    repaired, _ = rebase_episode(unpack_bundle(data, file="spoilt"))
    (c0, u0), (c1, u1) = whole.manifest.clocks.pairs[ClockBase.MONOTONIC]
    by_hand = [u0 + (int(c) - c0) * (u1 - u0) // (c1 - c0) for c in whole.rows[SourceKind.NETFLOW].t_mono_ns]

    assert found.verdict.status is BundleStatus.DEGRADED
    assert found.verdict.reasons == ("clock-base-repaired:netflow",)
    assert repaired.rows[SourceKind.NETFLOW].t_wall_ns.tolist() == by_hand
    assert found.binned is not None
    assert np.isfinite(found.binned.bins[:, NETFLOW]).mean() > 0.95


@pytest.mark.parametrize("path", SOME[:2], ids=lambda path: path.parent.name)
def test_without_pairs_the_source_is_missing_and_says_so(path: Path) -> None:
    _, place, data = spoilt(path, keep_pairs=False)
    found = validate_bundle(data, place)

    assert found.verdict.status is BundleStatus.DEGRADED
    assert "clock-base:netflow" in found.verdict.reasons
    assert found.binned is not None
    assert np.isnan(found.binned.bins[:, NETFLOW]).all()
    assert np.isfinite(found.binned.bins[:, 0]).any()
