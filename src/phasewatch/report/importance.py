"""What it looks at: the worth of each source and channel, beside what each costs to collect."""

from __future__ import annotations

from phasewatch.channels import CHANNELS, build_channel_mask, list_raw_fields, list_source_subsets
from phasewatch.evaluation import query
from phasewatch.evaluation.bootstrap import CONFIDENCE_LEVEL
from phasewatch.evaluation.comparisons import needs_agent
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow
from phasewatch.report import charts
from phasewatch.report.data import BundleCounts
from phasewatch.report.errors import EVALUATE_COMMAND, ReportContext
from phasewatch.report.layout import (
    ReportBlock,
    ReportSection,
    ReportTable,
    build_score_mark,
    render_interval,
    render_number,
)
from phasewatch.report.leaderboard import NOT_TRAINED, TRAIN_ALL_COMMAND
from phasewatch.training.predictions import NO_FILTER
from phasewatch.types import SourceKind

IMPORTANCE_MODEL = DEFAULT_HEADLINE.model
SOURCE_REQUIREMENTS = {
    SourceKind.PROC: "the right to read /proc of the QEMU process",
    SourceKind.QMP: "a QMP socket of the VM",
    SourceKind.NETFLOW: "a copy of the VM's frames",
    SourceKind.GUEST: "an agent inside the guest, whose word the guest can forge",
}


def build_importance_section(told: ReportContext, bundles: BundleCounts | None) -> ReportSection:
    """Build the section from the rows of all threat models and from what the validator counted."""
    blocks = (_build_sensor_block(told), _build_cost_block(bundles), _build_channel_block(told))
    return ReportSection(key="looks", title="What it looks at", blocks=blocks)


def _build_sensor_block(told: ReportContext) -> ReportBlock:
    base = ReportBlock(key="sensors", title="Value of a sensor", command=TRAIN_ALL_COMMAND)
    found: list[tuple[str, MetricRow]] = []
    absent = []
    own = [
        r
        for r in told.all_rows
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
                    x := query.find_overall_row(own, "macro_f1", model=IMPORTANCE_MODEL, channel_set=threat, agent="on")
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
        words = f"The 15 subsets of the four sources were {NOT_TRAINED}."
        return ReportBlock(key=base.key, title=base.title, absent=words, command=TRAIN_ALL_COMMAND)
    gaps = {r.channel_set: r for r in query.find_rows(own, "macro_f1_sensor_gap", agent="on", model=IMPORTANCE_MODEL)}
    prior = query.find_overall_row(
        own, "macro_f1", channel_set=DEFAULT_HEADLINE.channel_set, model="majority", agent="on"
    )
    series = charts.ScoreSeries(name=IMPORTANCE_MODEL, scores=tuple(build_score_mark(name, row) for name, row in found))
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
        body.append(("nothing: the most frequent phase", render_number(prior.value), render_interval(prior), "–", "no"))
    said = [
        f"{IMPORTANCE_MODEL} with one, two, three or all sources, on the same episodes: those whose guest had the agent."
    ]
    if absent:
        said.append(f"{NOT_TRAINED[0].upper()}{NOT_TRAINED[1:]}: {', '.join(absent)}.")
    return ReportBlock(
        key=base.key, title=base.title, sentences=tuple(said), command=TRAIN_ALL_COMMAND,
        figure=charts.draw_intervals((series,), title="macro-F1", origin=told.origin),
        table=ReportTable(
            columns=("sources", "macro-F1", "95 % interval", "against all four", "needs an agent"),
            numeric=(False, True, False, False, False), rows=tuple(body),
        ),
    )  # fmt: skip


def _render_gap(row: MetricRow | None) -> str:
    if row is None or row.value is None:
        return "–"
    return (
        f"{row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
        if row.low is not None and row.high is not None
        else f"{row.value:+.2f}"
    )


def _build_cost_block(bundles: BundleCounts | None) -> ReportBlock:
    base = ReportBlock(
        key="costs", title="What each source costs to collect", command="phasewatch validate STORE --out RUN"
    )
    if bundles is None or not bundles.rows_per_s:
        return ReportBlock(
            key=base.key, title=base.title, absent="No count of rows in validation_v1.parquet.", command=base.command
        )
    body = []
    for source in SourceKind:
        rate = dict(bundles.rows_per_s).get(str(source))
        fields = len(list_raw_fields(source))
        channels = sum(c.source is source for c in CHANNELS)
        body.append(
            (str(source), str(channels), "–" if rate is None else f"{rate:.2f}", str(fields),
             "–" if rate is None else f"{rate * fields * 3600:,.0f}", SOURCE_REQUIREMENTS[source])
        )  # fmt: skip
    columns = ("source", "channels", "readings a second", "numbers a reading", "numbers a VM-hour", "needs")
    return ReportBlock(
        key=base.key, title=base.title, is_table_open=True, command=base.command,
        sentences=("As measured in this run's bundles, over the episodes that have the source.",),
        table=ReportTable(columns=columns, numeric=(False, True, True, True, True, False), rows=tuple(body)),
    )  # fmt: skip


def _build_channel_block(told: ReportContext) -> ReportBlock:
    base = ReportBlock(key="channels", title="Worth of a channel", command=EVALUATE_COMMAND)
    rows = [
        r
        for r in query.find_rows(query.select_headline_rows(told.all_rows), "macro_f1_permuted_gap")
        if r.value is not None
    ]
    if not rows:
        notes = [r.note for r in told.all_rows if r.metric == "note" and r.note and r.note.startswith("no importance")]
        return ReportBlock(
            key=base.key, title=base.title, absent=(notes or ["No row for this."])[0], command=EVALUATE_COMMAND
        )
    ranked = sorted(rows, key=lambda r: (-(r.value or 0.0), r.compared_to or ""))
    clear = [r for r in ranked if r.low is not None and r.low > 0]
    series = charts.ScoreSeries(name="lost", scores=tuple(build_score_mark(str(r.compared_to), r) for r in ranked[:12]))
    body = tuple(
        (
            str(r.compared_to),
            f"{r.value:+.4f}",
            f"[{r.low:+.4f}, {r.high:+.4f}]" if r.low is not None else render_interval(r),
        )
        for r in ranked
    )
    return ReportBlock(
        key=base.key,
        title=base.title,
        sentences=(
            f"Macro-F1 that {rows[0].model} loses on the test windows when one channel is shuffled among them, the twelve "
            "dearest. Channels that say the same stand in for one another, so a small loss is no proof of no use.",
            f"{len(clear)} of {len(rows)} are above 0 by their intervals, each taken alone: of so many without any worth "
            f"about {len(rows) * (1 - CONFIDENCE_LEVEL) / 2:.1f} would be by chance.",
            "For one window: `phasewatch explain RUN EPISODE --at SECONDS`.",
        ),
        figure=charts.draw_intervals((series,), title="macro-F1 lost", origin=told.origin, is_gap=True),
        table=ReportTable(
            columns=("channel", "macro-F1 lost", "95 % interval"), numeric=(False, True, False), rows=body
        ),
        command=EVALUATE_COMMAND,
    )
