"""Compare two runs: paired gaps over the windows that both tested, and the numbers that an operator reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phasewatch.artifacts import HEADLINE_FILE, PREDICTIONS_FILE
from phasewatch.errors import MismatchError
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.comparisons import PairedGap, choose_agent_state, compute_gaps
from phasewatch.evaluation.evaluate import read_folds
from phasewatch.evaluation.headline import Headline, HeadlineNumber, read_headline
from phasewatch.evaluation.predictions import PredictionGroup, parse_prediction_groups
from phasewatch.evaluation.scoring import PredictionSet, build_settings
from phasewatch.models import registry
from phasewatch.training.predictions import NO_FILTER, read_predictions

__all__ = ["OPERATOR_NUMBERS", "RunComparison", "RunGap", "SharedWindows", "compare_runs"]

# Numbers of the headline that stand beside each other; they are not paired, because each run has its own alarms.
OPERATOR_NUMBERS = (
    "infection_recall_30s",
    "false_alarms_per_vm_hour",
    "median_delay_s",
    "idle_called_clean",
    "macro_f1_3class",
    "macro_f1",
)

_GroupKey = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunGap:
    """One paired gap between two runs.

    Attributes:
        recipe, channels, input: Split recipe, channel set and input of the models.
        agent: Guest agent state of the episodes, ``on`` or ``off``.
        gap: Scores of both sides; first minus second.
        p_holm: p-value corrected over all gaps of the same metric (Holm 1979).
    """

    recipe: str
    channels: str
    input: str
    agent: str
    gap: PairedGap
    p_holm: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWindows:
    """Test windows of one recipe, channel set and input in both runs.

    Attributes:
        first, second: Windows of each run.
        shared: Windows of both, with the same truth.
        relabelled: Windows of both whose truth differs; they are not compared.
    """

    recipe: str
    channels: str
    input: str
    first: int
    second: int
    shared: int
    relabelled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """What two runs have in common and where they differ.

    Attributes:
        gaps: Paired gaps, in the order recipe, channel set, input, model, metric.
        windows: What was compared.
        only_first, only_second: Recipe, channel set and input that one run alone tested.
        headlines: Both headlines; None where a run has none.
    """

    gaps: tuple[RunGap, ...]
    windows: tuple[SharedWindows, ...]
    only_first: tuple[tuple[str, str, str], ...]
    only_second: tuple[tuple[str, str, str], ...]
    headlines: tuple[Headline | None, Headline | None]

    def list_operator_numbers(self) -> Iterator[tuple[str, HeadlineNumber, HeadlineNumber]]:
        """Yield name and both values of the headlines' numbers; nothing unless both have one for the same recipe."""
        first, second = self.headlines
        if first is None or second is None or first.recipe != second.recipe:
            return
        for name in OPERATOR_NUMBERS:
            yield name, getattr(first, name), getattr(second, name)


def compare_runs(first: Path, second: Path, *, resamples: int = bootstrap.N_RESAMPLES, seed: int = 0) -> RunComparison:
    """Compare the models that two runs share, on the test windows that both have with the same truth.

    Predictions are those before smoothing. Baselines are left out, because they would only enlarge the family of tests.
    The intervals are over sessions, resampled within hosts, with the same resamples on both sides.

    Args:
        resamples: Number of resamples of the bootstrap.
        seed: Its seed.

    Raises:
        RunError: If a run has no predictions.
        MismatchError: If the runs have no test window in common.
    """
    rules = build_settings(resamples=resamples, seed=seed)
    groups = [_read_groups(run) for run in (first, second)]
    common = [key for key in groups[0] if key in groups[1]]
    baselines = {row.key for row in registry.BUILTIN_MODELS if row.is_baseline}
    gaps: list[tuple[_GroupKey, str, PairedGap]] = []
    windows = []
    for key in common:
        sides = [groups[i][key].pool() for i in (0, 1)]
        if sides[0] is None or sides[1] is None:
            continue
        shared, kept = _count_shared(key, sides[0], sides[1])
        windows.append(shared)
        if kept is not None:
            agent = choose_agent_state(key[1])
            gaps += [(key, agent, gap) for gap in compute_gaps(*kept, agent, rules) if gap.model not in baselines]
    if not any(each.shared for each in windows):
        raise MismatchError(
            f"{first} and {second} have no test window in common; compare runs of the same store and recipes, or "
            "test a model on another store: phasewatch predict STORE --model RUN --metrics X.json"
        )
    return RunComparison(
        gaps=tuple(_correct_p_values(gaps)),
        windows=tuple(windows),
        only_first=tuple(key[:3] for key in groups[0] if key not in groups[1]),
        only_second=tuple(key[:3] for key in groups[1] if key not in groups[0]),
        headlines=(_read_headline(first), _read_headline(second)),
    )


def _read_groups(run: Path) -> Mapping[_GroupKey, PredictionGroup]:
    table = read_predictions(run / PREDICTIONS_FILE)
    found = {group.key: group for group in parse_prediction_groups(table, read_folds(run)[0])}
    return {key: group for key, group in sorted(found.items()) if group.filter == NO_FILTER}


def _count_shared(
    key: _GroupKey, one: PredictionSet, other: PredictionSet
) -> tuple[SharedWindows, tuple[PredictionSet, PredictionSet] | None]:
    """Return the counts of shared windows, and both sides on those with the same truth."""
    aligned = one.align(other)
    same = None if aligned is None else aligned[0].windows.y_true == aligned[1].windows.y_true
    n_shared = 0 if same is None else int(np.count_nonzero(same))
    counts = SharedWindows(
        recipe=key[0],
        channels=key[1],
        input=key[2],
        first=len(one),
        second=len(other),
        shared=n_shared,
        relabelled=0 if same is None else len(same) - n_shared,
    )
    if aligned is None or same is None or n_shared == 0:
        return counts, None
    return counts, (aligned[0].select(same), aligned[1].select(same))


def _correct_p_values(gaps: list[tuple[_GroupKey, str, PairedGap]]) -> Iterator[RunGap]:
    corrected: dict[int, float | None] = {}
    for metric in sorted({gap.metric for _, _, gap in gaps}):
        at = [i for i, (_, _, gap) in enumerate(gaps) if gap.metric == metric]
        corrected.update(zip(at, bootstrap.adjust_p_values([gaps[i][2].p for i in at]), strict=True))
    for i, ((recipe, channels, table, _), agent, gap) in enumerate(gaps):
        yield RunGap(recipe=recipe, channels=channels, input=table, agent=agent, gap=gap, p_holm=corrected[i])


def _read_headline(run: Path) -> Headline | None:
    """Return the run's headline; None before `evaluate`."""
    return read_headline(run) if (run / HEADLINE_FILE).is_file() else None
