"""Report section on model comparison: leaderboard, pairwise tests, effects of channel set, input and filter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phasewatch.evaluation import query
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow, NoteCode, select_rows
from phasewatch.models.registry import BASELINE_MODELS
from phasewatch.report import charts
from phasewatch.report.errors import EVALUATE_COMMAND, NO_METRICS, ReportContext
from phasewatch.report.layout import (
    ReportBlock,
    ReportSection,
    ReportTable,
    build_metric_table,
    build_score_mark,
    join_words,
    render_signed_interval,
)
from phasewatch.training.predictions import NO_FILTER

__all__ = ["NOT_TRAINED", "TRAIN_ALL_COMMAND", "build_leaderboard_section"]

NOT_TRAINED = "not trained in this run"
TRAIN_ALL_COMMAND = "phasewatch train RUN --recipes all && phasewatch evaluate RUN && phasewatch report RUN"
_COMPARISON_TITLES = {
    "threat": "Effect of the channel set",
    "table": "Effect of the input: context and baseline normalisation",
    "filter": "Effect of the phase filter",
}


def build_leaderboard_section(context: ReportContext) -> ReportSection:
    """Build the section from the rows of the headline's split."""
    lead = (
        "95 % intervals come from a bootstrap over sessions within hosts; episodes that ran at the same time form one "
        "session. The intervals cover these hosts, samples and seeds. They do not cover the variance between hosts."
    )
    points = tuple(f"{words[0].upper()}{words[1:]}." for words in query.collect_notes(context.all_rows))
    blocks = [_build_leaderboard_block(context), _build_single_host_block(context), _build_pairwise_block(context)]
    blocks += [_build_comparison_block(context, kind, title) for kind, title in _COMPARISON_TITLES.items()]
    return ReportSection(key="sure", title="Model comparison", lead=lead, points=points, blocks=tuple(blocks))


def _build_leaderboard_block(context: ReportContext) -> ReportBlock:
    n_hosts = max((r.n_hosts for r in context.rows if r.metric == "macro_f1"), default=0)
    board = query.build_leaderboard(context.rows, n_hosts=n_hosts)
    absent = [key for key in BASELINE_MODELS if not any(c.model == key for c in board)]
    sentences = [
        "Macro-F1 of each model on hosts that are not in its training set. Each episode is tested once; folds are "
        "pooled.",
        "Models should clearly exceed the baselines that use no telemetry. Whiskers are 95 % intervals.",
        *_describe_elapsed_time(context),
    ]
    if absent:
        names = join_words([query.render_model_name(a) for a in absent])
        sentences.append(f"Baselines {NOT_TRAINED}: {names}.")
    return ReportBlock(
        key="leaderboard",
        title="Leaderboard",
        sentences=tuple(sentences),
        figure=charts.draw_intervals(_build_score_series(board), title="macro-F1", origin=context.origin)
        if board
        else None,
        absent="" if board else NO_METRICS,
        table=_build_score_table(board) if board else None,
        command=EVALUATE_COMMAND,
    )


def _build_score_series(board: Sequence[query.LeaderboardEntry]) -> tuple[charts.ScoreSeries, ...]:
    return (
        charts.ScoreSeries(name="five phases", scores=tuple(build_score_mark(c.label, c.five_class) for c in board)),
        charts.ScoreSeries(name="three states", scores=tuple(build_score_mark(c.label, c.three_class) for c in board)),
    )


def _build_score_table(board: Sequence[query.LeaderboardEntry]) -> ReportTable:
    return build_metric_table(
        [
            pair
            for c in board
            for pair in ((c.label, "five phases", c.five_class), (c.label, "three states", c.three_class))
        ]
    )


def _describe_elapsed_time(context: ReportContext) -> tuple[str, ...]:
    """List the models that are not above the elapsed-time baseline, and those without an interval of the difference."""
    own = query.select_headline_rows(context.all_rows)
    names = list(
        dict.fromkeys(r.model for r in select_rows(own, "note", code=NoteCode.NOT_ABOVE_ELAPSED_TIME) if r.model)
    )
    gaps = {name: query.find_elapsed_time_gap(context.all_rows, name) for name in names}
    unsure = [name for name, gap in gaps.items() if gap is not None and gap.low is None]
    below = [name for name in names if name not in unsure]
    sentences = []
    if below:
        sentences.append(f"Not above the elapsed-time baseline (95 % interval of the difference): {join_words(below)}.")
    if unsure:
        sentences.append(f"No interval for the difference to the elapsed-time baseline: {join_words(unsure)}.")
    return tuple(sentences)


