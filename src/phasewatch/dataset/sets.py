"""Windows, what models see of them, and the sets of a fold: values alone, nothing is read here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import RunEpisode
from phasewatch.models.base import LabelledExamples, ModelInputs
from phasewatch.models.smoothing import LabelSequence
from phasewatch.splits import Fold


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeWindows:
    """Windows of known phase in the order (host, episode, time), whatever order the file has.

    Attributes:
        episodes: Whose windows they are, in that order.
        episode_index: ``(n,)`` index into `episodes`.
        y: ``(n,)`` phase codes.
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
        """Mark the windows of the episodes that a rule keeps, ``(n,)``."""
        kept = np.fromiter((keep(e) for e in self.episodes), dtype=np.bool_, count=len(self.episodes))
        marked: NDArray[np.bool_] = kept[self.episode_index]
        return marked

    def take(self, rows: NDArray[np.bool_]) -> EpisodeWindows:
        """Give the marked windows, and of the episodes those that are left."""
        present, of = np.unique(self.episode_index[rows], return_inverse=True)
        return EpisodeWindows(
            episodes=tuple(self.episodes[i] for i in present),
            episode_index=of.astype(np.int32),
            t_center_ns=self.t_center_ns[rows],
            t_center_s=self.t_center_s[rows],
            purity=self.purity[rows],
            flags=self.flags[rows],
            y=self.y[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowSet:
    """Windows, and what a model sees of them."""

    windows: EpisodeWindows
    inputs: ModelInputs

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def x(self) -> NDArray[np.float32]:
        """``(n, f)``, NaN where nothing was known."""
        return self.inputs.x

    @property
    def X(self) -> NDArray[np.float32]:
        """The same, spelled as scikit-learn and aeon do: ``(n, f)``, or ``(n, channels, timepoints)`` of a tensor."""
        return self.x

    @property
    def y(self) -> NDArray[np.int64]:
        """``(n,)`` phase codes."""
        return self.windows.y

    @property
    def names(self) -> tuple[str, ...]:
        """What the columns of `x` are."""
        return self.inputs.spec.names

    @property
    def groups(self) -> NDArray[np.str_]:
        """``(n,)`` host and session of each window: what may not be torn apart."""
        labels = np.array([f"{e.host_id}/{e.session}" for e in self.windows.episodes], dtype=np.str_)
        return labels[self.windows.episode_index]

    @property
    def label_sequence(self) -> LabelSequence:
        """Truth, episode and time of each window, as filter and alarm take them."""
        return LabelSequence(y=self.y, episode_index=self.windows.episode_index, t_center_ns=self.windows.t_center_ns)

    @property
    def examples(self) -> LabelledExamples:
        """Inputs with labels, as `PhaseModel.fit` takes them."""
        return LabelledExamples(inputs=self.inputs, y=self.y)

    def take(self, rows: NDArray[np.bool_]) -> WindowSet:
        """Give the marked windows."""
        return WindowSet(
            windows=self.windows.take(rows), inputs=ModelInputs(x=self.inputs.x[rows], spec=self.inputs.spec)
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldData:
    """A fold's five sets of windows; `soak` is every soak episode of the run, for false alarms only.

    Attributes:
        calibration_soak: ``(n,)`` marks the soak windows of no host (or sample group) that the recipe holds out in this
            fold: thresholds may be set by them.
    """

    fold: Fold
    train: WindowSet
    val_a: WindowSet
    val_b: WindowSet
    test: WindowSet
    soak: WindowSet
    calibration_soak: NDArray[np.bool_]
