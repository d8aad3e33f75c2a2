"""Idle clean machines and load strata, on episodes small enough to count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from phasewatch.artifacts import RunEpisode
from phasewatch.evaluation.idle import build_idle_rows, build_load_rows
from phasewatch.evaluation.metric_table import NoteCode
from phasewatch.evaluation.predictions import ModelPredictions, PredictionGroup
from phasewatch.evaluation.scoring import (
    EvaluationSettings,
    EvaluationWindows,
    MetricKey,
    ModelOutput,
    PredictionSet,
    build_scoring_set,
)
from phasewatch.types import EpisodeOrigin, EpisodeRole, SampleKind

RULES = EvaluationSettings(malicious=("cryptomine",), profiles=("benign", "cryptomine"), resamples=300)
KEY = MetricKey(
    recipe="held_out_host", fold="pooled", channel_set="realistic", input="raw", smoothing="none", agent="off"
)


def meta(name: str, host: str, *, sample: str = "idle", profile: str = "benign", background: str | None = None):  # type: ignore[no-untyped-def]
    return RunEpisode(
        episode_id=name,
        host_id=host,
        profile=profile,
        sample_name=sample,
        sample_kind=SampleKind.BENIGN,
        origin=EpisodeOrigin.RECORDED,
        role=EpisodeRole.LAB,
        session=name,
        agent=False,
        plan_seed=0,
        proc_sketch=(),
        started_wall_ns=0,
        duration_s=60.0,
        background=background,
    )


def predict(fold: str, decided: dict[str, list[int]], episodes: dict[str, RunEpisode], y: int = 0) -> ModelPredictions:
    ids = [i for i, codes in decided.items() for _ in codes]
    codes = np.array([c for own in decided.values() for c in own])
    texts = {
        "episode_id": ids,
        "session": ids,
        "host_id": [episodes[i].host_id for i in ids],
        "profile": [episodes[i].profile for i in ids],
        "sample_name": [episodes[i].sample_name for i in ids],
        "origin": ["recorded"] * len(ids),
        "agent": ["off"] * len(ids),
    }
    return ModelPredictions(
        model="gbt",
        seed=0,
        fold=fold,
        windows=EvaluationWindows(
            **{name: np.array(values, dtype=object) for name, values in texts.items()},
            t_center_ns=np.arange(len(ids)) * 5 * 10**9,
            y_true=np.full(len(ids), y),
        ),
        output=ModelOutput(model="gbt", seed=0, probabilities=np.eye(5)[codes], y_pred=codes),
    )


def group(*predictions: ModelPredictions) -> PredictionGroup:
    return PredictionGroup(
        recipe="held_out_host", threat="realistic", table="raw", filter="none", predictions=predictions, refused=()
    )


@pytest.mark.parametrize(
    ("episode", "load"),
    [
        pytest.param(meta("a", "h"), False, id="idle"),
        pytest.param(meta("a", "h", sample="compile"), True, id="a benign load"),
        pytest.param(meta("a", "h", profile="cryptomine", background=""), False, id="malware alone"),
        pytest.param(meta("a", "h", profile="cryptomine", background="compile"), True, id="malware beside a load"),
        pytest.param(meta("a", "h", profile="cryptomine"), None, id="malware, an index that does not say"),
    ],
)
def test_load_of_an_episode(episode: RunEpisode, load: bool | None) -> None:
    assert episode.has_load is load


def test_only_idle_windows_of_the_folds_own_hosts_count() -> None:
    episodes = {
        e.episode_id: e
        for e in (meta("i1", "h1"), meta("i2", "h2"), meta("busy", "h1", sample="compile"), meta("soak1", "h1"))
    }
    test = group(predict("h1", {"i1": [0, 1], "busy": [3, 3]}, episodes), predict("h2", {"i2": [0, 0]}, episodes))
    # The fold h2 learnt from h1, so its word on that host's idle windows does not count.
    soak = group(predict("h1", {"soak1": [4, 3], "i2": [3]}, episodes), predict("h2", {"soak1": [3, 3]}, episodes))

    rows = {r.metric: r for r in build_idle_rows(test, [soak], episodes, RULES, agent="off")}

    assert rows["idle_called_clean"].value == pytest.approx(3 / 6)  # clean, armed; clean, clean; dormant, active
    assert rows["idle_called_quiet"].value == pytest.approx(5 / 6)
    assert (rows["idle_called_clean"].n_windows, rows["idle_called_clean"].n_hosts) == (6, 2)
    assert rows["idle_called_clean"].code is NoteCode.TOO_FEW_SESSIONS


def test_without_idle_windows_there_is_a_coded_note() -> None:
    episodes = {"busy": meta("busy", "h1", sample="compile")}

    (row,) = build_idle_rows(group(predict("h1", {"busy": [0]}, episodes)), [], episodes, RULES, agent="off")

    assert (row.value, row.code) == (None, NoteCode.NO_IDLE_WINDOWS)


def test_interval_resamples_sessions() -> None:
    episodes = {f"{h}{i}": meta(f"{h}{i}", h) for h in ("h1", "h2") for i in range(6)}
    parts = [
        predict(h, {f"{h}{i}": [0, 0, 1] if i % 2 else [1, 1, 1] for i in range(6)}, episodes) for h in ("h1", "h2")
    ]

    rows = list(build_idle_rows(group(*parts), [], episodes, RULES, agent="off"))

    assert rows[0].value == pytest.approx(1 / 3)
    assert rows[0].low < 1 / 3 < rows[0].high
    assert rows[1].code is NoteCode.NO_SPREAD  # every window is called quiet


def test_scores_with_and_without_load_are_those_of_their_own_windows() -> None:
    rng = np.random.default_rng(0)
    episodes = {
        f"e{i}": replace(meta(f"e{i}", f"h{i % 2}", profile="cryptomine"), background=("", "compile", None)[i % 3])
        for i in range(24)
    }
    ids = np.repeat(np.array(list(episodes), dtype=object), 10)
    y, decided = rng.integers(0, 5, len(ids)), rng.integers(0, 5, len(ids))
    windows = EvaluationWindows(
        episode_id=ids,
        session=ids,
        host_id=np.array([episodes[i].host_id for i in ids], dtype=object),
        profile=np.full(len(ids), "cryptomine", dtype=object),
        sample_name=np.full(len(ids), "x", dtype=object),
        origin=np.full(len(ids), "recorded", dtype=object),
        agent=np.full(len(ids), "off", dtype=object),
        t_center_ns=np.arange(len(ids)),
        y_true=y,
    )
    output = ModelOutput(model="gbt", seed=0, probabilities=np.eye(5)[decided], y_pred=decided)
    scope = build_scoring_set(PredictionSet(windows=windows, outputs=(output,)), RULES)

    rows = {r.metric: r for r in build_load_rows(KEY, scope, episodes)}

    loads = np.array([episodes[i].has_load for i in ids], dtype=object)
    for ending, load in (("with_load", True), ("without_load", False)):
        own = np.array([known is load for known in loads])
        row = rows[f"macro_f1_{ending}"]
        assert row.value == pytest.approx(f1_score(y[own], decided[own], average="macro"))
        assert row.low < row.value < row.high
        assert row.n_episodes == 8


def test_episodes_of_unknown_load_are_in_no_stratum() -> None:
    episodes = {"e0": meta("e0", "h1", profile="cryptomine")}
    scope = build_scoring_set(
        PredictionSet(
            windows=predict("h1", {"e0": [0, 1]}, episodes).windows,
            outputs=(predict("h1", {"e0": [0, 1]}, episodes).output,),
        ),
        RULES,
    )

    assert {r.code for r in build_load_rows(KEY, scope, episodes)} == {NoteCode.UNKNOWN_LOAD}
