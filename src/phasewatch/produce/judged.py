"""A recorded bundle that a model judged just now, as a recording to be replayed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phasewatch.errors import RunError
from phasewatch.features.windows import label_windows, spans_of
from phasewatch.grid.files import row_of
from phasewatch.live.scorer import Scorer
from phasewatch.live.tracker import Decision
from phasewatch.models.filter import NONE, PHASE
from phasewatch.produce.replay import Choice, Judged, Recording
from phasewatch.validate.verdict import Examined
from phasewatch.vocab import BIN_NS, WINDOW_BINS


def recording_of(found: Examined, scorer: Scorer, said: Sequence[Decision], *, caveat: str | None = None) -> Recording:
    """Put a usable bundle, its labels and what was decided of its windows together.

    Args:
        found: The bundle.
        scorer: Whose decisions they are.
        said: In time's order.
        caveat: What a reader must know, such as that the model learnt from this very bundle.

    Raises:
        RunError: If the bundle is not usable, or nothing was said of it.
    """
    if found.episode is None or found.grid is None or not said:
        raise RunError(f"{found.verdict.path}: nothing to replay: {found.verdict.detail or 'shorter than a window'}")
    starts = np.array([d.t_start_ns for d in said], np.int64)
    p = np.array([d.belief for d in said], np.float64)
    judged = Judged(
        choice=Choice(recipe="deploy", threat=scorer.threat, model=scorer.model, table=str(scorer.spec.table)),
        fold="all",
        seed=scorer.seed,
        filter=PHASE if scorer.filter is not None else NONE,
        t_center_ns=starts + WINDOW_BINS * BIN_NS // 2,
        p=p,
        y_pred=p.argmax(axis=1),
        y_true=label_windows(spans_of(found.episode.marks), starts).phase.astype(np.int64),
        alarm=None if scorer.alarm is None else np.array([bool(d.alarm) for d in said], np.bool_),
        threshold=None if scorer.alarm is None else scorer.alarm.theta,
        caveat=caveat,
    )
    return Recording(row=row_of(found.episode, found.grid), bins=found.grid.bins, judged=judged)
