"""Measure learning curves of a run: `python -m tools.learning_curve RUN --out CURVE.json [--recipe R] [--folds N]`.

A curve shows the scores of a model that was fitted to a part of the train sets: fewer episodes, hosts, benign kinds or
samples. The parts are nested and the same in every call. Each part by host, kind or sample has a control: as many
episodes drawn from all of them, so that their difference is what breadth is worth. Validation sets stay whole and the
model is not fitted to them.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

import msgspec
import numpy as np

from phasewatch import profiles
from phasewatch.artifacts import RunEpisode
from phasewatch.atomic import write_atomic
from phasewatch.dataset import FoldData, WindowSet, load, read_folds
from phasewatch.evaluation.metric_table import NoteCode
from phasewatch.evaluation.scoring import (
    EvaluationSettings,
    EvaluationWindows,
    ModelOutput,
    PredictionSet,
    build_interval,
    build_scoring_set,
    score_models,
    select_resamples,
)
from phasewatch.models import registry
from phasewatch.types import BENIGN_PROFILE, SampleKind

__all__ = ["SHARES", "CurvePoint", "choose_folds", "list_parts", "measure_curves", "read_curves"]

SHARES = (0.125, 0.25, 0.5, 1.0)
MODEL = "gbt"
N_FOLDS = 8
N_RESAMPLES = 2_000
_METRICS = ("macro_f1_3class", "macro_f1")

# What is made scarce → the key of an episode that a part keeps or drops; None keeps the episode in every part.
UNITS: dict[str, Callable[[RunEpisode], str | None]] = {
    "episodes": lambda e: e.episode_id,
    "hosts": lambda e: e.host_id,
    "benign kinds": lambda e: e.sample_name if e.profile == BENIGN_PROFILE else None,
    "samples": lambda e: None if e.profile == BENIGN_PROFILE else f"{e.profile}/{e.sample_name}",
}
_EPISODES = "episodes"


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One point of a curve.

    Attributes:
        unit: What was made scarce.
        share: Share of the units that were kept.
        control: Whether as many episodes were drawn from all units instead.
        n_units, n_episodes: Mean over folds, in the train set.
        scores: Metric → value, low, high; null where there is none.
        code: Why a value or an interval is missing; null otherwise.
    """

    unit: str
    share: float
    control: bool
    n_units: float
    n_episodes: float
    scores: dict[str, tuple[float | None, float | None, float | None]]
    code: NoteCode | None = None


class CurveFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a file of curves."""

    recipe: str
    channel_set: str
    folds: tuple[str, ...]
    n_folds: int
    points: tuple[CurvePoint, ...]


def _hash(*words: str) -> str:
    return hashlib.sha256("|".join(words).encode()).hexdigest()


def choose_folds(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Choose some folds by the hash of their names, so that more folds contain fewer."""
    return tuple(sorted(sorted(names, key=lambda name: _hash("fold", name))[:count]))


def list_parts(episodes: Sequence[RunEpisode], unit: str, share: float) -> tuple[frozenset[str], frozenset[str]]:
    """Return the episodes of a part, and as many of all units, as sets of ids.

    Args:
        episodes: Episodes of a train set.
        unit: A key of `UNITS`.
        share: Share of the units to keep, at least one. A smaller share is a subset of a larger one.
    """
    key = UNITS[unit]
    keys = {e.episode_id: key(e) for e in episodes}
    names = sorted({k for k in keys.values() if k is not None}, key=lambda name: _hash(unit, name))
    chosen = set(names[: max(1, ceil(share * len(names)))]) if names else set()
    part = frozenset(i for i, k in keys.items() if k is None or k in chosen)
    scarce = sorted((i for i, k in keys.items() if k is not None), key=lambda i: _hash("control", i))
    size = sum(keys[i] is not None for i in part)
    control = frozenset(i for i, k in keys.items() if k is None) | frozenset(scarce[:size])
    return part, control


