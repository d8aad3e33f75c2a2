"""Permutation importance of channels on held-out windows, and the channels behind a single decision."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.dataset import FoldData, read_folds
from phasewatch.errors import PhasewatchError, RunError
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.metric_table import HeadlineKey, MetricNote, MetricRow, NoteCode
from phasewatch.evaluation.scoring import (
    EvaluationSettings,
    EvaluationWindows,
    MetricKey,
    ModelOutput,
    PredictionSet,
    build_interval,
    build_scoring_set,
    compute_gap_p_value,
    count_profiles,
    mean_over_seeds,
    score_models,
    select_resamples,
)
from phasewatch.features.schema import list_column_channels
from phasewatch.models import registry
from phasewatch.models.base import InputKind, ModelInputs, PhaseModel
from phasewatch.splits import Fold
from phasewatch.training.experiment import Experiment
from phasewatch.training.predictions import NO_FILTER
from phasewatch.training.train import read_experiment_data
from phasewatch.types import PHASES

__all__ = [
    "N_PERMUTATIONS",
    "ChannelContribution",
    "DecisionExplanation",
    "build_importance_rows",
    "explain_decision",
    "explain_window",
]

N_PERMUTATIONS = 3  # permutations of a channel, averaged
_UNPERMUTED = "whole"
_N_TOP_CHANNELS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelContribution:
    """The contribution of one channel to a decision.

    Attributes:
        value: Mean over the window, in `unit`; None where nothing is known.
        drop: Decrease of the decided phase's probability when the channel is unknown.
    """

    channel: str
    value: float | None
    unit: str
    drop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionExplanation:
    """The decision on one window and the channels that contribute most, largest first.

    Attributes:
        at_s: Centre of the window, seconds since the first label; None if it is not known.
    """

    decided: str
    probability: float
    truth: str
    reasons: tuple[ChannelContribution, ...]
    at_s: float | None = None


def build_importance_rows(run: Path, headline: HeadlineKey, rules: EvaluationSettings) -> Iterator[MetricRow]:
    """Yield for each channel the macro-F1 lost on held-out windows when it is permuted within its fold.

    Args:
        run: A run with the checkpoints of the model on all folds of its recipe.
        headline: Model, recipe, channel set, input and agent state.
        rules: How intervals are drawn.
    """
    key = MetricKey(
        recipe=headline.recipe,
        fold="pooled",
        channel_set=headline.channel_set,
        input=headline.input,
        smoothing=NO_FILTER,
        agent=headline.agent,
    )
    try:
        folds = [_predict_permuted(run, headline, fold) for fold in read_folds(run, headline.recipe)]
    except PhasewatchError:  # its message names folders, which must not enter the metrics
        text = f"no channel importance: the checkpoint of {headline.model} cannot be loaded for every fold"
        yield key.row(metric="note", model=headline.model, note=MetricNote(code=NoteCode.NO_IMPORTANCE, text=text))
        return
    folds = [one for one in folds if len(one[0])]
    if not folds:
        return
    windows = EvaluationWindows.concatenate([windows for windows, _ in folds])
    channels = [
        name
        for name in dict.fromkeys(name for _, predictions in folds for name, _ in predictions)
        if name != _UNPERMUTED
    ]
    rows = [
        _compute_importance_row(key, channel, windows, [predictions for _, predictions in folds], headline, rules)
        for channel in channels
    ]
    for row, p_holm in zip(rows, bootstrap.adjust_p_values([row.p for row in rows]), strict=True):
        yield msgspec.structs.replace(row, p_holm=None if p_holm is None else round(p_holm, 10))


def _compute_importance_row(
    key: MetricKey,
    channel: str,
    windows: EvaluationWindows,
    folds: Sequence[Mapping[tuple[str, int], NDArray[np.int64]]],
    headline: HeadlineKey,
    rules: EvaluationSettings,
) -> MetricRow:
    """Compute the macro-F1 lost by permuting one channel, over the test windows of all folds."""
    keys = [(_UNPERMUTED, 0), *((channel, r) for r in range(N_PERMUTATIONS))]
    outputs = tuple(
        ModelOutput(
            model=name,
            seed=seed,
            probabilities=np.zeros((0, len(PHASES))),
            y_pred=np.concatenate([own[name, seed] for own in folds]),
        )
        for name, seed in keys
    )
    scope = build_scoring_set(PredictionSet(windows=windows, outputs=outputs), rules)
    kept = select_resamples(scope)
    scored = score_models(scope, kept)
    (whole,), permuted = scored[_UNPERMUTED], scored[channel]
    lost = whole.point.macro_f1 - np.mean([s.point.macro_f1 for s in permuted])
    after = mean_over_seeds([None if s.draws is None else s.draws.macro_f1 for s in permuted])
    draws = None if after is None or whole.draws is None else whole.draws.macro_f1 - after
    return key.row(
        metric="macro_f1_permuted_gap",
        model=headline.model,
        seed="mean",
        compared_to=channel,
        value=float(lost),
        p=compute_gap_p_value(draws, kept),
        **build_interval(draws, kept),
        **scope.counts(),
        **count_profiles(scope, rules),
    )


def _predict_permuted(
    run: Path, headline: HeadlineKey, fold: Fold
) -> tuple[EvaluationWindows, dict[tuple[str, int], NDArray[np.int64]]]:
    """Predict a fold's test windows as they are, and with each channel permuted over them.

    Returns:
        The windows, and (channel or `_UNPERMUTED`, repeat) → ``(n,)`` decided phase codes.
    """
    experiment = Experiment(
        recipe=headline.recipe, fold=fold.fold, threat=headline.channel_set, model=headline.model, table=headline.input
    )
    model, sets = _load_experiment(run, experiment)
    test = sets.test.take(sets.test.windows.mark_episodes(lambda e: e.agent is (headline.agent == "on")))
    of = [test.windows.episodes[i] for i in test.windows.episode_index]
    texts = {
        "episode_id": [e.episode_id for e in of],
        "session": [e.session for e in of],
        "host_id": [e.host_id for e in of],
        "profile": [e.profile for e in of],
        "sample_name": [e.sample_name for e in of],
        "origin": [str(e.origin) for e in of],
        "agent": [headline.agent] * len(of),
    }
    windows = EvaluationWindows(
        **{name: np.array(values, dtype=object) for name, values in texts.items()},
        t_center_ns=test.windows.t_center_ns,
        y_true=test.y,
    )
    if not len(test):
        return windows, {}
    predictions = {(_UNPERMUTED, 0): model.predict(test.inputs)}
    for channel, columns in _group_columns_by_channel(test.inputs).items():
        for repeat in range(N_PERMUTATIONS):
            rng = _build_rng(channel, repeat)
            x = test.x.copy()
            x[:, columns] = x[rng.permutation(len(x))][:, columns]
            predictions[channel, repeat] = model.predict(ModelInputs(x=x, spec=test.inputs.spec))
    return windows, predictions


def _load_experiment(run: Path, experiment: Experiment) -> tuple[PhaseModel, FoldData]:
    return registry.load(experiment.folder(run)), read_experiment_data(run, experiment)


def _build_rng(channel: str, repeat: int) -> np.random.Generator:
    return np.random.default_rng([repeat, int.from_bytes(hashlib.sha256(channel.encode()).digest()[:8], "big")])


def _group_columns_by_channel(inputs: ModelInputs) -> dict[str, list[int]]:
    """Return the columns of each channel: its row of a tensor, or its statistics and all that derives from it.

    A column that is derived from several channels is in the group of each of them.
    """
    found: dict[str, list[int]] = {}
    for i, name in enumerate(inputs.spec.names):
        for channel in (name,) if inputs.spec.kind is InputKind.TENSOR else list_column_channels(name):
            found.setdefault(channel, []).append(i)
    return found


def explain_decision(run: Path, experiment: Experiment, episode_id: str, at_s: float) -> DecisionExplanation:
    """Explain an experiment's decision on one test window.

    Args:
        run: The run.
        experiment: The experiment.
        episode_id: A test episode of the experiment's fold.
        at_s: Seconds since the first label; the window with the nearest centre is used.

    Raises:
        RunError: If the fold does not test that episode.
    """
    model, sets = _load_experiment(run, experiment)
    in_episode = sets.test.windows.mark_episodes(lambda e: e.episode_id == episode_id)
    if not in_episode.any():
        raise RunError(
            f"{experiment.recipe}, fold {experiment.fold}: does not test episode {episode_id}; "
            f"name one of its {len(sets.test.windows.episodes)} episodes"
        )
    test = sets.test.take(in_episode)
    nearest = int(np.abs(test.windows.t_center_s - at_s).argmin())
    one = ModelInputs(x=test.x[nearest : nearest + 1], spec=test.inputs.spec)
    return replace(explain_window(model, one, int(test.y[nearest])), at_s=float(test.windows.t_center_s[nearest]))


def explain_window(
    model: PhaseModel, inputs: ModelInputs, truth: int, *, top: int = _N_TOP_CHANNELS
) -> DecisionExplanation:
    """Explain a decision by setting each channel to unknown in turn.

    Args:
        model: Any model.
        inputs: One window.
        truth: Its true phase code.
        top: Number of channels to return.
    """
    columns = _group_columns_by_channel(inputs)
    x = np.repeat(inputs.x, 1 + len(columns), axis=0)
    for i, own in enumerate(columns.values(), 1):
        x[i, own] = np.nan
    p = model.predict_proba(ModelInputs(x=x, spec=inputs.spec))
    decided = int(p[0].argmax())
    drops = p[0, decided] - p[1:, decided]
    units = {c.full_name: c.unit for c in CHANNELS}
    names = list(columns)
    order = sorted(range(len(names)), key=lambda i: (-drops[i], names[i]))[:top]
    return DecisionExplanation(
        decided=str(PHASES[decided]),
        probability=float(p[0, decided]),
        truth=str(PHASES[truth]),
        reasons=tuple(
            ChannelContribution(
                channel=names[i],
                value=_compute_channel_mean(inputs, columns[names[i]]),
                unit=units.get(names[i], "1"),
                drop=float(drops[i]),
            )
            for i in order
        ),
    )


def _compute_channel_mean(inputs: ModelInputs, columns: Sequence[int]) -> float | None:
    """Return a channel's mean over the window: the first statistic of a table, the mean of a tensor's known bins."""
    own = np.asarray(inputs.x[0, list(columns)], np.float64).ravel()
    if inputs.spec.kind is InputKind.TABLE:
        return float(own[0]) if np.isfinite(own[0]) else None
    known = own[np.isfinite(own)]
    return float(known.mean()) if len(known) else None