def _build_single_host_block(context: ReportContext) -> ReportBlock:
    """Compare the models that were not tested on every host with all others, on the host with most of them."""
    base = ReportBlock(key="one-host", title="All models on one host", command=EVALUATE_COMMAND)
    most = max((r.n_hosts for r in context.rows if r.metric == "macro_f1"), default=0)
    whole = {(r.model, r.channel_set) for r in context.rows if r.metric == "macro_f1" and r.n_hosts >= most}
    at = (DEFAULT_HEADLINE.recipe, DEFAULT_HEADLINE.input, NO_FILTER)
    own = [
        r
        for r in context.all_rows
        if (r.recipe, r.input, r.smoothing) == at and r.compared_to is None and r.bin is None
    ]
    by_fold: dict[str, list[MetricRow]] = {}
    for r in own:
        if r.fold != "pooled":
            by_fold.setdefault(r.fold, []).append(r)
    boards = {fold: query.build_leaderboard(rows) for fold, rows in by_fold.items()}
    partial = {f: [c for c in board if (c.model, c.threat) not in whole] for f, board in boards.items()}
    widest = max(partial, key=lambda f: (len(partial[f]), f), default=None)
    if widest is None or not partial[widest]:
        return replace(
            base, sentences=("Every model of this run was tested on every host; see the leaderboard above.",)
        )
    board = boards[widest]
    return replace(
        base,
        title=f"All models on one host: {widest}",
        sentences=(
            "Some models were trained for the fold of this host only. One host has too few episodes for a ranking.",
            "The channel set oracle is scored on episodes with the guest agent, the others on episodes without it.",
        ),
        figure=charts.draw_intervals(_build_score_series(board), title="macro-F1", origin=context.origin),
        table=_build_score_table(board),
    )


def _build_pairwise_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(key="significance", title="Pairwise tests", command=EVALUATE_COMMAND)
    own = [r for r in select_rows(query.select_headline_rows(context.all_rows), "macro_f1_gap") if r.value is not None]
    if context.model is None or not own:
        return replace(base, absent="No test: this run has no two models with scores on the same windows.")
    marks = tuple(_build_gap_mark(r, context.model) for r in own if context.model in (r.model, r.compared_to))
    series = (charts.ScoreSeries(name=f"{context.model} minus the other model", scores=marks),)
    body = tuple(
        (
            f"{r.model} − {r.compared_to}",
            f"{r.value:+.3f}",
            render_signed_interval(r),
            _render_p_value(r.p),
            _render_p_value(r.p_holm),
        )
        for r in own
        if r.value is not None
    )
    corrected = [r.p_holm for r in own if r.p_holm is not None]
    return replace(
        base,
        sentences=(
            "Differences of macro-F1 are paired: both models are scored on the same bootstrap resamples of sessions, "
            "averaged over seeds.",
            f"{sum(p < 0.05 for p in corrected)} of {len(corrected)} differences have p < 0.05 after Holm correction. "
            "Pairs of baselines are not tested.",
        ),
        figure=charts.draw_intervals(
            series, title=f"macro-F1 of {context.model} minus the other model", origin=context.origin, is_gap=True
        )
        if marks
        else None,
        table=ReportTable(
            columns=("difference", "macro-F1", "95 % interval", "p", "p (Holm)"),
            numeric=(False, True, False, True, True),
            rows=body,
        ),
    )


def _build_gap_mark(row: MetricRow, model: str) -> charts.ScoreMark:
    """Convert a paired difference to a mark that is positive if the model is better, whichever sign the row holds."""
    words = f"p {_render_p_value(row.p)}, Holm-corrected {_render_p_value(row.p_holm)}"
    value, low, high, other = row.value or 0.0, row.low, row.high, row.compared_to
    if row.model != model:
        value, other = -value, row.model
        low, high = (None, None) if row.low is None or row.high is None else (-row.high, -row.low)
    return charts.ScoreMark(label=query.render_model_name(str(other)), value=value, low=low, high=high, words=words)


def _build_comparison_block(context: ReportContext, kind: str, title: str) -> ReportBlock:
    """Build the block on the paired differences of one model between two channel sets, inputs or filters."""
    rows = [
        r
        for r in select_rows(context.all_rows, f"macro_f1_{kind}_gap", recipe=DEFAULT_HEADLINE.recipe)
        if r.value is not None
        and (r.channel_set == DEFAULT_HEADLINE.channel_set or kind == "threat")
        and (r.input == DEFAULT_HEADLINE.input or kind == "table")
    ]
    base = ReportBlock(key=f"gap-{kind}", title=title, command=EVALUATE_COMMAND)
    if not rows:
        return replace(base, absent=f"No comparison: {NOT_TRAINED}.", command=TRAIN_ALL_COMMAND)

    def label(r: MetricRow) -> str:
        variant = {"threat": r.channel_set, "table": r.input, "filter": r.smoothing}[kind]
        return f"{r.model}: {variant} − {r.compared_to}"

    series = charts.ScoreSeries(name=title, scores=tuple(build_score_mark(label(r), r) for r in rows))
    body = tuple(
        (
            label(r),
            f"{r.value:+.3f}",
            render_signed_interval(r),
            _render_p_value(r.p),
            _render_p_value(r.p_holm),
            f"agent {r.agent}",
            f"{r.n_episodes:,}",
            f"{r.n_hosts}",
        )
        for r in rows
    )
    return replace(
        base,
        sentences=(
            "Paired differences of macro-F1 on the windows that both variants were tested on. Values above 0 favour "
            "the first variant.",
        ),
        figure=charts.draw_intervals((series,), title="difference of macro-F1", origin=context.origin, is_gap=True),
        table=ReportTable(
            columns=("difference", "macro-F1", "95 % interval", "p", "p (Holm)", "episodes with", "episodes", "hosts"),
            numeric=(False, True, False, True, True, False, True, True),
            rows=body,
        ),
    )


def _render_p_value(p: float | None) -> str:
    return "–" if p is None else f"{p:.4f}"
