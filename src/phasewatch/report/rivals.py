"""How sure: every model beside its baselines, who is really above whom, and what tables, filters and sensors change."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.evaluate.rows import MetricRow
from phasewatch.models.registry import BASELINES
from phasewatch.report import figures, scores
from phasewatch.report.blocks import Block, Section, Table, bracket, listed, metric_table, score_of
from phasewatch.report.evidence import PLACE
from phasewatch.report.failings import EVALUATE, NO_METRICS, Told
from phasewatch.train.predictions import NO_FILTER

NOT_TRAINED = "not trained in this grid"
TRAIN_ALL = "phasewatch train RUN --recipes all && phasewatch evaluate RUN && phasewatch report RUN"
OTHERS = {
    "threat": "What a guest's word would add, and what KVM would take away",
    "table": "What context and commissioning add",
    "filter": "What the phase filter adds",
}


def how_sure(told: Told) -> Section:
    """Build the section from the rows of the headline's recipe."""
    lead = (
        "Intervals come from resampling sessions (episodes that ran side by side count as one) within hosts. "
        "They hold for these hosts, samples and seeds, and say nothing of the spread between hosts."
    )
    points = tuple(f"{words[0].upper()}{words[1:]}." for words in scores.notes(told.all_rows))
    blocks = [_leaderboard(told), _one_host(told), _significance(told)]
    blocks += [_across(told, kind, title) for kind, title in OTHERS.items()]
    return Section(key="sure", title="How sure", lead=lead, points=points, blocks=tuple(blocks))


def _leaderboard(told: Told) -> Block:
    n_hosts = max((r.n_hosts for r in told.rows if scores.base_of(r) == "macro_f1"), default=0)
    board = scores.contenders(told.rows, n_hosts=n_hosts)
    absent = [key for key in BASELINES if not any(c.model == key for c in board)]
    said = [
        "Each model on hosts that its training never saw, each episode tested once, all folds pooled.",
        "A baseline shows what is to be beaten; one that looks at no telemetry must be cleared by far. Whiskers are "
        "95 % intervals.",
        *_below_clock(told),
    ]
    if absent:
        said.append(f"Of the baselines, {NOT_TRAINED}: {listed([scores.model_words(a) for a in absent])}.")
    table = [pair for c in board for pair in ((c.label, "five phases", c.five), (c.label, "three states", c.three))]
    return Block(
        key="leaderboard",
        title="Leaderboard",
        sentences=tuple(said),
        figure=figures.whiskers(_both(board), title="macro-F1", origin=told.origin) if board else None,
        absent="" if board else NO_METRICS,
        table=metric_table(table) if board else None,
        command=EVALUATE,
    )


def _both(board: Sequence[scores.Contender]) -> tuple[figures.Series, ...]:
    return (
        figures.Series(name="five phases", scores=tuple(score_of(c.label, c.five) for c in board)),
        figures.Series(name="three states", scores=tuple(score_of(c.label, c.three) for c in board)),
    )


def _below_clock(told: Told) -> tuple[str, ...]:
    """Say in words which models are not above elapsed time by the interval of the paired gap, and which have none."""
    own = scores.at_headline(told.all_rows)
    names = list(dict.fromkeys(r.model for r in own if r.metric == "note" and r.vs == scores.CLOCK and r.model))
    gaps = {name: scores.clock_gap(told.all_rows, name) for name in names}
    unsure = [name for name, gap in gaps.items() if gap is not None and gap.low is None]
    below = [name for name in names if name not in unsure]
    said = []
    if below:
        said.append(f"Not above elapsed time by their intervals: {listed(below)}.")
    if unsure:
        said.append(f"Without an interval it cannot be said whether they are above elapsed time: {listed(unsure)}.")
    return tuple(said)


def _one_host(told: Told) -> Block:
    """Show the models that did not answer for every host, beside the others on the one host that most answered for."""
    most = max((r.n_hosts for r in told.rows if scores.base_of(r) == "macro_f1"), default=0)
    whole = {(r.model, r.threat) for r in told.rows if scores.base_of(r) == "macro_f1" and r.n_hosts >= most}
    at = (PLACE.recipe, PLACE.table, NO_FILTER)
    own = [r for r in told.all_rows if (r.recipe, r.table, r.filter) == at and r.vs is None and r.x is None]
    by_fold: dict[str, list[MetricRow]] = {}
    for r in own:
        if r.fold != "pooled":
            by_fold.setdefault(r.fold, []).append(r)
    boards = {fold: scores.contenders(rows) for fold, rows in by_fold.items()}
    partial = {f: [c for c in board if (c.model, c.threat) not in whole] for f, board in boards.items()}
    widest = max(partial, key=lambda f: (len(partial[f]), f), default=None)
    if widest is None or not partial[widest]:
        said = ("Every model of this run answered for every host; the leaderboard above has them all.",)
        return Block(key="one-host", title="All models on one host", sentences=said, command=EVALUATE)
    board = boards[widest]
    table = [pair for c in board for pair in ((c.label, "five phases", c.five), (c.label, "three states", c.three))]
    return Block(
        key="one-host",
        title=f"All models on one host: {widest}",
        sentences=(
            "Some models were trained for this host's fold alone. So few episodes rank nobody: look, do not quote.",
            "Oracle is scored where the guest's agent ran, the others where it did not.",
        ),
        figure=figures.whiskers(_both(board), title="macro-F1", origin=told.origin),
        table=metric_table(table),
        command=EVALUATE,
    )


