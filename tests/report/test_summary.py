"""The headline of the report quotes only numbers of the metrics file, with the time-only baseline next to them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from phasewatch.evaluation import query
from phasewatch.evaluation.metric_table import MetricRow, MetricTable
from phasewatch.report.data import ReportData
from phasewatch.report.layout import ReportPage
from phasewatch.report.summary import build_page


def row(metric: str, model: str | None, value: float | None, **more: object) -> MetricRow:
    series = {
        "recipe": "held_out_host",
        "fold": "pooled",
        "channel_set": "realistic",
        "input": "raw",
        "smoothing": "none",
    }
    return MetricRow(
        **(series | {"agent": "off", "seed": "mean", "n_hosts": 4, "n_profiles_tested": 5, "n_profiles": 6} | more),
        metric=metric,
        model=model,
        value=value,
    )  # type: ignore[arg-type]


def page_of(rows: Sequence[MetricRow]) -> ReportPage:
    return build_page(
        ReportData(
            metrics=MetricTable(inputs={}, metrics=tuple(rows)),
            predictions=None,
            bundles=None,
            stages=(),
            folds=(),
            schema=None,
            digests={},
            notes=(),
        )
    )


GBT = row("macro_f1", "gbt", 0.69, low=0.64, high=0.73)
THREE = row("macro_f1_3class", "gbt", 0.87, low=0.83, high=0.9)
CLOCK = row("macro_f1", "elapsed_time", 0.22, low=0.18, high=0.27)


def test_headline_shows_the_score_and_the_time_only_baseline() -> None:
    claim = page_of([GBT, THREE, CLOCK]).claim

    assert "0.69 [0.64, 0.73]" in claim.words
    assert "time alone 0.22" in claim.line
    assert [(t.name, t.value, t.is_reference) for t in claim.tiles] == [
        ("five phases", "0.69", False),
        ("three states", "0.87", False),
        ("elapsed time alone", "0.22", True),
    ]


@pytest.mark.parametrize(
    ("low", "high", "verdict", "holds"),
    [
        pytest.param(0.1, 0.3, "is above", True, id="interval above zero"),
        pytest.param(-0.05, 0.3, "is not above", False, id="interval includes zero"),
        pytest.param(-0.3, -0.1, "is not above", False, id="interval below zero"),
    ],
)
def test_paired_difference_decides_whether_the_model_beats_elapsed_time(
    low: float, high: float, verdict: str, holds: bool
) -> None:
    gap = row("macro_f1_gap", "gbt", (low + high) / 2, compared_to="elapsed_time", low=low, high=high)

    claim = page_of([GBT, CLOCK, gap]).claim

    assert verdict in claim.verdict
    assert claim.holds is holds


def test_difference_stored_from_the_baseline_is_negated() -> None:
    gap = query.find_elapsed_time_gap(
        [row("macro_f1_gap", "elapsed_time", -0.4, compared_to="gbt", low=-0.5, high=-0.3)], "gbt"
    )

    assert gap == query.ElapsedTimeGap(value=0.4, low=0.3, high=0.5)


@pytest.mark.parametrize(
    ("model", "clock", "above"),
    [
        pytest.param((0.2, 0.1, 0.3), (0.22, 0.2, 0.25), False, id="lower value"),
        pytest.param((0.4, 0.3, 0.5), (0.22, 0.2, 0.35), False, id="intervals overlap"),
        pytest.param((0.4, 0.36, 0.5), (0.22, 0.2, 0.35), True, id="intervals do not overlap"),
        pytest.param((0.4, None, None), (0.22, None, None), None, id="no interval"),
    ],
)
def test_without_a_paired_difference_the_two_intervals_decide(
    model: tuple[float, float | None, float | None], clock: tuple[float, float | None, float | None], above: bool | None
) -> None:
    one, other = (row("macro_f1", "m", v, low=low, high=high) for v, low, high in (model, clock))

    assert query.is_above_elapsed_time(one, other, None) is above


def test_headline_does_not_hold_without_a_scored_time_only_baseline() -> None:
    claim = page_of([GBT]).claim

    assert "was not scored" in claim.verdict
    assert not claim.holds


def test_without_rows_there_is_no_headline_score_and_no_figure() -> None:
    page = page_of([])

    assert page.claim.words.startswith("No score")
    assert page.claim.tiles == ()
    assert page.figures() == {}


def test_score_of_one_fold_or_another_split_is_no_headline() -> None:
    page = page_of(
        [row("macro_f1", "gbt", 0.99, fold="microvm"), row("macro_f1", "gbt", 0.98, recipe="random_windows")]
    )

    assert page.claim.tiles == ()


def test_score_without_the_agent_is_preferred_to_the_score_over_all_episodes() -> None:
    rows = [row("macro_f1", "gbt", 0.5, agent=None), row("macro_f1", "gbt", 0.4)]

    found = query.find_score(rows, "macro_f1", model="gbt")

    assert found is not None
    assert found.value == 0.4


@pytest.mark.parametrize(("threat", "value"), [("portable", 0.4), ("oracle", 0.5)])
def test_channel_set_is_scored_on_episodes_with_its_agent_state(threat: str, value: float) -> None:
    rows = [row("macro_f1", "gbt", v, channel_set=threat, agent=agent) for agent, v in (("off", 0.4), ("on", 0.5))]

    found = query.find_score(rows, "macro_f1", model="gbt", threat=threat)

    assert found is not None
    assert found.value == value


def test_leaderboard_is_sorted_by_score_and_marks_baselines() -> None:
    board = query.build_leaderboard([CLOCK, GBT, row("macro_f1", "majority", None)])

    assert [c.label for c in board] == ["gbt", "elapsed time (baseline)", "majority (baseline)"]


def test_confusion_matrix_has_all_true_and_predicted_labels() -> None:
    rows = [
        row("confusion", "gbt", 7.0, phase="clean", bin=0.0),
        row("confusion", "gbt", 2.0, phase="clean", bin=3.0),
        row("confusion", "gbt", 0.0, phase="armed", bin=0.0),
    ]

    matrix = query.build_confusion_matrix(rows, model="gbt")

    assert matrix is not None
    assert matrix.labels == ("clean", "active")
    assert matrix.counts == ((7.0, 2.0), (0.0, 0.0))


def test_notes_of_the_evaluation_are_listed_once() -> None:
    note = row("note", None, None, note="only 12 sessions: intervals are too narrow")

    (section,) = [s for s in page_of([GBT, note, note]).sections if s.key == "sure"]

    assert section.points == ("Only 12 sessions: intervals are too narrow.",)
