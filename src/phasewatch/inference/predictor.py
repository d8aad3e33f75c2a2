"""Predict phases from bins with a trained model: probabilities, phase filter and alarm, for live and offline use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.channels import CHANNEL_NAMES, build_channel_mask
from phasewatch.errors import RunError, UsageError
from phasewatch.features.inputs import compute_inputs, list_input_channels, list_table_columns
from phasewatch.features.normalise import ChannelScaling, HostBaseline, build_scaling
from phasewatch.features.schema import feature_names
from phasewatch.features.windows import build_window_view
from phasewatch.inference.edge_bundle import TrainingOrigin
from phasewatch.models.alarm import AlarmKind, AlarmRule, AlarmState, compute_alarm_score, find_alarm_rule
from phasewatch.models.base import InputKind, InputSpec, InputVariant, ModelInputs
from phasewatch.models.checkpoint import MAX_MAGNITUDE
from phasewatch.models.smoothing import PhaseFilter
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS, PHASES, STRIDE_BINS, STRIDE_NS, WINDOW_BINS, Phase

__all__ = [
    "AlarmMemory",
    "PhaseDecision",
    "PhasePostprocessor",
    "PhasePredictor",
    "ProbabilityEstimator",
    "check_columns",
    "list_model_channels",
]


class ProbabilityEstimator(Protocol):
    """A loaded model: a `PhaseModel` or an `OnnxModel`."""

    def predict_proba(self, inputs: ModelInputs) -> NDArray[np.float64]:
        """Return calibrated probabilities, ``(n, 5)`` float64."""


@dataclass(frozen=True, kw_only=True)
class PhasePredictor:
    """A trained model with its phase filter, alarm rules and input transform.

    Attributes:
        model, threat, seed: Key, channel set and seed of the model.
        spec: Its input.
        estimator: The loaded model.
        filter: Phase filter of the displayed phase; None shows the phase of the window alone.
        alarms: Alarm rules of each kind and stride; empty if none were fitted.
        trained: Origin of its training data.
        where: File or folder of the model, for messages.
        baseline: Baseline of the VM, for a model of values relative to it.
    """

    model: str
    threat: str
    seed: int
    spec: InputSpec
    estimator: ProbabilityEstimator
    filter: PhaseFilter | None
    alarms: tuple[AlarmRule, ...]
    trained: TrainingOrigin
    where: str
    baseline: HostBaseline | None = None

    @property
    def bins_needed(self) -> int:
        """Number of bins, the newest last, that a decision needs: a window, and earlier ones if the model uses them."""
        return self.spec.n_bins

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Full names of the channels that the model uses, in the order of CHANNELS."""
        return list_model_channels(self.spec)

    @cached_property
    def _channel_indices(self) -> NDArray[np.intp]:
        """Indices of the channels in CHANNEL_NAMES."""
        return np.array([CHANNEL_NAMES.index(name) for name in self.channels], np.intp)

    @cached_property
    def scaling(self) -> ChannelScaling | None:
        """The scaling by the VM's baseline; None for a model of raw values."""
        if self.spec.table is not InputVariant.COMMISSIONED:
            return None
        day = self.baseline.select_channels(self.channels) if self.baseline is not None else None
        floors = dict(self.spec.floors)
        return build_scaling(day, np.array([floors[name] for name in self.channels]))

    def find_rule(self, kind: AlarmKind, stride_bins: int) -> AlarmRule | None:
        """Return the rule of an alarm for windows at a stride; None if none was fitted."""
        return find_alarm_rule(self.alarms, kind, stride_bins * BIN_NS // 10**9)

    def compute_known_share(self, bins: Float32Array, stride_bins: int = STRIDE_BINS) -> NDArray[np.float64]:
        """Compute the known share of the model's readings in each window: ``(n, 73)`` float32 → ``(w,)`` float64."""
        windows = build_window_view(bins, stride_bins)[:, :, self._channel_indices]
        share: NDArray[np.float64] = np.isfinite(windows).mean(axis=(1, 2))
        return share

    def predict_windows(self, bins: Float32Array, stride_bins: int = STRIDE_BINS) -> NDArray[np.float64]:
        """Predict the calibrated probabilities of each window, before the phase filter.

        Args:
            bins: ``(n, 73)`` float32 bins of all channels from the first bin of the episode on; NaN where unknown.
            stride_bins: Bins from one window's start to the next.

        Returns:
            ``(w, 5)`` float64 in the order of PHASES. A window has the same probabilities at every stride.
        """
        x = compute_inputs(bins, self.spec, stride_bins=stride_bins, scaling=self.scaling)
        return self.estimator.predict_proba(ModelInputs(x=x, spec=self.spec))

    def compute_newest_known_share(self, bins: Float32Array) -> float:
        """Compute the known share of the model's readings in the window that ends with the last bin."""
        return float(np.isfinite(bins[-WINDOW_BINS:][:, self._channel_indices]).mean())

    def predict_newest(self, bins: Float32Array) -> NDArray[np.float64]:
        """Predict the calibrated probabilities of the window that ends with the last bin, as `predict_windows`.

        Args:
            bins: ``(n, 73)`` float32; the last `bins_needed` are used, or all since the start of the episode if there
                are fewer.

        Returns:
            ``(5,)`` float64 in the order of PHASES.
        """
        x = compute_inputs(bins, self.spec, scaling=self.scaling, newest_only=True)
        newest: NDArray[np.float64] = self.estimator.predict_proba(ModelInputs(x=x, spec=self.spec))[0]
        return newest

    def caveat(self, accel: str, arch: str) -> str:
        """Render a warning if a VM differs from the training data; empty if it does not, or its origin is unknown."""
        words = []
        if self.trained.accels and accel not in self.trained.accels:
            known = ", ".join(self.trained.accels)
            words.append(f"training never saw a VM under {accel or 'an unknown accelerator'} (only {known})")
        if self.trained.archs and arch not in self.trained.archs:
            words.append(f"training never saw {arch} (only {', '.join(self.trained.archs)})")
        if "simulated" in self.trained.origins:
            words.append("it learnt from simulated episodes")
        return "; ".join(words) + ": a guess" if words else ""


def check_columns(spec: InputSpec, *, where: str) -> None:
    """Raise RunError unless the columns of a model's input are those of its channel set, in order.

    Args:
        spec: The input that the model's file states.
        where: Name of the model, for the message.
    """
    try:
        allowed = {name for name, on in zip(CHANNEL_NAMES, build_channel_mask(spec.mask), strict=True) if on}
    except UsageError as exc:
        raise RunError(f"{where}: {exc}; train it again") from exc
    channels = list_model_channels(spec)
    expected = channels
    if spec.kind is InputKind.TABLE:
        expected = list_table_columns(feature_names(), channels, spec.table)
    if not channels or spec.names != expected or not set(channels) <= allowed:
        raise RunError(
            f"{where}: its {len(spec.names)} columns are not those of the channel set {spec.mask} in order; "
            "train it again"
        )
    scales = [dict(spec.floors).get(name, 0.0) for name in channels]
    if spec.table is InputVariant.COMMISSIONED and not all(0.0 < scale <= MAX_MAGNITUDE for scale in scales):
        raise RunError(
            f"{where}: lacks the scale of a channel for the host's baseline, or one is invalid; train it again"
        )


def list_model_channels(spec: InputSpec) -> tuple[str, ...]:
    """Return the channels of a model's columns, in the order of CHANNELS."""
    return list_input_channels(spec.kind, spec.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDecision:
    """The decision on one window.

    Attributes:
        number: Number of the window, from 0.
        t_start_ns, t_end_ns: Start and end of the window on the wall clock.
        p: Five calibrated probabilities, from which the alarms are decided.
        belief: Five probabilities after the phase filter; the same as `p` without one.
        phase: The most probable phase by `belief`.
        known: Share of the model's channels × bins that are known.
        flags: Flags of the window: 1 clock step, 2 late ticks.
        alarm: Whether the infection alarm is on after this window; None without a rule.
        raised: Whether it started at this window.
        since_ns: End of the window at which it started; None while it is off.
        activity_alarm, activity_raised, activity_since_ns: The same of the activity alarm.
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
    activity_alarm: bool | None
    activity_raised: bool
    activity_since_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmMemory:
    """One alarm between two watches of a VM.

    Attributes:
        state: Whether it is on, and the windows that its rule remembers.
        since_ns: End of the window at which it started; None while it is off.
    """

    state: AlarmState
    since_ns: int | None = None


class PhasePostprocessor:
    """Apply the phase filter and the alarm rules to the windows of one VM, in the order of time.

    At a stride below 5 s there is one chain of beliefs for each offset within 5 s, so that each advances by the stride
    that the filter was fitted to.

    Args:
        scorer: The model.
        stride_bins: Bins from one window's start to the next.
    """

    def __init__(self, scorer: PhasePredictor, *, stride_bins: int = LIVE_STRIDE_BINS) -> None:
        self._filter = scorer.filter
        self._chains = [_BeliefChain() for _ in range(STRIDE_BINS // stride_bins)]
        self._alarms = {kind: _AlarmTrack(kind, scorer.find_rule(kind, stride_bins)) for kind in AlarmKind}

    @property
    def alarms(self) -> dict[AlarmKind, AlarmMemory]:
        """The alarms of which there is a rule."""
        return {
            kind: AlarmMemory(state=track.state, since_ns=track.since_ns)
            for kind, track in self._alarms.items()
            if track.is_active is not None
        }

    def restore_alarms(self, memory: Mapping[AlarmKind, AlarmMemory]) -> None:
        """Continue alarms of an earlier watch; an alarm without a rule stays off."""
        for kind, alarm in memory.items():
            self._alarms[kind].restore(alarm)

    def postprocess(
        self, number: int, start_ns: int, p: NDArray[np.float64], *, known: float, flags: int
    ) -> PhaseDecision:
        """Return the decision on the next window.

        Args:
            number: Number of the window, from 0.
            start_ns: Start of the window on the wall clock.
            p: ``(5,)`` float64 calibrated probabilities.
            known: Known share of the model's channels × bins.
            flags: Flags of the window.
        """
        end_ns = start_ns + WINDOW_BINS * BIN_NS
        belief = p if self._filter is None else self._chains[number % len(self._chains)].step(self._filter, p, end_ns)
        for track in self._alarms.values():
            track.step(p, end_ns)
        infection, activity = self._alarms[AlarmKind.INFECTION], self._alarms[AlarmKind.ACTIVITY]
        return PhaseDecision(
            number=number,
            t_start_ns=start_ns,
            t_end_ns=end_ns,
            p=tuple(p.tolist()),
            belief=tuple(belief.tolist()),
            phase=PHASES[int(belief.argmax())],
            known=known,
            flags=flags,
            alarm=infection.is_active,
            raised=infection.state.has_started,
            since_ns=infection.since_ns,
            activity_alarm=activity.is_active,
            activity_raised=activity.state.has_started,
            activity_since_ns=activity.since_ns,
        )


class _BeliefChain:
    """The belief of the windows at one offset within 5 s."""

    def __init__(self) -> None:
        self._belief: NDArray[np.float64] | None = None
        self._last_ns = 0

    def step(self, phase_filter: PhaseFilter, p: NDArray[np.float64], end_ns: int) -> NDArray[np.float64]:
        """Return the belief after the window that ends at `end_ns`."""
        strides = max(1, round((end_ns - self._last_ns) / STRIDE_NS)) if self._belief is not None else 1
        self._belief, self._last_ns = phase_filter.step(self._belief, p, strides=strides), end_ns
        return self._belief


class _AlarmTrack:
    """The state of one alarm; without a rule it stays off."""

    def __init__(self, kind: AlarmKind, rule: AlarmRule | None) -> None:
        self._kind, self._rule = kind, rule
        self.state = AlarmState()
        self.since_ns: int | None = None

    @property
    def is_active(self) -> bool | None:
        return None if self._rule is None else self.state.is_active

    def restore(self, alarm: AlarmMemory) -> None:
        """Continue an earlier alarm."""
        if self._rule is not None:
            self.state, self.since_ns = alarm.state, alarm.since_ns

    def step(self, p: NDArray[np.float64], end_ns: int) -> None:
        """Update the state with the window that ends at `end_ns`."""
        if self._rule is None:
            return
        self.state = self.state.step(self._rule, float(compute_alarm_score(p, self._kind)))
        self.since_ns = end_ns if self.state.has_started else self.since_ns if self.state.is_active else None
