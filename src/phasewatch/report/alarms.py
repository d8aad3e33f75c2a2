"""Report section on alarms: infections announced in time, misses, delay, false alarms, budgets, and their impact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phasewatch.evaluation.detection import (
    BASE_RATE_DAYS,
    DETECTION_TIMES_S,
    HEADLINE_TIME_S,
    IMPACT_METRICS,
    MIN_RECORDED_S,
    STRIDE_SUFFIXES,
)
from phasewatch.evaluation.metric_table import (
    DEFAULT_HEADLINE,
    HEADLINE_RECIPES,
    MetricRow,
    NoteCode,
    select_rows,
)
from phasewatch.evaluation.ranking import FALSE_POSITIVE_RATES, RANKINGS
from phasewatch.models.alarm import FALSE_ALARM_BUDGET, LIVE_STRIDE_S, AlarmKind
from phasewatch.report import charts
from phasewatch.report.errors import EVALUATE_COMMAND, ReportContext
from phasewatch.report.layout import ReportBlock, ReportSection, ReportTable, build_score_mark, render_count
from phasewatch.training.predictions import NO_FILTER
from phasewatch.types import PHASES

__all__ = ["build_alarm_section"]

_NO_ALARM_METRICS = (
    "This run has no alarm metrics. They need binned episodes with labels and model predictions on validation data."
)
_RECIPE_LABELS = {"held_out_both": "unseen host and sample", "held_out_host": "unseen host"}
_KIND_LABELS = {AlarmKind.INFECTION: "infection", AlarmKind.ACTIVITY: "activity"}
_RANKING_LABELS = {"infecting": "infecting against the rest", "hot": "infecting or active against the rest"}
_IMPACT_LABELS = {
    "impact_bytes_written": "bytes written to disk",
    "impact_bytes_out": "bytes sent",
    "impact_new_flows": "new flows",
    "impact_cpu_seconds": "CPU-seconds",
}
# Metric → label and format, in the order of the table.
_MEASURES = (
    *((f"recall_{t}s", f"announced within {t} s", "{:.0%}") for t in DETECTION_TIMES_S),
    (f"chance_{HEADLINE_TIME_S}s", f"the same by chance, within {HEADLINE_TIME_S} s", "{:.0%}"),
    (f"n_cut_short_{HEADLINE_TIME_S}s", f"left out: recording ends within {HEADLINE_TIME_S} s of the onset", "{:.0f}"),
    ("miss_rate", f"missed, where {MIN_RECORDED_S:.0f} s or more follow the onset", "{:.0%}"),
    ("delay_s", "median delay (a miss counts as infinite)", "{:.1f} s"),
    ("soak_false_alarms_per_vm_hour", "false alarms per quiet VM-hour, soak recordings", "{:.2f}"),
    ("false_alarms_per_vm_hour", "false alarms per quiet VM-hour, test episodes", "{:.2f}"),
    ("soak_time_in_alarm", "share of quiet time in alarm, soak recordings", "{:.2%}"),
    ("time_in_alarm", "share of quiet time in alarm, test episodes", "{:.2%}"),
)


def build_alarm_section(context: ReportContext) -> ReportSection:
    """Build the section from the alarm metrics of the headline's model."""
    lead = (
        "The infection alarm rings on p(infecting) and is meant to page somebody. The activity alarm rings on "
        "p(infecting) + p(active) and informs. Each fold fits threshold and rule of both for at most "
        f"{FALSE_ALARM_BUDGET:g} false alarms per quiet VM-hour, on its validation episodes and on the soak recordings "
        "of other hosts. The results below are measured on the test hosts."
    )
    return ReportSection(
        key="rings",
        title="Alarms",
        lead=lead,
        blocks=(
            _build_alarm_block(context),
            _build_budget_block(context),
            _build_group_block(context),
            _build_ranking_block(context),
            _build_load_block(context),
            _build_impact_block(context),
        ),
    )


def _select_rows(context: ReportContext, recipe: str) -> tuple[MetricRow, ...]:
    home = DEFAULT_HEADLINE
    return select_rows(
        context.all_rows,
        recipe=recipe,
        fold="pooled",
        channel_set=home.channel_set,
        input=home.input,
        smoothing=NO_FILTER,
        model=context.model,
    )


def _find_row(own: Sequence[MetricRow], kind: AlarmKind, metric: str, **columns: object) -> MetricRow | None:
    """Return the row of an alarm's metric, at the stride of a live watcher if the run has it."""
    for suffix in STRIDE_SUFFIXES.values():
        if found := select_rows(own, f"{kind}_{metric}{suffix}", **({"overall": True} | columns)):  # type: ignore[arg-type]
            return found[0]
    return None


