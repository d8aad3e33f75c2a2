"""Report sections on data and coverage (coverage, data accounting, audit) and on reproducibility."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phasewatch.artifacts import ACCOUNTING_FILE, FEATURE_SCHEMA_FILE, SPLIT_INDEX_FILE, VALIDATION_FILE
from phasewatch.dataset import SplitIndex
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE
from phasewatch.report import charts
from phasewatch.report.audit import build_audit_blocks
from phasewatch.report.data import (
    AccountingStage,
    BundleCounts,
    HeadlineWindows,
    ReportData,
    SchemaSummary,
    count_test_episodes,
)
from phasewatch.report.layout import ReportBlock, ReportSection, ReportTable, join_words, render_count
from phasewatch.splits import Fold
from phasewatch.splits.build import DRIFT_DAYS

__all__ = [
    "build_coverage_section",
    "build_reproducibility_section",
]

_MAX_OPEN_ROWS = 12  # a longer table is collapsed when the page opens
_VALIDATE_COMMAND = "phasewatch validate STORE --out RUN"


def build_coverage_section(evidence: ReportData, windows: HeadlineWindows | None, origin: str) -> ReportSection:
    """Build the section on the data behind the scores."""
    return ReportSection(
        key="grounds",
        title="Data and coverage",
        points=_describe_caveats(evidence, windows, origin),
        blocks=(
            _build_coverage_block(evidence.folds, windows),
            *_build_exclusion_blocks(evidence.splits),
            _build_accounting_block(evidence, origin),
            _build_reasons_block(evidence.bundles),
            *build_audit_blocks(evidence.audit),
        ),
    )


def _describe_caveats(evidence: ReportData, windows: HeadlineWindows | None, origin: str) -> tuple[str, ...]:
    """List the limits of the data: origin, number of hosts, time span, guest agent and channels."""
    caveats = [f"Origin of the test episodes: {origin}."]
    hosts = (
        sorted({h for h, _ in windows.count_episodes()})
        if windows
        else list(evidence.bundles.hosts if evidence.bundles else ())
    )
    if len(hosts) == 1:
        caveats.append(f"The data has one host ({hosts[0]}). The scores do not predict the performance on other hosts.")
    elif hosts:
        caveats.append(
            f"The data has {render_count(len(hosts), 'host')}: {join_words(hosts)}. A host is a combination of "
            "hardware, hypervisor and VM shape; two hosts may share one physical machine. Unless the datasheet of the "
            "corpus lists several machines, “unseen host” means an unseen VM shape on one machine, not an unseen data "
            "centre."
        )
    span = evidence.bundles.span_days if evidence.bundles else None
    if span is not None and span < DRIFT_DAYS:
        caveats.append(f"The recordings span {_render_span(span)}, which is too short to measure drift over time.")
    if windows is not None and not windows.agent_off:
        caveats.append(
            "All test episodes ran with the guest agent. Its own resource use is part of the host-side telemetry."
        )
    if evidence.schema is not None:
        s = evidence.schema
        caveats.append(
            f"The channel set {DEFAULT_HEADLINE.channel_set} has {s.n_host_channels} of {s.n_channels} channels, those "
            "that need no agent in the guest."
        )
    return tuple(caveats)


def build_reproducibility_section(evidence: ReportData) -> ReportSection:
    """Build the section with the commands and the digests that a reproduction must match."""
    facts = [*_list_schema_facts(evidence.schema)]
    facts += [(f"sha256 of {name}", digest) for name, digest in sorted(evidence.digests.items())]
    table = ReportTable(columns=("item", "value"), numeric=(False, False), rows=tuple(facts)) if facts else None
    return ReportSection(
        key="repeat",
        title="Reproducibility",
        lead=(
            "The same store gives byte-identical files with any number of workers. Only `run.json` holds times and "
            "facts of the host. In all commands, RUN is the folder of this report and STORE is the folder of the "
            "bundles."
        ),
        blocks=(
            ReportBlock(
                key="digests",
                title="Digests of the run's files",
                table_name="Digests",
                table=table,
                is_table_open=True,
                absent="" if table else "None of the run's files could be read.",
                command="phasewatch run STORE --out RUN",
            ),
        ),
    )


def _list_schema_facts(schema: SchemaSummary | None) -> tuple[tuple[str, str], ...]:
    if schema is None:
        return (("feature schema", f"{FEATURE_SCHEMA_FILE} is missing"),)
    return (("feature schema", schema.schema_hash), ("behaviour fingerprint", schema.behaviour_fingerprint))


def _build_coverage_block(folds: Sequence[Fold], windows: HeadlineWindows | None) -> ReportBlock:
    base = ReportBlock(key="coverage", title="Coverage", command="phasewatch split RUN && phasewatch report RUN")
    of_recipe = [f for f in folds if f.recipe == DEFAULT_HEADLINE.recipe]
    if not of_recipe:
        return replace(base, absent=f"No split {DEFAULT_HEADLINE.recipe}; `phasewatch split RUN` creates it.")
    scored = windows.count_episodes() if windows is not None else {}
    cells = count_test_episodes(of_recipe)
    profiles = {c.profile for c in cells if c.test}
    never = sorted(set.intersection(*(set(f.untested_profiles) for f in of_recipe)))
    phases = sorted(set.intersection(*({str(p) for p in f.untested_phases} for f in of_recipe)))
    embargoed = sum(len(f.embargoed) for f in of_recipe)
    sentences = [
        f"{render_count(sum(c.test for c in cells), 'test episode')} in {render_count(len(of_recipe), 'fold')}; "
        f"{len(profiles)} of {render_count(len(profiles | set(never)), 'profile')} tested, including benign ones. "
        "The headline counts malicious profiles only.",
        f"Untested profiles: {join_words(never) or 'none'}. Untested phases: {join_words(phases) or 'none'}.",
    ]
    if embargoed:
        sentences.append(
            f"{render_count(embargoed, 'episode')} excluded from training (sum over folds), because they share a "
            "session or rows with a test episode."
        )
    body = [
        (c.host_id, c.profile, str(c.test) if c.test else "untested", str(scored.get((c.host_id, c.profile), 0)))
        for c in cells
    ]
    body += [("all hosts", p, "untested", "0") for p in never]
    columns = ("host", "profile", "test episodes", "of these in the headline")
    return replace(
        base,
        sentences=tuple(sentences),
        table=ReportTable(columns=columns, numeric=(False, False, True, True), rows=tuple(body)),
    )


def _build_exclusion_blocks(splits: SplitIndex) -> tuple[ReportBlock, ...]:
    """Build the block on episodes that the splits exclude; no block if there are none."""
    if not splits.set_aside:
        return ()
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for a in splits.set_aside:
        groups.setdefault((a.host_id, a.profile, a.code, join_words(a.recipes) or "all"), []).append(a.episode_id)
    codes = list(dict.fromkeys(a.code for a in splits.set_aside))
    body = tuple(
        (host, profile, code, recipes, str(len(ids)), f"{ids[0]}{' …' if len(ids) > 1 else ''}")
        for (host, profile, code, recipes), ids in sorted(groups.items())
    )
    return (
        ReportBlock(
            key="set-aside",
            title="Excluded episodes",
            sentences=(
                f"{render_count(len({a.episode_id for a in splits.set_aside}), 'episode')} excluded from all folds of "
                f"some or all splits; `{SPLIT_INDEX_FILE}` lists them.",
                *(f"{code}: {code.about}." for code in codes),
            ),
            table=ReportTable(
                columns=("host", "profile", "reason", "splits", "episodes", "first episode"),
                numeric=(False, False, False, False, True, False),
                rows=body,
            ),
            command="phasewatch split RUN",
        ),
    )


def _build_accounting_block(evidence: ReportData, origin: str) -> ReportBlock:
    stages = evidence.stages or _derive_stages(evidence.bundles)
    base = ReportBlock(key="ledger", title="Data accounting", command=_VALIDATE_COMMAND)
    if not stages:
        return replace(base, absent=f"{ACCOUNTING_FILE} is missing; `{_VALIDATE_COMMAND}` writes it.")
    tallies = tuple(charts.StageCounts(stage=s.name, counts=s.outcomes) for s in stages)
    sentences = [
        "Number of bundles by outcome at each stage. Every bundle is counted: in = accepted + degraded + rejected + "
        "errored.",
        *(_describe_balance(s) for s in stages),
    ]
    names = list(dict.fromkeys(name for s in stages for name, _ in s.outcomes))

    def cell(n: int | None) -> str:
        return "–" if n is None else f"{n:,}"

    body = tuple(
        (
            s.name,
            cell(s.bundles_in),
            *(cell(dict(s.outcomes).get(n)) for n in names),
            cell(s.rows_in),
            cell(s.rows_used),
            _render_lost_rows(s),
        )
        for s in stages
    )
    columns = ("stage", "in", *names, "rows in", "rows used", "rows lost")
    numeric = (False, *(True,) * (len(names) + 3), False)
    return replace(
        base,
        sentences=tuple(sentences),
        figure=charts.draw_accounting(tallies, origin=origin),
        table=ReportTable(columns=columns, numeric=numeric, rows=body),
    )


def _derive_stages(bundles: BundleCounts | None) -> tuple[AccountingStage, ...]:
    if bundles is None:
        return ()
    return (AccountingStage(name="validate", bundles_in=bundles.total, outcomes=bundles.by_status),)


def _describe_balance(stage: AccountingStage) -> str:
    total = sum(n for _, n in stage.outcomes)
    parts = " + ".join(f"{n:,} {name}" for name, n in stage.outcomes)
    if stage.bundles_in is None or stage.bundles_in == total:
        return f"{stage.name}: {total:,} = {parts}."
    return f"{stage.name} does not balance: {stage.bundles_in:,} bundles in, {total:,} counted ({parts})."


def _render_lost_rows(stage: AccountingStage) -> str:
    if stage.rows_in is None:
        return "–"
    return ", ".join(f"{n:,} {reason}" for reason, n in stage.rows_lost) or "0"


def _build_reasons_block(bundles: BundleCounts | None) -> ReportBlock:
    base = ReportBlock(key="reasons", title="Findings of the validation", command=_VALIDATE_COMMAND)
    if bundles is None:
        return replace(base, absent=f"{VALIDATION_FILE} is missing; `{_VALIDATE_COMMAND}` writes it.")
    if not bundles.by_reason:
        return replace(base, sentences=("No bundle has a finding.",))
    return replace(
        base,
        sentences=(
            "Reasons why bundles were degraded, rejected or errored. A bundle counts once for each of its reasons.",
        ),
        table=ReportTable(
            columns=("status", "reason", "bundles"),
            numeric=(False, False, True),
            rows=tuple((s, reason, f"{n:,}") for s, reason, n in bundles.by_reason),
        ),
        is_table_open=len(bundles.by_reason) <= _MAX_OPEN_ROWS,
    )


def _render_span(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"
