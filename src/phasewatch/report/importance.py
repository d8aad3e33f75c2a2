"""Report section on importance: ablation by source, collection cost by source, permutation importance by channel."""

from __future__ import annotations

from dataclasses import replace

from phasewatch.artifacts import VALIDATION_FILE
from phasewatch.channels import CHANNELS, build_channel_mask, list_raw_fields, list_source_subsets
from phasewatch.evaluation import query
from phasewatch.evaluation.bootstrap import CONFIDENCE_LEVEL
from phasewatch.evaluation.comparisons import needs_agent
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow, NoteCode, select_rows
from phasewatch.report import charts
from phasewatch.report.data import BundleCounts
from phasewatch.report.errors import EVALUATE_COMMAND, NO_METRICS, ReportContext
from phasewatch.report.layout import (
    ReportBlock,
    ReportSection,
    ReportTable,
    build_score_mark,
    render_interval,
    render_number,
    render_signed_interval,
)
from phasewatch.report.leaderboard import NOT_TRAINED, TRAIN_ALL_COMMAND
from phasewatch.training.predictions import NO_FILTER
from phasewatch.types import SourceKind

__all__ = ["build_importance_section"]

_MAX_CHANNELS_SHOWN = 12  # in the figure; the table lists all
_IMPORTANCE_MODEL = DEFAULT_HEADLINE.model
_SOURCE_REQUIREMENTS = {
    SourceKind.PROC: "permission to read /proc of the QEMU process",
    SourceKind.QMP: "a QMP socket of the VM",
    SourceKind.NETFLOW: "a copy of the VM's network frames",
    SourceKind.GUEST: "an agent in the guest; malware in the guest can forge its data",
}


def build_importance_section(context: ReportContext, bundles: BundleCounts | None) -> ReportSection:
    """Build the section from the metrics of all channel sets and the row counts of the bundles."""
    blocks = (_build_sensor_block(context), _build_cost_block(bundles), _build_channel_block(context))
    return ReportSection(key="looks", title="Importance", blocks=blocks)


def _build_sensor_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(key="sensors", title="Ablation by source", command=TRAIN_ALL_COMMAND)
    found: list[tuple[str, MetricRow]] = []
    absent = []
    own = [
        r
        for r in context.all_rows
        if (r.recipe, r.fold, r.input, r.smoothing)
        == (DEFAULT_HEADLINE.recipe, "pooled", DEFAULT_HEADLINE.input, NO_FILTER)
    ]
    for name in list_source_subsets():
        same = (
            DEFAULT_HEADLINE.channel_set
            if build_channel_mask(name) == build_channel_mask(DEFAULT_HEADLINE.channel_set)
            else name
        )
        row = next(
            (
                x
                for threat in (name, same)
                if (
                    x := query.find_overall_row(
                        own, "macro_f1", model=_IMPORTANCE_MODEL, channel_set=threat, agent="on"
                    )
                )
                is not None
            ),
            None,
        )
        if row is None:
            absent.append(name)
        else:
            found.append((name, row))
    if len(found) < 2:
        return replace(base, absent=f"The 15 subsets of the four sources were {NOT_TRAINED}.")
    gaps = {r.channel_set: r for r in select_rows(own, "macro_f1_sensor_gap", agent="on", model=_IMPORTANCE_MODEL)}
    prior = query.find_overall_row(
        own, "macro_f1", channel_set=DEFAULT_HEADLINE.channel_set, model="majority", agent="on"
    )
    series = charts.ScoreSeries(
        name=_IMPORTANCE_MODEL, scores=tuple(build_score_mark(name, row) for name, row in found)
    )
    body = [
        (
            name,
            render_number(row.value),
            render_interval(row),
            _render_gap(gaps.get(row.channel_set)),
            "yes" if needs_agent(name) else "no",
        )
        for name, row in found
    ]
    if prior is not None:
        body.append(("none (majority class)", render_number(prior.value), render_interval(prior), "–", "no"))
    sentences = [
        f"Macro-F1 of {_IMPORTANCE_MODEL} trained on each subset of the sources. All subsets are tested on the same "
        "episodes, those with the guest agent."
    ]
    if absent:
        sentences.append(f"{NOT_TRAINED[0].upper()}{NOT_TRAINED[1:]}: {', '.join(absent)}.")
    return replace(
        base,
        sentences=tuple(sentences),
        figure=charts.draw_intervals((series,), title="macro-F1", origin=context.origin),
        table=ReportTable(
            columns=("sources", "macro-F1", "95 % interval", "difference to all four", "needs the agent"),
            numeric=(False, True, False, False, False),
            rows=tuple(body),
        ),
    )


