"""How sure: every model beside its baselines, who is really above whom, and what tables, filters and sensors change."""

from __future__ import annotations

from collections.abc import Sequence

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
    render_interval,
)
from phasewatch.training.predictions import NO_FILTER

NOT_TRAINED = "not trained in this grid"
TRAIN_ALL_COMMAND = "phasewatch train RUN --recipes all && phasewatch evaluate RUN && phasewatch report RUN"
COMPARISON_TITLES = {
    "threat": "What a guest's word would add, and what KVM would take away",
    "table": "What context and commissioning add",
    "filter": "What the phase filter adds",
}


def build_leaderboard_section(told: ReportContext) -> ReportSection:
    """Build the section from the rows of the headline's recipe."""
    lead = (
        "Intervals come from resampling sessions (episodes that ran side by side count as one) within hosts. "
        "They hold for these hosts, samples and seeds, and say nothing of the spread between hosts."
    )
    points = tuple(f"{words[0].upper()}{words[1:]}." for words in query.collect_notes(told.all_rows))
    blocks = [_build_leaderboard_block(told), _build_single_host_block(told), _build_pairwise_block(told)]
    blocks += [_build_comparison_block(told, kind, title) for kind, title in COMPARISON_TITLES.items()]
    return ReportSection(key="sure", title="How sure", lead=lead, points=points, blocks=tuple(blocks))


def _build_leaderboard_block(told: ReportContext) -> ReportBlock:
    n_hosts = max((r.n_hosts for r in told.rows if r.metric == "macro_f1"), default=0)
    board = query.build_leaderboard(told.rows, n_hosts=n_hosts)
    absent = [key for key in BASELINE_MODELS if not any(c.model == key for c in board)]
    said = [
        "Each model on hosts that its training never saw, each episode tested once, all folds pooled.",
        "A baseline shows what is to be beaten; one that looks at no telemetry must be cleared by far. Whiskers are "
        "95 % intervals.",
        *_describe_elapsed_time(told),
    ]
    if absent:
        said.append(f"Of the baselines, {NOT_TRAINED}: {join_words([query.render_model_name(a) for a in absent])}.")
    table = [
        pair
        for c in board
        for pair in ((c.label, "five phases", c.five_class), (c.label, "three states", c.three_class))
    ]
    return ReportBlock(
        key="leaderboard",
        title="Leaderboard",
        sentences=tuple(said),
        figure=charts.draw_intervals(_build_score_series(board), title="macro-F1", origin=told.origin)
        if board
        else None,
        absent="" if board else NO_METRICS,
        table=build_metric_table(table) if board else None,
        command=EVALUATE_COMMAND,
    )


def _build_score_series(board: Sequence[query.LeaderboardEntry]) -> tuple[charts.ScoreSeries, ...]:
    return (
        charts.ScoreSeries(name="five phases", scores=tuple(build_score_mark(c.label, c.five_class) for c in board)),
        charts.ScoreSeries(name="three states", scores=tuple(build_score_mark(c.label, c.three_class) for c in board)),
    )


def _describe_elapsed_time(told: ReportContext) -> tuple[str, ...]:
    """Say in words which models are not above elapsed time by the interval of the paired gap, and which have none."""
    own = query.select_headline_rows(told.all_rows)
    names = list(
        dict.fromkeys(r.model for r in select_rows(own, "note", code=NoteCode.NOT_ABOVE_ELAPSED_TIME) if r.model)
    )
    gaps = {name: query.find_elapsed_time_gap(told.all_rows, name) for name in names}
    unsure = [name for name, gap in gaps.items() if gap is not None and gap.low is None]
    below = [name for name in names if name not in unsure]
    said = []
    if below:
        said.append(f"Not above elapsed time by their intervals: {join_words(below)}.")
    if unsure:
        said.append(f"Without an interval it cannot be said whether they are above elapsed time: {join_words(unsure)}.")
    return tuple(said)


def _build_single_host_block(told: ReportContext) -> ReportBlock:
    """Show the models that did not answer for every host, beside the others on the one host that most answered for."""
    most = max((r.n_hosts for r in told.rows if r.metric == "macro_f1"), default=0)
    whole = {(r.model, r.channel_set) for r in told.rows if r.metric == "macro_f1" and r.n_hosts >= most}
    at = (DEFAULT_HEADLINE.recipe, DEFAULT_HEADLINE.input, NO_FILTER)
    own = [
        r for r in told.all_rows if (r.recipe, r.input, r.smoothing) == at and r.compared_to is None and r.bin is None
    ]
    by_fold: dict[str, list[MetricRow]] = {}
    for r in own:
        if r.fold != "pooled":
            by_fold.setdefault(r.fold, []).append(r)
    boards = {fold: query.build_leaderboard(rows) for fold, rows in by_fold.items()}
    partial = {f: [c for c in board if (c.model, c.threat) not in whole] for f, board in boards.items()}
    widest = max(partial, key=lambda f: (len(partial[f]), f), default=None)
    if widest is None or not partial[widest]:
        said = ("Every model of this run answered for every host; the leaderboard above has them all.",)
        return ReportBlock(key="one-host", title="All models on one host", sentences=said, command=EVALUATE_COMMAND)
    board = boards[widest]
    table = [
        pair
        for c in board
        for pair in ((c.label, "five phases", c.five_class), (c.label, "three states", c.three_class))
    ]
    return ReportBlock(
        key="one-host",
        title=f"All models on one host: {widest}",
        sentences=(
            "Some models were trained for this host's fold alone. So few episodes rank nobody: look, do not quote.",
            "Oracle is scored where the guest's agent ran, the others where it did not.",
        ),
        figure=charts.draw_intervals(_build_score_series(board), title="macro-F1", origin=told.origin),
        table=build_metric_table(table),
        command=EVALUATE_COMMAND,
    )


