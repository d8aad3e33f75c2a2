"""Score recorded episodes with a checkpoint, run or edge bundle, and write the decisions as one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch import atomic
from phasewatch.errors import BundleError, MismatchError, StoreError, UsageError
from phasewatch.features.windows import (
    FLAG_MIXED,
    build_label_spans,
    combine_window_flags,
    compute_window_starts,
    label_windows,
)
from phasewatch.inference.model_selection import ModelCandidate, compute_preference
from phasewatch.inference.predictor import PhaseDecision, PhasePostprocessor, PhasePredictor
from phasewatch.models.base import InputVariant
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.store.base import BundleStore, StoreItem, StoreLocation, check_store, find_bundle, open_store
from phasewatch.store.local import BUNDLE_SUFFIX
from phasewatch.training.predictions import PROBABILITY_COLUMNS, WINDOW_TEXT_COLUMNS
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS, WINDOW_BINS
from phasewatch.validate.verdict import BundleCheck, BundleLocation, validate_bundle

__all__ = [
    "PREDICT_PART",
    "PredictionSummary",
    "build_prediction_schema",
    "choose_offline_model",
    "predict",
    "predict_episode",
]

PREDICT_PART = "predict"


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionSummary:
    """The result of scoring a store.

    Attributes:
        path: The table.
        model, threat: Key and channel set of the model.
        episodes, windows: Episodes and windows in the table.
        silent: Windows in which all of the model's channels are unknown; they have no row.
        alarms, activity_alarms: Infection and activity alarms that started.
        failed: Bundles that could not be used, each with the reason.
    """

    path: Path
    model: str
    threat: str
    episodes: int
    windows: int
    silent: int
    alarms: int
    activity_alarms: int
    failed: tuple[tuple[str, str], ...]


def choose_offline_model(
    candidates: Sequence[ModelCandidate], threat: str = "", *, smoothing: str = SMOOTHING_NONE
) -> PhasePredictor:
    """Load the model with the largest channel set, or with a named one; recordings may have the guest's channels.

    Args:
        candidates: Models, from `find_models`.
        threat: Channel set; empty for the largest.
        smoothing: As in `ModelCandidate.load_predictor`.

    Raises:
        UsageError: If no model has the channel set.
        MismatchError: If the models need the host's baseline.
    """
    fits = [c for c in candidates if not threat or c.threat == threat]
    if not fits:
        known = ", ".join(sorted({c.threat for c in candidates}))
        raise UsageError(f"no model for channel set {threat!r}; there are models for {known}")
    plain = [c for c in fits if c.spec.table is not InputVariant.COMMISSIONED]
    if not plain:
        raise MismatchError(
            f"{fits[0].where}: was trained on values relative to each host's baseline; predict needs one of raw values"
        )
    return min(plain, key=compute_preference).load_predictor(smoothing=smoothing)


def predict(
    source: StoreLocation,
    scorer: PhasePredictor,
    out: Path,
    *,
    stride_bins: int = LIVE_STRIDE_BINS,
    progress: Progress = NO_PROGRESS,
    on_episode: Callable[[BundleCheck], None] | None = None,
) -> PredictionSummary:
    """Score every usable bundle of a store, or one bundle, and write the table atomically.

    A bundle that cannot be used is listed in `failed` and does not stop the others.

    Args:
        source: A store, or one ``.tar.zst``, as a path or a URI.
        scorer: Model, from `choose_offline_model`.
        out: The parquet file to write.
        stride_bins: Bins from one window's start to the next.
        progress: Receives task ``predict`` after each bundle, with its path.
        on_episode: Receives each usable bundle whose windows are in the table.

    Raises:
        UsageError: If `out` has another suffix than ``.parquet``.
        StoreError: If there is no store or bundle.
    """
    import pyarrow.parquet as pq

    if out.suffix != ".parquet":
        raise UsageError(f"--out {out}: the table is a parquet file; name it X.parquet")
    store, items = _find_bundles(source)
    failed: list[tuple[str, str]] = []
    episodes = windows = silent = alarms = activity_alarms = 0
    atomic.make_folder(out.absolute().parent)
    with atomic.open_atomic(out.absolute()) as file:
        with pq.ParquetWriter(
            file,
            build_prediction_schema(),
            compression="zstd",
            compression_level=1,
            use_dictionary=list(WINDOW_TEXT_COLUMNS),
        ) as table:
            for number, item in enumerate(items, 1):
                try:
                    found = _read_bundle(store, item)
                except BundleError as exc:
                    failed.append((item.path, str(exc)))
                    continue
                finally:
                    progress.update("predict", number, len(items), item.path)
                if found.episode is None or found.binned is None:
                    failed.append((item.path, found.verdict.detail))
                    continue
                decisions, n = predict_episode(found, scorer, stride_bins=stride_bins)
                episodes, windows, silent = episodes + 1, windows + len(decisions), silent + n - len(decisions)
                if on_episode is not None:
                    on_episode(found)
                alarms += sum(d.raised for d in decisions)
                activity_alarms += sum(d.activity_raised for d in decisions)
                for name, beliefs in ((SMOOTHING_NONE, False), (SMOOTHING_PHASE, True)):
                    if decisions and (not beliefs or scorer.filter is not None):
                        table.write_table(_build_rows(found, scorer, decisions, name, beliefs=beliefs))
    return PredictionSummary(
        path=out,
        model=scorer.model,
        threat=scorer.threat,
        episodes=episodes,
        windows=windows,
        silent=silent,
        alarms=alarms,
        activity_alarms=activity_alarms,
        failed=tuple(failed),
    )


def predict_episode(
    found: BundleCheck, scorer: PhasePredictor, *, stride_bins: int = LIVE_STRIDE_BINS
) -> tuple[list[PhaseDecision], int]:
    """Return the decisions on an episode, as the live watcher makes them, and the number of its windows.

    A window in which all of the model's channels are unknown has no decision.
    """
    if found.episode is None or found.binned is None:
        return [], 0
    bins = found.binned.bins
    p, known = scorer.predict_windows(bins, stride_bins), scorer.compute_known_share(bins, stride_bins)
    flags = combine_window_flags(found.binned.flags, np.zeros(len(p), np.bool_), stride_bins)
    starts = compute_window_starts(found.episode.t0_ns, len(p), stride_bins)
    postprocessor = PhasePostprocessor(scorer, stride_bins=stride_bins)
    decisions = [
        postprocessor.postprocess(j, int(starts[j]), p[j], known=float(known[j]), flags=int(flags[j]))
        for j in range(len(p))
        if known[j] > 0.0
    ]
    return decisions, len(p)


def build_prediction_schema() -> Any:
    """Return the pyarrow schema: a run's columns, the known share of the readings, and both alarms."""
    import pyarrow as pa

    return pa.schema(
        [(name, pa.string()) for name in WINDOW_TEXT_COLUMNS]
        + [("seed", pa.int64()), ("t_center_ns", pa.int64()), ("purity", pa.float32()), ("flags", pa.uint8())]
        + [("y_true", pa.int8()), ("y_pred", pa.int8())]
        + [(name, pa.float32()) for name in PROBABILITY_COLUMNS]
        + [("known", pa.float32()), ("alarm", pa.bool_()), ("activity_alarm", pa.bool_())]
    )


