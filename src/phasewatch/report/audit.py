"""Report blocks on the audit: every check, and the shortcut checks of every model."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.audit.checks import AuditReport, AuditRow, CheckOutcome
from phasewatch.report.layout import ReportBlock, ReportTable, join_words, render_count

__all__ = ["NOT_AUDITED", "build_audit_blocks", "describe_audit", "describe_failed_audit"]

_AUDIT_COMMAND = "phasewatch audit RUN && phasewatch report RUN"
NOT_AUDITED = (
    "This run has no valid audit: it was not audited, or its files changed since. `phasewatch audit RUN` checks it for "
    "leakage and consistency."
)
_FIVE_PHASES_WITHDRAWN = (
    "The five-phase scores are withdrawn: the headline's model does not call enough windows of idle clean machines "
    "clean, so armed and dormant cannot be told from clean on this corpus. The three-class scores and the infection "
    "alarm stay."
)
_OUTCOME_LABELS = {CheckOutcome.KEPT: "passed", CheckOutcome.BROKEN: "failed", CheckOutcome.UNTESTED: "not run"}

# Column of the shortcut table → (metric, baseline, stratum).
_SHORTCUT_COLUMNS = {
    "AUC of active: real": ("splice_auc_real", None, None),
    "spliced": ("splice_auc_counterfactual", None, None),
    "recall of active: real": ("splice_recall_real", None, None),
    "long": ("splice_recall_counterfactual", None, None),
    "busy benign called active: real": ("splice_false_activity_real", None, None),
    "short": ("splice_false_activity_counterfactual", None, None),
    "macro-F1 above load_only": ("macro_f1_gap", "load_only", None),
    "duration_only": ("macro_f1_gap", "duration_only", None),
    "elapsed_time": ("macro_f1_gap", "elapsed_time", None),
    "three classes above load_only, with load": ("macro_f1_3class_gap", "load_only", "with_load"),
    "without load": ("macro_f1_3class_gap", "load_only", "without_load"),
    "idle called quiet": ("idle_called_quiet", None, None),
    "idle called clean": ("idle_called_clean", None, None),
}


def build_audit_blocks(audit: AuditReport | None) -> tuple[ReportBlock, ...]:
    """Build the block of all checks, and that of the shortcut checks by model where the audit has their rows."""
    if audit is None:
        return (ReportBlock(key="audit", title="Audit", command=_AUDIT_COMMAND, absent=NOT_AUDITED),)
    rows = [row for check in audit.checks for row in check.rows]
    return (_build_audit_block(audit), *((_build_shortcut_block(rows),) if rows else ()))


def _build_audit_block(audit: AuditReport) -> ReportBlock:
    """List every audit check with its result and details; failed checks come first."""
    promises = [c for c in audit.checks if not c.is_reported]
    counts = [f"{sum(c.fate is fate for c in promises)} {label}" for fate, label in _OUTCOME_LABELS.items()]
    figures = len(audit.checks) - len(promises)
    order = {CheckOutcome.BROKEN: 0, CheckOutcome.UNTESTED: 1, CheckOutcome.KEPT: 2}
    checks = sorted(audit.checks, key=lambda c: (order[c.fate], c.is_reported))
    return ReportBlock(
        key="audit",
        title="Audit",
        command=_AUDIT_COMMAND,
        sentences=(
            f"Audit checks: {join_words(counts)}.",
            "A check that could not run does not count as passed.",
            *((f"{render_count(figures, 'check')} without a limit, reported for information.",) if figures else ()),
        ),
        table=ReportTable(
            columns=("result", "check", "requirement", "details"),
            numeric=(False, False, False, False),
            rows=tuple(
                ("reported" if c.is_reported else _OUTCOME_LABELS[c.fate], c.name, c.promise, c.words) for c in checks
            ),
        ),
        is_table_open=True,
    )


def _build_shortcut_block(rows: Sequence[AuditRow]) -> ReportBlock:
    """Build the table of the shortcut checks, one line per model and input."""
    by_model: dict[tuple[str, str], list[AuditRow]] = {}
    for row in rows:
        by_model.setdefault((row.model, row.input), []).append(row)
    body = []
    for (model, model_input), own in by_model.items():
        values = {(row.metric, row.compared_to, row.stratum): row.rendered_value for row in own}
        failed = sorted({row.metric for row in own if row.holds is False})
        name = f"{model} (headline)" if own[0].is_headline else model
        body.append(
            (
                name,
                model_input,
                join_words(sorted({row.recipe for row in own})),
                *(values.get(at, "–") for at in _SHORTCUT_COLUMNS.values()),
                join_words(failed) or "none",
            )
        )
    limits = {(row.metric, row.limit) for row in rows if row.limit is not None}
    return ReportBlock(
        key="shortcuts",
        title="Shortcuts that the corpus teaches",
        command=_AUDIT_COMMAND,
        sentences=(
            "Splices exchange the durations of loads and of activity: a model that takes what lasts for benign loses "
            "AUC on them, or recall when activity lasts. The gaps compare a model with rules that know only whether a "
            "load runs, how long it has run, or the time. Idle machines are clean and run no load.",
            "Limits: " + join_words([f"{metric} {limit:.2f}" for metric, limit in sorted(limits)]) + ". The model of "
            "the headline decides the check; the other models are shown.",
        ),
        table=ReportTable(
            columns=("model", "input", "split", *_SHORTCUT_COLUMNS, "limits not kept"),
            numeric=(False, False, False, *(True,) * len(_SHORTCUT_COLUMNS), False),
            rows=tuple(body),
        ),
        is_table_open=True,
    )


def describe_audit(audit: AuditReport | None) -> tuple[str, ...]:
    """Return the notices of the report about its audit: that there is none, or what it withdraws."""
    if audit is None:
        return (NOT_AUDITED,)
    return (_FIVE_PHASES_WITHDRAWN,) if audit.withdraws_five_phases else ()


def describe_failed_audit(audit: AuditReport) -> str:
    """Render the headline of a run whose audit failed."""
    broken = audit.failed_checks
    names = join_words([check.name for check in broken])
    return f"No score: this run failed {render_count(len(broken), 'audit check')} ({names})."
