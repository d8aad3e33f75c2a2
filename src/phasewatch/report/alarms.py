"""Report section on alarms: detection delay, missed episodes, false alarms, and the impact before detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phasewatch.evaluation import query
from phasewatch.evaluation.detection import IMPACT_METRICS
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow, NoteCode, select_rows
from phasewatch.report import charts
from phasewatch.report.errors import EVALUATE_COMMAND, ReportContext
from phasewatch.report.layout import ReportBlock, ReportSection, ReportTable, render_count, render_interval
from phasewatch.training.predictions import NO_FILTER

__all__ = ["build_alarm_section"]

_NO_ALARM_METRICS = (
    "This run has no alarm metrics. They need binned episodes with labels and model predictions on validation data."
)
_RECIPE_LABELS = {"held_out_host": "unseen host", "held_out_both": "unseen host and sample"}
_IMPACT_LABELS = {
    "impact_bytes_written": "bytes written to disk",
    "impact_bytes_out": "bytes sent",
    "impact_new_flows": "new flows",
    "impact_cpu_seconds": "CPU-seconds",
}


def build_alarm_section(context: ReportContext) -> ReportSection:
    """Build the section from the alarm metrics of the headline's model."""
    lead = (
        "An alarm is raised when p(infecting) + p(active) exceeds a threshold in two of three consecutive windows. "
        "Each fold fits its threshold for a budget of at most one false alarm per quiet VM-hour, on its validation "
        "episodes and on the soak recordings of other hosts. The results below are measured on the test hosts."
    )
    return ReportSection(
        key="rings",
        title="Detection delay and false alarms",
        lead=lead,
        blocks=(_build_alarm_block(context), _build_budget_block(context), _build_impact_block(context)),
    )


def _select_rows(context: ReportContext, recipe: str, filter_: str = NO_FILTER) -> tuple[MetricRow, ...]:
    home = DEFAULT_HEADLINE
    return select_rows(
        context.all_rows,
        recipe=recipe,
        fold="pooled",
        channel_set=home.channel_set,
        input=home.input,
        smoothing=filter_,
        model=context.model,
    )


def _build_alarm_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="operator", title="Delay, misses and false alarms", command=EVALUATE_COMMAND, absent=_NO_ALARM_METRICS
    )
    body, sentences = [], []
    for recipe, words in _RECIPE_LABELS.items():
        for filter_, filtered in ((NO_FILTER, ""), ("phase", ", with phase filter")):
            own = _select_rows(context, recipe, filter_)
            delay = query.find_overall_row(own, "delay_s")
            if delay is None:
                continue
            body += _list_measures(own, f"{words}{filtered}")
            if recipe == DEFAULT_HEADLINE.recipe and filter_ == NO_FILTER:
                sentences += _describe_alarms(own, delay)
    if not body:
        return base
    columns = ("evaluated on", "metric", "value", "95 % interval", "sample size")
    return replace(
        base,
        absent="",
        sentences=tuple(sentences),
        is_table_open=True,
        table=ReportTable(columns=columns, numeric=(False, False, True, False, False), rows=tuple(body)),
    )


def _list_measures(own: Sequence[MetricRow], place: str) -> list[tuple[str, ...]]:
    names = (
        ("delay_s", "median detection delay (missed episodes count as infinite)", "{:.0f} s"),
        ("miss_rate", "miss rate (share of episodes with an onset)", "{:.0%}"),
        ("false_alarms_per_vm_hour", "false alarms per quiet VM-hour, test episodes", "{:.1f}"),
        ("soak_false_alarms_per_vm_hour", "false alarms per quiet VM-hour, soak recordings", "{:.1f}"),
    )
    body: list[tuple[str, ...]] = []
    for metric, words, form in names:
        row = query.find_overall_row(own, metric)
        if row is None:
            if metric.startswith("soak"):
                body.append((place, words, "–", "no soak recording of the test hosts", "–"))
            continue
        value = "–" if row.value is None else form.format(row.value)
        ends = "none" if row.low is None or row.high is None else f"[{form.format(row.low)}, {form.format(row.high)}]"
        note = row.note if row.note and (row.low is None or row.code is NoteCode.FALSE_ALARM_COUNT) else ""
        size = render_count(row.n_episodes, "episode")
        body.append((place, words, value, ends, f"{size}; {note}" if note else size))
    return body


