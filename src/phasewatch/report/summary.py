"""Evidence becomes the page's argument: the claim, how sure it is, where it fails, what it rests on, how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.artifacts import METRICS_FILE
from phasewatch.audit.checks import AuditReport
from phasewatch.evaluation import query
from phasewatch.evaluation.leaderboard import ELAPSED_TIME
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow, render_headline
from phasewatch.report import charts
from phasewatch.report.alarms import build_alarm_section
from phasewatch.report.calibration import build_calibration_section
from phasewatch.report.charts import PlotlyFigure
from phasewatch.report.coverage import (
    NOT_AUDITED,
    build_coverage_section,
    build_reproducibility_section,
    describe_failed_audit,
)
from phasewatch.report.data import ReportData, describe_origin, select_headline_windows
from phasewatch.report.errors import EVALUATE_COMMAND, ReportContext, build_error_section
from phasewatch.report.importance import build_importance_section
from phasewatch.report.layout import (
    HeadlineClaim,
    HeadlineTile,
    ReportBlock,
    ReportPage,
    ReportSection,
    ReportTable,
    build_score_mark,
    render_count,
    render_interval,
    render_number,
)
from phasewatch.report.leaderboard import TRAIN_ALL_COMMAND, build_leaderboard_section
from phasewatch.training.predictions import NO_FILTER

PROTOCOL_MODEL = DEFAULT_HEADLINE.model  # the same under every recipe, whatever the headline's is
RANDOM_WINDOWS, IN_DISTRIBUTION, HELD_OUT_HOST, HELD_OUT_BOTH = (
    "random_windows",
    "in_distribution",
    "held_out_host",
    "held_out_both",
)
PROTOCOL_LABELS = {
    RANDOM_WINDOWS: ("random windows", "neighbouring windows of one episode on both sides; leaky, and common"),
    IN_DISTRIBUTION: ("random episodes", "other episodes of the same hosts and samples"),
    "held_out_sample": ("unseen sample", "the same hosts, a variant that was never trained on"),
    HELD_OUT_HOST: ("unseen host", "the same samples, a machine that was never trained on"),
    HELD_OUT_BOTH: ("unseen host and sample", "neither was trained on"),
}


def _find_protocol_score(rows: Sequence[MetricRow], recipe: str, base: str = "macro_f1") -> MetricRow | None:
    """Find the meter's score under one recipe."""
    where = {
        "recipe": recipe,
        "fold": "pooled",
        "channel_set": DEFAULT_HEADLINE.channel_set,
        "input": DEFAULT_HEADLINE.input,
        "smoothing": NO_FILTER,
    }
    return query.find_overall_row(
        rows, base, model=PROTOCOL_MODEL, agent=DEFAULT_HEADLINE.agent, compared_to=None, **where
    )


def describe_protocol_scores(rows: Sequence[MetricRow], model: str = PROTOCOL_MODEL) -> str:
    """Say what would have been claimed and what to expect; nothing where the run has no two such numbers.

    The meter has a model of its own, named where the page is about another.

    Source: DESIGN.md, section 9, "Inflation meter".
    """
    by = {recipe: _find_protocol_score(rows, recipe) for recipe in PROTOCOL_LABELS}
    claimed = by[RANDOM_WINDOWS] or by[IN_DISTRIBUTION]
    places = ((HELD_OUT_HOST, "on a new host"), (HELD_OUT_BOTH, "on a new host with a new sample"))
    expected = [(row, where) for recipe, where in places if (row := by[recipe]) is not None and row.value is not None]
    if claimed is None or claimed.value is None or not expected:
        return ""
    parts = ", ".join(f"{render_number(row.value)} {render_interval(row)} {where}" for row, where in expected)
    return f"You would have claimed {render_number(claimed.value)}; expect {parts}{'' if model == PROTOCOL_MODEL else f' ({PROTOCOL_MODEL})'}."


