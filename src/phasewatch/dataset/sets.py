"""Windows, their model inputs, and the sets of a fold, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import RunEpisode
from phasewatch.models.base import LabelledExamples, ModelInputs
from phasewatch.models.smoothing import LabelSequence
from phasewatch.splits import Fold

__all__ = ["EpisodeWindows", "FoldData", "WindowSet"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeWindows:
    """Windows of known phase in the order (host, episode, time).

    Attributes:
        episodes: Episodes of the windows, in that order.
        episode_index: ``(n,)`` int32 index into `episodes`.
        t_center_ns: ``(n,)`` int64 centre of each window on the wall clock, ns.
        t_center_s: ``(n,)`` float32 centre of each window since the first label, s.
        purity: ``(n,)`` float32 share of the window in its phase.
        flags: ``(n,)`` uint8 bits of `features.windows` and `FLAG_NO_BASELINE`.
        y: ``(n,)`` int64 phase codes.
    """

    episodes: tuple[RunEpisode, ...]
    episode_index: NDArray[np.int32]
    t_center_ns: NDArray[np.int64]
    t_center_s: NDArray[np.float32]
    purity: NDArray[np.float32]
    flags: NDArray[np.uint8]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def mark_episodes(self, keep: Callable[[RunEpisode], bool]) -> NDArray[np.bool_]:
        """Mark the windows of the episodes for which `keep` is true, ``(n,)`` bool."""
        kept = np.fromiter((keep(e) for e in self.episodes), dtype=np.bool_, count=len(self.episodes))
        marked: NDArray[np.bool_] = kept[self.episode_index]
        return marked

    @property
    def label_sequence(self) -> LabelSequence:
        """Label, episode and time of each window, for the phase filter and the alarms."""
        return LabelSequence(y=self.y, episode_index=self.episode_index, t_center_ns=self.t_center_ns)

    def take(self, rows: NDArray[np.bool_]) -> EpisodeWindows:
        """Return the windows marked in ``(n,)`` bool, and the episodes that still have any."""
        present, episode_index = np.unique(self.episode_index[rows], return_inverse=True)
        return EpisodeWindows(
            episodes=tuple(self.episodes[i] for i in present),
            episode_index=episode_index.astype(np.int32),
            t_center_ns=self.t_center_ns[rows],
            t_center_s=self.t_center_s[rows],
            purity=self.purity[rows],
            flags=self.flags[rows],
            y=self.y[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowSet:
    """Windows with their model inputs."""

    windows: EpisodeWindows
    inputs: ModelInputs

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def x(self) -> NDArray[np.float32]:
        """``(n, f)`` or ``(n, c, t)`` float32; NaN where unknown."""
        return self.inputs.x

    @property
    def X(self) -> NDArray[np.float32]:
        """The same array under the name of scikit-learn and aeon: ``(n, f)``, or ``(n, channels, timepoints)``."""
        return self.x

    @property
    def y(self) -> NDArray[np.int64]:
        """``(n,)`` int64 phase codes."""
        return self.windows.y

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of `x`."""
        return self.inputs.spec.names

    @property
    def groups(self) -> NDArray[np.str_]:
        """``(n,)`` str host and session of each window, for a grouped cross-validation."""
        labels = np.array([f"{e.host_id}/{e.session}" for e in self.windows.episodes], dtype=np.str_)
        return labels[self.windows.episode_index]

    @property
    def label_sequence(self) -> LabelSequence:
        """Label, episode and time of each window, for the phase filter and the alarms."""
        return self.windows.label_sequence

    @property
    def examples(self) -> LabelledExamples:
        """Inputs with labels, for `PhaseModel.fit`."""
        return LabelledExamples(inputs=self.inputs, y=self.y)

    def take(self, rows: NDArray[np.bool_]) -> WindowSet:
        """Return the windows marked in ``(n,)`` bool."""
        return WindowSet(
            windows=self.windows.take(rows), inputs=ModelInputs(x=self.inputs.x[rows], spec=self.inputs.spec)
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldData:
    """The sets of windows of a fold.

    Attributes:
        fold: The assignment of episodes to sets.
        train, val_a, val_b, test: Windows of the sets.
        soak: Windows of all soak episodes of the run, for false alarms only.
        calibration_soak: ``(n,)`` bool over the soak windows: those that share no held-out host or sample group with
            the test set, to which thresholds may be fitted.
        baseline: Windows of the baseline episodes of hosts that are in train or validation: the machine is known clean
            and runs no load; None without any.
        idle: Windows of the baseline episodes of hosts that are in the test set alone; None without any. They ask
            whether a clean machine that runs no load is called clean.
        run: Folder of the run, for the windows of every second; None if there are none.
        extra: Further examples for training, from spliced episodes of the train set; None if the input has no context.
    """

    fold: Fold
    train: WindowSet
    val_a: WindowSet
    val_b: WindowSet
    test: WindowSet
    soak: WindowSet
    calibration_soak: NDArray[np.bool_]
    baseline: WindowSet | None = None
    idle: WindowSet | None = None
    run: Path | None = None
    extra: LabelledExamples | None = None

    def build_extra(self, *parts: WindowSet) -> LabelledExamples | None:
        """Return what joins the training set beside some parts: `extra`, and the baseline windows of their hosts.

        Args:
            parts: The sets of the fold that a model is fitted to.

        Returns:
            The examples; None if there are none.
        """
        found = [] if self.extra is None else [self.extra]
        if self.baseline is not None:
            hosts = {e.host_id for part in parts for e in part.windows.episodes}
            own = self.baseline.take(self.baseline.windows.mark_episodes(lambda e: e.host_id in hosts))
            if len(own):
                marks = np.ones(len(own), np.bool_)
                found.append(LabelledExamples(inputs=own.inputs, y=own.y, is_baseline=marks))
        return LabelledExamples.concatenate(found) if found else None
