"""When it would ring: delay, missed episodes and false alarms as an operator would live through them, and what was done by then."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.evaluation import query
from phasewatch.evaluation.detection import IMPACT_METRICS
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow, NoteCode, select_rows
from phasewatch.report import charts
from phasewatch.report.errors import EVALUATE_COMMAND, ReportContext
from phasewatch.report.layout import ReportBlock, ReportSection, ReportTable, render_count, render_interval
from phasewatch.training.predictions import NO_FILTER

NO_ALARM_METRICS = "No operator's view in this run: it needs grids with labels, and a model with its validation."
RECIPE_LABELS = {"held_out_host": "unseen host", "held_out_both": "unseen host and sample"}
IMPACT_LABELS = {
    "impact_bytes_written": "bytes written to disk",
    "impact_bytes_out": "bytes sent",
    "impact_new_flows": "new flows",
    "impact_cpu_seconds": "CPU-seconds",
}


def build_alarm_section(told: ReportContext) -> ReportSection:
    """Build the section from the operator's rows of the headline's model."""
    lead = (
        "An alarm rings when infecting or active is likely enough in two of three windows. Each fold's threshold is "
        "bought with a budget of one false alarm per VM-hour on its own validation and on the soak of other hosts; "
        "what the tested host then does to it is what is shown."
    )
    return ReportSection(
        key="rings",
        title="When it would ring",
        lead=lead,
        blocks=(_build_alarm_block(told), _build_budget_block(told), _build_impact_block(told)),
    )


def _select_rows(told: ReportContext, recipe: str, filter_: str = NO_FILTER) -> tuple[MetricRow, ...]:
    home = DEFAULT_HEADLINE
    return select_rows(
        told.all_rows, recipe=recipe, fold="pooled", channel_set=home.channel_set, input=home.input,
        smoothing=filter_, model=told.model,
    )  # fmt: skip


def _build_alarm_block(told: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="operator", title="Delay, misses and false alarms", command=EVALUATE_COMMAND, absent=NO_ALARM_METRICS
    )
    body, said = [], []
    for recipe, words in RECIPE_LABELS.items():
        for filter_, filtered in ((NO_FILTER, ""), ("phase", ", filtered")):
            own = _select_rows(told, recipe, filter_)
            delay = query.find_overall_row(own, "delay_s")
            if delay is None:
                continue
            place = f"{words}{filtered}"
            body += _list_measures(own, place)
            if recipe == DEFAULT_HEADLINE.recipe and filter_ == NO_FILTER:
                said += _describe_alarms(own, delay)
    if not body:
        return base
    columns = ("tested on", "measure", "value", "95 % interval", "rests on")
    return ReportBlock(
        key=base.key, title=base.title, command=EVALUATE_COMMAND, sentences=tuple(said), is_table_open=True,
        table=ReportTable(columns=columns, numeric=(False, False, True, False, False), rows=tuple(body)),
    )  # fmt: skip


def _list_measures(own: Sequence[MetricRow], place: str) -> list[tuple[str, ...]]:
    names = (
        ("delay_s", "median delay, a miss counting as never", "{:.0f} s"),
        ("miss_rate", "episodes missed", "{:.0%}"),
        ("false_alarms_per_vm_hour", "false alarms per VM-hour, test", "{:.1f}"),
        ("soak_false_alarms_per_vm_hour", "false alarms per VM-hour, soak", "{:.1f}"),
    )
    body: list[tuple[str, ...]] = []
    for metric, words, form in names:
        row = query.find_overall_row(own, metric)
        if row is None:
            if metric.startswith("soak"):
                body.append((place, words, "–", "no soak episode of the tested hosts", "–"))
            continue
        value = "–" if row.value is None else form.format(row.value)
        ends = "none" if row.low is None or row.high is None else f"[{form.format(row.low)}, {form.format(row.high)}]"
        why = row.note if row.note and (row.low is None or row.code is NoteCode.FALSE_ALARM_COUNT) else ""
        body.append(
            (place, words, value, ends, "; ".join(w for w in (render_count(row.n_episodes, "episode"), why) if w))
        )
    return body


def _describe_alarms(own: Sequence[MetricRow], delay: MetricRow) -> list[str]:
    missed, false = (
        query.find_overall_row(own, "miss_rate"),
        query.find_overall_row(own, "false_alarms_per_vm_hour"),
    )
    said = []
    if missed is not None and missed.value is not None:
        n = round(missed.value * missed.n_episodes)
        said.append(f"On an unseen host {n} of {render_count(missed.n_episodes, 'episode')} with an onset were missed.")
    if delay.value is not None:
        said.append(f"Half of all were caught within {delay.value:.0f} s of their onset {_render_seconds(delay)}.")
    if false is not None and false.value is not None:
        said.append(
            f"The budget of one false alarm per VM-hour became {false.value:.1f} {render_interval(false)} on the test: {false.note}."
        )
    return said


def _render_seconds(row: MetricRow) -> str:
    return f"[{row.low:.0f} s, {row.high:.0f} s]" if row.low is not None and row.high is not None else f"({row.note})"


def _build_budget_block(told: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="delay-curve", title="Delay against budget", command=EVALUATE_COMMAND, absent=NO_ALARM_METRICS
    )
    own = _select_rows(told, DEFAULT_HEADLINE.recipe)
    points = [r for r in select_rows(own, "delay_s_at_budget") if r.bin is not None]
    if not points:
        return base
    false = {r.bin: r for r in select_rows(own, "false_alarms_per_vm_hour_at_budget")}
    missed = {(r.bin, r.profile): r for r in select_rows(own, "miss_rate_at_budget")}
    profiles: list[str | None] = list(dict.fromkeys(r.profile for r in points))

    def words(r: MetricRow) -> str:
        lost = missed.get((r.bin, r.profile))
        share = "" if lost is None or lost.value is None else f", {lost.value:.0%} of {r.n_episodes} missed"
        return f"budget {r.bin:g}: {'more than half missed' if r.value is None else f'{r.value:.0f} s'}{share}"

    lines = tuple(
        charts.CurveLine(
            name=profile or "all profiles",
            points=tuple((r.bin, r.value, words(r)) for r in points if r.profile == profile and r.bin is not None),
        )
        for profile in profiles
    )
    body = tuple(
        (
            f"{r.bin:g}",
            r.profile or "all",
            "more than half missed" if r.value is None else f"{r.value:.0f} s",
            f"{lost.value:.0%}" if (lost := missed.get((r.bin, r.profile))) and lost.value is not None else "–",
            f"{came.value:.1f}" if r.profile is None and (came := false.get(r.bin)) and came.value is not None else "–",
            f"{r.n_episodes}",
        )
        for r in points
    )
    return ReportBlock(
        key=base.key,
        title=base.title,
        sentences=(
            "Median delay at each budget; a line breaks off where more than half of its episodes are missed.",
            "The budget is what was allowed on validation; the table says what the unseen hosts made of it.",
        ),
        figure=charts.draw_curve(lines, x="budget: false alarms per VM-hour", y="median delay, s", origin=told.origin),
        table=ReportTable(
            columns=("budget", "profile", "median delay", "missed", "false alarms per VM-hour that came", "episodes"),
            numeric=(True, False, True, True, True, True), rows=body,
        ),
        command=EVALUATE_COMMAND,
    )  # fmt: skip


def _build_impact_block(told: ReportContext) -> ReportBlock:
    base = ReportBlock(key="damage", title="What was done by then", command=EVALUATE_COMMAND, absent=NO_ALARM_METRICS)
    own = _select_rows(told, DEFAULT_HEADLINE.recipe)
    found = [
        (name, unit, row)
        for name, _, unit in IMPACT_METRICS
        if (row := query.find_overall_row(own, name)) and row.value is not None
    ]
    if not found:
        return base
    body = tuple(
        (IMPACT_LABELS[name], _render_amount(row.value, unit), _render_amount_interval(row, unit), f"{row.n_episodes}")
        for name, unit, row in found
    )
    return ReportBlock(
        key=base.key,
        title=base.title,
        sentences=(
            "Median over episodes with an onset, from host-side channels, from onset to the alarm; of a missed episode all "
            "until its recording ended, so a lower bound. The machine's own life is in it.",
        ),
        table=ReportTable(
            columns=("measure", "median", "95 % interval", "episodes"), numeric=(False, True, False, True), rows=body
        ),
        is_table_open=True,
        command=EVALUATE_COMMAND,
    )


def _render_amount_interval(row: MetricRow, unit: str) -> str:
    if row.low is None or row.high is None:
        return f"none: {row.note}"
    return f"[{_render_amount(row.low, unit)}, {_render_amount(row.high, unit)}]"


def _render_amount(value: float | None, unit: str) -> str:
    """Give `1.9 MB`, `4 flows`, `12 s`."""
    if value is None:
        return "–"
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if unit == "B" and value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} {unit}"
