"""Paired gaps of one model between recipes, channel sets, inputs and smoothings, over the windows that both tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.channels import CHANNELS, SENSOR_SETS, build_channel_mask, list_source_subsets
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.metric_table import MetricRow, select_rows
from phasewatch.evaluation.predictions import PredictionGroup
from phasewatch.evaluation.scoring import (
    BootstrapScores,
    EvaluationSettings,
    IntervalColumns,
    ModelOutput,
    PredictionSet,
    build_interval,
    build_scoring_set,
    compute_gap_p_value,
    count_profiles,
    mean_over_seeds,
    score_models,
    select_resamples,
)
from phasewatch.training.predictions import NO_FILTER
from phasewatch.types import SourceKind

__all__ = [
    "SPLIT_PROTOCOLS",
    "PairedGap",
    "build_comparison_rows",
    "choose_agent_state",
    "compute_gaps",
    "needs_agent",
]

AGENT_ON, AGENT_OFF = "on", "off"
SPLIT_PROTOCOLS = ("random_windows", "in_distribution", "held_out_sample", "held_out_host", "held_out_both")
_PROTOCOL_SETTING = ("realistic", "raw", NO_FILTER)  # channel set, input and smoothing of the split comparison
# Channel sets that are compared with that of the split comparison, on episodes with the agent on or off.
_OTHER_CHANNEL_SETS = (
    ("oracle", AGENT_ON),
    ("portable", AGENT_OFF),
    ("extended", AGENT_OFF),
    ("libvirt", AGENT_OFF),
    ("device", AGENT_ON),
)
_FIRST_SIDE, _SECOND_SIDE = "one", "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class _GapFamily:
    """A family of gaps whose p-values are corrected together.

    Attributes:
        name: The middle of the metric ``macro_f1_<name>_gap``.
        pairs: Two prediction groups, the gap being first minus second, and the agent state of the episodes.
    """

    name: str
    pairs: tuple[tuple[PredictionGroup, PredictionGroup, str | None], ...]


def needs_agent(threat: str) -> bool:
    """Return whether a channel set has a channel that only the guest agent provides."""
    return any(on and c.source is SourceKind.GUEST for c, on in zip(CHANNELS, build_channel_mask(threat), strict=True))


def choose_agent_state(threat: str) -> str:
    """Return the agent state of the episodes that a channel set is scored on: ``on`` if it needs the agent."""
    return AGENT_ON if needs_agent(threat) else AGENT_OFF


def _build_gap_families(groups: Sequence[PredictionGroup]) -> Iterator[_GapFamily]:
    """Yield the families of gaps, as far as their groups exist."""
    at = {b.key: b for b in groups}

    def find_group(recipe: str, threat: str, table: str, filter_: str = NO_FILTER) -> PredictionGroup | None:
        return at.get((recipe, threat, table, filter_))

    protocols = [b for b in (find_group(recipe, *_PROTOCOL_SETTING) for recipe in SPLIT_PROTOCOLS) if b is not None]
    yield _GapFamily(name="recipe", pairs=tuple((a, b, AGENT_OFF) for a, b in combinations(protocols, 2)))
    for recipe, threat, table in sorted({b.key[:3] for b in groups}):
        group = find_group(recipe, threat, table)
        if group is None:
            continue
        agent = choose_agent_state(threat)
        if threat == _PROTOCOL_SETTING[0]:
            pairs = []
            for other, on in _OTHER_CHANNEL_SETS:
                if (other_group := find_group(recipe, other, table)) is not None:
                    pairs.append((other_group, group, on))
            yield _GapFamily(name="threat", pairs=tuple(pairs))
            yield _GapFamily(name="sensor", pairs=tuple(_pair_source_subsets(recipe, table, find_group)))
        if threat == "extended":
            without = [find_group(recipe, f"{threat}-{name}", table) for name in SENSOR_SETS]
            yield _GapFamily(name="without", pairs=tuple((b, group, agent) for b in without if b is not None))
        if table != "raw" and (plain := find_group(recipe, threat, "raw")) is not None:
            yield _GapFamily(name="table", pairs=((group, plain, agent),))
        filters = [b for b in (find_group(recipe, threat, table, f) for f in ("phase", "schedule")) if b is not None]
        yield _GapFamily(name="filter", pairs=tuple((a, b, agent) for a, b in combinations([*filters, group], 2)))


def _pair_source_subsets(
    recipe: str, table: str, find_group: Callable[..., PredictionGroup | None]
) -> Iterator[tuple[PredictionGroup, PredictionGroup, str | None]]:
    """Yield each subset of sources with all four, and those without the agent with all host-side sources."""
    subsets = list_source_subsets()
    for agent, full in ((AGENT_ON, subsets[-1]), (AGENT_OFF, _PROTOCOL_SETTING[0])):
        whole = find_group(recipe, full, table)
        for name in subsets:
            same = (
                _PROTOCOL_SETTING[0] if build_channel_mask(name) == build_channel_mask(_PROTOCOL_SETTING[0]) else name
            )  # all of the host's is trained once
            part = find_group(recipe, name, table) or find_group(recipe, same, table)
            if whole is None or part is None or part is whole or (agent == AGENT_OFF and needs_agent(name)):
                continue
            yield part, whole, agent


def build_comparison_rows(groups: Sequence[PredictionGroup], rules: EvaluationSettings) -> list[MetricRow]:
    """Compute the paired gaps of all families, seeds averaged inside each resample, p by Holm over the family."""
    rows: list[MetricRow] = []
    for kind in _build_gap_families(groups):
        found = [gap for pair in kind.pairs for gap in _build_pair_rows(kind.name, *pair, rules)]
        for metric in ("macro_f1", "macro_f1_3class"):
            own = select_rows(found, f"{metric}_{kind.name}_gap")
            for row, p_holm in zip(own, bootstrap.adjust_p_values([row.p for row in own]), strict=True):
                rows.append(msgspec.structs.replace(row, p_holm=None if p_holm is None else round(p_holm, 10)))
    return rows


def _build_pair_rows(
    kind: str, one: PredictionGroup, other: PredictionGroup, agent: str | None, rules: EvaluationSettings
) -> Iterator[MetricRow]:
    key = one.build_metric_key(agent=agent)
    compared_to = next((b for a, b in zip(one.key, other.key, strict=True) if a != b), None)
    for gap in compute_gaps(one.pool(), other.pool(), agent, rules):
        yield key.row(
            metric=f"{gap.metric}_{kind}_gap",
            model=gap.model,
            compared_to=compared_to,
            seed="mean",
            value=gap.first - gap.second,
            p=gap.p,
            **gap.interval,
            **gap.counts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedGap:
    """Scores of one model on both sides of a comparison, over the windows that both tested.

    Attributes:
        metric: ``macro_f1`` or ``macro_f1_3class``.
        first, second: The score of each side, the mean over the seeds that both have.
        interval: 95 % interval of first minus second, as columns of a row.
        p: Its two-sided p-value; None where it cannot be computed.
        counts: Numbers of windows, episodes, sessions, hosts and profiles.
    """

    model: str
    metric: str
    first: float
    second: float
    interval: IntervalColumns
    p: float | None
    counts: Mapping[str, int]


def compute_gaps(
    one: PredictionSet | None, other: PredictionSet | None, agent: str | None, rules: EvaluationSettings
) -> Iterator[PairedGap]:
    """Compare the models that two sets of predictions share, with the same resamples on both sides.

    Args:
        one, other: Predictions; nothing is compared if one is None.
        agent: ``on`` or ``off`` keeps the episodes with or without the guest's agent; None keeps all.
    """
    sides = [pooled.select_agent(agent) for pooled in (one, other) if pooled is not None]
    if len(sides) < 2 or sides[0] is None or sides[1] is None or (aligned := sides[0].align(sides[1])) is None:
        return
    by_model = [side.group_by_model() for side in aligned]
    models = [m for m in by_model[0] if m in by_model[1]]
    seeds = {m: set.intersection(*({o.seed for o in side[m]} for side in by_model)) for m in models}
    outputs = tuple(
        ModelOutput(model=f"{name} {o.model}", seed=o.seed, probabilities=o.probabilities, y_pred=o.y_pred)
        for name, side in zip((_FIRST_SIDE, _SECOND_SIDE), aligned, strict=True)
        for o in side.outputs
        if o.model in models and (o.seed in seeds[o.model] or not seeds[o.model])
    )
    scope = build_scoring_set(PredictionSet(windows=aligned[0].windows, outputs=outputs), rules)
    kept = select_resamples(scope)
    scored = score_models(scope, kept)
    counts = {**scope.counts(), **count_profiles(scope, rules)}
    for model in models:
        for metric in ("macro_f1", "macro_f1_3class"):
            (first, first_draws), (second, second_draws) = (
                _average_scores(scored[f"{side} {model}"], metric) for side in (_FIRST_SIDE, _SECOND_SIDE)
            )
            draws = None if first_draws is None or second_draws is None else first_draws - second_draws
            yield PairedGap(
                model=model,
                metric=metric,
                first=first,
                second=second,
                interval=build_interval(draws, kept),
                p=compute_gap_p_value(draws, kept),
                counts=counts,
            )


def _average_scores(seeds: Sequence[BootstrapScores], metric: str) -> tuple[float, FloatArray | None]:
    points: list[NDArray[np.float64]] = [getattr(s.point, metric) for s in seeds]
    draws = [None if s.draws is None else getattr(s.draws, metric) for s in seeds]
    return float(np.mean(points)), mean_over_seeds(draws)
