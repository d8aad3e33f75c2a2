"""Whatever is done to a bundle: no crash, no hang, bounded memory, and nothing read as something else without a
word."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tests.factories.small_bundles import EPISODE_ID, members_of, small_bundle

from phasewatch.bundle.archive import unpack_bundle
from phasewatch.errors import BundleError
from phasewatch.store.local import parse_receipt, render_receipt
from phasewatch.validate.verdict import BundleLocation, validate_bundle

ROOT = Path(__file__).parents[2]


def mutate(seed: int, count: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bundle.mutants", str(seed), str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def hold(said: dict[str, Any]) -> None:
    assert said["wrong"] == []
    assert said["slowest_cpu_s"] < 1.0
    assert said["peak_mib"] < 256
    assert len(said["fates"]) > 30  # the mutants are of many kinds, and so are the refusals


def test_of_two_thousand_mutants_none_crashes_hangs_swells_or_lies() -> None:
    hold(mutate(seed=1, count=2_000))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 7))
def test_of_fifty_thousand_mutants_none_crashes_hangs_swells_or_lies(seed: int, soak_row: Callable[..., None]) -> None:
    said = mutate(seed=seed, count=10_000)
    soak_row(
        "Mutants of bundles",
        seed=seed,
        mutants=said["count"],
        kinds_of_fate=len(said["fates"]),
        wrong=len(said["wrong"]),
        slowest_cpu_s=round(said["slowest_cpu_s"], 3),
        peak_MiB=round(said["peak_mib"]),
    )

    hold(said)


def flips(data: bytes) -> Iterator[bytes]:
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def test_every_flip_of_a_single_bit_is_found_and_none_changes_what_is_read() -> None:
    sound = small_bundle()
    content, digest = members_of(sound), sha256(sound).hexdigest()
    harmless = 0
    for flipped in flips(sound):
        place = BundleLocation(path="flipped", host_id="pc-a", episode_id=EPISODE_ID, receipt=digest)

        assert "receipt" in validate_bundle(flipped, place).verdict.reasons

        try:
            unpack_bundle(flipped, file="flipped")
        except BundleError:
            continue
        harmless += 1  # bits that zstd writes and never reads: another spelling of the same bytes

        assert members_of(flipped) == content

    assert harmless < 0.005 * 8 * len(sound)


def test_every_flip_in_a_receipt_is_found() -> None:
    sound = small_bundle()
    name = f"{EPISODE_ID}.tar.zst"
    line = render_receipt(sha256(sound).hexdigest(), name)
    for flipped in flips(line):
        vouched = parse_receipt(flipped, name)
        place = BundleLocation(path=name, host_id="pc-a", episode_id=EPISODE_ID, receipt=vouched)
        changes_nothing = flipped.replace(b" *", b"  ") == line  # sha256sum's binary mode

        assert ("receipt" in validate_bundle(sound, place).verdict.reasons) or changes_nothing
