"""Shortcuts that a corpus teaches: models that read only a load or its duration are caught, an honest one is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from phasewatch.artifacts import RunEpisode
from phasewatch.audit.checks import AuditCheck, AuditReport, AuditRow, AuditSubject, CheckOutcome
from phasewatch.audit.shortcut_checks import (
    RunPredictions,
    build_idle_check,
    build_load_check,
    build_splice_check,
    list_subjects,
)
from phasewatch.audit.shortcuts import (
    AnsweredWindows,
    SpliceGroup,
    Stratum,
    compute_auc,
    measure_idle,
    measure_load_gaps,
    measure_splices,
)
from phasewatch.evaluation.metric_table import HeadlineKey
from phasewatch.training.experiment import Experiment
from phasewatch.types import EpisodeOrigin, EpisodeRole, SampleKind

SUBJECT = AuditSubject(recipe="held_out_host", channel_set="realistic", model="gbt", input="context")
KEY = HeadlineKey(recipe="held_out_host", model="gbt", input="raw")
CLEAN, ARMED, INFECTING, ACTIVE, DORMANT = range(5)
HOSTS, SESSIONS = 4, 6
STRIDE_S = 5.0

# How long a load or an activity lasts in each group, seconds: what the corpus teaches, and what splices exchange.
LASTS_S = {
    SpliceGroup.REAL_ACTIVITY: 40.0,
    SpliceGroup.REAL_LOAD: 150.0,
    SpliceGroup.SHORT_ACTIVITY: 40.0,
    SpliceGroup.SHORT_LOAD: 40.0,
    SpliceGroup.LONG_ACTIVITY: 150.0,
}
IS_ACTIVE = {group: "activity" in group for group in SpliceGroup}


def row_of(rows: tuple[AuditRow, ...], metric: str, **columns: object) -> AuditRow:
    (row,) = [r for r in rows if r.metric == metric and all(getattr(r, k) == v for k, v in columns.items())]
    return row


def one_hot(codes: np.ndarray, sure: float = 0.8) -> np.ndarray:
    """Return probabilities of which one phase is likely: ``(n,)`` → ``(n, 5)``."""
    p = np.full((len(codes), 5), (1 - sure) / 4)
    p[np.arange(len(codes)), codes] = sure
    return p


def spliced(decide: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]) -> AnsweredWindows:
    """Return real and counterfactual windows, decided by a rule that sees how long a load has lasted, and its content.

    The content is 1 where an activity runs, told with noise.
    """
    rng = np.random.default_rng(0)
    parts = []
    for host in range(HOSTS):
        for session in range(SESSIONS):
            for group, lasts_s in LASTS_S.items():
                since_s = np.arange(10.0, lasts_s, STRIDE_S)
                n, active = len(since_s), IS_ACTIVE[group]
                content = np.full(n, float(active)) + rng.normal(scale=0.6) + rng.normal(scale=0.3, size=n)
                parts.append(
                    AnsweredWindows(
                        host=np.full(n, f"h{host}", object),
                        session=np.full(n, f"s{session}", object),
                        episode=np.full(n, f"e{host}{session}{active:d}", object),
                        y=np.full(n, ACTIVE if active else CLEAN),
                        p=decide(since_s, content, rng),
                        group=np.full(n, str(group), object),
                    )
                )
    return AnsweredWindows.concatenate(parts)


def reads_duration(since_s: np.ndarray, content: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A load is activity only as long as it has lasted less than 45 s."""
    return one_hot(np.where(since_s < 45.0, ACTIVE, CLEAN))


