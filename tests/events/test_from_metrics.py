"""Score, confusion and profile events of a run match the rows of its metrics file."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from tests.factories.report_runs import MALICIOUS, Recipe, make_run

from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.evaluation.headline import HeadlineVerdict, build_headline, render_headline
from phasewatch.evaluation.metric_table import MetricRow, MetricTable
from phasewatch.events.from_metrics import build_metric_events, build_profile_event
from phasewatch.events.schema import ConfusionEvent, EventEnvelope, ScoreEvent, parse_event, render_event

FEW = Recipe(hosts=("a", "b", "c"), profiles=("benign", *MALICIOUS[:4]), n_windows=12)


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> MetricTable:
    return read_metrics(make_run(tmp_path_factory.mktemp("facts") / "run", FEW))


def score_of(metrics: MetricTable) -> ScoreEvent:
    event = build_metric_events(metrics)[0]
    assert isinstance(event, ScoreEvent)
    return event


def test_leaderboard_is_sorted_by_score_and_marks_baselines(metrics: MetricTable) -> None:
    score = score_of(metrics)

    assert [r.value for r in score.rows] == sorted((r.value for r in score.rows), reverse=True)
    assert {r.model: r.is_baseline for r in score.rows} == {"gbt": False, "majority": True, "elapsed_time": True}
    assert (score.metric, score.tested, score.registered) == ("macro_f1", 4, 6)
    assert score.headline == render_headline(build_headline(metrics))


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (HeadlineVerdict(passes=False, failed=("disjoint",)), "failed its audit (disjoint)"),
        (HeadlineVerdict(passes=True, withdraws_five_phases=True), "5 phases withdrawn"),
    ],
)
def test_headline_obeys_the_verdict_of_the_audit(metrics: MetricTable, verdict: HeadlineVerdict, words: str) -> None:
    event = build_metric_events(metrics, verdict)[0]

    assert isinstance(event, ScoreEvent)
    assert words in event.headline


def test_scores_on_fewer_hosts_come_last(metrics: MetricTable) -> None:
    one_host = tuple(
        replace(r, channel_set="oracle", value=0.99, n_hosts=1)
        for r in metrics.metrics
        if (r.model, r.metric) == ("gbt", "macro_f1")
    )
    rows = score_of(replace(metrics, metrics=(*metrics.metrics, *one_host))).rows

    assert [(r.model, r.threat) for r in rows][::3] == [("gbt", "realistic"), ("gbt", "oracle")]
    assert [r.n_hosts for r in rows] == [3, 3, 3, 1]


def test_leaderboard_rows_are_rows_of_the_metrics_file(metrics: MetricTable) -> None:
    known = {(r.model, r.value, r.low, r.high, r.agent) for r in metrics.metrics if r.metric == "macro_f1"}

    for row in score_of(metrics).rows:
        assert (row.model, row.value, row.low, row.high, row.agent) in known


def test_p_value_is_for_the_difference_to_the_first_model(metrics: MetricTable) -> None:
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


def test_confusion_matrix_counts_the_windows_of_the_headline(metrics: MetricTable) -> None:
    matrix = build_metric_events(metrics)[1]

    assert isinstance(matrix, ConfusionEvent)
    off_windows = next(r.n_windows for r in metrics.metrics if r.metric == "macro_f1" and r.agent == "off")
    assert sum(map(sum, matrix.counts)) == off_windows
    assert (matrix.model, matrix.agent) == ("gbt", "off")


def test_scores_of_easier_splits_are_part_of_the_event(metrics: MetricTable) -> None:
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
    assert score_of(metrics).inflation == ()  # no comparison with one split only


def test_profile_table_has_all_registered_profiles(metrics: MetricTable) -> None:
    table = build_profile_event(metrics)

    assert table is not None
    assert set(table.profiles) == {"benign", *MALICIOUS}
    assert set(table.untested_profiles) == set(MALICIOUS[4:])
    for profile, cells in zip(table.profiles, table.cells, strict=True):
        assert all((c is None) == (profile in MALICIOUS[4:]) for c in cells)


def test_run_without_scores_gives_an_empty_leaderboard_and_no_table() -> None:
    empty = MetricTable(inputs={}, metrics=())

    assert build_profile_event(empty) is None
    assert score_of(empty).rows == ()
    assert "untested" in str(score_of(empty).headline)


def test_events_can_be_rendered_and_parsed(metrics: MetricTable) -> None:
    for data in (*build_metric_events(metrics), build_profile_event(metrics)):
        assert data is not None
        made = EventEnvelope(id="1", t_wall_ns=1, run="demo", data=data)
        assert parse_event(render_event(made)) == made
