"""What it looks at: the worth of each source and channel, beside what each costs to collect."""

from __future__ import annotations

from phasewatch.channels import CHANNELS, mask_of, raw_fields, source_subsets
from phasewatch.evaluate.across import needs_agent
from phasewatch.evaluate.bootstrap import LEVEL
from phasewatch.evaluate.rows import MetricRow
from phasewatch.report import figures, scores
from phasewatch.report.blocks import Block, Section, Table, bracket, number, score_of
from phasewatch.report.evidence import PLACE, Bundles
from phasewatch.report.failings import EVALUATE, Told
from phasewatch.report.rivals import NOT_TRAINED, TRAIN_ALL
from phasewatch.train.predictions import NO_FILTER
from phasewatch.vocab import Source

MODEL = PLACE.model
NEEDS = {
    Source.PROC: "the right to read /proc of the QEMU process",
    Source.QMP: "a QMP socket of the VM",
    Source.NETFLOW: "a copy of the VM's frames",
    Source.GUEST: "an agent inside the guest, whose word the guest can forge",
}


def looks(told: Told, bundles: Bundles | None) -> Section:
    """Build the section from the rows of all threat models and from what the validator counted."""
    blocks = (_sensors(told), _costs(bundles), _channels(told))
    return Section(key="looks", title="What it looks at", blocks=blocks)


def _sensors(told: Told) -> Block:
    base = Block(key="sensors", title="Value of a sensor", command=TRAIN_ALL)
    found: list[tuple[str, MetricRow]] = []
    absent = []
    own = [
        r
        for r in told.all_rows
        if (r.recipe, r.fold, r.table, r.filter) == (PLACE.recipe, "pooled", PLACE.table, NO_FILTER)
    ]
    for name in source_subsets():
        same = PLACE.threat if mask_of(name) == mask_of(PLACE.threat) else name
        row = next(
            (
                x
                for threat in (name, same)
                if (x := scores.one(own, "macro_f1", model=MODEL, threat=threat, agent="on")) is not None
            ),
            None,
        )
        if row is None:
            absent.append(name)
        else:
            found.append((name, row))
    if len(found) < 2:
        words = f"The 15 subsets of the four sources were {NOT_TRAINED}."
        return Block(key=base.key, title=base.title, absent=words, command=TRAIN_ALL)
    gaps = {r.threat: r for r in scores.find(own, "macro_f1_sensor_gap", agent="on", model=MODEL)}
    prior = scores.one(own, "macro_f1", threat=PLACE.threat, model="majority", agent="on")
    series = figures.Series(name=MODEL, scores=tuple(score_of(name, row) for name, row in found))
    body = [
        (name, number(row.value), bracket(row), _gap(gaps.get(row.threat)), "yes" if needs_agent(name) else "no")
        for name, row in found
    ]
    if prior is not None:
        body.append(("nothing: the most frequent phase", number(prior.value), bracket(prior), "–", "no"))
    said = [f"{MODEL} with one, two, three or all sources, on the same episodes: those whose guest had the agent."]
    if absent:
        said.append(f"{NOT_TRAINED[0].upper()}{NOT_TRAINED[1:]}: {', '.join(absent)}.")
    return Block(
        key=base.key, title=base.title, sentences=tuple(said), command=TRAIN_ALL,
        figure=figures.whiskers((series,), title="macro-F1", origin=told.origin),
        table=Table(
            columns=("sources", "macro-F1", "95 % interval", "against all four", "needs an agent"),
            numeric=(False, True, False, False, False), rows=tuple(body),
        ),
    )  # fmt: skip


def _gap(row: MetricRow | None) -> str:
    if row is None or row.value is None:
        return "–"
    return (
        f"{row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
        if row.low is not None and row.high is not None
        else f"{row.value:+.2f}"
    )


def _costs(bundles: Bundles | None) -> Block:
    base = Block(key="costs", title="What each source costs to collect", command="phasewatch validate STORE --out RUN")
    if bundles is None or not bundles.rows_per_s:
        return Block(
            key=base.key, title=base.title, absent="No count of rows in validation_v1.parquet.", command=base.command
        )
    body = []
    for source in Source:
        rate = dict(bundles.rows_per_s).get(str(source))
        fields = len(raw_fields(source))
        channels = sum(c.source is source for c in CHANNELS)
        body.append(
            (str(source), str(channels), "–" if rate is None else f"{rate:.2f}", str(fields),
             "–" if rate is None else f"{rate * fields * 3600:,.0f}", NEEDS[source])
        )  # fmt: skip
    columns = ("source", "channels", "readings a second", "numbers a reading", "numbers a VM-hour", "needs")
    return Block(
        key=base.key, title=base.title, shown=True, command=base.command,
        sentences=("As measured in this run's bundles, over the episodes that have the source.",),
        table=Table(columns=columns, numeric=(False, True, True, True, True, False), rows=tuple(body)),
    )  # fmt: skip


def _channels(told: Told) -> Block:
    base = Block(key="channels", title="Worth of a channel", command=EVALUATE)
    rows = [r for r in scores.find(scores.at_headline(told.all_rows), "macro_f1_permuted_gap") if r.value is not None]
    if not rows:
        notes = [r.why for r in told.all_rows if r.metric == "note" and r.why and r.why.startswith("no importance")]
        return Block(key=base.key, title=base.title, absent=(notes or ["No row for this."])[0], command=EVALUATE)
    ranked = sorted(rows, key=lambda r: (-(r.value or 0.0), r.vs or ""))
    clear = [r for r in ranked if r.low is not None and r.low > 0]
    series = figures.Series(name="lost", scores=tuple(score_of(str(r.vs), r) for r in ranked[:12]))
    body = tuple(
        (str(r.vs), f"{r.value:+.4f}", f"[{r.low:+.4f}, {r.high:+.4f}]" if r.low is not None else bracket(r))
        for r in ranked
    )
    return Block(
        key=base.key,
        title=base.title,
        sentences=(
            f"Macro-F1 that {rows[0].model} loses on the test windows when one channel is shuffled among them, the twelve "
            "dearest. Channels that say the same stand in for one another, so a small loss is no proof of no use.",
            f"{len(clear)} of {len(rows)} are above 0 by their intervals, each taken alone: of so many without any worth "
            f"about {len(rows) * (1 - LEVEL) / 2:.1f} would be by chance.",
            "For one window: `phasewatch evaluate RUN --why EPISODE --at SECONDS`.",
        ),
        figure=figures.whiskers((series,), title="macro-F1 lost", origin=told.origin, is_gap=True),
        table=Table(columns=("channel", "macro-F1 lost", "95 % interval"), numeric=(False, True, False), rows=body),
        command=EVALUATE,
    )
