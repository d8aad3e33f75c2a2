"""Predict a store with a model that was trained elsewhere, and score it there."""

from __future__ import annotations

from pathlib import Path

from phasewatch import atomic
from phasewatch.artifacts import RunEpisode, file_sha256
from phasewatch.errors import UsageError
from phasewatch.evaluation.metric_table import MetricTable, render_metrics
from phasewatch.evaluation.other_store import (
    StoreEpisode,
    TrainingEpisodes,
    score_other_store,
    select_unseen_episodes,
)
from phasewatch.features.windows import build_label_spans
from phasewatch.inference.model_selection import read_training_episodes
from phasewatch.inference.offline import PredictionSummary, predict
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.store.base import StoreLocation
from phasewatch.types import BIN_NS, EpisodeOrigin, EpisodeRole, SampleKind
from phasewatch.validate.verdict import BundleCheck, BundleVerdict

__all__ = ["predict_and_score"]


def predict_and_score(
    source: StoreLocation,
    predictor: PhasePredictor,
    out: Path,
    metrics: Path,
    *,
    stride_bins: int,
    progress: Progress = NO_PROGRESS,
) -> tuple[PredictionSummary, MetricTable]:
    """Write the predictions and their metrics; nothing of the model is fitted to the store.

    Args:
        source: The store.
        predictor: The model.
        out: Table of predictions to write, X.parquet.
        metrics: Metric table to write, X.json.
        stride_bins: Bins from one window's start to the next; alarms of every second need 2.
        progress: As in `predict`.

    Raises:
        UsageError: If a file has another suffix.
        MismatchError: If no episode may be scored; the predictions are written all the same.
    """
    if metrics.suffix != ".json":
        raise UsageError(f"--metrics {metrics}: the table of metrics is a JSON file; name it X.json")
    found: list[StoreEpisode] = []

    def collect(check: BundleCheck) -> None:
        if check.episode is None or check.binned is None:
            return
        spans = [(s.phase, s.start_ns, s.end_ns) for s in build_label_spans(check.episode.marks)]
        episode = _build_run_episode(check.verdict)
        found.append(StoreEpisode.build(episode, spans, check.episode.t0_ns, check.binned.bins))

    done = predict(source, predictor, out, stride_bins=stride_bins, progress=progress, on_episode=collect)
    episodes = read_training_episodes(predictor.where)
    known = {e.host_id for e in episodes} if episodes is not None else predictor.trained.hosts
    trained = TrainingEpisodes(hosts=frozenset(known), episodes=episodes)
    unseen, notes = select_unseen_episodes(found, trained)
    scored = score_other_store(
        _read_predictions(out),
        unseen,
        predictor.alarms,
        stride_s=stride_bins * BIN_NS // 10**9,
        notes=notes,
        inputs={out.name: file_sha256(out)},
    )
    atomic.make_folder(metrics.absolute().parent)
    atomic.write_atomic(metrics.absolute(), render_metrics(scored))
    return done, scored


def _read_predictions(path: Path) -> object:
    import pyarrow.parquet as pq

    return pq.read_table(path)


def _build_run_episode(verdict: BundleVerdict) -> RunEpisode:
    return RunEpisode(
        episode_id=verdict.episode_id,
        host_id=verdict.host_id,
        profile=verdict.profile,
        sample_name=verdict.sample_name,
        sample_kind=SampleKind(verdict.sample_kind),
        origin=EpisodeOrigin(verdict.origin),
        role=EpisodeRole(verdict.role),
        session=verdict.session or verdict.episode_id,
        agent=verdict.agent,
        plan_seed=verdict.plan_seed,
        proc_sketch=verdict.proc_sketch,
        started_wall_ns=verdict.started_wall_ns,
        duration_s=verdict.duration_s,
        neighbours=verdict.neighbours,
        background=verdict.background,
    )
