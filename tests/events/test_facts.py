"""What the run's scores say as events: every number is a row of the metrics file, and what is untested is named."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from tests.factories.report_runs import MALICIOUS, Recipe, make_run

from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.evaluation.metric_table import MetricRow, MetricTable, render_headline
from phasewatch.events.from_metrics import build_metric_events, build_profile_event
from phasewatch.events.schema import ConfusionEvent, EventEnvelope, ScoreEvent, parse_event, render_event

FEW = Recipe(hosts=("a", "b", "c"), profiles=("benign", *MALICIOUS[:4]), n_windows=12)


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> MetricTable:
    return read_metrics(make_run(tmp_path_factory.mktemp("facts") / "run", FEW))


def score_of(metrics: MetricTable) -> ScoreEvent:
    found = build_metric_events(metrics)[0]
    assert isinstance(found, ScoreEvent)
    return found


def test_the_leaderboard_is_best_first_and_marks_its_baselines(metrics: MetricTable) -> None:
    score = score_of(metrics)

    assert [r.value for r in score.rows] == sorted((r.value for r in score.rows), reverse=True)
    assert {r.model: r.is_baseline for r in score.rows} == {"gbt": False, "majority": True, "elapsed_time": True}
    assert (score.metric, score.tested, score.registered) == ("macro_f1", 4, 6)
    assert score.headline == render_headline(metrics)


def test_a_score_on_fewer_hosts_comes_after_all_that_were_tested_on_more(metrics: MetricTable) -> None:
    one_host = tuple(
        replace(r, channel_set="oracle", value=0.99, n_hosts=1)
        for r in metrics.metrics
        if (r.model, r.metric) == ("gbt", "macro_f1")
    )
    rows = score_of(replace(metrics, metrics=(*metrics.metrics, *one_host))).rows

    assert [(r.model, r.threat) for r in rows][::3] == [("gbt", "realistic"), ("gbt", "oracle")]
    assert [r.n_hosts for r in rows] == [3, 3, 3, 1]


def test_every_number_of_the_leaderboard_is_a_row_of_the_file(metrics: MetricTable) -> None:
    known = {(r.model, r.value, r.low, r.high, r.agent) for r in metrics.metrics if r.metric == "macro_f1"}

    for row in score_of(metrics).rows:
        assert (row.model, row.value, row.low, row.high, row.agent) in known


def test_the_paired_p_is_that_against_the_first(metrics: MetricTable) -> None:
    rows = score_of(metrics).rows
    gaps = {
        (r.channel_set, frozenset((r.model, r.compared_to))): r.p_holm
        for r in metrics.metrics
        if r.metric == "macro_f1_gap" and r.fold == "pooled" and r.agent == "off"
    }

    assert rows[0].p_holm is None
    for row in rows[1:]:
        assert row.p_holm is not None
        assert row.p_holm == gaps[row.threat, frozenset((row.model, rows[0].model))]


def test_the_confusion_counts_the_headline_s_windows(metrics: MetricTable) -> None:
    matrix = build_metric_events(metrics)[1]

    assert isinstance(matrix, ConfusionEvent)
    off_windows = next(r.n_windows for r in metrics.metrics if r.metric == "macro_f1" and r.agent == "off")
    assert sum(map(sum, matrix.counts)) == off_windows
    assert (matrix.model, matrix.agent) == ("gbt", "off")


def test_easier_splits_stand_beside_the_headline(metrics: MetricTable) -> None:
    own = next(
        r
        for r in metrics.metrics
        if r.metric == "macro_f1" and r.model == "gbt" and r.agent == "off" and r.seed == "mean"
    )
    easy = MetricRow(
        **{f: getattr(own, f) for f in own.__struct_fields__} | {"recipe": "random_windows", "value": 0.99}
    )

    score = score_of(MetricTable(inputs={}, metrics=(*metrics.metrics, easy)))

    assert [(i.recipe, i.value) for i in score.inflation] == [("random_windows", 0.99), ("held_out_host", own.value)]
    assert score.inflation_of == "gbt"
    assert score_of(metrics).inflation == ()  # one way of splitting alone inflates nothing


def test_every_registered_profile_has_a_row_tested_or_not(metrics: MetricTable) -> None:
    table = build_profile_event(metrics)

    assert table is not None
    assert set(table.profiles) == {"benign", *MALICIOUS}
    assert set(table.untested_profiles) == set(MALICIOUS[4:])
    for profile, cells in zip(table.profiles, table.cells, strict=True):
        assert all((c is None) == (profile in MALICIOUS[4:]) for c in cells)


def test_a_run_without_a_score_says_so_and_shows_no_table() -> None:
    empty = MetricTable(inputs={}, metrics=())

    assert build_profile_event(empty) is None
    assert score_of(empty).rows == ()
    assert "untested" in str(score_of(empty).headline)


def test_what_is_built_fits_its_bounds(metrics: MetricTable) -> None:
    for data in (*build_metric_events(metrics), build_profile_event(metrics)):
        assert data is not None
        made = EventEnvelope(id="1", t_wall_ns=1, run="demo", data=data)
        assert parse_event(render_event(made)) == made