def _render_gap(row: MetricRow | None) -> str:
    if row is None or row.value is None:
        return "–"
    value = f"{row.value:+.2f}"
    return value if row.low is None or row.high is None else f"{value} {render_signed_interval(row)}"


def _build_cost_block(bundles: BundleCounts | None) -> ReportBlock:
    base = ReportBlock(key="costs", title="Collection cost by source", command="phasewatch validate STORE --out RUN")
    if bundles is None or not bundles.rows_per_s:
        return replace(base, absent=f"{VALIDATION_FILE} has no row counts.")
    body = []
    for source in SourceKind:
        rate = dict(bundles.rows_per_s).get(str(source))
        fields = len(list_raw_fields(source))
        channels = sum(c.source is source for c in CHANNELS)
        body.append(
            (
                str(source),
                str(channels),
                "–" if rate is None else f"{rate:.2f}",
                str(fields),
                "–" if rate is None else f"{rate * fields * 3600:,.0f}",
                _SOURCE_REQUIREMENTS[source],
            )
        )
    columns = ("source", "channels", "readings per second", "values per reading", "values per VM-hour", "requirement")
    return replace(
        base,
        is_table_open=True,
        sentences=("Sampling rate measured in the bundles of this run, over the episodes that have the source.",),
        table=ReportTable(columns=columns, numeric=(False, True, True, True, True, False), rows=tuple(body)),
    )


def _build_channel_block(context: ReportContext) -> ReportBlock:
    base = ReportBlock(key="channels", title="Permutation importance", command=EVALUATE_COMMAND)
    rows = [
        r
        for r in select_rows(query.select_headline_rows(context.all_rows), "macro_f1_permuted_gap")
        if r.value is not None
    ]
    if not rows:
        notes = [r.note for r in select_rows(context.all_rows, "note", code=NoteCode.NO_IMPORTANCE) if r.note]
        return replace(base, absent=(notes or [NO_METRICS])[0])
    ranked = sorted(rows, key=lambda r: (-(r.value or 0.0), r.compared_to or ""))
    clear = [r for r in ranked if r.low is not None and r.low > 0]
    top = ranked[:_MAX_CHANNELS_SHOWN]
    series = charts.ScoreSeries(
        name="decrease of macro-F1", scores=tuple(build_score_mark(str(r.compared_to), r) for r in top)
    )
    body = tuple(
        (
            str(r.compared_to),
            f"{r.value:+.4f}",
            f"[{r.low:+.4f}, {r.high:+.4f}]" if r.low is not None else render_interval(r),
        )
        for r in ranked
    )
    return replace(
        base,
        sentences=(
            f"Decrease of the macro-F1 of {rows[0].model} when one channel is permuted among the test windows; the "
            f"figure shows the {len(top)} largest. Correlated channels can replace each other, so a small decrease "
            "does not show that a channel is useless.",
            f"{len(clear)} of {len(rows)} channels have an interval above 0. The intervals are not corrected for "
            f"multiple comparisons: about {len(rows) * (1 - CONFIDENCE_LEVEL) / 2:.1f} would be above 0 by chance.",
            "Channels behind one prediction: `phasewatch explain RUN EPISODE --at SECONDS`.",
        ),
        figure=charts.draw_intervals((series,), title="decrease of macro-F1", origin=context.origin, is_gap=True),
        table=ReportTable(
            columns=("channel", "decrease of macro-F1", "95 % interval"), numeric=(False, True, False), rows=body
        ),
    )
