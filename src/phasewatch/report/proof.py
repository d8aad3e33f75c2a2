"""What the audit found: each promise kept, broken or untested; and the words for a run that has no headline."""

from __future__ import annotations

from phasewatch.audit.checks import Audit, Fate
from phasewatch.report.blocks import Block, Table, count, listed

COMMAND = "phasewatch audit RUN && phasewatch report RUN"
NOT_AUDITED = "This run was not audited, or it changed since: `phasewatch audit RUN` checks what it promises."


def audit_block(audit: Audit | None) -> Block:
    """Show every check with its words."""
    title = "Audit: what was promised, and whether it was kept"
    if audit is None:
        return Block(key="audit", title=title, absent=NOT_AUDITED, command=COMMAND)
    promises = [c for c in audit.checks if not c.is_reported]
    counts = [f"{sum(c.fate is fate for c in promises)} {fate}" for fate in Fate]
    figures = len(audit.checks) - len(promises)
    order = {Fate.BROKEN: 0, Fate.UNTESTED: 1, Fate.KEPT: 2}
    checks = sorted(audit.checks, key=lambda c: (order[c.fate], c.is_reported))
    return Block(
        key="audit",
        title=title,
        sentences=(
            f"{listed(counts)}.",
            "An untested promise is none that was kept.",
            *((f"{count(figures, 'figure')} without a limit: what the recordings give away.",) if figures else ()),
        ),
        table=Table(
            columns=("fate", "check", "what a reader may rely on", "what was found"),
            numeric=(False, False, False, False),
            rows=tuple((c.shown, c.name, c.promise, c.words) for c in checks),
        ),
        shown=True,
        command=COMMAND,
    )


def refusal(audit: Audit) -> str:
    """Say why a run has no headline."""
    broken = audit.broken
    names = listed([check.name for check in broken])
    return f"No claim: this run breaks {len(broken)} of its promises ({names})."