def _build_pairwise_block(told: ReportContext) -> ReportBlock:
    base = ReportBlock(key="significance", title="Who is really above whom", command=EVALUATE_COMMAND)
    own = [r for r in select_rows(query.select_headline_rows(told.all_rows), "macro_f1_gap") if r.value is not None]
    if told.model is None or not own:
        return ReportBlock(
            key=base.key, title=base.title, command=EVALUATE_COMMAND,
            absent="There are no two models on the same windows, so there is no gap to test.",
        )  # fmt: skip
    mine = [_orient_gap(r, told.model) for r in own if told.model in (r.model, r.compared_to)]
    series = (
        charts.ScoreSeries(
            name=f"{told.model} less the other",
            scores=tuple(
                charts.ScoreMark(label=o, value=v, low=low, high=high, words=p) for o, v, low, high, p in mine
            ),
        ),
    )
    body = tuple(
        (
            f"{r.model} − {r.compared_to}",
            f"{r.value:+.3f}",
            _render_signed_interval(r),
            _render_p_value(r.p),
            _render_p_value(r.p_holm),
        )
        for r in own
        if r.value is not None
    )
    corrected = [r.p_holm for r in own if r.p_holm is not None]
    return ReportBlock(
        key=base.key,
        title=base.title,
        sentences=(
            "Gaps are paired: the same resampled sessions for both models, seeds averaged inside each resample.",
            f"{sum(p < 0.05 for p in corrected)} of {len(corrected)} gaps of a model have p < 0.05 after Holm's correction "
            "over all of them; two baselines are not tested against each other.",
        ),
        figure=charts.draw_intervals(series, title=f"macro-F1 of {told.model} less the other's", origin=told.origin, is_gap=True)
        if mine
        else None,
        table=ReportTable(
            columns=("gap", "macro-F1", "95 % interval", "p", "p (Holm)"), numeric=(False, True, False, True, True),
            rows=body,
        ),
        command=EVALUATE_COMMAND,
    )  # fmt: skip


def _orient_gap(row: MetricRow, model: str) -> tuple[str, float, float | None, float | None, str]:
    """Count a gap from the model's side."""
    value = row.value or 0.0
    words = f"p {_render_p_value(row.p)}, after Holm {_render_p_value(row.p_holm)}"
    if row.model == model:
        return query.render_model_name(str(row.compared_to)), value, row.low, row.high, words
    low, high = (None, None) if row.low is None or row.high is None else (-row.high, -row.low)
    return query.render_model_name(str(row.model)), -value, low, high, words


def _build_comparison_block(told: ReportContext, kind: str, title: str) -> ReportBlock:
    """Show the paired gaps of one model in two places, on the headline's recipe."""
    rows = [
        r for r in select_rows(told.all_rows, f"macro_f1_{kind}_gap", recipe=DEFAULT_HEADLINE.recipe)
        if r.value is not None and (r.channel_set == DEFAULT_HEADLINE.channel_set or kind == "threat") and (r.input == DEFAULT_HEADLINE.input or kind == "table")
    ]  # fmt: skip
    if not rows:
        return ReportBlock(
            key=f"gap-{kind}", title=title, absent=f"Nothing to compare: {NOT_TRAINED}.", command=TRAIN_ALL_COMMAND
        )

    def label(r: MetricRow) -> str:
        mine = {"threat": r.channel_set, "table": r.input, "filter": r.smoothing}[kind]
        return f"{r.model}: {mine} − {r.compared_to}"

    series = charts.ScoreSeries(name=title, scores=tuple(build_score_mark(label(r), r) for r in rows))
    body = tuple(
        (label(r), f"{r.value:+.3f}", _render_signed_interval(r), _render_p_value(r.p), _render_p_value(r.p_holm), f"agent {r.agent}", f"{r.n_episodes:,}", f"{r.n_hosts}")
        for r in rows
    )  # fmt: skip
    return ReportBlock(
        key=f"gap-{kind}",
        title=title,
        sentences=("Paired over the windows that both were tested on; above 0 the first of the two is better.",),
        figure=charts.draw_intervals((series,), title="gap of macro-F1", origin=told.origin, is_gap=True),
        table=ReportTable(
            columns=("gap", "macro-F1", "95 % interval", "p", "p (Holm)", "episodes with", "episodes", "hosts"),
            numeric=(False, True, False, True, True, False, True, True), rows=body,
        ),
        command=EVALUATE_COMMAND,
    )  # fmt: skip


def _render_signed_interval(row: MetricRow) -> str:
    return (
        f"[{row.low:+.2f}, {row.high:+.2f}]" if row.low is not None and row.high is not None else render_interval(row)
    )


def _render_p_value(p: float | None) -> str:
    return "–" if p is None else f"{p:.4f}"