def _describe_alarms(own: Sequence[MetricRow], delay: MetricRow) -> list[str]:
    missed, false_rate = (
        query.find_overall_row(own, "miss_rate"),
        query.find_overall_row(own, "false_alarms_per_vm_hour"),
    )
    sentences = []
    if missed is not None and missed.value is not None:
        n = round(missed.value * missed.n_episodes)
        sentences.append(
            f"On unseen hosts the alarm missed {n} of {render_count(missed.n_episodes, 'episode')} with an onset."
        )
    if delay.value is not None:
        sentences.append(
            f"Median detection delay: {delay.value:.0f} s after the onset {_render_seconds(delay)}; missed episodes "
            "count as infinite."
        )
    if false_rate is not None and false_rate.value is not None:
        sentences.append(
            f"Measured false alarms on the test episodes: {false_rate.value:.1f} {render_interval(false_rate)} per "
            f"quiet VM-hour ({false_rate.note}), with a threshold fitted for at most one."
        )
    return sentences


def _render_seconds(row: MetricRow) -> str:
    return f"[{row.low:.0f} s, {row.high:.0f} s]" if row.low is not None and row.high is not None else f"({row.note})"


def _build_budget_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="delay-curve", title="Delay against false-alarm budget", command=EVALUATE_COMMAND, absent=_NO_ALARM_METRICS
    )
    own = _select_rows(context, DEFAULT_HEADLINE.recipe)
    points = [r for r in select_rows(own, "delay_s_at_budget") if r.bin is not None]
    if not points:
        return base
    false_rates = {r.bin: r for r in select_rows(own, "false_alarms_per_vm_hour_at_budget")}
    missed = {(r.bin, r.profile): r for r in select_rows(own, "miss_rate_at_budget")}
    profiles: list[str | None] = list(dict.fromkeys(r.profile for r in points))

    def hover_text(r: MetricRow) -> str:
        miss_rate = missed.get((r.bin, r.profile))
        share = (
            ""
            if miss_rate is None or miss_rate.value is None
            else f", {miss_rate.value:.0%} of {r.n_episodes} episodes missed"
        )
        return f"budget {r.bin:g}: {'more than half missed' if r.value is None else f'{r.value:.0f} s'}{share}"

    lines = tuple(
        charts.CurveLine(
            name=profile or "all profiles",
            points=tuple((r.bin, r.value, hover_text(r)) for r in points if r.profile == profile and r.bin is not None),
        )
        for profile in profiles
    )
    body = tuple(
        (
            f"{r.bin:g}",
            r.profile or "all",
            "more than half missed" if r.value is None else f"{r.value:.0f} s",
            _render_optional(missed.get((r.bin, r.profile)), "{:.0%}"),
            _render_optional(false_rates.get(r.bin) if r.profile is None else None, "{:.1f}"),
            f"{r.n_episodes}",
        )
        for r in points
    )
    return replace(
        base,
        absent="",
        sentences=(
            "Median detection delay at each false-alarm budget. A line ends where more than half of its episodes are "
            "missed.",
            "The budget is the rate allowed on validation data; the table shows the rate measured on the test hosts.",
        ),
        figure=charts.draw_curve(
            lines, x="budget: false alarms per quiet VM-hour", y="median delay, s", origin=context.origin
        ),
        table=ReportTable(
            columns=("budget", "profile", "median delay", "miss rate", "measured false alarms per VM-hour", "episodes"),
            numeric=(True, False, True, True, True, True),
            rows=body,
        ),
    )


def _render_optional(row: MetricRow | None, form: str) -> str:
    return "–" if row is None or row.value is None else form.format(row.value)


def _build_impact_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="damage", title="Impact before detection", command=EVALUATE_COMMAND, absent=_NO_ALARM_METRICS
    )
    own = _select_rows(context, DEFAULT_HEADLINE.recipe)
    found = [
        (name, unit, row)
        for name, _, unit in IMPACT_METRICS
        if (row := query.find_overall_row(own, name)) and row.value is not None
    ]
    if not found:
        return base
    body = tuple(
        (_IMPACT_LABELS[name], _render_amount(row.value, unit), _render_amount_interval(row, unit), f"{row.n_episodes}")
        for name, unit, row in found
    )
    return replace(
        base,
        absent="",
        sentences=(
            "Activity of the VM between the onset and the alarm, measured by host-side channels; median over episodes "
            "with an onset. A missed episode counts up to the end of its recording, which is a lower bound. The benign "
            "load of the VM is included.",
        ),
        table=ReportTable(
            columns=("metric", "median", "95 % interval", "episodes"), numeric=(False, True, False, True), rows=body
        ),
        is_table_open=True,
    )


def _render_amount_interval(row: MetricRow, unit: str) -> str:
    if row.low is None or row.high is None:
        return f"none: {row.note}"
    return f"[{_render_amount(row.low, unit)}, {_render_amount(row.high, unit)}]"


def _render_amount(value: float | None, unit: str) -> str:
    """Render an amount with its unit: `1.9 MB`, `4 flows`, `12 s`."""
    if value is None:
        return "–"
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if unit == "B" and value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} {unit}"
