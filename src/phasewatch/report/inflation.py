"""The inflation meter: what the same model would have claimed had its test set been easier, and what to expect instead."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.evaluate.rows import MetricRow
from phasewatch.report import figures, scores
from phasewatch.report.blocks import Block, Section, Table, bracket, number, score_of
from phasewatch.report.drawing import Figure
from phasewatch.report.evidence import PLACE
from phasewatch.report.failings import EVALUATE, Told
from phasewatch.train.predictions import NO_FILTER

MODEL = PLACE.model  # the same under every recipe, whatever the headline's is
LEAKY, CLAIMED, HOST, BOTH = "random_windows", "in_distribution", "held_out_host", "held_out_both"
RECIPES = {
    LEAKY: ("random windows", "neighbouring windows of one episode on both sides; leaky, and common"),
    CLAIMED: ("random episodes", "other episodes of the same hosts and samples"),
    "held_out_sample": ("unseen sample", "the same hosts, a variant that was never trained on"),
    HOST: ("unseen host", "the same samples, a machine that was never trained on"),
    BOTH: ("unseen host and sample", "neither was trained on"),
}
COMMAND = "phasewatch train RUN --recipes all && phasewatch evaluate RUN && phasewatch report RUN"


def score_under(rows: Sequence[MetricRow], recipe: str, base: str = "macro_f1") -> MetricRow | None:
    """Find the meter's score under one recipe."""
    where = {"recipe": recipe, "fold": "pooled", "threat": PLACE.threat, "table": PLACE.table, "filter": NO_FILTER}
    return scores.one(rows, base, model=MODEL, agent=PLACE.agent, vs=None, **where)


def sentence(rows: Sequence[MetricRow], model: str = MODEL) -> str:
    """Say what would have been claimed and what to expect; nothing where the run has no two such numbers.

    The meter has a model of its own, named where the page is about another.

    Source: DESIGN.md, section 9, "Inflation meter".
    """
    by = {recipe: score_under(rows, recipe) for recipe in RECIPES}
    claimed = by[LEAKY] or by[CLAIMED]
    places = ((HOST, "on a new host"), (BOTH, "on a new host with a new sample"))
    expected = [(row, where) for recipe, where in places if (row := by[recipe]) is not None and row.value is not None]
    if claimed is None or claimed.value is None or not expected:
        return ""
    parts = ", ".join(f"{number(row.value)} {bracket(row)} {where}" for row, where in expected)
    return f"You would have claimed {number(claimed.value)}; expect {parts}{'' if model == MODEL else f' ({MODEL})'}."


def upside_down(rows: Sequence[MetricRow]) -> str:
    """Say what it means that other episodes of known hosts score below an unseen host; nothing where they do not."""
    dealt, host = score_under(rows, CLAIMED), score_under(rows, HOST)
    if dealt is None or host is None or dealt.value is None or host.value is None or dealt.value >= host.value:
        return ""
    sizes = [_trained_on(rows, recipe) for recipe in (CLAIMED, HOST)]
    size = " after training on as much" if all(sizes) and abs(sizes[0] - sizes[1]) < 0.05 * sizes[1] else ""
    return (
        f"Random episodes score below an unseen host{size}, though they are the easier test: which sessions fall into one "
        "fold is one random deal, which spreads samples less evenly than hosts do, and no interval counts the luck of it; "
        "take the two for equal."
    )


def inflation(told: Told) -> Section:
    """Build the section from the rows of all recipes."""
    rows = told.all_rows
    found = {recipe: score_under(rows, recipe) for recipe in RECIPES}
    absent = [RECIPES[r][0] for r, row in found.items() if row is None]
    said = [
        f"{MODEL} with the same settings under five ways to hold out; trained on: windows a fold, the mean over folds."
    ]
    if words := upside_down(rows):
        said.append(words)
    if absent:
        said.append(f"Not trained in this grid: {', '.join(absent)}.")
    block = Block(
        key="inflation",
        title="The inflation meter",
        sentences=tuple(said),
        figure=_figure(told, found) if any(found.values()) else None,
        absent="" if any(found.values()) else "No recipe of the meter was trained in this grid.",
        table=_table(rows, found),
        shown=True,
        command=COMMAND if absent else EVALUATE,
    )
    lead = "A number means what its split means; the further down, the less of the test was ever seen."
    return Section(key="inflation", title="What would have been claimed", lead=lead, blocks=(block,))


def _figure(told: Told, found: dict[str, MetricRow | None]) -> Figure:
    series = tuple(
        figures.Series(
            name=name,
            scores=tuple(score_of(RECIPES[r][0], score_under(told.all_rows, r, base)) for r in found),
        )
        for base, name in (("macro_f1", "five phases"), ("macro_f1_3", "three states"))
    )
    return figures.whiskers(series, title="macro-F1", origin=told.origin)


def _table(rows: Sequence[MetricRow], found: dict[str, MetricRow | None]) -> Table:
    body = []
    for recipe, row in found.items():
        name, about = RECIPES[recipe]
        size = _trained_on(rows, recipe)
        body.append(
            (
                f"{name}: {about}",
                number(row.value if row else None),
                bracket(row) if row else "not trained in this grid",
                _gap(rows, recipe),
                f"{size:,.0f}" if size else "–",
                f"{row.n_windows:,}" if row else "–",
                f"{row.n_episodes:,}" if row else "–",
            )
        )
    columns = ("tested on", "macro-F1", "95 % interval", "less unseen host", "trained on", "test windows", "episodes")
    return Table(columns=columns, numeric=(False, True, False, False, True, True, True), rows=tuple(body))


def _trained_on(rows: Sequence[MetricRow], recipe: str) -> float:
    """Give the windows that a fold learns from, the mean over folds; 0 where that is not known."""
    row = scores.one(rows, "train_windows", recipe=recipe, threat=PLACE.threat, table=PLACE.table, model=MODEL)
    return row.value if row is not None and row.value is not None else 0.0


def _gap(rows: Sequence[MetricRow], recipe: str) -> str:
    """Give the paired gap to the unseen host, whichever of the two the row counts from."""
    if recipe == HOST:
        return "–"
    for one, other, sign in ((recipe, HOST, 1.0), (HOST, recipe, -1.0)):
        row = scores.one(rows, "macro_f1_recipe_gap", recipe=one, vs=other, model=MODEL)
        if row is not None and row.value is not None:
            ends = sorted(sign * v for v in (row.low, row.high) if v is not None)
            span = f" [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else f" (no interval: {row.why})"
            return f"{sign * row.value:+.2f}{span}"
    return "–"
