"""The page of results: each number is a row of the metrics, and what has no row is not shown."""

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

from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.splits import parse_fold, render_fold
from phasewatch.splits.fold import compute_fold_digest

SCRIPT = Path(__file__).parents[1] / "tools" / "results.py"


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
    assert "macro_f1, 5 of 6 profiles" in page
    assert "## held_out_sample" not in page


def test_what_the_splits_say_of_their_scores_stands_beside_them(run: Path, tmp_path: Path) -> None:
    last = shutil.copytree(run, tmp_path / "last")
    path = next((last / "splits").iterdir())
    fold = parse_fold(path.read_bytes(), file="")
    told = replace(fold, notes=("the store spans 1.4 days: no drift can be seen",))
    path.write_bytes(render_fold(replace(told, sha256=compute_fold_digest(told))))

    page = page_of(last, tmp_path / "lab.md")

    assert (
        "## held_out_host\n\nTested on a host that training never saw. **The store spans 1.4 days: no drift can be seen.**"
        in page
    )


def test_the_others_are_held_against_the_model_of_the_headline(run: Path, tmp_path: Path) -> None:
    document = json.loads((run / "metrics_v2.json").read_text().replace('"gbt"', '"cnn"'))
    (other := tmp_path / "other").mkdir()
    (other / "metrics_v2.json").write_text(json.dumps(document))
    liked = {**document["metrics"][0], "metric": "val_b_macro_f1", "model": "cnn", "value": 0.9, "agent": None}
    (other / "metrics_v2.json").write_text(json.dumps({**document, "metrics": [*document["metrics"], liked]}))

    page = page_of(other, tmp_path / "lab.md")

    assert "realistic, cnn: " in page
    assert "| cnn − elapsed_time |" in page


def test_the_same_run_gives_the_same_page(run: Path, tmp_path: Path) -> None:
    assert page_of(run, tmp_path / "one.md") == page_of(run, tmp_path / "two.md")
