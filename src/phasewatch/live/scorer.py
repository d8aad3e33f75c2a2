"""A trained model as the watcher uses it: bins of a window in, probabilities, belief and alarm out (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, mask_of
from phasewatch.dataset.views import BACK, past_names
from phasewatch.errors import RunError, UsageError
from phasewatch.export.edge import Trained
from phasewatch.features.commission import Affine, Reference, affine_of
from phasewatch.features.schema import feature_names
from phasewatch.features.stats import window_stats
from phasewatch.features.tensors import window_view
from phasewatch.models.alarm import AlarmRule
from phasewatch.models.base import InputKind, Inputs, InputSpec, Table
from phasewatch.models.filter import PhaseFilter
from phasewatch.vocab import STRIDE_BINS, WINDOW_BINS

Bins = NDArray[np.float32]
_NAMES = tuple(c.full_name for c in CHANNELS)


class Predictor(Protocol):
    """What gives probabilities: a checkpoint's model, or a graph of an edge bundle."""

    def predict_proba(self, inputs: Inputs) -> NDArray[np.float64]:
        """Give ``(n, 5)`` calibrated probabilities."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model with all that was fixed when it was trained.

    Attributes:
        model, threat, seed: As in a run's predictions; what was made of the values stands in `spec`.
        spec: What it takes.
        predictor: The model.
        filter: Phase filter; None where none was trained.
        alarm: Rule of the alarm; None likewise.
        trained: Who it learnt from.
        where: Where it came from, for messages.
        clean_day: What is usual on the VM while it is known clean; for a model of commissioned numbers.
    """

    model: str
    threat: str
    seed: int
    spec: InputSpec
    predictor: Predictor
    filter: PhaseFilter | None
    alarm: AlarmRule | None
    trained: Trained
    where: str
    clean_day: Reference | None = None

    @property
    def bins_needed(self) -> int:
        """How many bins, the newest last, a decision looks at: a window, and its past where the model has one."""
        return WINDOW_BINS + (BACK * STRIDE_BINS if self.spec.table is Table.CONTEXT else 0)

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Full names of the channels that it reads, in the order of CHANNELS."""
        return channels_of(self.spec)

    @cached_property
    def _places(self) -> NDArray[np.intp]:
        """Where the channels stand among all."""
        return np.array([_NAMES.index(name) for name in self.channels], np.intp)

    @cached_property
    def _columns(self) -> NDArray[np.intp]:
        """Where its table columns stand among all."""
        names = feature_names()
        own = [name for name in self.spec.names if "@" not in name]
        return np.array([names.index(name) for name in own], np.intp)

    @cached_property
    def _affine(self) -> Affine | None:
        """What makes raw numbers those of the clean day; None where the model takes them raw."""
        if self.spec.table is not Table.COMMISSIONED:
            return None
        day = self.clean_day.take(self.channels) if self.clean_day is not None else None
        floors = dict(self.spec.floors)
        return affine_of(day, np.array([floors[name] for name in self.channels]))

    def known(self, bins: Bins) -> NDArray[np.float64]:
        """Give the share of its channels' bins that are known in each window: ``(n, 46)`` gives ``(w,)``."""
        share: NDArray[np.float64] = np.isfinite(window_view(bins)[:, :, self._places]).mean(axis=(1, 2))
        return share

    def probabilities(self, bins: Bins) -> NDArray[np.float64]:
        """Give what the model says of each window of some bins: ``(n, 46)`` gives ``(w, 5)``, calibrated, not filtered.

        Of a model that looks back, the earliest window stands in for those before it.
        """
        if self.spec.kind is InputKind.TABLE:
            stats = window_stats(bins)
            x = stats.reshape(len(stats), -1)[:, self._columns]
            if self._affine is not None:
                x = self._affine.stats(x)
            if self.spec.table is Table.CONTEXT:
                at = np.arange(len(x))
                x = np.concatenate([x[np.maximum(at - back, 0)] for back in range(BACK + 1)], axis=1)
        else:
            x = window_view(bins)[:, :, self._places].transpose(0, 2, 1)
            if self._affine is not None:
                x = self._affine.bins(x)
        return self.predictor.predict_proba(Inputs(x=np.ascontiguousarray(x), spec=self.spec))

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
        allowed = {name for name, on in zip(_NAMES, mask_of(spec.mask), strict=True) if on}
    except UsageError as exc:
        raise RunError(f"{where}: {exc}; train it again") from exc
    channels = channels_of(spec)
    wanted = channels
    if spec.kind is InputKind.TABLE:
        wanted = tuple(name for name in feature_names() if name.rpartition(".")[0] in channels)
        if spec.table is Table.CONTEXT:
            wanted = past_names(wanted)
    if not channels or spec.names != wanted or not set(channels) <= allowed:
        raise RunError(
            f"{where}: its {len(spec.names)} columns are not those of channels of {spec.mask}, in their order; train it again"
        )
    floors = dict(spec.floors)
    if spec.table is Table.COMMISSIONED and not all(0.0 < floors.get(name, 0.0) <= 1e30 for name in channels):
        raise RunError(f"{where}: lacks the scales of a clean day, or one is not above 0; train it again")


def channels_of(spec: InputSpec) -> tuple[str, ...]:
    """Name the channels that a model's columns are made of, in the order of CHANNELS."""
    is_tensor = spec.kind is InputKind.TENSOR
    wanted = {name if is_tensor else name.partition("@")[0].rpartition(".")[0] for name in spec.names}
    return tuple(name for name in _NAMES if name in wanted)