def describe_inversion(rows: Sequence[MetricRow]) -> str:
    """Say what it means that other episodes of known hosts score below an unseen host; nothing where they do not."""
    dealt, host = _find_protocol_score(rows, IN_DISTRIBUTION), _find_protocol_score(rows, HELD_OUT_HOST)
    if dealt is None or host is None or dealt.value is None or host.value is None or dealt.value >= host.value:
        return ""
    sizes = [_find_train_size(rows, recipe) for recipe in (IN_DISTRIBUTION, HELD_OUT_HOST)]
    size = " after training on as much" if all(sizes) and abs(sizes[0] - sizes[1]) < 0.05 * sizes[1] else ""
    return (
        f"Random episodes score below an unseen host{size}, though they are the easier test: which sessions fall into one "
        "fold is one random deal, which spreads samples less evenly than hosts do, and no interval counts the luck of it; "
        "take the two for equal."
    )


def build_protocol_section(told: ReportContext) -> ReportSection:
    """Build the section from the rows of all recipes."""
    rows = told.all_rows
    found = {recipe: _find_protocol_score(rows, recipe) for recipe in PROTOCOL_LABELS}
    absent = [PROTOCOL_LABELS[r][0] for r, row in found.items() if row is None]
    said = [
        f"{PROTOCOL_MODEL} with the same settings under five ways to hold out; trained on: windows a fold, the mean over folds."
    ]
    if words := describe_inversion(rows):
        said.append(words)
    if absent:
        said.append(f"Not trained in this grid: {', '.join(absent)}.")
    block = ReportBlock(
        key="inflation",
        title="The inflation meter",
        sentences=tuple(said),
        figure=_draw_protocol_scores(told, found) if any(found.values()) else None,
        absent="" if any(found.values()) else "No recipe of the meter was trained in this grid.",
        table=_build_protocol_table(rows, found),
        is_table_open=True,
        command=TRAIN_ALL_COMMAND if absent else EVALUATE_COMMAND,
    )
    lead = "A number means what its split means; the further down, the less of the test was ever seen."
    return ReportSection(key="inflation", title="What would have been claimed", lead=lead, blocks=(block,))


def _draw_protocol_scores(told: ReportContext, found: dict[str, MetricRow | None]) -> PlotlyFigure:
    series = tuple(
        charts.ScoreSeries(
            name=name,
            scores=tuple(
                build_score_mark(PROTOCOL_LABELS[r][0], _find_protocol_score(told.all_rows, r, base)) for r in found
            ),
        )
        for base, name in (("macro_f1", "five phases"), ("macro_f1_3class", "three states"))
    )
    return charts.draw_intervals(series, title="macro-F1", origin=told.origin)


def _build_protocol_table(rows: Sequence[MetricRow], found: dict[str, MetricRow | None]) -> ReportTable:
    body = []
    for recipe, row in found.items():
        name, about = PROTOCOL_LABELS[recipe]
        size = _find_train_size(rows, recipe)
        body.append(
            (
                f"{name}: {about}",
                render_number(row.value if row else None),
                render_interval(row) if row else "not trained in this grid",
                _render_protocol_gap(rows, recipe),
                f"{size:,.0f}" if size else "–",
                f"{row.n_windows:,}" if row else "–",
                f"{row.n_episodes:,}" if row else "–",
            )
        )
    columns = ("tested on", "macro-F1", "95 % interval", "less unseen host", "trained on", "test windows", "episodes")
    return ReportTable(columns=columns, numeric=(False, True, False, False, True, True, True), rows=tuple(body))


def _find_train_size(rows: Sequence[MetricRow], recipe: str) -> float:
    """Give the windows that a fold learns from, the mean over folds; 0 where that is not known."""
    row = query.find_overall_row(
        rows,
        "train_windows",
        recipe=recipe,
        channel_set=DEFAULT_HEADLINE.channel_set,
        input=DEFAULT_HEADLINE.input,
        model=PROTOCOL_MODEL,
    )
    return row.value if row is not None and row.value is not None else 0.0


def _render_protocol_gap(rows: Sequence[MetricRow], recipe: str) -> str:
    """Give the paired gap to the unseen host, whichever of the two the row counts from."""
    if recipe == HELD_OUT_HOST:
        return "–"
    for one, other, sign in ((recipe, HELD_OUT_HOST, 1.0), (HELD_OUT_HOST, recipe, -1.0)):
        row = query.find_overall_row(rows, "macro_f1_recipe_gap", recipe=one, compared_to=other, model=PROTOCOL_MODEL)
        if row is not None and row.value is not None:
            ends = sorted(sign * v for v in (row.low, row.high) if v is not None)
            span = f" [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else f" (no interval: {row.note})"
            return f"{sign * row.value:+.2f}{span}"
    return "–"