def measure_curves(
    run: Path, recipe: str, folds: Sequence[str], *, channel_set: str = "realistic", shares: Sequence[float] = SHARES
) -> tuple[CurvePoint, ...]:
    """Fit the model to each part of each fold and score the pooled test windows."""
    asked = [
        (unit, share, control)
        for unit in UNITS
        for share in shares
        for control in ((False,) if unit == _EPISODES or share == 1.0 else (False, True))
    ]
    outputs: dict[tuple[str, float, bool], list[np.ndarray]] = {key: [] for key in asked}
    sizes: dict[tuple[str, float, bool], list[tuple[int, int]]] = {key: [] for key in asked}
    windows: list[EvaluationWindows] = []
    for fold in folds:
        sets = replace(load(run, recipe, fold, channel_set, registry.find_model(MODEL).kind), run=None)
        windows.append(_describe_windows(sets.test))
        whole: np.ndarray | None = None
        for unit, share, control in asked:
            ids = list_parts(sets.train.windows.episodes, unit, share)[control]
            if len(ids) == len(sets.train.windows.episodes) and whole is not None:
                p = whole  # every unit ends with the whole train set
            else:
                p = _fit_and_predict(sets, ids)
                whole = p if len(ids) == len(sets.train.windows.episodes) else whole
            outputs[unit, share, control].append(p)
            kept = [e for e in sets.train.windows.episodes if e.episode_id in ids]
            units = {UNITS[unit](e) for e in kept} - {None}
            sizes[unit, share, control].append((len(units), len(kept)))
    joined = EvaluationWindows.concatenate(windows)
    return tuple(_build_point(key, joined, np.concatenate(outputs[key]), sizes[key]) for key in asked)


def _fit_and_predict(sets: FoldData, ids: frozenset[str]) -> np.ndarray:
    """Return probabilities of the test windows, ``(n, 5)``, by a model that was fitted to some episodes of train."""
    train = sets.train.take(sets.train.windows.mark_episodes(lambda e: e.episode_id in ids))
    model = registry.create(MODEL, seed=0)
    model.fit(train.examples, sets.val_a.examples, extra=replace(sets, extra=None).build_extra(train))
    return np.asarray(model.calibrate(sets.val_b.examples).predict_proba(sets.test.inputs), np.float64)


def _describe_windows(part: WindowSet) -> EvaluationWindows:
    w = part.windows

    def repeat(values: Sequence[str]) -> np.ndarray:
        return np.array(values, dtype=object)[w.episode_index]

    e = w.episodes
    return EvaluationWindows(
        episode_id=repeat([x.episode_id for x in e]),
        session=repeat([x.session for x in e]),
        host_id=repeat([x.host_id for x in e]),
        profile=repeat([x.profile for x in e]),
        sample_name=repeat([x.sample_name for x in e]),
        origin=repeat([str(x.origin) for x in e]),
        agent=repeat(["on" if x.agent else "off" for x in e]),
        t_center_ns=w.t_center_ns,
        y_true=w.y,
    )


def _build_point(
    key: tuple[str, float, bool], windows: EvaluationWindows, p: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> CurvePoint:
    output = ModelOutput(model=MODEL, seed=0, probabilities=p, y_pred=p.argmax(axis=1).astype(np.int64))
    malicious = tuple(row.name for row in profiles.PROFILES if row.kind != SampleKind.BENIGN)
    rules = EvaluationSettings(
        malicious=malicious, profiles=tuple(row.name for row in profiles.PROFILES), resamples=N_RESAMPLES
    )
    scope = build_scoring_set(PredictionSet(windows=windows, outputs=(output,)), rules)
    kept = select_resamples(scope)
    scored = score_models(scope, kept)[MODEL][0]
    scores: dict[str, tuple[float | None, float | None, float | None]] = {}
    for metric in _METRICS:
        ends: Mapping[str, object] = build_interval(
            None if scored.draws is None else getattr(scored.draws, metric), kept
        )
        low, high = (None if ends.get(end) is None else round(float(str(ends[end])), 10) for end in ("low", "high"))
        scores[metric] = (round(float(getattr(scored.point, metric)), 10), low, high)
    unit, share, control = key
    n_units, n_episodes = (float(np.mean(column)) for column in zip(*sizes, strict=True))
    code = kept.note.code if kept.note is not None else None
    return CurvePoint(
        unit=unit, share=share, control=control, n_units=n_units, n_episodes=n_episodes, scores=scores, code=code
    )


def read_curves(path: Path) -> CurveFile:
    """Read a file of curves."""
    return msgspec.json.decode(path.read_bytes(), type=CurveFile)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the curves of a run."""
    parser = argparse.ArgumentParser(description="Measure learning curves of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="held_out_both")
    parser.add_argument("--channels", default="realistic")
    parser.add_argument("--folds", type=int, default=N_FOLDS)
    given = parser.parse_args(arguments)
    names = [fold.fold for fold in read_folds(given.run, given.recipe)]
    folds = choose_folds(names, given.folds)
    points = measure_curves(given.run, given.recipe, folds, channel_set=given.channels)
    file = CurveFile(recipe=given.recipe, channel_set=given.channels, folds=folds, n_folds=len(names), points=points)
    write_atomic(given.out, msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")


if __name__ == "__main__":
    main()