def _find_first_recipe(context: ReportContext) -> str:
    """Return the hardest recipe with alarm metrics."""
    for recipe in HEADLINE_RECIPES:
        own = _select_rows(context, recipe)
        if any(_find_row(own, kind, "miss_rate") is not None for kind in AlarmKind):
            return recipe
    return DEFAULT_HEADLINE.recipe


def _build_alarm_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="operator", title="Detection and false alarms", command=EVALUATE_COMMAND, absent=_NO_ALARM_METRICS
    )
    body: list[tuple[str, ...]] = []
    sentences: list[str] = []
    for kind, label in _KIND_LABELS.items():
        for recipe, words in _RECIPE_LABELS.items():
            own = _select_rows(context, recipe)
            if _find_row(own, kind, "miss_rate") is None:
                continue
            body += _list_measures(own, kind, (label, words))
            if kind is AlarmKind.INFECTION:
                sentences += _describe_infections(own, words)
    if not body:
        return base
    if all(not select_rows(_select_rows(context, r), f"{AlarmKind.INFECTION}_miss_rate") for r in _RECIPE_LABELS):
        sentences.append(
            f"The run has no predictions every {LIVE_STRIDE_S} s, as a live watcher makes them; the numbers are those "
            "of the training stride."
        )
    columns = ("alarm", "evaluated on", "metric", "value", "95 % interval", "sample size")
    return replace(
        base,
        absent="",
        sentences=tuple(sentences),
        is_table_open=True,
        table=ReportTable(columns=columns, numeric=(False, False, False, True, False, False), rows=tuple(body)),
    )


def _list_measures(own: Sequence[MetricRow], kind: AlarmKind, place: tuple[str, str]) -> list[tuple[str, ...]]:
    body: list[tuple[str, ...]] = []
    for metric, words, form in _MEASURES:
        row = _find_row(own, kind, metric)
        if row is None:
            if metric == "soak_false_alarms_per_vm_hour":
                body.append((*place, words, "–", "no soak recording of the test hosts", "–"))
            continue
        value = "–" if row.value is None else form.format(row.value)
        note = row.note if row.note and (row.low is None or row.code is NoteCode.FALSE_ALARM_COUNT) else ""
        if row.code is NoteCode.COUNT:
            note = ""
        size = render_count(row.n_episodes, "episode")
        body.append((*place, words, value, _render_ends(row, form), f"{size}; {note}" if note else size))
    return body


def _render_ends(row: MetricRow, form: str) -> str:
    if row.low is None or row.high is None:
        return "none"
    return f"[{form.format(row.low)}, {form.format(row.high)}]"


def _describe_infections(own: Sequence[MetricRow], where: str) -> list[str]:
    """Return sentences on announced infections, false alarms and the precision that follows from them."""
    kind = AlarmKind.INFECTION
    recall = _find_row(own, kind, f"recall_{HEADLINE_TIME_S}s")
    false_rate = _find_row(own, kind, "soak_false_alarms_per_vm_hour") or _find_row(
        own, kind, "false_alarms_per_vm_hour"
    )
    if recall is None or recall.value is None or false_rate is None or false_rate.value is None:
        return []
    n = round(recall.value * recall.n_episodes)
    sentences = [
        f"{where[0].upper()}{where[1:]}: {n} of {render_count(recall.n_episodes, 'infection')} announced within "
        f"{HEADLINE_TIME_S} s, at {false_rate.value:.2f} {_render_ends(false_rate, '{:.2f}')} false alarms per quiet "
        f"VM-hour ({false_rate.note})."
    ]
    shares = [
        (days, row)
        for days in BASE_RATE_DAYS
        if (row := _find_row(own, kind, "precision_at_base_rate", bin=float(days))) and row.value is not None
    ]
    if shares:
        parts = ", ".join(
            f"{row.value:.2%} {_render_ends(row, '{:.2%}')} with one infection per VM in {render_count(days, 'day')}"
            for days, row in shares
        )
        sentences.append(f"Share of infection alarms that would be true: {parts}.")
    return sentences