def _find_bundles(source: StoreLocation) -> tuple[BundleStore, tuple[StoreItem, ...]]:
    if found := find_bundle(source):
        return found[0], (found[1],)
    if str(source).endswith(BUNDLE_SUFFIX) and not (isinstance(source, Path) and source.is_dir()):
        raise StoreError(f"{source}: no such bundle; name a store, or one <host_id>/<episode_id>{BUNDLE_SUFFIX} of it")
    store = open_store(source)
    check_store(source)
    return store, tuple(store.walk())


def _read_bundle(store: BundleStore, item: StoreItem) -> BundleCheck:
    place = BundleLocation(path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)
    return validate_bundle(store.read(item), place)


def _build_rows(
    found: BundleCheck, scorer: PhasePredictor, decisions: Sequence[PhaseDecision], name: str, *, beliefs: bool
) -> Any:
    import pyarrow as pa

    if found.episode is None:
        raise ValueError("an episode that could not be read has no rows")
    m = found.episode.manifest
    starts_ns = np.array([d.t_start_ns for d in decisions], np.int64)
    labels = label_windows(build_label_spans(found.episode.marks), starts_ns)
    p = np.array([d.belief if beliefs else d.p for d in decisions], np.float64).astype(np.float32)
    texts = {
        "threat": scorer.threat,
        "model": scorer.model,
        "table": str(scorer.spec.table),
        "filter": name,
        "part": PREDICT_PART,
        "role": str(m.role),
        "agent": "on" if m.agent else "off",
        "episode_id": m.episode_id,
        "session": m.session,
        "host_id": m.host.host_id,
        "profile": m.profile,
        "sample_name": m.sample_name,
        "sample_kind": str(m.sample_kind),
        "origin": str(m.origin),
    }
    columns: dict[str, Any] = {key: pa.array([value] * len(decisions), pa.string()) for key, value in texts.items()}
    is_mixed = np.where(labels.is_mixed, FLAG_MIXED, 0).astype(np.uint8)
    columns |= {
        "seed": pa.array([scorer.seed] * len(decisions), pa.int64()),
        "t_center_ns": pa.array(starts_ns + WINDOW_BINS * BIN_NS // 2),
        "purity": pa.array(labels.purity),
        # The live watcher has no labels; a recording has, so that its rows compare with those of a run.
        "flags": pa.array(np.array([d.flags for d in decisions], np.uint8) | is_mixed),
        "y_true": pa.array(labels.phase),
        "y_pred": pa.array(p.argmax(axis=1).astype(np.int8)),
        "known": pa.array([d.known for d in decisions], pa.float32()),
        "alarm": pa.array([d.alarm for d in decisions], pa.bool_()),
        "activity_alarm": pa.array([d.activity_alarm for d in decisions], pa.bool_()),
    }
    columns |= {column: pa.array(_copy_column(p, i)) for i, column in enumerate(PROBABILITY_COLUMNS)}
    return pa.table({key: columns[key] for key in build_prediction_schema().names}, schema=build_prediction_schema())


def _copy_column(p: NDArray[np.float32], i: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(p[:, i])
