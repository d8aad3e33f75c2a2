"""Compare each malicious sample with its declared benign twin, by the predictions of a run.

A twin is a benign kind that does the same as the sample seen from outside. Windows of the sample's active phase are
ranked against windows of benign episodes in which the twin ran, by the activity score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from phasewatch.artifacts import PREDICTIONS_FILE, VALIDATION_FILE, open_run_parquet
from phasewatch.bundle.archive import unpack_manifest
from phasewatch.channels import SENSOR_SETS
from phasewatch.errors import UsageError
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.comparisons import needs_agent
from phasewatch.evaluation.metric_table import NoteCode
from phasewatch.evaluation.predictions import parse_prediction_groups
from phasewatch.evaluation.ranking import compute_ranking
from phasewatch.evaluation.scoring import (
    EvaluationSettings,
    PredictionSet,
    build_interval,
    build_scoring_set,
    score_models,
    select_resamples,
)
from phasewatch.models.alarm import AlarmKind, compute_alarm_score
from phasewatch.profiles import PROFILES, find_sample
from phasewatch.training.predictions import NO_FILTER, read_predictions
from phasewatch.types import BENIGN_PROFILE, EpisodeRole, Phase, SampleKind

__all__ = ["TWIN_CHANNEL_SETS", "TwinPair", "TwinReport", "compare_twins", "read_load_spans"]

TWIN_CHANNEL_SETS = ("realistic", "extended", *(f"extended-{name}" for name in SENSOR_SETS))
MIN_WINDOWS = 10  # on either side of an AUC
N_DRAWS = 500
_SEED = 0
_CALLED = (Phase.INFECTING.code, Phase.ACTIVE.code)
_WITH, _WITHOUT, _ALL = "samples with a twin", "samples without a twin", "all samples"

LoadSpans = Sequence[tuple[str, int, int]]  # (kind, start, end), Unix time in ns


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinPair:
    """One sample against its twin.

    Attributes:
        n_sample, n_twin: Windows of either side.
        called_sample, called_twin: Share of them that are called infecting or active.
        areas: Channel set → AUC; None with a code.
        code: Why there is no AUC.
    """

    sample: str
    twin: str
    n_sample: int
    n_twin: int
    called_sample: float | None
    called_twin: float | None
    areas: Mapping[str, float | None]
    code: NoteCode | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinReport:
    """The comparison of all pairs.

    Attributes:
        recipe, model: Whose predictions were compared.
        pairs: By sample.
        means: Channel set → mean AUC over the pairs, low and high; ends are None without an interval.
        gaps: Channel set → the same of its difference to `extended`.
        scores: Samples → macro-F1 over three states, low and high, and the number of windows.
    """

    recipe: str
    model: str
    pairs: tuple[TwinPair, ...]
    means: Mapping[str, tuple[float, float | None, float | None]]
    gaps: Mapping[str, tuple[float, float | None, float | None]]
    scores: Mapping[str, tuple[float, float | None, float | None, int]]


def read_load_spans(store: Path, run: Path) -> dict[str, LoadSpans]:
    """Read the benign loads of the lab episodes of a run, by episode id."""
    with open_run_parquet(run / VALIDATION_FILE, "validate") as file:
        rows = file.read(columns=["path", "episode_id", "role"]).to_pylist()
    found: dict[str, LoadSpans] = {}
    for row in rows:
        path = store / row["path"]
        if row["role"] == EpisodeRole.LAB and path.is_file():
            manifest = unpack_manifest(path.read_bytes(), file=row["path"])
            found[row["episode_id"]] = manifest.recording.load if manifest.recording is not None else ()
    return found


def find_twin(profile: str, sample: str) -> str:
    """Return the declared twin of a sample; empty without one, or for a sample that is not registered."""
    try:
        return find_sample(profile, sample).twin
    except UsageError:
        return ""


def compare_twins(
    run: Path, loads: Mapping[str, LoadSpans], *, recipe: str, model: str, input_variant: str = "raw"
) -> TwinReport | None:
    """Compare every sample with its twin under each of `TWIN_CHANNEL_SETS` that the run has.

    Args:
        run: A run with predictions.
        loads: Episode id → its benign loads.
        recipe: Recipe whose test predictions are compared.
        model: Key of the model.
        input_variant: Input of the model.

    Returns:
        The report; None if the run has no such predictions.
    """
    sets = _read_sets(run, recipe, model, input_variant)
    if not sets:
        return None
    home = next(name for name in ("extended", "realistic") if name in sets) if len(sets) > 1 else next(iter(sets))
    windows = sets[home].windows
    kinds = _find_loads(windows.episode_id, windows.t_center_ns, loads)
    names = sorted(set(zip(windows.profile.tolist(), windows.sample_name.tolist(), strict=True)))
    sides = {
        (f"{profile}/{sample}", twin): (
            (windows.profile == profile) & (windows.sample_name == sample) & (windows.y_true == Phase.ACTIVE.code),
            (windows.profile == BENIGN_PROFILE) & (kinds == twin),
        )
        for profile, sample in names
        if profile != BENIGN_PROFILE and (twin := find_twin(profile, sample))
    }
    clusters = bootstrap.build_clusters(windows.host_id.tolist(), windows.session.tolist())
    drawn = bootstrap.draw_weights(
        clusters, np.zeros(len(windows), np.int64), classes=(0,), resamples=N_DRAWS, seed=_SEED
    )
    ones = np.ones((1, len(windows)))
    weights = ones if drawn is None else np.concatenate([ones, drawn.counts[:, clusters.cluster_index]])
    areas: dict[str, list[NDArray[np.float64]]] = {name: [] for name in sets}
    pairs = []
    called = np.isin(sets[home].outputs[0].y_pred, _CALLED)
    for (sample, twin), (is_sample, is_twin) in sides.items():
        n_sample, n_twin = int(is_sample.sum()), int(is_twin.sum())
        enough = min(n_sample, n_twin) >= MIN_WINDOWS
        rows = is_sample | is_twin
        for name, scored in sets.items():
            if enough:
                score = compute_alarm_score(scored.outputs[0].probabilities[rows], AlarmKind.ACTIVITY)
                areas[name].append(compute_ranking(score, is_sample[rows], weights[:, rows]).auroc)
        pairs.append(
            TwinPair(
                sample=sample,
                twin=twin,
                n_sample=n_sample,
                n_twin=n_twin,
                called_sample=float(called[is_sample].mean()) if n_sample else None,
                called_twin=float(called[is_twin].mean()) if n_twin else None,
                areas={name: float(found[-1][0]) if enough else None for name, found in areas.items()},
                code=None if enough else NoteCode.TOO_FEW_WINDOWS,
            )
        )
    means = {name: _average(found) for name, found in areas.items() if found}
    return TwinReport(
        recipe=recipe,
        model=model,
        pairs=tuple(pairs),
        means={name: _summarise(draws, len(clusters), clusters.host_index) for name, draws in means.items()},
        gaps={
            name: _summarise(draws - means[home], len(clusters), clusters.host_index)
            for name, draws in means.items()
            if name != home
        },
        scores=_score_samples(sets[home]),
    )


def _read_sets(run: Path, recipe: str, model: str, input_variant: str) -> dict[str, PredictionSet]:
    """Return channel set → the pooled test predictions of a model's first seed, all on the same windows."""
    table = read_predictions(run / PREDICTIONS_FILE)
    table = table.filter(pc.and_(pc.equal(table["recipe"], recipe), pc.equal(table["model"], model)))
    found: dict[str, PredictionSet] = {}
    first: PredictionSet | None = None
    for group in parse_prediction_groups(table, {}):
        if group.filter != NO_FILTER or group.table != input_variant or group.threat not in TWIN_CHANNEL_SETS:
            continue
        pooled = None if needs_agent(group.threat) else group.pool()
        if pooled is None or (first is not None and not first.windows.is_same_as(pooled.windows)):
            continue
        first = first or pooled
        found[group.threat] = PredictionSet(windows=pooled.windows, outputs=pooled.outputs[:1])
    return {name: found[name] for name in TWIN_CHANNEL_SETS if name in found}


