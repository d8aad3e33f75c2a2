"""The page of results shows metric rows only, with baselines, caveats and the model of the headline."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.factories.report_runs import Recipe, make_run

from phasewatch.artifacts import METRICS_FILE, SPLITS_DIR
from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.evaluation.metric_table import SELECTION_METRIC
from phasewatch.splits import parse_fold, render_fold
from phasewatch.splits.fold import compute_fold_digest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("results") / "run", Recipe())


def render_page(run: Path, out: Path) -> str:
    command = [sys.executable, "-m", "tools.results", str(run), "--out", str(out), "--command", "phasewatch run S"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return out.read_text(encoding="utf-8")


def test_every_score_with_an_interval_is_a_metric_row(run: Path, tmp_path: Path) -> None:
    page = render_page(run, tmp_path / "lab.md")
    rows = [r for r in read_metrics(run).metrics if r.value is not None and r.low is not None and r.high is not None]
    known = {f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rows}
    shown = re.findall(r"(?<![+\d])(\d\.\d\d \[\d\.\d\d, \d\.\d\d\])", page)

    assert len(shown) > 5
    assert set(shown) <= known


def test_page_has_the_command_the_baselines_and_the_coverage(run: Path, tmp_path: Path) -> None:
    page = render_page(run, tmp_path / "lab.md")

    assert "```\nphasewatch run S\n```" in page
    assert "| *elapsed_time* |" in page
    assert "5 of 6 profiles" in page
    assert "## held_out_sample" not in page


def test_caveats_of_the_splits_are_shown(run: Path, tmp_path: Path) -> None:
    last = shutil.copytree(run, tmp_path / "last")
    path = next((last / SPLITS_DIR).iterdir())
    fold = parse_fold(path.read_bytes(), file="")
    noted = replace(fold, notes=("the store spans 1.4 days",))
    path.write_bytes(render_fold(replace(noted, sha256=compute_fold_digest(noted))))

    page = render_page(last, tmp_path / "lab.md")

    section = page.partition(f"## {fold.recipe}\n")[2].partition("\n## ")[0]
    assert "The store spans 1.4 days" in section


def test_other_models_are_compared_with_the_model_of_the_headline(run: Path, tmp_path: Path) -> None:
    document = json.loads((run / METRICS_FILE).read_text().replace('"gbt"', '"cnn"'))
    chosen = {**document["metrics"][0], "metric": SELECTION_METRIC, "model": "cnn", "value": 0.9, "agent": None}
    (other := tmp_path / "other").mkdir()
    (other / METRICS_FILE).write_text(json.dumps({**document, "metrics": [*document["metrics"], chosen]}))

    page = render_page(other, tmp_path / "lab.md")

    assert "| cnn − elapsed_time |" in page


def test_same_run_gives_the_same_page(run: Path, tmp_path: Path) -> None:
    assert render_page(run, tmp_path / "one.md") == render_page(run, tmp_path / "two.md")