def _significance(told: Told) -> Block:
    base = Block(key="significance", title="Who is really above whom", command=EVALUATE)
    own = [r for r in scores.find(scores.at_headline(told.all_rows), "macro_f1_gap") if r.value is not None]
    if told.model is None or not own:
        return Block(
            key=base.key, title=base.title, command=EVALUATE,
            absent="There are no two models on the same windows, so there is no gap to test.",
        )  # fmt: skip
    mine = [_turned(r, told.model) for r in own if told.model in (r.model, r.vs)]
    series = (
        figures.Series(
            name=f"{told.model} less the other",
            scores=tuple(figures.Score(label=o, value=v, low=low, high=high, words=p) for o, v, low, high, p in mine),
        ),
    )
    body = tuple(
        (f"{r.model} − {r.vs}", f"{r.value:+.3f}", _span(r), _p(r.p), _p(r.p_holm)) for r in own if r.value is not None
    )
    corrected = [r.p_holm for r in own if r.p_holm is not None]
    return Block(
        key=base.key,
        title=base.title,
        sentences=(
            "Gaps are paired: the same resampled sessions for both models, seeds averaged inside each resample.",
            f"{sum(p < 0.05 for p in corrected)} of {len(corrected)} gaps of a model have p < 0.05 after Holm's correction "
            "over all of them; two baselines are not tested against each other.",
        ),
        figure=figures.whiskers(series, title=f"macro-F1 of {told.model} less the other's", origin=told.origin, is_gap=True)
        if mine
        else None,
        table=Table(
            columns=("gap", "macro-F1", "95 % interval", "p", "p (Holm)"), numeric=(False, True, False, True, True),
            rows=body,
        ),
        command=EVALUATE,
    )  # fmt: skip


def _turned(row: MetricRow, model: str) -> tuple[str, float, float | None, float | None, str]:
    """Count a gap from the model's side."""
    value = row.value or 0.0
    words = f"p {_p(row.p)}, after Holm {_p(row.p_holm)}"
    if row.model == model:
        return scores.model_words(str(row.vs)), value, row.low, row.high, words
    low, high = (None, None) if row.low is None or row.high is None else (-row.high, -row.low)
    return scores.model_words(str(row.model)), -value, low, high, words


def _across(told: Told, kind: str, title: str) -> Block:
    """Show the paired gaps of one model in two places, on the headline's recipe."""
    rows = [
        r for r in scores.find(told.all_rows, f"macro_f1_{kind}_gap", recipe=PLACE.recipe)
        if r.value is not None and (r.threat == PLACE.threat or kind == "threat") and (r.table == PLACE.table or kind == "table")
    ]  # fmt: skip
    if not rows:
        return Block(key=f"gap-{kind}", title=title, absent=f"Nothing to compare: {NOT_TRAINED}.", command=TRAIN_ALL)

    def label(r: MetricRow) -> str:
        mine = {"threat": r.threat, "table": r.table, "filter": r.filter}[kind]
        return f"{r.model}: {mine} − {r.vs}"

    series = figures.Series(name=title, scores=tuple(score_of(label(r), r) for r in rows))
    body = tuple(
        (label(r), f"{r.value:+.3f}", _span(r), _p(r.p), _p(r.p_holm), f"agent {r.agent}", f"{r.n_episodes:,}", f"{r.n_hosts}")
        for r in rows
    )  # fmt: skip
    return Block(
        key=f"gap-{kind}",
        title=title,
        sentences=("Paired over the windows that both were tested on; above 0 the first of the two is better.",),
        figure=figures.whiskers((series,), title="gap of macro-F1", origin=told.origin, is_gap=True),
        table=Table(
            columns=("gap", "macro-F1", "95 % interval", "p", "p (Holm)", "episodes with", "episodes", "hosts"),
            numeric=(False, True, False, True, True, False, True, True), rows=body,
        ),
        command=EVALUATE,
    )  # fmt: skip


def _span(row: MetricRow) -> str:
    return f"[{row.low:+.2f}, {row.high:+.2f}]" if row.low is not None and row.high is not None else bracket(row)


def _p(p: float | None) -> str:
    return "–" if p is None else f"{p:.4f}"
