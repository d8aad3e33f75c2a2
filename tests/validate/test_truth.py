"""The ledger of a store with injected faults is the truth file's, to the last bundle and row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from phasewatch.artifacts import ACCOUNTING_FILE
from phasewatch.simulate import SimulationResult, simulate
from phasewatch.types import BundleStatus
from phasewatch.validate.checks import describe_code
from phasewatch.validate.sweep import sweep


def severity_of(code: str) -> str:
    spec = describe_code(code)
    assert spec is not None
    return str(spec.severity)


def hold_ledger_to_truth(made: SimulationResult, run: Path, *, workers: int) -> int:
    """Sweep, and compare what the ledger counts with what the truth file lists; give how many it judges otherwise."""
    truths = [json.loads(line) for line in made.truth.read_bytes().splitlines()]
    summary = sweep(made.store, run, workers=workers)
    ledger = json.loads((run / ACCOUNTING_FILE).read_bytes())["stages"]["validate"]

    assert ledger["in"] == len(truths) == made.episodes
    assert {str(s): ledger[str(s)] for s in BundleStatus} == {
        str(s): sum(t["status"] == str(s) for t in truths) for s in BundleStatus
    }
    faults = {code: n for code, n in ledger["reasons"].items() if severity_of(code) != "note"}  # an idle card is none
    assert faults == dict(sorted(Counter(code for t in truths for code in t["reasons"]).items()))
    said = {v.path: (str(v.status), {r for r in v.reasons if severity_of(r) != "note"}) for v in summary.verdicts}
    true = {t["path"]: (t["status"], set(t["reasons"])) for t in truths}
    assert said == true
    assert ledger["rows_in"] == ledger["rows_used"] + sum(ledger["rows_lost"].values())
    return sum(said[path] != true[path] for path in true)


def test_the_ledger_of_a_store_with_a_tenth_of_faults_is_the_truths(tmp_path: Path) -> None:
    made = simulate(tmp_path / "store", hosts=3, episodes=200, seed=11, faults=0.1, between_s=(100.0, 104.0))

    hold_ledger_to_truth(made, tmp_path / "run", workers=1)

    assert 8 <= made.faulty <= 35


@pytest.mark.soak
def test_the_ledger_of_ten_thousand_bundles_with_a_tenth_of_faults_is_the_truths(
    tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    made = simulate(tmp_path / "store", hosts=6, episodes=10_000, seed=12, faults=0.1, workers=2)

    otherwise = hold_ledger_to_truth(made, tmp_path / "run", workers=2)
    soak_row("Ledger against truth", bundles=made.episodes, faulty=made.faulty, judged_otherwise=otherwise)

    assert 900 <= made.faulty <= 1_100