def _build_budget_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="delay-curve",
        title="Detection against false-alarm budget",
        command=EVALUATE_COMMAND,
        absent=_NO_ALARM_METRICS,
    )
    recipe = _find_first_recipe(context)
    own = _select_rows(context, recipe)
    metric = f"recall_{HEADLINE_TIME_S}s_at_budget"
    budgets = sorted({r.bin for kind in AlarmKind for r in _select_curve(own, kind, metric) if r.bin is not None})
    if not budgets:
        return base
    lines, body = [], []
    for kind, label in _KIND_LABELS.items():
        points = []
        for budget in budgets:
            rows = {
                name: _find_row(own, kind, f"{name}_at_budget", bin=budget)
                for name in (
                    f"recall_{HEADLINE_TIME_S}s",
                    "miss_rate",
                    "delay_s",
                    "soak_false_alarms_per_vm_hour",
                    "false_alarms_per_vm_hour",
                    "soak_time_in_alarm",
                )
            }
            recall = rows[f"recall_{HEADLINE_TIME_S}s"]
            value = None if recall is None else recall.value
            words = f"budget {budget:g}: {_render_value(recall, '{:.0%}')} announced within {HEADLINE_TIME_S} s"
            points.append((budget, value, words))
            forms = ("{:.0%}", "{:.0%}", "{:.1f} s", "{:.2f}", "{:.2f}", "{:.2%}")
            cells = (_render_value(row, form) for row, form in zip(rows.values(), forms, strict=True))
            body.append((label, f"{budget:g}", *cells))
        lines.append(charts.CurveLine(name=f"{label} alarm", points=tuple(points)))
    return replace(
        base,
        absent="",
        sentences=(
            f"Share of onsets announced within {HEADLINE_TIME_S} s at each false-alarm budget, "
            f"{_RECIPE_LABELS[recipe]}.",
            "The budget is the rate allowed on validation data; the table shows the rates measured on the test hosts. "
            "An alarm that is on for long is cheap by this count, so the table shows its time as well.",
        ),
        figure=charts.draw_curve(
            lines,
            x="budget: false alarms per quiet VM-hour",
            y=f"announced within {HEADLINE_TIME_S} s",
            origin=context.origin,
        ),
        table=ReportTable(
            columns=(
                "alarm",
                "budget",
                f"within {HEADLINE_TIME_S} s",
                "missed",
                "median delay",
                "false alarms per VM-hour, soak",
                "false alarms per VM-hour, test",
                "time in alarm, soak",
            ),
            numeric=(False, True, True, True, True, True, True, True),
            rows=tuple(body),
        ),
    )


def _select_curve(own: Sequence[MetricRow], kind: AlarmKind, metric: str) -> tuple[MetricRow, ...]:
    """Select the points of a curve at the stride of a live watcher, else at that of training."""
    curves = (select_rows(own, f"{kind}_{metric}{suffix}", overall=True) for suffix in STRIDE_SUFFIXES.values())
    return next((rows for rows in curves if rows), ())


def _render_value(row: MetricRow | None, form: str) -> str:
    """Render a value with its interval; a dash where there is none."""
    if row is None or row.value is None:
        return "–" if row is None or row.code is not NoteCode.MOST_EPISODES_MISSED else "more than half missed"
    return form.format(row.value) + ("" if row.low is None else f" {_render_ends(row, form)}")


def _build_group_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="alarm-groups",
        title="By starting state and by profile",
        command=EVALUATE_COMMAND,
        absent=_NO_ALARM_METRICS,
    )
    recipe = _find_first_recipe(context)
    own = _select_rows(context, recipe)
    body = []
    for kind, label in _KIND_LABELS.items():
        found = [
            r
            for suffix in STRIDE_SUFFIXES.values()
            for r in select_rows(own, f"{kind}_recall_{HEADLINE_TIME_S}s{suffix}")
            if r.bin is None and (r.profile or r.phase)
        ]
        names = [("class", str(p), {"phase": str(p)}) for p in PHASES if any(r.phase == p for r in found)]
        names += [("profile", p, {"profile": p}) for p in sorted({r.profile for r in found if r.profile})]
        for what, name, columns in names:
            where: dict[str, object] = {"overall": False, "phase": None, "profile": None, "bin": None, **columns}
            rows = [_find_row(own, kind, m, **where) for m in (f"recall_{HEADLINE_TIME_S}s", "miss_rate", "delay_s")]
            forms = ("{:.0%}", "{:.0%}", "{:.1f} s")
            cells = [_render_value(row, form) for row, form in zip(rows, forms, strict=True)]
            size = "–" if rows[0] is None else f"{rows[0].n_episodes}"
            body.append((label, f"starts {name}" if what == "class" else name, *cells, size))
    if not body:
        return base
    return replace(
        base,
        absent="",
        sentences=(
            f"Episodes with an onset, {_RECIPE_LABELS[recipe]}. The starting state is the phase at the first label: a "
            "machine that starts infecting, active or dormant was infected before the recording began.",
        ),
        table=ReportTable(
            columns=("alarm", "episodes", f"within {HEADLINE_TIME_S} s", "missed", "median delay", "sample size"),
            numeric=(False, False, True, True, True, True),
            rows=tuple(body),
        ),
        is_table_open=True,
    )


