"""The bundled corpus is accepted, and the index that says so is the one that a sweep of it makes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from phasewatch.artifacts import VALIDATION_FILE
from phasewatch.store.local import DiskStore
from phasewatch.types import BundleStatus, EpisodeOrigin
from phasewatch.validate.index import read_index
from phasewatch.validate.sweep import sweep

CORPUS = Path(__file__).parents[2] / "corpus" / "lab-v1"


def test_a_sweep_of_the_corpus_makes_the_committed_index(tmp_path: Path) -> None:
    sweep(CORPUS, tmp_path / "run", workers=1)

    made, committed = read_index(tmp_path / "run" / VALIDATION_FILE), read_index(CORPUS / VALIDATION_FILE)

    stale = "the bundles changed: `make datasheet` writes the index anew"
    assert [v.path for v in made] == [v.path for v in committed] == [i.path for i in DiskStore(CORPUS).walk()], stale
    for new, old in zip(made, committed, strict=True):
        assert str(new) == str(old), stale


def test_every_recording_is_usable_and_is_one() -> None:
    verdicts = read_index(CORPUS / VALIDATION_FILE)
    statuses = Counter(v.status for v in verdicts)

    assert set(statuses) <= {BundleStatus.ACCEPTED, BundleStatus.DEGRADED}
    assert statuses[BundleStatus.ACCEPTED] > 0.8 * len(verdicts)
    assert {v.origin for v in verdicts} == {EpisodeOrigin.RECORDED}
    assert all(v.reasons for v in verdicts if v.status is BundleStatus.DEGRADED)
