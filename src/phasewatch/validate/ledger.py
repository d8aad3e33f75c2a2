"""The ledger: what came in, what became of it, to the last row; it balances or it is a bug."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from phasewatch.validate.verdict import USABLE, Verdict
from phasewatch.vocab import Source, Status


def stage_of(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Give the ledger's entry of the validation stage.

    Rows in = rows emitted by the samplers, as far as a readable manifest tells; used = rows of usable bundles whose
    source was usable too; lost = by reason. ``rows_in = rows_used + sum(rows_lost)``.
    """
    statuses = Counter(v.status for v in verdicts)
    rows_in = rows_used = 0
    lost: Counter[str] = Counter()
    per_source: dict[str, dict[str, int]] = {str(s): {"in": 0, "used": 0, "lost": 0} for s in Source}
    for v in verdicts:
        for source, rows, never in zip(Source, v.rows, v.lost, strict=True):
            rows_in += rows + never
            lost[f"never arrived:{source}"] += never
            if v.status not in USABLE:
                lost[str(v.status)] += rows
                used = 0
            elif f"clock-base:{source}" in v.reasons:
                lost[f"clock-base:{source}"] += rows
                used = 0
            else:
                used = rows
            rows_used += used
            entry = per_source[str(source)]
            entry["in"], entry["used"] = entry["in"] + rows + never, entry["used"] + used
            entry["lost"] += rows + never - used
    reasons = Counter(code for v in verdicts for code in v.reasons)
    return {
        "in": len(verdicts),
        **{str(status): statuses.get(status, 0) for status in Status},
        "reasons": dict(sorted(reasons.items())),
        "rows_in": rows_in,
        "rows_used": rows_used,
        "rows_lost": {reason: n for reason, n in sorted(lost.items()) if n},
        "rows_by_source": per_source,
    }


def balances(stage: dict[str, Any]) -> bool:
    """Tell whether the entry adds up."""
    bundles = bool(stage["in"] == sum(stage[str(status)] for status in Status))
    return bundles and bool(stage["rows_in"] == stage["rows_used"] + sum(stage["rows_lost"].values()))


def render_ledger(stages: dict[str, dict[str, Any]]) -> bytes:
    """Spell `ledger.json`."""
    return (json.dumps({"stages": stages}, indent=1) + "\n").encode()
