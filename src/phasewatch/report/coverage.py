"""What the claim rests on: coverage, the ledger, what the data cannot say; and how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.artifacts import ACCOUNTING_FILE, FEATURE_SCHEMA_FILE
from phasewatch.audit.checks import AuditReport, CheckOutcome
from phasewatch.dataset import SplitIndex
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE
from phasewatch.report import charts
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

AUDIT_COMMAND = "phasewatch audit RUN && phasewatch report RUN"
NOT_AUDITED = "This run was not audited, or it changed since: `phasewatch audit RUN` checks what it promises."


def build_audit_block(audit: AuditReport | None) -> ReportBlock:
    """Show every check with its words."""
    title = "Audit: what was promised, and whether it was kept"
    if audit is None:
        return ReportBlock(key="audit", title=title, absent=NOT_AUDITED, command=AUDIT_COMMAND)
    promises = [c for c in audit.checks if not c.is_reported]
    counts = [f"{sum(c.fate is fate for c in promises)} {fate}" for fate in CheckOutcome]
    figures = len(audit.checks) - len(promises)
    order = {CheckOutcome.BROKEN: 0, CheckOutcome.UNTESTED: 1, CheckOutcome.KEPT: 2}
    checks = sorted(audit.checks, key=lambda c: (order[c.fate], c.is_reported))
    return ReportBlock(
        key="audit",
        title=title,
        sentences=(
            f"{join_words(counts)}.",
            "An untested promise is none that was kept.",
            *(
                (f"{render_count(figures, 'figure')} without a limit: what the recordings give away.",)
                if figures
                else ()
            ),
        ),
        table=ReportTable(
            columns=("fate", "check", "what a reader may rely on", "what was found"),
            numeric=(False, False, False, False),
            rows=tuple((c.outcome_label, c.name, c.promise, c.words) for c in checks),
        ),
        is_table_open=True,
        command=AUDIT_COMMAND,
    )


def describe_failed_audit(audit: AuditReport) -> str:
    """Say why a run has no headline."""
    broken = audit.failed_checks
    names = join_words([check.name for check in broken])
    return f"No claim: this run breaks {len(broken)} of its promises ({names})."


def build_coverage_section(evidence: ReportData, windows: HeadlineWindows | None, origin: str) -> ReportSection:
    """Build the section that says what lies under the numbers."""
    return ReportSection(
        key="grounds",
        title="What it rests on",
        points=_describe_caveats(evidence, windows, origin),
        blocks=(
            _build_coverage_block(evidence.folds, windows),
            *_build_set_aside_blocks(evidence.splits),
            _build_accounting_block(evidence, origin),
            _build_reasons_block(evidence.bundles),
            build_audit_block(evidence.audit),
        ),
    )


def _describe_caveats(evidence: ReportData, windows: HeadlineWindows | None, origin: str) -> tuple[str, ...]:
    """Say what the data itself forbids to conclude."""
    said = [f"Origin of the test episodes: {origin}."]
    hosts = (
        sorted({h for h, _ in windows.count_episodes()})
        if windows
        else list(evidence.bundles.hosts if evidence.bundles else ())
    )
    if len(hosts) == 1:
        said.append(f"There is one host ({hosts[0]}): nothing here says anything about another one.")
    elif hosts:
        said.append(
            f"There are {render_count(len(hosts), 'host')}: {join_words(hosts)}. A host is hardware, hypervisor and VM shape taken together; "
            "a run cannot tell whether two of them are one physical machine. "
            "Unless the corpus's datasheet names several, read “unseen host” as “unseen VM shape on one machine”, "
            "not as “unseen data centre”."
        )
    span = evidence.bundles.span_days if evidence.bundles else None
    if span is not None and span < DRIFT_DAYS:
        said.append(f"The recordings span {_render_span(span)}: no drift over time can be seen.")
    if windows is not None and not windows.agent_off:
        said.append("No test episode ran without the guest agent, whose own cost is then part of what the host sees.")
    if evidence.schema is not None:
        s = evidence.schema
        said.append(
            f"The {DEFAULT_HEADLINE.channel_set} threat model sees {s.n_host_channels} of {s.n_channels} channels: those that need no word of the guest."
        )
    return tuple(said)


def build_reproducibility_section(evidence: ReportData) -> ReportSection:
    """Build the section with the commands and the digests that a second run must meet."""
    facts = [*_list_schema_facts(evidence.schema)]
    facts += [(f"sha256 of {name}", digest) for name, digest in sorted(evidence.digests.items())]
    table = ReportTable(columns=("what", "value"), numeric=(False, False), rows=tuple(facts)) if facts else None
    return ReportSection(
        key="repeat",
        title="How to repeat it",
        lead=(
            "The same store gives the same files, byte by byte, from any number of workers; times and host facts stand "
            "only in `run.json`. In all commands RUN is the folder in which this page lies, STORE the folder of the bundles."
        ),
        blocks=(
            ReportBlock(
                key="digests",
                title="What a second run must meet",
                table_name="Digests",
                table=table,
                is_table_open=True,
                absent="" if table else "No file of the run could be read.",
                command="phasewatch run STORE --out RUN",
            ),
        ),
    )


def _list_schema_facts(schema: SchemaSummary | None) -> tuple[tuple[str, str], ...]:
    if schema is None:
        return (("feature schema", f"{FEATURE_SCHEMA_FILE} is absent"),)
    return (("feature schema", schema.schema_hash), ("behaviour fingerprint", schema.behaviour_fingerprint))


def _build_coverage_block(folds: Sequence[Fold], windows: HeadlineWindows | None) -> ReportBlock:
    base_title = "Coverage: what was tested, what was not"
    of_recipe = [f for f in folds if f.recipe == DEFAULT_HEADLINE.recipe]
    command = "phasewatch split RUN && phasewatch report RUN"
    if not of_recipe:
        return ReportBlock(
            key="coverage",
            title=base_title,
            absent=f"No split of recipe {DEFAULT_HEADLINE.recipe}; `phasewatch split RUN` makes them.",
            command=command,
        )
    scored = windows.count_episodes() if windows is not None else {}
    cells = count_test_episodes(of_recipe)
    profiles = {c.profile for c in cells if c.test}
    never = sorted(set.intersection(*(set(f.untested_profiles) for f in of_recipe)))
    phases = sorted(set.intersection(*({str(p) for p in f.untested_phases} for f in of_recipe)))
    embargoed = sum(len(f.embargoed) for f in of_recipe)
    said = [
        f"{render_count(sum(c.test for c in cells), 'test episode')} over {render_count(len(of_recipe), 'fold')}; "
        f"{len(profiles)} of {render_count(len(profiles | set(never)), 'profile')} tested, benign ones counted too, where the "
        "headline counts the malicious ones of its own episodes.",
        f"Untested profiles: {join_words(never) or 'none'}. Untested phases: {join_words(phases) or 'none'}.",
    ]
    if embargoed:
        said.append(
            f"{render_count(embargoed, 'episode')} kept out of training, fold by fold, because they share a session or rows with a test episode."
        )
    body = [
        (c.host_id, c.profile, str(c.test) if c.test else "untested", str(scored.get((c.host_id, c.profile), 0)))
        for c in cells
    ]
    body += [("every host", p, "untested", "0") for p in never]
    columns = ("host", "profile", "test episodes", "of these in the headline")
    return ReportBlock(
        key="coverage",
        title=base_title,
        sentences=tuple(said),
        table=ReportTable(columns=columns, numeric=(False, False, True, True), rows=tuple(body)),
        command=command,
    )


def _build_set_aside_blocks(splits: SplitIndex) -> tuple[ReportBlock, ...]:
    """Build the list of episodes that splits do without; nothing where there are none."""
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
            title="Episodes set aside",
            sentences=(
                f"{render_count(len({a.episode_id for a in splits.set_aside}), 'episode')} in no fold of some or all recipes; "
                "`splits_v1.json` names each.",
                *(f"{code}: {code.about}." for code in codes),
            ),
            table=ReportTable(
                columns=("host", "profile", "reason", "recipes", "episodes", "first of them"),
                numeric=(False, False, False, False, True, False),
                rows=body,
            ),
            command="phasewatch split RUN",
        ),
    )


def _build_accounting_block(evidence: ReportData, origin: str) -> ReportBlock:
    stages = evidence.stages or _derive_stages(evidence.bundles)
    command = "phasewatch validate STORE --out RUN"
    if not stages:
        return ReportBlock(
            key="ledger",
            title="Ledger",
            absent=f"No {ACCOUNTING_FILE}; `phasewatch validate STORE --out RUN` writes it.",
            command=command,
        )
    tallies = tuple(charts.StageCounts(stage=s.name, counts=s.outcomes) for s in stages)
    said = ["In = accepted + degraded + rejected + errored, at each stage.", *(_describe_balance(s) for s in stages)]
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
    return ReportBlock(
        key="ledger",
        title="Ledger: nothing is lost silently",
        sentences=tuple(said),
        figure=charts.draw_accounting(tallies, origin=origin),
        table=ReportTable(columns=columns, numeric=numeric, rows=body),
        command=command,
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
    return f"{stage.name} does not balance: {stage.bundles_in:,} went in, {total:,} = {parts} came out."


def _render_lost_rows(stage: AccountingStage) -> str:
    if stage.rows_in is None:
        return "–"
    return ", ".join(f"{n:,} {reason}" for reason, n in stage.rows_lost) or "0"


def _build_reasons_block(bundles: BundleCounts | None) -> ReportBlock:
    command = "phasewatch validate STORE --out RUN"
    if bundles is None:
        return ReportBlock(
            key="reasons",
            title="Why bundles were not simply accepted",
            absent="No validation_v1.parquet.",
            command=command,
        )
    if not bundles.by_reason:
        return ReportBlock(
            key="reasons",
            title="Why bundles were not simply accepted",
            sentences=("No bundle has a finding.",),
            command=command,
        )
    return ReportBlock(
        key="reasons",
        title="Why bundles were not simply accepted",
        sentences=("A bundle counts under each of its reasons.",),
        table=ReportTable(
            columns=("status", "reason", "bundles"),
            numeric=(False, False, True),
            rows=tuple((s, reason, f"{n:,}") for s, reason, n in bundles.by_reason),
        ),
        is_table_open=len(bundles.by_reason) <= 12,
        command=command,
    )


def _render_span(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"