def _find_loads(
    episode_id: NDArray[np.object_], at_ns: NDArray[np.int64], loads: Mapping[str, LoadSpans]
) -> NDArray[np.object_]:
    """Return the benign kind that ran in the middle of each window, ``(n,)``; empty without one."""
    kinds = np.full(len(at_ns), "", dtype=object)
    for episode in set(episode_id.tolist()):
        own = episode_id == episode
        for kind, start_ns, end_ns in loads.get(episode, ()):
            kinds[own & (start_ns <= at_ns) & (at_ns < end_ns)] = kind
    return kinds


def _average(areas: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Average over the pairs that a resample still has, ``(1 + B,)``; the first entry is that of all windows."""
    stacked = np.stack(areas)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.asarray(total / np.maximum(known.sum(axis=0), 1), np.float64)


def _summarise(
    draws: NDArray[np.float64], sessions: int, host_index: NDArray[np.int64]
) -> tuple[float, float | None, float | None]:
    hosts = len(set(host_index.tolist()))
    if len(draws) < 2 or bootstrap.explain_missing_interval(sessions, hosts) is not None:
        return float(draws[0]), None, None
    low, high = bootstrap.compute_interval(draws[1:], bootstrap.compute_tail_share(sessions, hosts))
    return float(draws[0]), low, high


def _score_samples(predictions: PredictionSet) -> dict[str, tuple[float, float | None, float | None, int]]:
    """Return macro-F1 over three states with and without the episodes of samples that have a twin."""
    windows = predictions.windows
    has_twin = np.array(
        [bool(find_twin(p, s)) for p, s in zip(windows.profile, windows.sample_name, strict=True)], np.bool_
    )
    is_benign = windows.profile == BENIGN_PROFILE
    rules = EvaluationSettings(
        malicious=tuple(row.name for row in PROFILES if row.kind != SampleKind.BENIGN),
        profiles=tuple(row.name for row in PROFILES),
        resamples=N_DRAWS,
    )
    scope = build_scoring_set(predictions, rules)
    masks = {_ALL: np.ones(len(windows), np.bool_), _WITH: is_benign | has_twin, _WITHOUT: is_benign | ~has_twin}
    found: dict[str, tuple[float, float | None, float | None, int]] = {}
    for name, mask in masks.items():
        if not mask.any():
            continue
        part = scope.select(mask)
        kept = select_resamples(part)
        scores = next(iter(score_models(part, kept).values()))[0]
        ends = build_interval(None if scores.draws is None else scores.draws.macro_f1_3class, kept)
        found[name] = (float(scores.point.macro_f1_3class), ends.get("low"), ends.get("high"), int(mask.sum()))
    return found
