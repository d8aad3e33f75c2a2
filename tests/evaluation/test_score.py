"""From predictions to numbers: which rows there are, that scikit-learn gives the same, and the line that is quoted."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from tests.factories.predictions import MALICIOUS, SKILL, Shape, write_predictions

from phasewatch.artifacts import OLD_METRICS_FILES, PREDICTIONS_FILE
from phasewatch.errors import RunError
from phasewatch.evaluation.bootstrap import compute_paired_p_value
from phasewatch.evaluation.evaluate import evaluate_run, read_metrics
from phasewatch.evaluation.headline import build_headline, render_headline
from phasewatch.evaluation.metric_table import (
    MetricRow,
    MetricTable,
    NoteCode,
    has_metrics,
    parse_metrics,
    render_metrics,
)
from phasewatch.training.predictions import PROBABILITY_COLUMNS, write_prediction_table


def rows_of(metrics: MetricTable, metric: str, **where: object) -> list[MetricRow]:
    wanted = {
        "fold": "pooled",
        "agent": "off",
        "phase": None,
        "profile": None,
        "host_id": None,
        "sample_name": None,
        **where,
    }
    return [r for r in metrics.metrics if r.metric == metric and all(getattr(r, k) == v for k, v in wanted.items())]


def one(metrics: MetricTable, metric: str, **where: object) -> MetricRow:
    (row,) = rows_of(metrics, metric, **where)
    return row


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetricTable, pa.Table, Path]:
    run = tmp_path_factory.mktemp("score")
    table = write_predictions(run)
    return evaluate_run(run, resamples=500), table, run


def columns(table: pa.Table, **where: object) -> tuple[np.ndarray, np.ndarray]:
    for name, value in where.items():
        table = table.filter(pa.compute.equal(table[name], value))
    return table["y_true"].to_numpy(), table["y_pred"].to_numpy()


@pytest.mark.parametrize(
    ("where", "n_tested"),
    [
        pytest.param({}, 2, id="over all"),
        pytest.param({"profile": "benign"}, 0, id="one profile"),
        pytest.param({"host_id": "host-1"}, 2, id="one host"),
    ],
)
def test_scores_equal_scikit_learn(
    scored: tuple[MetricTable, pa.Table, Path], where: dict[str, str], n_tested: int
) -> None:
    from sklearn.metrics import f1_score

    metrics, table, _ = scored
    y, decided = columns(table, model="gbt", agent="off", **where)
    k = np.unique(y)
    state = np.array([0, 0, 1, 2, 0])

    macro = one(metrics, "macro_f1", model="gbt", seed="mean", **where)
    three = one(metrics, "macro_f1_3class", model="gbt", seed="mean", **where)
    f1 = one(metrics, "f1", model="gbt", phase="active", **where)

    assert macro.value == pytest.approx(f1_score(y, decided, labels=k, average="macro", zero_division=0))
    assert three.value == pytest.approx(f1_score(state[y], state[decided], labels=[0, 1, 2], average="macro"))
    assert f1.value == pytest.approx(f1_score(y, decided, labels=[3], average=None)[0])
    assert macro.n_windows == len(y)
    assert (macro.n_profiles_tested, macro.n_profiles) == (n_tested, 6)


def test_pooled_confusion_counts_each_episode_once(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    from sklearn.metrics import confusion_matrix

    metrics, table, _ = scored
    y, decided = columns(table, model="gbt", agent="off")
    rows = [r for r in metrics.metrics if (r.metric, r.model, r.fold, r.agent) == ("confusion", "gbt", "pooled", "off")]

    assert [r.value for r in rows] == confusion_matrix(y, decided, labels=range(5)).ravel().tolist()
    assert (rows[1].phase, rows[1].bin) == ("clean", 1.0)


def test_intervals_hold_their_value_and_rest_on_sessions(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    row = one(scored[0], "macro_f1", model="gbt", seed="mean")

    assert row.low is not None and row.low < row.value < row.high  # noqa: PT018
    assert (row.n_episodes, row.n_sessions, row.n_hosts) == (9, 9, 3)


def test_each_fold_has_its_own_board(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    metrics, table, _ = scored
    y, _ = columns(table, model="gbt", agent="off", fold="host-1")
    row = one(metrics, "macro_f1", model="gbt", seed="mean", fold="host-1")

    assert row.n_hosts == 1
    assert row.code is NoteCode.TOO_FEW_SESSIONS
    assert row.value is not None
    assert row.low is None
    assert len(y) == row.n_windows == 45


def test_a_gap_is_paired_and_signed(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    metrics = scored[0]
    gap = one(metrics, "macro_f1_gap", model="gbt", compared_to="elapsed_time")
    of = {m: one(metrics, "macro_f1", model=m, seed="mean").value for m in SKILL}

    assert gap.value == pytest.approx(of["gbt"] - of["elapsed_time"])
    assert gap.low > 0
    assert gap.p == pytest.approx(
        compute_paired_p_value(np.ones(500), sessions=9, hosts=3)
    )  # all 500 resamples are above 0
    assert gap.p_holm == pytest.approx(2 * gap.p)  # gbt against two baselines, which are not tested against each other


def test_two_baselines_have_a_p_of_their_own_and_are_in_no_family(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    metrics = scored[0]
    gaps = [
        r
        for r in metrics.metrics
        if r.metric == "macro_f1_gap" and {r.model, r.compared_to} == {"majority", "elapsed_time"}
    ]

    assert gaps
    assert all(r.p is not None and r.p_holm is None for r in gaps if r.low is not None)


def test_a_p_below_five_percent_stands_beside_no_interval_that_holds_zero(
    scored: tuple[MetricTable, pa.Table, Path],
) -> None:
    tested = [r for r in scored[0].metrics if r.p is not None and r.low is not None and r.high is not None]

    assert tested
    assert all(r.low > 0 or r.high < 0 for r in tested if r.p < 0.05)


def test_every_number_has_an_interval_or_a_reason(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    assert not [r for r in scored[0].metrics if r.value is not None and r.low is None and not r.note]


def test_calibration_rows_are_those_of_the_measures(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    from sklearn.metrics import brier_score_loss

    metrics, table, _ = scored
    own = table.filter(
        pa.compute.and_(pa.compute.equal(table["model"], "gbt"), pa.compute.equal(table["agent"], "off"))
    )
    p = np.column_stack([own[n].to_numpy().astype(float) for n in PROBABILITY_COLUMNS])
    row = one(metrics, "brier", model="gbt")

    truth = np.eye(5)[own["y_true"].to_numpy()]
    assert row.value == pytest.approx(
        brier_score_loss(truth.argmax(1), p / p.sum(1, keepdims=True), labels=range(5), scale_by_half=False), abs=1e-6
    )
    assert row.low < row.value < row.high


def test_what_is_untested_is_listed(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(phases=4))
    metrics = evaluate_run(tmp_path, resamples=100)

    assert [
        r.phase for r in metrics.metrics if r.metric == "untested_phase" and (r.fold, r.agent) == ("pooled", "off")
    ] == ["dormant"]
    assert {
        r.profile for r in metrics.metrics if r.metric == "untested_profile" and (r.fold, r.agent) == ("pooled", "off")
    } == set(MALICIOUS[2:])


def test_a_model_that_is_not_above_elapsed_time_is_said_so_in_words(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(skill=(("gbt", 0.3), ("elapsed_time", 0.3))))
    notes = [r.note for r in rows_of(evaluate_run(tmp_path, resamples=200), "note", model="gbt")]

    assert any(re.match(r"gbt is not above elapsed time alone: gap [+-]0\.\d\d", w) for w in notes)


def test_without_an_interval_a_model_is_not_called_below_the_clock(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(hosts=2, sessions=2, agents=("off",)))
    notes = [str(r.note) for r in rows_of(evaluate_run(tmp_path, resamples=100), "note", model="gbt")]

    assert any(
        re.match(r"gbt cannot be said to be above elapsed time alone: gap \+0\.\d\d \(no interval, 4 sessions", w)
        for w in notes
    )
    assert not any("is not above" in w for w in notes)


def test_a_model_of_the_users_own_is_held_against_elapsed_time_too(tmp_path: Path) -> None:
    own = "forest:Forest"  # no row of the registry: it stands behind the baselines, and its gap counts from the clock
    write_predictions(tmp_path, Shape(skill=(("gbt", 0.9), ("elapsed_time", 0.3), (own, 0.0)), agents=("off",)))
    metrics = evaluate_run(tmp_path, resamples=200)
    told = [r for r in metrics.metrics if r.metric == "note" and r.compared_to == "elapsed_time" and r.fold == "pooled"]
    gap = one(metrics, "macro_f1_gap", model="elapsed_time", compared_to=own)

    assert {r.model for r in told} == {own}
    assert gap.value > 0
    assert f"gap -{gap.value:.2f} ([-{gap.high:.2f}, " in str(told[0].note)


def test_the_headline_has_its_form(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    number = r"0\.\d\d \[0\.\d\d, 0\.\d\d\]"

    assert re.fullmatch(
        r"infections alarmed within 30 s, unseen host \(unseen host and sample not tested\): untested at untested "
        rf"false alarms per VM-hour; macro-F1 3 classes {number}, 5 phases {number}; a new host \d\.\d\d to \d\.\d\d; "
        r"idle called clean untested; time alone 0\.\d\d, load alone untested "
        r"\(9 episodes, 3 hosts, 2 of 6 profiles, 1 seed\)",
        render_headline(build_headline(scored[0])),
    )


def test_the_headline_says_that_episodes_are_simulated_and_counts_seeds(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(origin="simulated", seeds=(0, 1)))

    assert render_headline(build_headline(evaluate_run(tmp_path, resamples=100))).endswith("2 seeds) [simulated]")


def test_without_a_test_episode_whose_agent_is_off_there_is_no_number(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(agents=("on",)))

    headline = build_headline(evaluate_run(tmp_path, resamples=100))

    assert headline.macro_f1.value is None
    assert "5 phases untested" in render_headline(headline)


def test_with_too_few_sessions_the_headline_says_why_there_is_no_interval(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(hosts=2, sessions=2, agents=("off",)))

    assert "[no interval: 4 sessions, an interval needs 5]" in render_headline(
        build_headline(evaluate_run(tmp_path, resamples=100))
    )


def test_seeds_are_averaged(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(seeds=(0, 1)))
    metrics = evaluate_run(tmp_path, resamples=100)
    each = [one(metrics, "macro_f1", model="gbt", seed=s).value for s in (0, 1)]

    assert one(metrics, "macro_f1", model="gbt", seed="mean").value == pytest.approx(np.mean(each))


def test_a_model_of_one_fold_is_on_no_pooled_board(tmp_path: Path) -> None:
    table = write_predictions(tmp_path)
    drop = pa.compute.and_(pa.compute.equal(table["model"], "majority"), pa.compute.not_equal(table["fold"], "host-0"))
    write_prediction_table(tmp_path / PREDICTIONS_FILE, [table.filter(pa.compute.invert(drop))])
    metrics = evaluate_run(tmp_path, resamples=100)

    assert not rows_of(metrics, "macro_f1", model="majority")
    assert rows_of(metrics, "macro_f1", model="majority", fold="host-0")


def test_models_that_saw_other_truths_are_refused(tmp_path: Path) -> None:
    table = write_predictions(tmp_path)
    truth = np.where(np.array(table["model"].to_pylist()) == "majority", 0, table["y_true"].to_numpy()).astype(np.int8)
    write_prediction_table(
        tmp_path / PREDICTIONS_FILE,
        [table.set_column(table.schema.get_field_index("y_true"), "y_true", pa.array(truth))],
    )

    with pytest.raises(RunError, match=r"majority \(seed 0\) and gbt were scored on different windows"):
        evaluate_run(tmp_path, resamples=10)


def test_the_same_predictions_give_the_same_bytes_in_any_order(
    scored: tuple[MetricTable, pa.Table, Path], tmp_path: Path
) -> None:
    metrics, table, run = scored
    order = np.random.default_rng(0).permutation(table.num_rows)
    write_prediction_table(tmp_path / PREDICTIONS_FILE, [table.take(pa.array(order))])

    assert evaluate_run(tmp_path, resamples=500).metrics == metrics.metrics
    assert (run / "metrics_v3.json").read_bytes() == render_metrics(evaluate_run(run, resamples=500))


def test_the_file_names_its_inputs_and_every_row_has_every_field(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    metrics, _, run = scored
    raw = msgspec.json.decode((run / "metrics_v3.json").read_bytes())

    assert list(raw) == ["inputs", "metrics"]
    assert list(raw["inputs"]) == [PREDICTIONS_FILE]
    assert list(raw["metrics"][0]) == [
        "metric",
        "recipe",
        "fold",
        "channel_set",
        "model",
        "input",
        "smoothing",
        "seed",
        "agent",
        "class",
        "profile",
        "host_id",
        "sample_name",
        "compared_to",
        "p",
        "p_holm",
        "bin",
        "value",
        "low",
        "high",
        "note",
        "code",
        "unit",
        "n_windows",
        "n_episodes",
        "n_sessions",
        "n_hosts",
        "n_profiles_tested",
        "n_profiles",
    ]
    assert read_metrics(run) == metrics


def test_a_file_that_is_no_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"m\.json: not a metrics file"):
        parse_metrics(b"{}", file="m.json")
    with pytest.raises(RunError, match=r"metrics_v3\.json: absent; make it with `phasewatch evaluate"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("name", OLD_METRICS_FILES)
def test_a_run_with_only_an_old_metrics_file_is_refused_with_the_command_that_helps(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")

    assert has_metrics(tmp_path)
    with pytest.raises(RunError, match=r"older version, expected metrics_v3\.json; make it with `phasewatch evaluate"):
        read_metrics(tmp_path)


def test_every_note_has_a_code(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    assert all((r.note is None) == (r.code is None) for r in scored[0].metrics)


def test_select_matches_values_sets_and_overall_rows(scored: tuple[MetricTable, pa.Table, Path]) -> None:
    metrics = scored[0]

    assert {r.metric for r in metrics.select(fold="pooled", metric="ece")} == {"ece"}
    assert {r.agent for r in metrics.select("macro_f1", agent={"off", None})} == {"off", None}
    assert all(r.host_id is r.profile is r.phase is None for r in metrics.select("macro_f1", overall=True))
    with pytest.raises(AttributeError):
        metrics.select(colour="red")
