"""How many variants a run tried, and whether the choice among them holds on other hosts (ADR 75)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricNote, MetricRow, NoteCode
from phasewatch.evaluation.predictions import ModelPredictions, PredictionGroup
from phasewatch.evaluation.scoring import MetricKey
from phasewatch.metrics import compute_pooled_macro_f1
from phasewatch.models.registry import BASELINE_MODELS
from phasewatch.training.predictions import NO_FILTER

__all__ = ["build_selection_rows"]

_COUNT_NOTE = MetricNote(code=NoteCode.COUNT, text="a count")
_ONE_CHOICE_NOTE = MetricNote(code=NoteCode.COUNT, text="one choice on half of the hosts, so it has no interval")

GroupKey = tuple[str, str, str, str]  # recipe, channel set, input, smoothing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A model with an input variant: its predictions by fold, of the first seed."""

    model: str
    table: str
    val_b: Mapping[str, ModelPredictions]
    test: Mapping[str, ModelPredictions]


def build_selection_rows(
    groups: Sequence[PredictionGroup],
    val_b_groups: Mapping[GroupKey, PredictionGroup],
    trials: Mapping[tuple[str, str, str], int],
) -> Iterator[MetricRow]:
    """Yield for each recipe the number of variants tried, and the score of the choice on the hosts that did not choose.

    `variants_tried` counts models, input variants and seeds, each times the settings that were tried; baselines do not
    count. `selection_confirmed` has two rows: hosts are sorted by name and halved alternately, the best variant by
    five-phase macro-F1 on validation B of one half (``bin`` 0 or 1) is scored on the test windows of the other.

    Args:
        groups: Test predictions of all recipes.
        val_b_groups: Key of a group → its predictions on validation B.
        trials: Recipe, model and input variant → number of settings tried; absent for the defaults alone.
    """
    chosen = [g for g in groups if g.filter == NO_FILTER and g.threat == DEFAULT_HEADLINE.channel_set]
    for recipe in dict.fromkeys(g.recipe for g in chosen):
        own = [g for g in chosen if g.recipe == recipe]
        key = MetricKey(
            recipe=recipe,
            fold="pooled",
            channel_set=DEFAULT_HEADLINE.channel_set,
            input=DEFAULT_HEADLINE.input,
            smoothing=NO_FILTER,
            agent=None,
        )
        tried = {(s.model, g.table, s.seed) for g in own for s in g.predictions if s.model not in BASELINE_MODELS}
        count = sum(max(1, trials.get((recipe, model, table), 1)) for model, table, _ in tried)
        yield key.row(metric="variants_tried", model=None, value=float(count), unit="variants", note=_COUNT_NOTE)
        yield from _build_confirmation_rows(key, list(_find_candidates(own, val_b_groups)))


def _find_candidates(
    groups: Sequence[PredictionGroup], val_b_groups: Mapping[GroupKey, PredictionGroup]
) -> Iterator[_Candidate]:
    """Yield the variants that were trained on every fold."""
    for group in groups:
        val_b = val_b_groups.get(group.key)
        for model in dict.fromkeys(s.model for s in group.predictions if s.model not in BASELINE_MODELS):
            seed = min(s.seed for s in group.predictions if s.model == model)
            test, validation = (
                {s.fold: s for s in part if (s.model, s.seed) == (model, seed)}
                for part in (group.predictions, val_b.predictions if val_b is not None else ())
            )
            if sorted(test) == sorted(validation) == sorted(group.folds):
                yield _Candidate(model=model, table=group.table, val_b=validation, test=test)


def _build_confirmation_rows(key: MetricKey, candidates: Sequence[_Candidate]) -> Iterator[MetricRow]:
    hosts = {
        fold: str(min(set(found.windows.host_id)))
        for candidate in candidates[:1]
        for fold, found in candidate.test.items()
    }
    names = sorted(set(hosts.values()))
    if len(candidates) < 2 or len(names) < 2:
        return
    halves = [{fold for fold, host in hosts.items() if host in names[at::2]} for at in (0, 1)]
    for number, (half, other) in enumerate((halves, halves[::-1])):
        best = max(candidates, key=lambda c: (_score(c.val_b[fold] for fold in half), c.model))
        value = _score([best.test[fold] for fold in sorted(other)])
        yield key.row(
            metric="selection_confirmed", model=best.model, bin=float(number), value=value, note=_ONE_CHOICE_NOTE
        )


def _score(parts: Iterable[ModelPredictions]) -> float:
    """Compute five-phase macro-F1 over the windows of several folds."""
    return compute_pooled_macro_f1((part.windows.y_true, part.output.y_pred) for part in parts)