def reads_content(since_s: np.ndarray, content: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The clearer the content of an activity, the surer."""
    p = np.zeros((len(content), 5))
    p[:, ACTIVE] = 1 / (1 + np.exp(-4 * (content - 0.5)))
    p[:, CLEAN] = 1 - p[:, ACTIVE]
    return p


def test_a_model_that_takes_what_lasts_for_benign_is_caught() -> None:
    rows = measure_splices(SUBJECT, spliced(reads_duration), is_headline=True)

    assert row_of(rows, "splice_auc_real").value == pytest.approx(0.9, abs=0.1)
    assert row_of(rows, "splice_auc_counterfactual").value == pytest.approx(0.5)
    assert row_of(rows, "splice_auc_change").holds is False
    assert row_of(rows, "splice_recall_change").holds is False
    assert row_of(rows, "splice_false_activity_change").value > 0.5


def test_a_model_that_reads_the_content_is_not_accused() -> None:
    rows = measure_splices(SUBJECT, spliced(reads_content), is_headline=True)

    assert row_of(rows, "splice_auc_real").value > 0.8
    assert row_of(rows, "splice_auc_change").holds is True
    assert row_of(rows, "splice_recall_change").holds is True
    assert row_of(rows, "splice_auc_change").n_sessions == HOSTS * SESSIONS


def test_a_fall_that_chance_explains_is_not_held_against_a_model() -> None:
    windows = spliced(reads_content)
    few = windows.select(np.isin(windows.host, ["h0"]) & np.isin(windows.session, ["s0", "s1", "s2", "s3", "s4"]))
    noisy = few.select(np.ones(len(few), np.bool_))
    one_session = (noisy.session == "s0") & (noisy.group == "short_activity")
    noisy.p[one_session] = noisy.p[one_session][:, ::-1]

    row = row_of(measure_splices(SUBJECT, noisy, is_headline=True), "splice_auc_change")

    assert row.value > 0.05
    assert row.low < 0 < row.high
    assert row.holds is True


def test_too_few_sessions_leave_the_splices_untested() -> None:
    windows = spliced(reads_duration)
    two = windows.select(np.isin(windows.host, ["h0"]) & np.isin(windows.session, ["s0", "s1"]))

    row = row_of(measure_splices(SUBJECT, two, is_headline=True), "splice_auc_change")

    assert row.holds is None
    assert "2 sessions" in row.note


@pytest.mark.parametrize("seed", range(4))
def test_the_area_is_that_of_scikit_learn(seed: int) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    truth, score = rng.random(200) < 0.3, rng.integers(0, 12, 200) / 11

    assert compute_auc(score, truth, ~truth) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)


def test_the_interval_of_the_area_is_that_of_a_bootstrap_by_hand() -> None:
    """Sessions drawn within hosts, the windows of each copied as often as it was drawn, scikit-learn's area of them."""
    from sklearn.metrics import roc_auc_score

    windows = spliced(reads_content)
    kept = windows.select(np.isin(windows.group, ["real_activity", "real_load"]))
    sessions = np.array([f"{h}/{s}" for h, s in zip(kept.host, kept.session, strict=True)])
    rng = np.random.default_rng(5)
    areas = []
    for _ in range(400):
        rows: list[np.ndarray] = []
        for host in range(HOSTS):
            names = [f"h{host}/s{session}" for session in range(SESSIONS)]
            rows += [np.flatnonzero(sessions == name) for name in rng.choice(names, SESSIONS)]
        at = np.concatenate(rows)
        areas.append(roc_auc_score(kept.y[at] == ACTIVE, kept.p[at, ACTIVE]))

    row = row_of(measure_splices(SUBJECT, windows, is_headline=True), "splice_auc_real")

    # The audit's interval is wider by the expansion for few sessions (ADR 16).
    assert row.low == pytest.approx(np.percentile(areas, 2.5), abs=0.03)
    assert row.high == pytest.approx(np.percentile(areas, 97.5), abs=0.03)


def episodes_under_load(rng: np.random.Generator) -> tuple[AnsweredWindows, dict[str, np.ndarray]]:
    """Return windows of clean and malicious episodes with and without a load, and what each kind of model decides."""
    parts, decided = [], {"honest": [], "load": [], "time": []}
    for host in range(HOSTS):
        for session in range(SESSIONS):
            for malicious in (False, True):
                for has_load in (False, True):
                    n = 20
                    y = rng.integers(0, 5, 4).repeat(5) if malicious else np.zeros(n, np.int64)
                    parts.append(
                        AnsweredWindows(
                            host=np.full(n, f"h{host}", object),
                            session=np.full(n, f"s{session}", object),
                            episode=np.full(n, f"e{host}{session}{malicious:d}{has_load:d}", object),
                            y=y,
                            p=np.zeros((n, 5)),
                            group=np.full(n, Stratum.WITH_LOAD if has_load else Stratum.WITHOUT_LOAD, object),
                        )
                    )
                    wrong = rng.random(n) < 0.3
                    decided["honest"].append(np.where(wrong, rng.integers(0, 5, n), y))
                    decided["load"].append(np.full(n, CLEAN if has_load else ARMED))
                    decided["time"].append(np.full(n, CLEAN))
    return AnsweredWindows.concatenate(parts), {name: np.concatenate(parts) for name, parts in decided.items()}


def test_a_model_that_reads_only_whether_a_load_runs_is_not_above_the_rule_that_does() -> None:
    windows, decided = episodes_under_load(np.random.default_rng(1))
    baselines = {"load_only": [decided["load"]], "elapsed_time": [decided["time"]]}

    rows = measure_load_gaps(SUBJECT, windows, [decided["load"]], baselines, is_headline=True)

    assert row_of(rows, "macro_f1_gap", compared_to="load_only").value == 0.0
    assert row_of(rows, "macro_f1_gap", compared_to="load_only").holds is False
    assert row_of(rows, "macro_f1_3class_gap", compared_to="load_only", stratum="with_load").holds is False


def test_an_honest_model_is_above_every_rule_in_every_stratum() -> None:
    windows, decided = episodes_under_load(np.random.default_rng(1))
    baselines = {"load_only": [decided["load"]], "elapsed_time": [decided["time"]]}

    rows = measure_load_gaps(SUBJECT, windows, [decided["honest"]], baselines, is_headline=True)

    assert {row.holds for row in rows} == {True}
    assert {(row.metric, row.stratum) for row in rows} == {
        ("macro_f1_gap", None),
        ("macro_f1_3class_gap", "with_load"),
        ("macro_f1_3class_gap", "without_load"),
    }


def idle_windows(decided: int) -> AnsweredWindows:
    n = HOSTS * SESSIONS * 10
    at = np.arange(n) // 10
    return AnsweredWindows(
        host=np.array([f"h{i // SESSIONS}" for i in at], object),
        session=np.array([f"s{i % SESSIONS}" for i in at], object),
        episode=np.array([f"e{i}" for i in at], object),
        y=np.zeros(n, np.int64),
        p=one_hot(np.full(n, decided)),
        group=np.full(n, "", object),
    )


@pytest.mark.parametrize(
    ("decided", "quiet", "clean"),
    [(CLEAN, True, True), (ARMED, True, False), (DORMANT, True, False), (INFECTING, False, False)],
)
def test_idle_machines_are_to_be_called_quiet_and_clean(decided: int, quiet: bool, clean: bool) -> None:
    rows = measure_idle(SUBJECT, idle_windows(decided), is_headline=True)

    assert row_of(rows, "idle_called_quiet").holds is quiet
    assert row_of(rows, "idle_called_clean").holds is clean


# The checks of a run: which model decides, and what a reader is told.


def run_predictions(
    parts: dict[tuple[str, str, str], AnsweredWindows], *, recipe: str = "held_out_host"
) -> RunPredictions:
    """Return predictions by model, input and part, all of one fold a host."""
    texts: dict[str, list[object]] = {
        name: []
        for name in (
            "recipe", "fold", "model", "table", "part", "agent", "episode_id", "session", "host_id", "profile",
            "sample_name",
        )
    }  # fmt: skip
    t, y, p = [], [], []
    for (model, table, part), windows in parts.items():
        n = len(windows)
        for name, values in {
            "recipe": [recipe] * n, "fold": windows.host.tolist(), "model": [model] * n, "table": [table] * n,
            "part": [part] * n, "agent": ["off"] * n, "episode_id": windows.episode.tolist(),
            "session": windows.session.tolist(), "host_id": windows.host.tolist(), "profile": ["benign"] * n,
            "sample_name": ["idle" if part == "idle" else "render"] * n,
        }.items():  # fmt: skip
            texts[name] += values
        t.append(np.arange(n) * 5_000_000_000)
        y.append(windows.y)
        p.append(windows.p)
    n = sum(map(len, y))
    return RunPredictions(
        texts={name: np.array(values, object) for name, values in texts.items()},
        seed=np.zeros(n, np.int64),
        t_center_ns=np.concatenate(t),
        y=np.concatenate(y),
        purity=np.ones(n, np.float32),
        p=np.concatenate(p),
    )


def with_p(windows: AnsweredWindows, p: np.ndarray) -> AnsweredWindows:
    return AnsweredWindows(
        **{n: p if n == "p" else getattr(windows, n) for n in ("host", "session", "episode", "y", "p", "group")}
    )


def run_episode(episode_id: str, host_id: str, session: str) -> RunEpisode:
    return RunEpisode(
        episode_id=episode_id, host_id=host_id, profile="benign", sample_name="render", sample_kind=SampleKind.BENIGN,
        origin=EpisodeOrigin.RECORDED, role=EpisodeRole.LAB, session=session, agent=False, plan_seed=0, proc_sketch=(),
        started_wall_ns=0, duration_s=100.0,
    )  # fmt: skip


def check_of(decide: Callable[..., np.ndarray], model: str = "gbt") -> AuditCheck:
    """Return the splice check of a run with one model, whose counterfactual answers follow the same rule."""
    windows = spliced(decide)
    is_real = np.array([group.startswith("real") for group in windows.group])
    real, counterfactual = windows.select(is_real), windows.select(~is_real)
    ids = zip(windows.episode.tolist(), windows.host.tolist(), windows.session.tolist(), strict=True)
    episodes = {i: run_episode(i, host, session) for i, host, session in ids}

    def answers(experiment: Experiment, asked: object) -> AnsweredWindows:
        return counterfactual.select(counterfactual.host == experiment.fold)

    return build_splice_check(run_predictions({(model, "raw", "test"): real}), episodes, KEY, answers)


def test_the_splice_check_fails_a_headline_that_reads_duration() -> None:
    check = check_of(reads_duration)

    assert check.fate is CheckOutcome.BROKEN
    assert not AuditReport(inputs={}, checks=(check,)).passes


def test_the_splice_check_passes_an_honest_headline() -> None:
    check = check_of(reads_content)

    assert check.fate is CheckOutcome.KEPT
    assert len(check.rows) == 9


def test_another_model_that_reads_duration_is_shown_and_takes_no_headline() -> None:
    check = check_of(reads_duration, model="gru")

    assert check.fate is CheckOutcome.UNTESTED
    assert row_of(check.rows, "splice_auc_change").holds is False
    assert "gru (raw) fail" in check.words


def load_check(decided: np.ndarray, windows: AnsweredWindows, *, knows_load: bool) -> AuditCheck:
    always_clean = np.zeros(len(windows), np.int64)
    of_model = {
        "gbt": decided,
        "load_only": np.where(windows.group == str(Stratum.WITH_LOAD), CLEAN, ARMED),
        "duration_only": always_clean,
        "elapsed_time": always_clean,
    }
    predictions = run_predictions(
        {(model, "raw", "test"): with_p(windows, one_hot(codes)) for model, codes in of_model.items()}
    )
    loads = dict(zip(windows.episode.tolist(), (windows.group == str(Stratum.WITH_LOAD)).tolist(), strict=True))
    return build_load_check(predictions, {i: loads[i] if knows_load else None for i in loads}, KEY)


def test_the_load_check_fails_a_headline_that_reads_only_the_load() -> None:
    windows, decided = episodes_under_load(np.random.default_rng(1))

    assert load_check(decided["load"], windows, knows_load=True).fate is CheckOutcome.BROKEN


def test_the_load_check_passes_an_honest_headline() -> None:
    windows, decided = episodes_under_load(np.random.default_rng(1))

    check = load_check(decided["honest"], windows, knows_load=True)

    assert check.fate is CheckOutcome.KEPT
    assert len(check.rows) == 9


def test_a_run_that_does_not_know_its_loads_leaves_the_strata_untested() -> None:
    windows, decided = episodes_under_load(np.random.default_rng(1))

    check = load_check(decided["honest"], windows, knows_load=False)

    assert check.fate is CheckOutcome.UNTESTED
    assert "does not know which windows had a load" in check.words


def idle_report(decided: int) -> AuditReport:
    test, idle = idle_windows(CLEAN), idle_windows(decided)
    predictions = run_predictions({("gbt", "raw", "test"): test, ("gbt", "raw", "idle"): idle})
    return AuditReport(inputs={}, checks=(build_idle_check(predictions, KEY),))


def test_a_headline_that_calls_idle_machines_infecting_fails() -> None:
    assert not idle_report(INFECTING).passes


def test_a_headline_that_calls_idle_machines_armed_loses_its_five_phases_only() -> None:
    report = idle_report(ARMED)

    assert report.passes
    assert report.withdraws_five_phases
    assert "five-phase scores are withdrawn" in report.checks[0].words


def test_a_headline_that_calls_idle_machines_clean_loses_nothing() -> None:
    report = idle_report(CLEAN)

    assert report.passes
    assert not report.withdraws_five_phases


def test_a_run_without_idle_windows_is_untested() -> None:
    check = build_idle_check(run_predictions({("gbt", "raw", "test"): idle_windows(CLEAN)}), KEY)

    assert check.fate is CheckOutcome.UNTESTED


def test_models_are_asked_on_the_harder_recipe_and_baselines_are_not_asked() -> None:
    windows = idle_windows(CLEAN)
    predictions = run_predictions(
        {(name, "raw", "test"): windows for name in ("gru", "gbt", "majority", "elapsed_time")}, recipe="held_out_both"
    )

    assert [(s.model, s.recipe) for s in list_subjects(predictions, KEY)] == [
        ("gbt", "held_out_both"),
        ("gru", "held_out_both"),
    ]
