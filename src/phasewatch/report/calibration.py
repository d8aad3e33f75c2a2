"""Whether its probabilities can be believed: reliability, flips, and what it does before malware that it never saw."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.evaluation import query
from phasewatch.evaluation.calibration import DECIDED_SHARE
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow, select_rows
from phasewatch.report import charts
from phasewatch.report.errors import EVALUATE_COMMAND, NO_METRICS, ReportContext
from phasewatch.report.layout import ReportBlock, ReportSection, ReportTable, build_metric_table, render_interval
from phasewatch.report.leaderboard import NOT_TRAINED, TRAIN_ALL_COMMAND
from phasewatch.training.predictions import NO_FILTER

FILTER_LABELS = ((NO_FILTER, "no filter"), ("phase", "phase filter"), ("schedule", "schedule alone"))
HELD_OUT_PROFILE = "held_out_profile"


def build_calibration_section(told: ReportContext) -> ReportSection:
    """Build the section from the rows of the headline's model."""
    lead = "A temperature is fitted on validation; nothing here saw the test before."
    blocks = (_build_reliability_block(told), _build_label_change_block(told), _build_abstention_block(told))
    return ReportSection(key="trust", title="Whether it can be believed", lead=lead, blocks=blocks)


def _select_rows(
    told: ReportContext, *, recipe: str = DEFAULT_HEADLINE.recipe, filter_: str = NO_FILTER
) -> tuple[MetricRow, ...]:
    home = DEFAULT_HEADLINE
    return select_rows(
        told.all_rows, recipe=recipe, fold="pooled", channel_set=home.channel_set, input=home.input,
        smoothing=filter_, agent=home.agent,
    )  # fmt: skip


def _build_reliability_block(told: ReportContext) -> ReportBlock:
    rows = _select_rows(told)
    found = [
        r for r in select_rows(rows, "reliability", model=told.model) if r.bin is not None and r.value is not None
    ]
    base = ReportBlock(key="reliability", title="Reliability", absent=NO_METRICS, command=EVALUATE_COMMAND)
    if not found:
        return base
    marks = [
        charts.ScoreMark(
            label="", value=r.value, low=r.low, high=r.high,
            words=f"said {r.bin:.2f}, right {r.value:.2f} {render_interval(r)}, {r.n_windows:,} windows",
        )
        for r in found
    ]  # fmt: skip
    pairs = (
        ("ece_debiased", "calibration error, sampling bias subtracted"),
        ("confidence_less_accuracy", "mean confidence less accuracy"),
        ("brier", "Brier score"),
    )
    overall = [(words, metric, query.find_overall_row(rows, metric, model=told.model)) for metric, words in pairs]
    said = [
        f"{words[0].upper()}{words[1:]} {row.value:.3f} {_render_three_decimals(row)}."
        for words, _, row in overall
        if row and row.value is not None
    ]
    body = tuple((f"{r.bin:.2f}", f"{r.value:.2f}", render_interval(r), f"{r.n_windows:,}") for r in found)
    return ReportBlock(
        key=base.key,
        title=base.title,
        sentences=("Below the dashed line it is surer than it is right.", *said),
        figure=charts.draw_reliability(marks, [float(r.bin or 0.0) for r in found], origin=told.origin),
        table=ReportTable(
            columns=("said", "right", "95 % interval", "windows"), numeric=(True, True, False, True), rows=body
        ),
        command=EVALUATE_COMMAND,
    )


def _render_three_decimals(row: MetricRow) -> str:
    return f"[{row.low:.3f}, {row.high:.3f}]" if row.low is not None and row.high is not None else render_interval(row)


def _build_label_change_block(told: ReportContext) -> ReportBlock:
    base = ReportBlock(key="flips", title="How often it changes its mind", command=TRAIN_ALL_COMMAND)
    body, said = [], []
    truth = query.find_overall_row(_select_rows(told), "true_flips_per_minute")
    if truth is not None and truth.value is not None:
        body.append(("the truth", f"{truth.value:.2f}", render_interval(truth), "–"))
    for filter_, words in FILTER_LABELS:
        own = _select_rows(told, filter_=filter_)
        row, score = (
            query.find_overall_row(own, m, model=told.model) for m in ("label_changes_per_minute", "macro_f1")
        )
        if row is None or row.value is None:
            body.append((words, "–", NOT_TRAINED, "–"))
            continue
        quality = (
            f"{score.value:.2f} {render_interval(score)}" if score is not None and score.value is not None else "–"
        )
        body.append((words, f"{row.value:.2f}", render_interval(row), quality))
    if len(body) <= len(FILTER_LABELS) and all(b[1] == "–" for b in body):
        return ReportBlock(key=base.key, title=base.title, absent=NO_METRICS, command=TRAIN_ALL_COMMAND)
    said.append(
        "The filter knows how phases follow one another in these plans; “schedule alone” is that knowledge without any "
        "telemetry, and what the filter adds counts only above it."
    )
    columns = ("decisions", "flips a minute", "95 % interval", "macro-F1")
    return ReportBlock(
        key=base.key, title=base.title, sentences=tuple(said), is_table_open=True, command=TRAIN_ALL_COMMAND,
        table=ReportTable(columns=columns, numeric=(False, True, False, False), rows=tuple(body)),
    )  # fmt: skip


def _build_abstention_block(told: ReportContext) -> ReportBlock:
    base = ReportBlock(key="unseen-profile", title="Malware that it never saw", command=TRAIN_ALL_COMMAND)
    body: list[tuple[str, str, MetricRow | None]] = []
    for recipe, words in ((DEFAULT_HEADLINE.recipe, "unseen host"), (HELD_OUT_PROFILE, "unseen profile")):
        rows: Sequence[MetricRow] = _select_rows(told, recipe=recipe)
        model = told.model if any(r.model == told.model for r in rows) else DEFAULT_HEADLINE.model
        for metric, name in (("accuracy", "right, all windows"), ("selective_accuracy", "right, where it decides"),
                             ("abstention_rate", "windows left undecided"), ("macro_f1", "macro-F1")):  # fmt: skip
            row = query.find_overall_row(rows, metric, model=model)
            if row is not None:
                body.append((words, name, row))
    if not body:
        return ReportBlock(
            key=base.key,
            title=base.title,
            absent=f"Abstention and {HELD_OUT_PROFILE}: {NOT_TRAINED}.",
            command=TRAIN_ALL_COMMAND,
        )
    said = [
        f"It keeps silent below the confidence that would leave {1 - DECIDED_SHARE:.0%} of its validation undecided."
    ]
    if not any(words == "unseen profile" for words, _, _ in body):
        said.append(f"No profile was held out: {HELD_OUT_PROFILE} was {NOT_TRAINED}.")
    return ReportBlock(
        key=base.key,
        title=base.title,
        sentences=tuple(said),
        table=build_metric_table(body),
        is_table_open=True,
        command=TRAIN_ALL_COMMAND,
    )