def _build_ranking_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="precision-curve",
        title="Ranking of single windows",
        command=EVALUATE_COMMAND,
        absent="This run has no test windows of infecting and other phases to rank.",
    )
    body, lines = [], []
    recipe = next(
        (r for r in HEADLINE_RECIPES if select_rows(_select_rows(context, r), "infecting_precision_curve")), None
    )
    if recipe is None:
        return base
    own = _select_rows(context, recipe)
    for name in RANKINGS:
        points = select_rows(own, f"{name}_precision_curve")
        lines.append(
            charts.CurveLine(
                name=_RANKING_LABELS[name],
                points=tuple(
                    (r.bin, r.value, f"recall {r.bin:.2f}, precision {r.value:.2f}")
                    for r in points
                    if r.bin is not None and r.value is not None
                ),
            )
        )
        measures = [("auroc", "AUROC"), ("average_precision", "average precision")]
        measures += [
            (f"tpr_at_fpr_{key}", f"recall at a false-positive rate of {rate:.1%}")
            for key, rate in FALSE_POSITIVE_RATES.items()
        ]
        for metric, words in measures:
            for row in select_rows(own, f"{name}_{metric}", overall=True)[:1]:
                size = render_count(row.n_windows or 0, "window")
                body.append((_RANKING_LABELS[name], words, _render_value(row, "{:.2f}"), size))
    return replace(
        base,
        absent="",
        sentences=(
            f"Single windows ranked by p(infecting), and by p(infecting) + p(active), {_RECIPE_LABELS[recipe]}. "
            "Precision depends on the share of such windows in the test episodes, which is far above that of real "
            "operation.",
        ),
        figure=charts.draw_curve(lines, x="recall", y="precision", origin=context.origin, is_share=True),
        table=ReportTable(
            columns=("windows", "metric", "value", "sample size"),
            numeric=(False, False, True, False),
            rows=tuple(body),
        ),
    )


def _build_load_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="load",
        title="Idle clean machines, and scores with and without load",
        command=EVALUATE_COMMAND,
        absent="This run has no scores by load; its index of bundles does not name the loads, or no host was held out.",
    )
    rows = [
        (words, label, row)
        for recipe, words in _RECIPE_LABELS.items()
        for metric, label in (
            ("idle_called_clean", "windows of idle clean machines called clean"),
            ("idle_called_quiet", "windows of idle clean machines called clean, armed or dormant"),
            ("macro_f1_3class_with_load", "macro-F1, three states, episodes with a benign load"),
            ("macro_f1_3class_without_load", "macro-F1, three states, episodes without"),
            ("macro_f1_with_load", "macro-F1, five phases, episodes with a benign load"),
            ("macro_f1_without_load", "macro-F1, five phases, episodes without"),
        )
        for row in select_rows(_select_rows(context, recipe), metric, overall=True)[:1]
        if row.value is not None
    ]
    if not rows:
        return base
    series = charts.ScoreSeries(
        name="share or macro-F1",
        scores=tuple(build_score_mark(f"{label}, {words}", row) for words, label, row in rows),
    )
    return replace(
        base,
        absent="",
        sentences=(
            "A model that has learnt whether a load runs, not what the malware does, calls idle clean machines armed "
            "or dormant, and loses its score where every episode runs a load.",
        ),
        figure=charts.draw_intervals((series,), title="share or macro-F1", origin=context.origin),
        table=ReportTable(
            columns=("evaluated on", "metric", "value", "sample size"),
            numeric=(False, False, True, False),
            rows=tuple(
                (
                    words,
                    label,
                    _render_value(row, "{:.2f}"),
                    f"{render_count(row.n_windows or 0, 'window')}, {render_count(row.n_episodes, 'episode')}"
                    + (f"; {row.note}" if row.note and row.low is None else ""),
                )
                for words, label, row in rows
            ),
        ),
        is_table_open=True,
    )


def _build_impact_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(
        key="damage", title="Impact before detection", command=EVALUATE_COMMAND, absent=_NO_ALARM_METRICS
    )
    own = _select_rows(context, _find_first_recipe(context))
    found = [
        (name, unit, row)
        for name, _, unit in IMPACT_METRICS
        if (row := _find_row(own, AlarmKind.INFECTION, name)) and row.value is not None
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
            "Activity of the VM between the infection and its alarm, measured by host-side channels; median over "
            "episodes with an infection. A missed episode counts up to the end of its recording, which is a lower "
            "bound. The benign load of the VM is included.",
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
