"""Report section on calibration: reliability diagram, prediction stability, and abstention on unseen profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phasewatch.evaluation import query
from phasewatch.evaluation.calibration import DECIDED_SHARE
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow, select_rows
from phasewatch.report import charts
from phasewatch.report.errors import EVALUATE_COMMAND, NO_METRICS, ReportContext
from phasewatch.report.layout import ReportBlock, ReportSection, ReportTable, build_metric_table, render_interval
from phasewatch.report.leaderboard import NOT_TRAINED, TRAIN_ALL_COMMAND
from phasewatch.training.predictions import NO_FILTER

__all__ = ["build_calibration_section"]

_ABSTENTION_METRICS = (
    ("accuracy", "accuracy, all windows"),
    ("selective_accuracy", "accuracy, decided windows"),
    ("abstention_rate", "abstention rate"),
    ("macro_f1", "macro-F1"),
)
_FILTER_LABELS = (
    (NO_FILTER, "no filter"),
    ("phase", "phase filter"),
    ("schedule", "transition model without telemetry"),
)
_HELD_OUT_PROFILE = "held_out_profile"


def build_calibration_section(context: ReportContext) -> ReportSection:
    """Build the section from the calibration metrics of the headline's model."""
    lead = (
        "Probabilities are calibrated by temperature scaling on validation data. All numbers below are measured on "
        "test episodes."
    )
    blocks = (_build_reliability_block(context), _build_label_change_block(context), _build_abstention_block(context))
    return ReportSection(key="trust", title="Calibration", lead=lead, blocks=blocks)


def _select_rows(
    context: ReportContext, *, recipe: str = DEFAULT_HEADLINE.recipe, filter_: str = NO_FILTER
) -> tuple[MetricRow, ...]:
    home = DEFAULT_HEADLINE
    return select_rows(
        context.all_rows,
        recipe=recipe,
        fold="pooled",
        channel_set=home.channel_set,
        input=home.input,
        smoothing=filter_,
        agent=home.agent,
    )


def _build_reliability_block(context: ReportContext) -> ReportBlock:
    rows = _select_rows(context)
    found = [
        r for r in select_rows(rows, "reliability", model=context.model) if r.bin is not None and r.value is not None
    ]
    base = ReportBlock(key="reliability", title="Reliability diagram", absent=NO_METRICS, command=EVALUATE_COMMAND)
    if not found:
        return base
    marks = [
        charts.ScoreMark(
            label="",
            value=r.value,
            low=r.low,
            high=r.high,
            words=f"confidence {r.bin:.2f}, accuracy {r.value:.2f} {render_interval(r)}, {r.n_windows:,} windows",
        )
        for r in found
    ]
    pairs = (
        ("ece_debiased", "expected calibration error (ECE), debiased"),
        ("confidence_less_accuracy", "mean confidence minus accuracy"),
        ("brier", "Brier score"),
    )
    overall = [(words, metric, query.find_overall_row(rows, metric, model=context.model)) for metric, words in pairs]
    scores = [
        f"{words[0].upper()}{words[1:]}: {row.value:.3f} {_render_three_decimals(row)}."
        for words, _, row in overall
        if row and row.value is not None
    ]
    body = tuple((f"{r.bin:.2f}", f"{r.value:.2f}", render_interval(r), f"{r.n_windows:,}") for r in found)
    return replace(
        base,
        absent="",
        sentences=(
            f"Accuracy by probability of the predicted phase, over {sum(r.n_windows for r in found):,} test windows. "
            "Marks below the dashed line mean overconfidence.",
            *scores,
        ),
        figure=charts.draw_reliability(marks, [float(r.bin or 0.0) for r in found], origin=context.origin),
        table=ReportTable(
            columns=("confidence", "accuracy", "95 % interval", "windows"),
            numeric=(True, True, False, True),
            rows=body,
        ),
    )


def _render_three_decimals(row: MetricRow) -> str:
    if row.low is None or row.high is None:
        return f"({render_interval(row)})"
    return f"[{row.low:.3f}, {row.high:.3f}]"


def _build_label_change_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(key="flips", title="Prediction stability", command=TRAIN_ALL_COMMAND)
    body = []
    truth = query.find_overall_row(_select_rows(context), "true_flips_per_minute")
    if truth is not None and truth.value is not None:
        body.append(("true phases", f"{truth.value:.2f}", render_interval(truth), "–"))
    for filter_, words in _FILTER_LABELS:
        own = _select_rows(context, filter_=filter_)
        row, score = (
            query.find_overall_row(own, m, model=context.model) for m in ("label_changes_per_minute", "macro_f1")
        )
        if row is None or row.value is None:
            body.append((words, "–", NOT_TRAINED, "–"))
            continue
        quality = (
            f"{score.value:.2f} {render_interval(score)}" if score is not None and score.value is not None else "–"
        )
        body.append((words, f"{row.value:.2f}", render_interval(row), quality))
    if len(body) <= len(_FILTER_LABELS) and all(b[1] == "–" for b in body):
        return replace(base, absent=NO_METRICS)
    columns = ("predictions", "label changes per minute", "95 % interval", "macro-F1")
    return replace(
        base,
        sentences=(
            "Rate at which the predicted phase changes, compared with the true phases. The phase filter uses the "
            "transition probabilities of the recording plans. The transition model without telemetry is its baseline: "
            "only the improvement over it comes from the telemetry.",
        ),
        is_table_open=True,
        table=ReportTable(columns=columns, numeric=(False, True, False, False), rows=tuple(body)),
    )


def _build_abstention_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(key="unseen-profile", title="Abstention and unseen profiles", command=TRAIN_ALL_COMMAND)
    body: list[tuple[str, str, MetricRow | None]] = []
    has_unseen_profile = False
    for recipe, words in ((DEFAULT_HEADLINE.recipe, "unseen host"), (_HELD_OUT_PROFILE, "unseen profile")):
        rows: Sequence[MetricRow] = _select_rows(context, recipe=recipe)
        model = context.model if any(r.model == context.model for r in rows) else DEFAULT_HEADLINE.model
        for metric, name in _ABSTENTION_METRICS:
            row = query.find_overall_row(rows, metric, model=model)
            if row is not None:
                body.append((words, name, row))
                has_unseen_profile |= recipe == _HELD_OUT_PROFILE
    if not body:
        return replace(base, absent=f"Abstention and the split {_HELD_OUT_PROFILE}: {NOT_TRAINED}.")
    sentences = [
        "With abstention, a window is undecided if its confidence is below a threshold. The threshold leaves "
        f"{1 - DECIDED_SHARE:.0%} of the validation windows undecided."
    ]
    if not has_unseen_profile:
        sentences.append(f"The split {_HELD_OUT_PROFILE}, which holds out malware profiles, was {NOT_TRAINED}.")
    return replace(base, sentences=tuple(sentences), table=build_metric_table(body), is_table_open=True)
