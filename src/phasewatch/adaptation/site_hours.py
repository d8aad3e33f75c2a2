"""The known-clean hours of a site: what is learnt from, what thresholds are fitted to, and what only tests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import BINS_DIR, read_run_episodes
from phasewatch.binning.storage import BinIndexRow, index_rows_by_id, open_bins
from phasewatch.dataset import EpisodeWindows
from phasewatch.dataset.live_windows import compute_live_digest, iter_live_windows, list_live_windows
from phasewatch.errors import StoreError
from phasewatch.metrics import N_CLASSES
from phasewatch.models.alarm import LIVE_STRIDE_S, LOOK_BACK_NS, RULE_STRIDE_S
from phasewatch.models.base import InputSpec, LabelledExamples, ModelInputs, PhaseModel, ScoredWindows
from phasewatch.types import Phase

__all__ = ["MIN_SITE_S", "SiteHours", "SitePart", "assign_site_parts", "read_site_hours"]

MIN_SITE_S = 600  # clean seconds below which nothing can be held back
# Of each host's clean time, in order: half is learnt from, a quarter each sets thresholds and tests.
_CUTS = (0.5, 0.75)
_WHOLE_TOLERANCE = 0.1  # of a host's clean time: a cut between episodes may be so far from the wanted one


class SitePart(IntEnum):
    """The use of a clean window."""

    LEARN = 0  # joins the training set
    THRESHOLD = 1  # the thresholds of the alarms must stay within their budget on it
    TEST = 2  # nothing is fitted to it; false alarms are counted on it
    GAP = 3  # between two uses of one episode; not used


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteHours:
    """The clean windows of every second of a site.

    Attributes:
        run: Folder with the bins of the site's episodes.
        rows: The episodes, in the order of `windows.episodes`.
        windows: Their ``n`` windows, all of phase clean.
        part: ``(n,)`` int8 `SitePart` of each window.
    """

    run: Path
    rows: tuple[BinIndexRow, ...]
    windows: EpisodeWindows
    part: NDArray[np.int8]

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts, sorted."""
        return tuple(sorted({e.host_id for e in self.windows.episodes}))

    def count_hours(self, part: SitePart | None = None) -> float:
        """Return the VM-hours of a part, or of all parts."""
        n = len(self.part) if part is None else np.count_nonzero(self.part == part)
        return float(n) * LIVE_STRIDE_S / 3600

    def mark_training_stride(self) -> NDArray[np.bool_]:
        """Mark the windows that models are trained on, every five seconds of an episode, ``(n,)`` bool."""
        marked: NDArray[np.bool_] = np.round(self.windows.t_center_s).astype(np.int64) % RULE_STRIDE_S == 0
        return marked

    def build_examples(self, spec: InputSpec, *, without_host: str = "", at_most: int) -> LabelledExamples | None:
        """Return the windows that join a training set; None if there are none.

        Args:
            spec: Input of the model.
            without_host: A host to leave out, because the fold holds out one of that name.
            at_most: Number of windows beyond which evenly spaced ones are kept, so that clean time of one site does not
                outweigh that of all recorded hosts.
        """
        rows = (self.part == SitePart.LEARN) & self.mark_training_stride()
        rows &= self.windows.mark_episodes(lambda e: e.host_id != without_host)
        chosen = np.flatnonzero(rows)
        if not len(chosen):
            return None
        if len(chosen) > at_most:
            chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, at_most).astype(np.int64))]
        own = np.zeros(len(rows), np.bool_)
        own[chosen] = True
        windows = self.windows.take(own)
        x = np.concatenate([part.x for part in iter_live_windows(self.run, windows, spec)])
        return LabelledExamples(inputs=ModelInputs(x=x, spec=spec), y=windows.y)

    def score(self, model: PhaseModel, spec: InputSpec, part: SitePart, stride_s: int) -> ScoredWindows:
        """Predict the windows of a part at a stride.

        Args:
            model: A fitted model that was not trained on them.
            spec: Its input.
            part: The part.
            stride_s: Seconds between two windows, 1 or 5.
        """
        rows = self.part == part
        if stride_s == RULE_STRIDE_S:
            rows = rows & self.mark_training_stride()
        windows = self.windows.take(rows)
        p = [np.zeros((0, N_CLASSES))]
        p += [model.predict_proba(one.inputs) for one in iter_live_windows(self.run, windows, spec)]
        digest = compute_live_digest(self.run, windows, spec)
        return ScoredWindows(labels=windows.label_sequence, p=np.concatenate(p), sha256=digest)


