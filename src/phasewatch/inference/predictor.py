"""A trained model as the watcher uses it: bins of a window in, probabilities, belief and alarm out (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.channels import CHANNEL_NAMES, build_channel_mask
from phasewatch.dataset.loader import N_CONTEXT_WINDOWS, build_context_names
from phasewatch.errors import RunError, UsageError
from phasewatch.features.normalise import ChannelScaling, HostBaseline, build_scaling
from phasewatch.features.schema import feature_names
from phasewatch.features.stats import window_stats
from phasewatch.features.windows import build_window_view
from phasewatch.inference.edge_bundle import TrainingOrigin
from phasewatch.models.alarm import AlarmRule, AlarmState, compute_activity_score
from phasewatch.models.base import InputKind, InputSpec, InputVariant, ModelInputs
from phasewatch.models.smoothing import PhaseFilter
from phasewatch.types import BIN_NS, PHASES, STRIDE_BINS, WINDOW_BINS, Phase


class ProbabilityEstimator(Protocol):
    """What gives probabilities: a checkpoint's model, or a graph of an edge bundle."""

    def predict_proba(self, inputs: ModelInputs) -> NDArray[np.float64]:
        """Give ``(n, 5)`` calibrated probabilities."""


@dataclass(frozen=True, kw_only=True)
class PhasePredictor:
    """A model with all that was fixed when it was trained.

    Attributes:
        model, threat, seed: As in a run's predictions; what was made of the values stands in `spec`.
        spec: What it takes.
        estimator: The model.
        filter: Phase filter; None where none was trained.
        alarm: Rule of the alarm; None likewise.
        trained: Who it learnt from.
        where: Where it came from, for messages.
        baseline: What is usual on the VM while it is known clean; for a model of commissioned numbers.
    """

    model: str
    threat: str
    seed: int
    spec: InputSpec
    estimator: ProbabilityEstimator
    filter: PhaseFilter | None
    alarm: AlarmRule | None
    trained: TrainingOrigin
    where: str
    baseline: HostBaseline | None = None

    @property
    def bins_needed(self) -> int:
        """How many bins, the newest last, a decision looks at: a window, and its past where the model has one."""
        return WINDOW_BINS + (N_CONTEXT_WINDOWS * STRIDE_BINS if self.spec.table is InputVariant.CONTEXT else 0)

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Full names of the channels that it reads, in the order of CHANNELS."""
        return list_model_channels(self.spec)

    @cached_property
    def _channel_indices(self) -> NDArray[np.intp]:
        """Where the channels stand among all."""
        return np.array([CHANNEL_NAMES.index(name) for name in self.channels], np.intp)

    @cached_property
    def _column_indices(self) -> NDArray[np.intp]:
        """Where its table columns stand among all."""
        names = feature_names()
        own = [name for name in self.spec.names if "@" not in name]
        return np.array([names.index(name) for name in own], np.intp)

    @cached_property
    def _baseline_transform(self) -> ChannelScaling | None:
        """What makes raw numbers those of the clean day; None where the model takes them raw."""
        if self.spec.table is not InputVariant.COMMISSIONED:
            return None
        day = self.baseline.select_channels(self.channels) if self.baseline is not None else None
        floors = dict(self.spec.floors)
        return build_scaling(day, np.array([floors[name] for name in self.channels]))

    def compute_known_share(self, bins: Float32Array) -> NDArray[np.float64]:
        """Give the share of its channels' bins that are known in each window: ``(n, 46)`` gives ``(w,)``."""
        share: NDArray[np.float64] = np.isfinite(build_window_view(bins)[:, :, self._channel_indices]).mean(axis=(1, 2))
        return share

    def predict_windows(self, bins: Float32Array) -> NDArray[np.float64]:
        """Give what the model says of each window of some bins: ``(n, 46)`` gives ``(w, 5)``, calibrated, not filtered.

        Of a model that looks back, the earliest window stands in for those before it.
        """
        if self.spec.kind is InputKind.TABLE:
            stats = window_stats(bins)
            x = stats.reshape(len(stats), -1)[:, self._column_indices]
            if self._baseline_transform is not None:
                x = self._baseline_transform.scale_stats(x)
            if self.spec.table is InputVariant.CONTEXT:
                at = np.arange(len(x))
                x = np.concatenate([x[np.maximum(at - back, 0)] for back in range(N_CONTEXT_WINDOWS + 1)], axis=1)
        else:
            x = build_window_view(bins)[:, :, self._channel_indices].transpose(0, 2, 1)
            if self._baseline_transform is not None:
                x = self._baseline_transform.scale_bins(x)
        return self.estimator.predict_proba(ModelInputs(x=np.ascontiguousarray(x), spec=self.spec))

    def caveat(self, accel: str, arch: str) -> str:
        """Say what every output must say on such a VM; empty if training saw its like, or nobody knows what it saw."""
        words = []
        if self.trained.accels and accel not in self.trained.accels:
            words.append(
                f"training never saw a VM under {accel or 'an unknown accelerator'} (only {', '.join(self.trained.accels)})"
            )
        if self.trained.archs and arch not in self.trained.archs:
            words.append(f"training never saw {arch} (only {', '.join(self.trained.archs)})")
        if "simulated" in self.trained.origins:
            words.append("it learnt from simulated episodes")
        return "; ".join(words) + ": a guess" if words else ""


