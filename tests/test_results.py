"""The page of results: each number is a row of the metrics, and what has no row is not shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.report.fake_run import Recipe, make_run

from phasewatch.evaluate.score import read_metrics

SCRIPT = Path(__file__).parents[1] / "docs" / "results.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("results") / "run", Recipe())


def page_of(run: Path, out: Path) -> str:
    command = [sys.executable, str(SCRIPT), str(run), "--out", str(out), "--command", "phasewatch run S --out R"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return out.read_text()


def test_every_score_with_an_interval_is_a_row_of_the_metrics(run: Path, tmp_path: Path) -> None:
    page = page_of(run, tmp_path / "lab.md")
    rows = [r for r in read_metrics(run).metrics if r.value is not None and r.low is not None and r.high is not None]
    known = {f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rows}
    shown = re.findall(r"(?<![+\d])(\d\.\d\d \[\d\.\d\d, \d\.\d\d\])", page)

    assert len(shown) > 5
    assert set(shown) <= known


def test_it_names_the_command_the_baselines_and_what_was_tested(run: Path, tmp_path: Path) -> None:
    page = page_of(run, tmp_path / "lab.md")

    assert "```\nphasewatch run S --out R\n```" in page
    assert "| *elapsed_time* |" in page
    assert "macro_f1@5of6" in page
    assert "## held_out_sample" not in page


def test_the_same_run_gives_the_same_page(run: Path, tmp_path: Path) -> None:
    assert page_of(run, tmp_path / "one.md") == page_of(run, tmp_path / "two.md")