def build_page(evidence: ReportData) -> ReportPage:
    """Build the page from whatever a run has."""
    all_rows = evidence.metrics.metrics if evidence.metrics else ()
    rows = query.select_recipe_rows(all_rows)
    model = query.find_headline_model(rows, all_rows)
    windows = None
    if evidence.predictions is not None:
        windows = select_headline_windows(evidence.predictions, model or DEFAULT_HEADLINE.model)
    origin = describe_origin(windows, evidence.bundles)
    told = ReportContext(rows=rows, all_rows=all_rows, model=model, windows=windows, origin=origin)
    audit = evidence.audit
    is_broken = audit is not None and not audit.passes
    line = render_headline(evidence.metrics) if evidence.metrics else ""
    return ReportPage(
        origin=origin,
        claim=_build_failed_audit_claim(audit) if audit is not None and is_broken else _build_claim(told, line),
        notices=(*_describe_simulation(origin), *evidence.notes, *(() if audit is not None else (NOT_AUDITED,))),
        sections=(
            build_protocol_section(told),
            build_leaderboard_section(told),
            build_error_section(told, evidence.folds),
            build_alarm_section(told),
            build_calibration_section(told),
            build_importance_section(told, evidence.bundles),
            build_coverage_section(evidence, told.windows, origin),
            build_reproducibility_section(evidence),
        ),
    )


def _build_failed_audit_claim(audit: AuditReport) -> HeadlineClaim:
    """Make no claim for a run that breaks its promises; its numbers stand below for whoever looks for the fault."""
    words = "; ".join(f"{check.name}: {check.words}" for check in audit.failed_checks)
    return HeadlineClaim(words=describe_failed_audit(audit), line="", tiles=(), verdict=words, holds=False)


def _describe_simulation(origin: str) -> tuple[str, ...]:
    if "simulated" not in origin:
        return ()
    what = "All" if origin == "simulated" else "Some"
    return (
        f"{what} test episodes are simulated: what they show is that the pipeline works, not how well real VMs can be told.",
    )


def _build_claim(told: ReportContext, line: str) -> HeadlineClaim:
    if told.model is None:
        words = f"No claim can be made: {METRICS_FILE} holds no macro-F1 of a model on {DEFAULT_HEADLINE.recipe.replace('_', ' ')}."
        return HeadlineClaim(
            words=words, line=line, tiles=(), verdict="`phasewatch evaluate RUN` computes it.", holds=False
        )
    five, three, clock, majority = (
        query.find_score(told.rows, base, model=model)
        for base, model in (
            ("macro_f1", told.model),
            ("macro_f1_3class", told.model),
            ("macro_f1", ELAPSED_TIME),
            ("macro_f1", "majority"),
        )
    )
    tiles = tuple(
        HeadlineTile(
            name=name, value=render_number(row.value), interval=render_interval(row), about=about, is_reference=beside
        )
        for row, name, about, beside in (
            (five, "five phases", f"macro-F1, {told.model}, host never seen", False),
            (three, "three states", "quiet, infecting, active: armed and dormant hardly differ from clean", False),
            (clock, "elapsed time alone", "the same five phases, told by the clock without any telemetry", True),
            (majority, "majority", "always the most frequent phase", True),
        )
        if row is not None
    )
    gap = query.find_elapsed_time_gap(told.all_rows, told.model)
    above = query.is_above_elapsed_time(five, clock, gap)
    inflated = describe_protocol_scores(told.all_rows, told.model)
    return HeadlineClaim(
        words=inflated or _describe_score(told.model, five),
        line=line,
        tiles=tiles,
        verdict=_describe_verdict(above, clock, gap),
        holds=above is True,
    )


def _describe_score(model: str, five: MetricRow | None) -> str:
    if five is None or five.value is None:
        return f"How well {model} tells the phase on an unseen host was not measured."
    where = (
        f"on {render_count(five.n_hosts, 'host')} that its training never saw"
        if five.n_hosts > 1
        else "on an unseen host"
    )
    return f"{model} tells the five phases {where} with macro‑F1 {five.value:.2f} {render_interval(five)}."


def _describe_verdict(above: bool | None, clock: MetricRow | None, gap: query.ElapsedTimeGap | None) -> str:
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
