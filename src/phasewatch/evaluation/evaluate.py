"""Score the predictions of a run and write `metrics_v3.json` and `headline.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from phasewatch import atomic
from phasewatch.artifacts import (
    BINS_DIR,
    BINS_INDEX_PATH,
    EXPERIMENT_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    VALIDATION_FILE,
    RunEpisode,
    list_split_names,
    read_run_episodes,
)
from phasewatch.binning.storage import index_rows_by_id, open_bins
from phasewatch.channels import CHANNELS
from phasewatch.dataset import file_sha256
from phasewatch.dataset.split_files import compute_sample_group, read_all_folds
from phasewatch.errors import PhasewatchError, RunError
from phasewatch.evaluation import alarms, comparisons
from phasewatch.evaluation.alarms import EpisodeTimeline
from phasewatch.evaluation.bootstrap import N_RESAMPLES
from phasewatch.evaluation.calibration import (
    build_abstention_rows,
    build_calibration_rows,
    compute_confidence_thresholds,
)
from phasewatch.evaluation.detection import IMPACT_METRICS, build_alarm_rows
from phasewatch.evaluation.headline import build_headline, render_headline, write_headline
from phasewatch.evaluation.idle import build_idle_rows, build_load_rows
from phasewatch.evaluation.importance import build_importance_rows
from phasewatch.evaluation.leaderboard import build_leaderboard_rows
from phasewatch.evaluation.metric_table import (
    HEADLINE_RECIPES,
    SELECTION_METRIC,
    HeadlineKey,
    MetricNote,
    MetricRow,
    MetricTable,
    NoteCode,
    read_metrics,
    render_metrics,
    select_headline,
)
from phasewatch.evaluation.predictions import PredictionGroup, parse_prediction_groups
from phasewatch.evaluation.ranking import build_ranking_rows
from phasewatch.evaluation.scoring import EvaluationSettings, MetricKey, build_scoring_set, build_settings
from phasewatch.evaluation.selection import build_selection_rows
from phasewatch.metrics import compute_pooled_macro_f1
from phasewatch.models import checkpoint, registry
from phasewatch.models.alarm import LIVE_STRIDE_S, RULE_STRIDE_S
from phasewatch.splits import ALARM_RECIPES, SINGLE_HOST_RECIPE, Fold, SplitPart, has_single_host
from phasewatch.training.experiment import Experiment, parse_experiment
from phasewatch.training.predictions import NO_FILTER, PredictionPart, read_predictions

__all__ = ["evaluate_run", "read_folds", "read_metrics", "render_headline"]

_FOLD_MEAN_NOTE = MetricNote(code=NoteCode.MEAN_OVER_FOLDS, text="mean over folds")
_ONE_HOST_NOTE = MetricNote(
    code=NoteCode.ONE_HOST, text="the store has one host, so no score on an unseen host can be computed"
)
_CHOICE_NOTE = MetricNote(code=NoteCode.COUNT, text="chooses a model, so it has no interval")


def _build_training_rows(
    run: Path,
    groups: Sequence[PredictionGroup],
    val_b_groups: Mapping[tuple[str, str, str, str], PredictionGroup],
    headline: HeadlineKey,
) -> Iterator[MetricRow]:
    """Yield each model's number of training windows, and the validation scores that choose the headline's model.

    A run without checkpoints (predictions from elsewhere) has no such rows.

    Args:
        run: The run.
        groups: Test predictions.
        val_b_groups: Key of a group → its predictions on validation B. Validation A stopped the training of some
            models, which therefore score too high on it.
        headline: The headline's channel set and input.
    """
    for group in groups:
        if group.filter != NO_FILTER:
            continue
        key = MetricKey(
            recipe=group.recipe,
            fold="pooled",
            channel_set=group.threat,
            input=group.table,
            smoothing=NO_FILTER,
            agent=None,
        )
        val_b = val_b_groups.get(group.key)
        is_headline = group.recipe in (*HEADLINE_RECIPES, SINGLE_HOST_RECIPE) and (group.threat, group.table) == (
            headline.channel_set,
            headline.input,
        )
        for model in dict.fromkeys(s.model for s in group.predictions):
            own = [s for s in group.predictions if s.model == model]
            experiments = [
                Experiment(
                    recipe=group.recipe, fold=s.fold, threat=group.threat, model=model, table=group.table, seed=s.seed
                )
                for s in own
            ]
            headers = [_read_header_if_any(run, experiment) for experiment in experiments]
            sizes = [h.trained_with["train"] for h in headers if h is not None and "train" in h.trained_with]
            if len(sizes) != len(experiments):
                continue
            yield key.row(
                metric="train_windows", model=model, value=float(np.mean(sizes)), unit="windows", note=_FOLD_MEAN_NOTE
            )
            first = min(s.seed for s in own)
            whole = sorted(s.fold for s in own if s.seed == first) == group.folds
            if is_headline and whole and model not in registry.BASELINE_MODELS and val_b is not None:
                found = [s for s in val_b.predictions if (s.model, s.seed) == (model, first)]
                if sorted(s.fold for s in found) == group.folds:
                    value = compute_pooled_macro_f1((s.windows.y_true, s.output.y_pred) for s in found)
                    yield key.row(metric=SELECTION_METRIC, model=model, seed=first, value=value, note=_CHOICE_NOTE)


def _read_trials(run: Path, groups: Sequence[PredictionGroup]) -> dict[tuple[str, str, str], int]:
    """Return recipe, model and input variant → number of settings tried, of the experiments that tried any."""
    found: dict[tuple[str, str, str], int] = {}
    for group in groups:
        for s in group.predictions:
            cell = Experiment(
                recipe=group.recipe, fold=s.fold, threat=group.threat, model=s.model, table=group.table, seed=s.seed
            )
            path = cell.folder(run) / EXPERIMENT_FILE
            if path.is_file() and (trials := parse_experiment(path.read_bytes(), file=str(path)).trials):
                found[group.recipe, s.model, group.table] = trials
    return found


def _read_header_if_any(run: Path, experiment: Experiment) -> checkpoint.CheckpointHeader | None:
    try:
        return checkpoint.read_header(experiment.folder(run))
    except PhasewatchError:
        return None


_AGENT_STATES = ("off", "on", None)  # None = both
_POOLED_FOLD = "pooled"
_STRIDE_ENDINGS = {LIVE_STRIDE_S: f"_{LIVE_STRIDE_S}s", RULE_STRIDE_S: ""}  # of the names of parts


def evaluate_run(run: Path, *, resamples: int = N_RESAMPLES, seed: int = 0, corpus: str | None = None) -> MetricTable:
    """Score the test predictions of a run and write `metrics_v3.json` and `headline.json`; see `compute_metrics`.

    Args:
        corpus: Name of the store, for the headline.
    """
    metrics = compute_metrics(run, resamples=resamples, seed=seed)
    atomic.write_atomic(run / METRICS_FILE, render_metrics(metrics))
    write_headline(run, build_headline(metrics, corpus=corpus))
    return metrics


def compute_metrics(run: Path, *, resamples: int = N_RESAMPLES, seed: int = 0) -> MetricTable:
    """Score the test predictions of a run.

    Models are compared on exactly the same windows: the pooled folds of a recipe, or one fold. A model that was trained
    on one fold is compared on that fold only. Predictions that cannot be scored (of another split, or with broken
    probabilities) get a note, and the rest is scored.

    A run whose folds test nothing, because its one host has too few sessions, has notes alone.

    Raises:
        RunError: If there are no test predictions, or two models saw other truths for the same window.
    """
    rules = build_settings(resamples=resamples, seed=seed)
    path = run / PREDICTIONS_FILE
    table = read_predictions(path)
    folds, digests = read_folds(run)
    for name in (BINS_INDEX_PATH, VALIDATION_FILE):
        if (run / name).is_file():
            digests[name] = file_sha256(run / name)
    episodes = _read_episodes(run, table)
    rows: list[MetricRow] = []
    if has_single_host(folds.values()):
        key = HeadlineKey()
        rows.append(
            MetricKey(
                recipe=key.recipe,
                fold=_POOLED_FOLD,
                channel_set=key.channel_set,
                input=key.input,
                smoothing=NO_FILTER,
                agent=None,
            ).row(metric="note", model=None, note=_ONE_HOST_NOTE)
        )
        if not any(fold.ids(SplitPart.TEST) or fold.ids(SplitPart.DEALT) for fold in folds.values()):
            return MetricTable(inputs={PREDICTIONS_FILE: file_sha256(path), **digests}, metrics=tuple(rows))
    with _limit_threads():
        groups = list(parse_prediction_groups(table, folds))
        if not groups:
            raise RunError(f"{path}: no test rows; train a recipe that holds something out")
        val_b = {b.key: b for b in parse_prediction_groups(table, {}, part="val_b")}
        for group in groups:
            rows += _score_group(group, val_b.get(group.key), episodes, rules)
        rows += comparisons.build_comparison_rows(groups, rules)
        rows += _score_alarms(groups, table, read_timelines(run), rules)
        rows += _score_idle(groups, table, episodes, rules)
        rows += _build_training_rows(run, groups, val_b, HeadlineKey())
        rows += build_selection_rows(groups, val_b, _read_trials(run, groups))
        rows += build_importance_rows(run, select_headline(rows), rules)
    return MetricTable(inputs={PREDICTIONS_FILE: file_sha256(path), **digests}, metrics=tuple(rows))


@contextmanager
def _limit_threads() -> Iterator[None]:
    """Limit BLAS to one thread: products are small, and idle threads cost ten times the work on a busy machine."""
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError:  # comes with scikit-learn; without it the numbers are the same, but slower
        yield
        return
    with threadpool_limits(1):
        yield


def read_folds(run: Path) -> tuple[dict[tuple[str, str], Fold], dict[str, str]]:
    """Return the folds of the run by recipe and fold, and the digests of their files."""
    digests = {name: file_sha256(run / name) for name in list_split_names(run)}
    return {(fold.recipe, fold.fold): fold for fold in read_all_folds(run)}, digests


def _read_episodes(run: Path, table: Any) -> dict[str, RunEpisode]:
    """Read the metadata of the predicted episodes; empty if the run has no index of bundles, or another one.

    Predictions can be scored without it. What needs it (idle machines, load) then has a note in place of a number.
    """
    if not (run / VALIDATION_FILE).is_file():
        return {}
    try:
        found = read_run_episodes(run, only=set(table["episode_id"].unique().to_pylist()))
    except RunError:
        return {}
    return {e.episode_id: e for e in found}


def _score_group(
    group: PredictionGroup,
    val_b: PredictionGroup | None,
    episodes: Mapping[str, RunEpisode],
    rules: EvaluationSettings,
) -> list[MetricRow]:
    """Score the models of all pooled folds, then those of each fold; then note what could not be scored."""
    rows: list[MetricRow] = []
    keys = {
        "recipe": group.recipe,
        "channel_set": group.threat,
        "input": group.table,
        "smoothing": group.filter,
    }
    own = comparisons.choose_agent_state(group.threat)
    for agent in _AGENT_STATES:
        # By profile, host and sample only on the channel set's own agent state: a full grid has too many rows.
        rows += _score_folds(
            group, group.folds, MetricKey(**keys, fold=_POOLED_FOLD, agent=agent), rules, parts=agent == own
        )
    if group.filter == NO_FILTER and group.recipe == HeadlineKey().recipe:
        for fold in group.folds:
            rows += _score_folds(group, [fold], MetricKey(**keys, fold=fold, agent=own), rules, parts=False)
    key = MetricKey(**keys, fold=_POOLED_FOLD, agent=None)
    if (joined := group.pool()) is not None and (chosen := joined.select_agent(own)) is not None:
        scope = build_scoring_set(chosen, rules)
        rows += build_calibration_rows(key.with_agent(own), scope)
        if group.filter == NO_FILTER:
            rows += build_abstention_rows(
                key.with_agent(own), scope, compute_confidence_thresholds(chosen, group, val_b)
            )
        if group.filter == NO_FILTER and group.recipe in ALARM_RECIPES:
            rows += build_ranking_rows(key.with_agent(own), scope)
            rows += build_load_rows(key.with_agent(own), scope, episodes)
    rows += [
        key.row(metric="note", model=None, note=MetricNote(code=NoteCode.NOT_SCORED, text=text))
        for text in group.refused
    ]
    return rows


def _score_folds(
    group: PredictionGroup, folds: Sequence[str], key: MetricKey, rules: EvaluationSettings, *, parts: bool
) -> list[MetricRow]:
    joined = group.pool(folds)
    chosen = joined.select_agent(key.agent) if joined is not None else None
    if chosen is None:
        return []
    parts = parts and group.filter == NO_FILTER
    details = key.fold == _POOLED_FOLD and (parts or key.agent != _AGENT_STATES[1])
    return build_leaderboard_rows(key, chosen, rules, parts=parts, details=details)


def _score_alarms(
    groups: Sequence[PredictionGroup],
    table: Any,
    timelines: Mapping[str, EpisodeTimeline],
    rules: EvaluationSettings,
) -> list[MetricRow]:
    """Build the alarm rows of the recipes that hold out a host, on the agent state of each channel set.

    Alarms use unsmoothed probabilities, at the stride of a live watcher where the run has it, and at that of training.
    """
    alarm_groups = [b for b in groups if b.recipe in ALARM_RECIPES and b.filter == NO_FILTER]
    if not timelines:
        text = "no delay and no false alarms: the run has no bins with labels"
        note = MetricNote(code=NoteCode.NO_ALARM_METRICS, text=text)
        return [group.build_metric_key().row(metric="note", model=None, note=note) for group in alarm_groups]
    own = _filter_groups(table, alarm_groups)
    parts = {
        f"{part}{ending}": {b.key: b for b in parse_prediction_groups(own, {}, part=f"{part}{ending}")}
        for part in ("test", "val_b", "soak")
        for ending in _STRIDE_ENDINGS.values()
    }
    rows: list[MetricRow] = []
    for group in alarm_groups:
        strides = [
            alarms.PredictionParts(
                test=group if not ending else test,
                val_b=parts[f"val_b{ending}"].get(group.key),
                soak=parts[f"soak{ending}"].get(group.key),
                stride_s=stride_s,
            )
            for stride_s, ending in _STRIDE_ENDINGS.items()
            if (test := parts[f"test{ending}"].get(group.key)) is not None
        ]
        rows += build_alarm_rows(strides, timelines, rules, agent=comparisons.choose_agent_state(group.threat))
    return rows


def _score_idle(
    groups: Sequence[PredictionGroup], table: Any, episodes: Mapping[str, RunEpisode], rules: EvaluationSettings
) -> list[MetricRow]:
    """Build the rows on idle clean machines of the recipes that hold out a host."""
    chosen = [b for b in groups if b.recipe in ALARM_RECIPES and b.filter == NO_FILTER]
    own = _filter_groups(table, chosen)
    parts = [
        {b.key: b for b in parse_prediction_groups(own, {}, part=part)}
        for part in (PredictionPart.SOAK, PredictionPart.IDLE)
    ]
    rows: list[MetricRow] = []
    for group in chosen:
        others = [found for part in parts if (found := part.get(group.key)) is not None]
        agent = comparisons.choose_agent_state(group.threat)
        rows += build_idle_rows(group, others, episodes, rules, agent=agent)
    return rows


def _filter_groups(table: Any, groups: Sequence[PredictionGroup]) -> Any:
    """Select the unsmoothed rows of these recipes: each of a full grid's thousands of experiments has soak rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    recipes = pa.array(sorted({b.recipe for b in groups}), pa.string())
    return table.filter(pc.and_(pc.is_in(table["recipe"], recipes), pc.equal(table["filter"], NO_FILTER)))


def read_timelines(run: Path) -> dict[str, EpisodeTimeline]:
    """Read label spans and impact rates from the run's bins; empty without bins."""
    folder = run / BINS_DIR
    if not (run / BINS_INDEX_PATH).is_file():
        return {}
    grids = open_bins(folder)
    names = [c.full_name for c in CHANNELS]
    columns = [names.index(name) for _, name, _ in IMPACT_METRICS]
    return {
        row.episode_id: EpisodeTimeline(
            spans=row.spans,
            t0_ns=row.t0_ns,
            rates=grids.episode_bins(row)[:, columns],
            group=compute_sample_group(row.profile, row.sample_name),
        )
        for row in index_rows_by_id(grids).values()
    }
