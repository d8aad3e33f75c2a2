"""What a model looks at: the channel that tells is found by permuting it, and named as the reason of a decision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.factories.synthetic_runs import NAMES, World, edit_features, write_run

from phasewatch.dataset import load, write_splits
from phasewatch.errors import RunError
from phasewatch.evaluation.evaluate import evaluate_run
from phasewatch.evaluation.importance import build_importance_rows, explain_decision
from phasewatch.evaluation.metric_table import HeadlineKey
from phasewatch.evaluation.scoring import EvaluationSettings
from phasewatch.training.experiment import Experiment
from phasewatch.training.train import train_experiments

TELLS = "netflow.out_bytes"
RULES = EvaluationSettings(
    malicious=("cryptomine", "exfil-drip"), profiles=("benign", "cryptomine", "exfil-drip"), resamples=200
)
HOSTS = ("host-0", "host-1", "host-2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which one channel tells the phase and all others are noise."""
    path = write_run(tmp_path_factory.mktemp("explained") / "run", World(hosts=3, sessions=6, signal=0.0))

    def tell(table: pa.Table) -> pa.Table:
        for i, name in enumerate(n for n in NAMES if n.startswith(f"{TELLS}.")):
            column = table["phase"].to_numpy().astype(np.float32) * 10 + i
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(column))
        return table

    edit_features(path, tell)
    write_splits(path, "held_out_host")
    cells = [Experiment(recipe="held_out_host", fold=h, threat="realistic", model="gbt") for h in HOSTS]
    train_experiments(path, cells, workers=1)
    return path


def test_permuting_the_channel_that_tells_costs_the_score_and_no_other_does(run: Path) -> None:
    rows = {r.compared_to: r for r in build_importance_rows(run, HeadlineKey(), RULES)}

    assert len(rows) == 35
    assert rows[TELLS].value > 0.3
    assert rows[TELLS].low > 0.1
    assert max(abs(r.value) for name, r in rows.items() if name != TELLS) < 0.05


def test_the_reason_of_a_decision_is_the_channel_that_tells_with_its_raw_value(run: Path) -> None:
    cell = Experiment(recipe="held_out_host", fold="host-1", threat="realistic", model="gbt")
    test = load(run, cell.recipe, cell.fold, cell.threat).test
    at = int(np.flatnonzero(test.y == 3)[0])
    episode = test.windows.episodes[test.windows.episode_index[at]].episode_id

    told = explain_decision(run, cell, episode, float(test.windows.t_center_s[at]))

    assert (told.truth, told.decided) == ("active", "active")
    first = told.reasons[0]
    assert (first.channel, first.value, first.unit) == (TELLS, 30.0, "B/s")
    assert first.drop > 0.3
    assert len(told.reasons) == 5


def test_an_episode_of_another_fold_is_refused_by_name(run: Path) -> None:
    cell = Experiment(recipe="held_out_host", fold="host-1", threat="realistic", model="gbt")

    with pytest.raises(RunError, match=r"held_out_host, fold host-1: does not test episode nobody"):
        explain_decision(run, cell, "nobody", 0.0)


def test_metrics_say_what_models_learnt_from_and_what_validation_made_of_them(run: Path) -> None:
    metrics = evaluate_run(run, resamples=50).metrics
    (size,) = [r for r in metrics if r.metric == "train_windows"]
    (choice,) = [r for r in metrics if r.metric == "val_b_macro_f1"]
    sizes = [len(load(run, "held_out_host", h).train) for h in HOSTS]

    assert size.value == pytest.approx(np.mean(sizes))
    assert 0.9 < choice.value <= 1.0


def test_the_headline_is_of_the_model_that_validation_liked_best() -> None:
    from phasewatch.evaluation.metric_table import MetricRow, select_headline

    def row(model: str, value: float) -> MetricRow:
        place = {
            "recipe": "held_out_host",
            "fold": "pooled",
            "channel_set": "realistic",
            "input": "raw",
            "smoothing": "none",
        }
        return MetricRow(metric="val_b_macro_f1", model=model, value=value, **place)

    assert select_headline([row("gbt", 0.4), row("cnn", 0.5)]).model == "cnn"
    assert select_headline([row("cnn", 0.4), row("gbt", 0.4)]).model == "gbt"
    assert select_headline([]).model == "gbt"


def test_the_command_line_explains_one_window_of_the_headlines_model(run: Path) -> None:
    from typer.testing import CliRunner

    from phasewatch.cli import app

    evaluate_run(run, resamples=20)
    test = load(run, "held_out_host", "host-2", "realistic").test
    at = int(np.flatnonzero(test.y == 2)[0])
    asked = [test.windows.episodes[test.windows.episode_index[at]].episode_id, "--at", str(test.windows.t_center_s[at])]

    said = CliRunner().invoke(app, ["explain", str(run), *asked])
    unknown = CliRunner().invoke(app, ["explain", str(run), "nobody", "--at", "1", "--json"])

    assert said.exit_code == 0
    assert said.stdout.startswith(f"window around {test.windows.t_center_s[at]:g} s: predicted infecting")
    assert said.stdout.splitlines()[1].endswith("less probable by")
    assert said.stdout.splitlines()[2].split()[:3] == [TELLS, "20", "B/s"]
    assert unknown.exit_code != 0


def test_a_report_without_pictures_goes_where_it_is_asked_to(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from phasewatch.cli import app

    out = tmp_path / "results.md"

    said = CliRunner().invoke(app, ["report", str(run), "--format", "md", "--out", str(out)])

    assert said.stdout.splitlines()[-1] == str(out)
    title = out.read_text().partition("\n")[0]
    assert title.startswith("# ")
    assert "infections announced" in title
    assert "unseen hosts" in title
