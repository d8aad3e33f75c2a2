"""Evidence becomes the page's argument: the claim, how sure it is, where it fails, what it rests on, how to repeat it."""

from __future__ import annotations

from phasewatch.evaluate.rows import METRICS, MetricRow, headline
from phasewatch.report import figures, scores
from phasewatch.report.blocks import (
    Block,
    Claim,
    Page,
    Section,
    Tile,
    bracket,
    count,
    metric_table,
    number,
    score_of,
)
from phasewatch.report.evidence import PLACE, Evidence
from phasewatch.report.failings import EVALUATE, NO_METRICS, Told, where_it_fails
from phasewatch.report.grounds import grounds, repeat
from phasewatch.report.windows import origin_words, scored


def tell(evidence: Evidence) -> Page:
    """Build the page from whatever a run has."""
    all_rows = evidence.metrics.metrics if evidence.metrics else ()
    rows = scores.headline_rows(all_rows)
    model = scores.headline_model(rows)
    windows = None
    if evidence.predictions is not None:
        windows = scored(evidence.predictions, model or PLACE.model)
    origin = origin_words(windows, evidence.bundles)
    told = Told(rows=rows, all_rows=all_rows, model=model, windows=windows, origin=origin)
    return Page(
        origin=origin,
        claim=_claim(told, headline(evidence.metrics) if evidence.metrics else ""),
        notices=(*_simulated(origin), *evidence.notes),
        sections=(
            _how_sure(told),
            where_it_fails(told, evidence.folds),
            grounds(evidence, told.windows, origin),
            repeat(evidence),
        ),
    )


def _simulated(origin: str) -> tuple[str, ...]:
    if "simulated" not in origin:
        return ()
    what = "All" if origin == "simulated" else "Some"
    return (
        f"{what} test episodes are simulated: what they show is that the pipeline works, not how well real VMs can be told.",
    )


def _claim(told: Told, line: str) -> Claim:
    if told.model is None:
        words = f"No claim can be made: {METRICS} holds no macro-F1 of a model on {PLACE.recipe.replace('_', ' ')}."
        return Claim(words=words, line=line, tiles=(), verdict="`phasewatch evaluate RUN` computes it.", holds=False)
    five, three, clock, majority = (
        scores.pick(told.rows, base, model=model)
        for base, model in (
            ("macro_f1", told.model),
            ("macro_f1_3", told.model),
            ("macro_f1", scores.CLOCK),
            ("macro_f1", "majority"),
        )
    )
    tiles = tuple(
        Tile(name=name, value=number(row.value), interval=bracket(row), about=about, beside=beside)
        for row, name, about, beside in (
            (five, "five phases", f"macro-F1, {told.model}, host never seen", False),
            (three, "three states", "quiet, infecting, active: armed and dormant hardly differ from clean", False),
            (clock, "elapsed time alone", "the same five phases, told by the clock without any telemetry", True),
            (majority, "majority", "always the most frequent phase", True),
        )
        if row is not None
    )
    gap = scores.clock_gap(told.all_rows, told.model)
    above = scores.above_clock(five, clock, gap)
    return Claim(
        words=_in_words(told.model, five),
        line=line,
        tiles=tiles,
        verdict=_verdict(above, clock, gap),
        holds=above is True,
    )


def _in_words(model: str, five: MetricRow | None) -> str:
    if five is None or five.value is None:
        return f"How well {model} tells the phase on an unseen host was not measured."
    where = f"on {count(five.n_hosts, 'host')} that its training never saw" if five.n_hosts > 1 else "on an unseen host"
    return f"{model} tells the five phases {where} with macro‑F1 {five.value:.2f} {bracket(five)}."


def _verdict(above: bool | None, clock: MetricRow | None, gap: scores.Gap | None) -> str:
    paired = ""
    if gap is not None:
        span = f" [{gap.low:+.2f}, {gap.high:+.2f}]" if gap.low is not None and gap.high is not None else ""
        paired = f" (paired gap {gap.value:+.2f}{span})"
    if above is True:
        return f"The model is above what elapsed time alone would score{paired}."
    if above is False:
        return f"The model is not above elapsed time: what it scores, a clock could score as well{paired}."
    if clock is None or clock.value is None:
        return (
            "Elapsed time alone was not scored, so it cannot be said whether the telemetry adds anything to the clock."
        )
    return "Without an interval it cannot be said whether the model is above elapsed time."


def _how_sure(told: Told) -> Section:
    board = scores.contenders(told.rows)
    series = (
        figures.Series(name="five phases", scores=tuple(score_of(c.label, c.five) for c in board)),
        figures.Series(name="three states", scores=tuple(score_of(c.label, c.three) for c in board)),
    )
    table = [pair for c in board for pair in ((c.label, "five phases", c.five), (c.label, "three states", c.three))]
    block = Block(
        key="leaderboard",
        title="Leaderboard",
        sentences=(
            "Each model on hosts that its training never saw, each episode tested once, all folds pooled.",
            "A baseline looks at no telemetry; a model that does not stand clear of it has learnt nothing. "
            "Whiskers are 95 % intervals.",
        ),
        figure=figures.whiskers(series, title="macro-F1", origin=told.origin) if board else None,
        absent="" if board else NO_METRICS,
        table=metric_table(table) if board else None,
        shown=True,
        command=EVALUATE,
    )
    lead = (
        "Intervals come from resampling sessions (episodes that ran side by side count as one) within hosts. "
        "They hold for these hosts, samples and seeds, and say nothing of the spread between hosts."
    )
    points = tuple(f"{words[0].upper()}{words[1:]}." for words in scores.notes(told.all_rows))
    return Section(key="sure", title="How sure", lead=lead, points=points, blocks=(block,))