def check_columns(spec: InputSpec, *, where: str) -> None:
    """Raise RunError unless a model from outside takes what a watcher can make, in the order in which it makes it.

    Args:
        spec: What the model says that it takes.
        where: Names the model.
    """
    try:
        allowed = {name for name, on in zip(CHANNEL_NAMES, build_channel_mask(spec.mask), strict=True) if on}
    except UsageError as exc:
        raise RunError(f"{where}: {exc}; train it again") from exc
    channels = list_model_channels(spec)
    wanted = channels
    if spec.kind is InputKind.TABLE:
        wanted = tuple(name for name in feature_names() if name.rpartition(".")[0] in channels)
        if spec.table is InputVariant.CONTEXT:
            wanted = build_context_names(wanted)
    if not channels or spec.names != wanted or not set(channels) <= allowed:
        raise RunError(
            f"{where}: its {len(spec.names)} columns are not those of channels of {spec.mask}, in their order; train it again"
        )
    floors = dict(spec.floors)
    if spec.table is InputVariant.COMMISSIONED and not all(0.0 < floors.get(name, 0.0) <= 1e30 for name in channels):
        raise RunError(f"{where}: lacks the scales of a clean day, or one is not above 0; train it again")


def list_model_channels(spec: InputSpec) -> tuple[str, ...]:
    """Name the channels that a model's columns are made of, in the order of CHANNELS."""
    is_tensor = spec.kind is InputKind.TENSOR
    wanted = {name if is_tensor else name.partition("@")[0].rpartition(".")[0] for name in spec.names}
    return tuple(name for name in CHANNEL_NAMES if name in wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDecision:
    """What is said of one window.

    Attributes:
        number: Of the window, 0 first; since the grid was begun.
        t_start_ns, t_end_ns: The window.
        p: ``(5,)`` calibrated probabilities.
        belief: ``(5,)`` after the phase filter; the same as `p` where there is none.
        phase: The likeliest by `belief`.
        known: Share of the model's channels × bins that were known.
        flags: Of the window: 1 clock step, 2 late ticks.
        alarm: Whether the alarm rings after this window; None where no rule was trained.
        raised: Whether it began with this window.
        since_ns: End of the window at which it began, while it rings.
    """

    number: int
    t_start_ns: int
    t_end_ns: int
    p: tuple[float, ...]
    belief: tuple[float, ...]
    phase: Phase
    known: float
    flags: int
    alarm: bool | None
    raised: bool
    since_ns: int | None


class PhasePostprocessor:
    """Filter and alarm over the windows of one VM, in the order of time."""

    def __init__(self, scorer: PhasePredictor) -> None:
        self._scorer = scorer
        self._belief: NDArray[np.float64] | None = None
        self._alarm = AlarmState()
        self._since_ns: int | None = None
        self._last_ns = 0

    def postprocess(
        self, number: int, start_ns: int, p: NDArray[np.float64], *, known: float, flags: int
    ) -> PhaseDecision:
        """Take in what the model says of the next window."""
        stride_ns, end_ns = STRIDE_BINS * BIN_NS, start_ns + WINDOW_BINS * BIN_NS
        belief = p
        if self._scorer.filter is not None:
            strides = max(1, round((end_ns - self._last_ns) / stride_ns)) if self._belief is not None else 1
            belief = self._belief = self._scorer.filter.step(self._belief, p, strides=strides)
        self._last_ns = end_ns
        rings: bool | None = None
        if self._scorer.alarm is not None:
            self._alarm = self._alarm.step(self._scorer.alarm, float(compute_activity_score(belief)))
            rings = self._alarm.is_active
            self._since_ns = end_ns if self._alarm.has_started else self._since_ns if rings else None
        return PhaseDecision(
            number=number, t_start_ns=start_ns, t_end_ns=end_ns, p=tuple(p.tolist()), belief=tuple(belief.tolist()),
            phase=PHASES[int(belief.argmax())], known=known, flags=flags, alarm=rings, raised=self._alarm.has_started,
            since_ns=self._since_ns,
        )  # fmt: skip
