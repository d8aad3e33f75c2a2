"""Predictions of counterfactual episodes: the test episodes of a fold with the durations of their loads exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.artifacts import RunEpisode
from phasewatch.audit.shortcuts import AnsweredWindows, SpliceGroup
from phasewatch.dataset.loader import read_baselines
from phasewatch.dataset.splices import SplicedEpisode, SpliceKind, build_splices
from phasewatch.errors import UsageError
from phasewatch.features.inputs import compute_inputs
from phasewatch.features.normalise import ChannelScaling, build_scaling
from phasewatch.features.windows import WINDOW_NS, compute_window_starts, n_windows
from phasewatch.models import registry
from phasewatch.models.base import InputSpec, InputVariant, ModelInputs
from phasewatch.training.experiment import Experiment
from phasewatch.types import Phase

__all__ = ["CounterfactualPredictor", "find_inner_windows"]

_GROUPS = {
    SpliceKind.SHORT_LOAD: (SpliceGroup.SHORT_LOAD, Phase.CLEAN),
    SpliceKind.LONG_ACTIVITY: (SpliceGroup.LONG_ACTIVITY, Phase.ACTIVE),
    SpliceKind.SHORT_ACTIVITY: (SpliceGroup.SHORT_ACTIVITY, Phase.ACTIVE),
}


@dataclass(slots=True, kw_only=True)
class CounterfactualPredictor:
    """Predicts the counterfactual windows of test episodes with the checkpoints of a run.

    The splices of an episode and their inputs are computed once for all models that read the same columns.
    """

    run: Path
    _splices: dict[str, tuple[SplicedEpisode, ...]] = field(default_factory=dict)
    _inputs: dict[InputSpec, dict[str, Float32Array]] = field(default_factory=dict)

    def __call__(self, experiment: Experiment, episodes: Sequence[RunEpisode]) -> AnsweredWindows | None:
        """Return the windows that lie wholly in the load or activity of each splice; None where there are none.

        Args:
            experiment: A finished experiment; None comes back for one whose weights were not kept.
            episodes: Its test episodes.

        Raises:
            RunError: If its checkpoint cannot be read.
        """
        try:
            if ":" in experiment.model or registry.find_model(experiment.model).persist != "exact":
                return None
        except UsageError:
            return None
        splices = self._build(episodes)
        if not splices:
            return None
        model = registry.load(experiment.folder(self.run))
        if model.spec is None:
            return None
        scalings = self._read_scalings(model.spec, {s.source.host_id for s in splices})
        x = np.concatenate([self._compute(splice, model.spec, scalings) for splice in splices])
        if not len(x):
            return None
        sizes = [len(find_inner_windows(splice)) for splice in splices]
        of = np.repeat(np.arange(len(splices)), sizes)

        def column(values: Sequence[object]) -> NDArray[np.object_]:
            return np.array(values, dtype=object)[of]

        return AnsweredWindows(
            host=column([s.source.host_id for s in splices]),
            session=column([s.source.session for s in splices]),
            episode=column([s.source.episode_id for s in splices]),
            y=np.array([_GROUPS[s.kind][1].code for s in splices], np.int64)[of],
            p=model.predict_proba(ModelInputs(x=x, spec=model.spec)),
            group=column([str(_GROUPS[s.kind][0]) for s in splices]),
        )

    def _build(self, episodes: Sequence[RunEpisode]) -> list[SplicedEpisode]:
        """Return the splices of the episodes, built once each."""
        if missing := [e for e in episodes if e.episode_id not in self._splices]:
            found: dict[str, list[SplicedEpisode]] = {e.episode_id: [] for e in missing}
            for splice in build_splices(self.run, missing):
                found[splice.source.episode_id].append(splice)
            self._splices |= {i: tuple(parts) for i, parts in found.items()}
        return [splice for e in episodes for splice in self._splices[e.episode_id]]

    def _compute(
        self, splice: SplicedEpisode, spec: InputSpec, scalings: Mapping[str, ChannelScaling] | None
    ) -> Float32Array:
        """Return the inputs of the windows inside a splice's load or activity."""
        known, key = self._inputs.setdefault(spec, {}), f"{splice.source.episode_id} {splice.kind}"
        if key not in known:
            scaling = None if scalings is None else scalings[splice.source.host_id]
            known[key] = compute_inputs(splice.bins, spec, scaling=scaling)[find_inner_windows(splice)]
        return known[key]

    def _read_scalings(self, spec: InputSpec, hosts: set[str]) -> dict[str, ChannelScaling] | None:
        """Return the scaling of each host for a model of values relative to its baseline; None for another model."""
        if spec.table is not InputVariant.COMMISSIONED:
            return None
        floors = dict(spec.floors)
        baselines = read_baselines(self.run, tuple(floors))
        return {host: build_scaling(baselines.get(host), np.array(list(floors.values()))) for host in hosts}


def find_inner_windows(splice: SplicedEpisode) -> NDArray[np.intp]:
    """Return the indices of the windows that lie wholly in the middle segment of a splice."""
    span = splice.spans[len(splice.spans) // 2]
    t0_ns = splice.spans[0].start_ns
    starts = compute_window_starts(t0_ns, n_windows(len(splice.bins)))
    inside: NDArray[np.intp] = np.flatnonzero((starts >= span.start_ns) & (starts + WINDOW_NS <= span.end_ns))
    return inside