def read_site_hours(run: Path) -> SiteHours:
    """Read the clean windows of a validated store, and assign them to parts.

    Args:
        run: Folder with the index and the bins of the store.

    Raises:
        StoreError: If an episode has a label other than clean and unknown, none is clean, or there is too little clean
            time.
    """
    rows = index_rows_by_id(open_bins(run / BINS_DIR))
    for row in sorted(rows.values(), key=lambda r: (r.host_id, r.episode_id)):
        if odd := next((phase for phase, _, _ in row.spans if phase not in (Phase.CLEAN, Phase.UNKNOWN)), None):
            raise StoreError(
                f"{row.host_id}/{row.episode_id}: has the label {odd}, expected clean or unknown; take it out of the "
                "store, or correct its label with `phasewatch label`"
            )
    labelled = {key for key, row in rows.items() if any(phase is Phase.CLEAN for phase, _, _ in row.spans)}
    clean = [e for e in read_run_episodes(run, only=rows) if e.episode_id in labelled]
    if not clean:
        raise StoreError(
            f"none of {len(rows)} episodes is labelled clean; mark known-clean recordings with `phasewatch label`"
        )
    windows = list_live_windows(run, clean)
    seconds = len(windows) * LIVE_STRIDE_S
    if seconds < MIN_SITE_S:
        raise StoreError(
            f"{seconds / 60:.1f} minutes of clean time, expected at least {MIN_SITE_S // 60}: half is learnt from, and "
            "the rest is held back; record more"
        )
    return SiteHours(
        run=run,
        rows=tuple(rows[e.episode_id] for e in windows.episodes),
        windows=windows,
        part=assign_site_parts(windows),
    )


def assign_site_parts(windows: EpisodeWindows) -> NDArray[np.int8]:
    """Assign each host's clean time, in order, to what is learnt, what sets thresholds and what tests.

    A host is cut between episodes, where that comes within a tenth of a half and of three quarters of its time.
    Otherwise an episode is cut, and the windows of the 60 s after the cut have no use: an alarm looks back as far.

    Args:
        windows: ``n`` windows of every second.

    Returns:
        ``(n,)`` int8 `SitePart`.
    """
    part = np.full(len(windows), SitePart.LEARN, np.int8)
    for host in sorted({e.host_id for e in windows.episodes}):
        own = [i for i, e in enumerate(windows.episodes) if e.host_id == host]
        own.sort(key=lambda i: (windows.episodes[i].started_wall_ns, windows.episodes[i].episode_id))
        at = [np.flatnonzero(windows.episode_index == i) for i in own]
        order = np.concatenate(at)
        ends = np.cumsum([len(one) for one in at])
        cuts = [_choose_cut(ends, round(share * len(order))) for share in _CUTS]
        for cut, use in zip(cuts, (SitePart.THRESHOLD, SitePart.TEST), strict=True):
            part[order[cut:]] = use
        for cut in cuts:
            if cut not in ends:
                inside = windows.episode_index[order] == windows.episode_index[order[cut]]
                after_ns = windows.t_center_ns[order] - windows.t_center_ns[order[cut]]
                part[order[inside & (after_ns >= 0) & (after_ns < LOOK_BACK_NS)]] = SitePart.GAP
    return part


def _choose_cut(ends: NDArray[np.int64], wanted: int) -> int:
    """Return the end of an episode that is close to a wanted cut; the wanted one if none is."""
    nearest = int(ends[np.argmin(np.abs(ends - wanted))])
    return nearest if abs(nearest - wanted) <= _WHOLE_TOLERANCE * int(ends[-1]) else wanted
