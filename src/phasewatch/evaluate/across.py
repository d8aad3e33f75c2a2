"""One model in two places: paired gaps between recipes, threat models, tables and filters, over the windows that both tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, mask_of, source_subsets
from phasewatch.evaluate import bootstrap
from phasewatch.evaluate.board import scope_of
from phasewatch.evaluate.bootstrap import Floats
from phasewatch.evaluate.rows import MetricRow
from phasewatch.evaluate.said import Board, Joined, join
from phasewatch.evaluate.scope import (
    Answer,
    Place,
    Rules,
    Scored,
    Shown,
    keep_resamples,
    mean_over_seeds,
    p_of_gap,
    score_answers,
    span,
    tested,
)
from phasewatch.train.predictions import NO_FILTER
from phasewatch.vocab import Source

AGENT_ON, AGENT_OFF = "on", "off"
INFLATION = ("random_windows", "in_distribution", "held_out_sample", "held_out_host", "held_out_both")
METERED = ("realistic", "raw", NO_FILTER)  # threat model, table and filter of the inflation meter
_ONE, _OTHER = "one", "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A family of gaps, corrected together.

    Attributes:
        name: Of the metric: ``macro_f1_<name>_gap@5of6``; `vs` is then another recipe, threat model, table or filter.
        pairs: Boards whose gap, first less second, is asked for, and the agent of the episodes.
    """

    name: str
    pairs: tuple[tuple[Board, Board, str | None], ...]


def needs_agent(threat: str) -> bool:
    """Whether a threat model has a channel that only the guest's agent gives."""
    return any(on and c.source is Source.GUEST for c, on in zip(CHANNELS, mask_of(threat), strict=True))


def own_agent(threat: str) -> str:
    """Say on which episodes a threat model is scored first: where the agent ran if it needs it, else where it did not."""
    return AGENT_ON if needs_agent(threat) else AGENT_OFF


def families(boards: Sequence[Board]) -> Iterator[Kind]:
    """List the gaps that a reader asks for, as far as the boards are there."""
    at = {b.key: b for b in boards}

    def board(recipe: str, threat: str, table: str, filter_: str = NO_FILTER) -> Board | None:
        return at.get((recipe, threat, table, filter_))

    metered = [b for b in (board(recipe, *METERED) for recipe in INFLATION) if b is not None]
    yield Kind(name="recipe", pairs=tuple((a, b, AGENT_OFF) for a, b in combinations(metered, 2)))
    for recipe, threat, table in sorted({b.key[:3] for b in boards}):
        here = board(recipe, threat, table)
        if here is None:
            continue
        agent = own_agent(threat)
        if threat == METERED[0]:
            pairs = []
            for other, on in (("oracle", AGENT_ON), ("portable", AGENT_OFF)):
                if (there := board(recipe, other, table)) is not None:
                    pairs.append((there, here, on))
            yield Kind(name="threat", pairs=tuple(pairs))
            yield Kind(name="sensor", pairs=tuple(_sensors(recipe, table, board)))
        if table != "raw" and (plain := board(recipe, threat, "raw")) is not None:
            yield Kind(name="table", pairs=((here, plain, agent),))
        filters = [b for b in (board(recipe, threat, table, f) for f in ("phase", "schedule")) if b is not None]
        yield Kind(name="filter", pairs=tuple((a, b, agent) for a, b in combinations([*filters, here], 2)))


def _sensors(recipe: str, table: str, board: Callable[..., Board | None]) -> Iterator[tuple[Board, Board, str | None]]:
    """Hold each subset of sources against all four, and those without the agent against all that the host has."""
    subsets = source_subsets()
    for agent, full in ((AGENT_ON, subsets[-1]), (AGENT_OFF, METERED[0])):
        whole = board(recipe, full, table)
        for name in subsets:
            same = METERED[0] if mask_of(name) == mask_of(METERED[0]) else name  # all of the host's is trained once
            part = board(recipe, name, table) or board(recipe, same, table)
            if whole is None or part is None or part is whole or (agent == AGENT_OFF and needs_agent(name)):
                continue
            yield part, whole, agent


def build_gaps(boards: Sequence[Board], rules: Rules) -> list[MetricRow]:
    """Compute the paired gaps of all families, seeds averaged inside each resample, p by Holm over the family."""
    rows: list[MetricRow] = []
    for kind in families(boards):
        found = [gap for pair in kind.pairs for gap in _gaps(kind.name, *pair, rules)]
        for metric in ("macro_f1", "macro_f1_3"):
            own = [row for row in found if row.metric.startswith(f"{metric}_{kind.name}_gap@")]
            for row, p_holm in zip(own, bootstrap.holm([row.p for row in own]), strict=True):
                rows.append(msgspec.structs.replace(row, p_holm=None if p_holm is None else round(p_holm, 10)))
    return rows


def _gaps(kind: str, one: Board, other: Board, agent: str | None, rules: Rules) -> Iterator[MetricRow]:
    pooled = [join(b, b.folds) for b in (one, other)]
    if pooled[0] is None or pooled[1] is None:
        return
    sides = [side.of_agent(agent) for side in pooled if side is not None]
    if sides[0] is None or sides[1] is None or (aligned := _align(sides[0], sides[1])) is None:
        return
    models = [m for m in dict.fromkeys(a.model for a in aligned[0]) if any(a.model == m for a in aligned[1])]
    seeds = {m: set.intersection(*({a.seed for a in own if a.model == m} for own in aligned[:2])) for m in models}
    answers = [
        Answer(model=f"{side} {a.model}", seed=a.seed, probabilities=a.probabilities, y_pred=a.y_pred)
        for side, own in zip((_ONE, _OTHER), aligned[:2], strict=True)
        for a in own
        if a.model in models and (a.seed in seeds[a.model] or not seeds[a.model])
    ]
    scope = scope_of(aligned[2], answers, rules)
    kept = keep_resamples(scope)
    scored = score_answers(scope, kept)
    of, counts = tested(scope, rules), scope.counts()
    place = Place(recipe=one.recipe, fold="pooled", threat=one.threat, table=one.table, filter=one.filter, agent=agent)
    vs = next(b for a, b in zip(one.key, other.key, strict=True) if a != b)
    for model in models:
        for metric in ("macro_f1", "macro_f1_3"):
            (mine, my_draws), (theirs, their_draws) = (
                _mean(scored[f"{side} {model}"], metric) for side in (_ONE, _OTHER)
            )
            draws = None if my_draws is None or their_draws is None else my_draws - their_draws
            yield place.row(
                metric=f"{metric}_{kind}_gap@{of}", model=model, vs=vs, seed="mean", value=mine - theirs,
                p=p_of_gap(draws, kept), **span(draws, kept), **counts,
            )  # fmt: skip


def _align(one: Joined, other: Joined) -> tuple[list[Answer], list[Answer], Shown] | None:
    """Find the windows that both tested, in one order; None without any."""
    place = {key: i for i, key in enumerate(other.shown.window_ids())}
    common = [(i, place[key]) for i, key in enumerate(one.shown.window_ids()) if key in place]
    if not common:
        return None
    mine, theirs = (np.array(rows, np.intp) for rows in zip(*common, strict=True))
    here = one.take(mine)
    return list(here.answers), list(other.take(theirs).answers), here.shown


def _mean(seeds: Sequence[Scored], metric: str) -> tuple[float, Floats | None]:
    points: list[NDArray[np.float64]] = [getattr(s.point, metric) for s in seeds]
    draws = [None if s.draws is None else getattr(s.draws, metric) for s in seeds]
    return float(np.mean(points)), mean_over_seeds(draws)
