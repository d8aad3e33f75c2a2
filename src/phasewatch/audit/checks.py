"""The result of an audit: one check per promise, and the file `audit_v1.json`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import msgspec

from phasewatch.errors import PhasewatchError, RunError
from phasewatch.evaluation.headline import HeadlineVerdict

__all__ = [
    "IDLE_CLEAN_METRIC",
    "REPORT_ONLY_SUFFIX",
    "AuditCheck",
    "AuditReport",
    "AuditRow",
    "AuditSubject",
    "CheckOutcome",
    "LimitKind",
    "build_check",
    "build_untested_check",
    "collect_refusals",
    "parse_audit",
    "render_audit",
]

REPORT_ONLY_SUFFIX = "Reported, without a limit."  # ends the promise of a figure without a limit
IDLE_CLEAN_METRIC = "idle_called_clean"  # below its limit, the five-phase scores of the headline are withdrawn
_MAX_SHOWN_FAULTS = 3  # faults that a check lists; the rest is counted


class CheckOutcome(StrEnum):
    """The outcome of a check; untested never counts as kept."""

    KEPT = "kept"
    BROKEN = "broken"
    UNTESTED = "untested"


class LimitKind(StrEnum):
    """The side of a limit on which a number must lie."""

    AT_LEAST = "at_least"
    AT_MOST = "at_most"
    ABOVE = "above"  # the lower end of the interval must lie above it


class AuditSubject(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, order=True):
    """The model whose predictions a row is about.

    Attributes:
        recipe: Split recipe whose test windows were used.
        channel_set: Channel set of the model.
        input: Input variant of the model.
    """

    recipe: str
    channel_set: str
    model: str
    input: str


class AuditRow(AuditSubject, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number of an audit check, with its limit.

    Attributes:
        metric: Stable name in snake_case.
        is_headline: Whether the row is about the model of the headline; only such rows decide a check.
        compared_to: Baseline of a paired gap; the value is the model's score minus the baseline's.
        stratum: ``with_load`` or ``without_load``; null for all windows.
        value, low, high: The number and its interval by the session bootstrap; null where there is none.
        limit, limit_kind: The limit, and on which side of it the number must lie; null for a number that is only
            reported.
        holds: Whether the limit is kept; null without a limit, or where the data cannot say.
        note: Why there is no number or no verdict; null where there is one.
    """

    metric: str
    is_headline: bool
    compared_to: str | None = None
    stratum: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    limit_kind: LimitKind | None = None
    holds: bool | None = None
    n_windows: int = 0
    n_episodes: int = 0
    n_sessions: int = 0
    n_hosts: int = 0
    note: str | None = None

    @property
    def rendered_value(self) -> str:
        """The number with its interval, for people."""
        if self.value is None:
            return "–"
        interval = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{interval}"


class AuditCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The check of one promise.

    Attributes:
        name: Stable name in kebab-case.
        promise: What a reader may rely on if it is kept.
        words: What was checked, or the faults.
        rows: The numbers of the check, one per model and metric; empty for a check without numbers by model.
    """

    name: str
    promise: str
    fate: CheckOutcome
    words: str
    rows: tuple[AuditRow, ...] = ()

    @property
    def is_reported(self) -> bool:
        """Whether it is a figure without a limit."""
        return self.fate is CheckOutcome.KEPT and self.promise.endswith(REPORT_ONLY_SUFFIX)

    @property
    def outcome_label(self) -> str:
        """The outcome in a word, for people."""
        return "reported" if self.is_reported else str(self.fate)


class AuditReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All checks of one run, over the files named with their digests."""

    inputs: dict[str, str]
    checks: tuple[AuditCheck, ...]

    @property
    def failed_checks(self) -> tuple[AuditCheck, ...]:
        """The checks of broken promises."""
        return tuple(check for check in self.checks if check.fate is CheckOutcome.BROKEN)

    @property
    def passes(self) -> bool:
        """Whether no promise is broken; untested ones do not count as broken."""
        return not self.failed_checks

    @property
    def withdraws_five_phases(self) -> bool:
        """Whether the five-phase scores of the headline are withdrawn: its model does not call idle machines clean."""
        rows = (row for check in self.checks for row in check.rows)
        return any(row.metric == IDLE_CLEAN_METRIC and row.is_headline and row.holds is False for row in rows)

    def build_verdict(self) -> HeadlineVerdict:
        """Return the verdict that stands beside the headline."""
        return HeadlineVerdict(
            passes=self.passes,
            failed=tuple(check.name for check in self.failed_checks),
            withdraws_five_phases=self.withdraws_five_phases,
        )

    @property
    def summary(self) -> str:
        """The result in one line."""
        if not self.passes:
            return f"the run breaks {len(self.failed_checks)} of its promises"
        untested = sum(check.fate is CheckOutcome.UNTESTED for check in self.checks)
        return "the run keeps its promises" + (f", but for {untested} that could not be tested" if untested else "")


def build_check(name: str, promise: str, faults: Iterable[str], *, looked_at: str) -> AuditCheck:
    """Build a check from its faults; without any the promise is kept."""
    found = list(faults)
    if not found:
        return AuditCheck(name=name, promise=promise, fate=CheckOutcome.KEPT, words=looked_at)
    more = f" (and {len(found) - _MAX_SHOWN_FAULTS} more)" if len(found) > _MAX_SHOWN_FAULTS else ""
    return AuditCheck(
        name=name, promise=promise, fate=CheckOutcome.BROKEN, words="; ".join(found[:_MAX_SHOWN_FAULTS]) + more
    )


def build_untested_check(name: str, promise: str, why: str) -> AuditCheck:
    """Build a check that could not be done."""
    return AuditCheck(name=name, promise=promise, fate=CheckOutcome.UNTESTED, words=why)


@contextmanager
def collect_refusals(faults: list[str]) -> Iterator[None]:
    """Append a refusal inside the block to the faults: an unreadable file breaks a promise."""
    try:
        yield
    except PhasewatchError as error:
        faults.append(str(error))


def render_audit(audit: AuditReport) -> bytes:
    """Render the bytes of `audit_v1.json`."""
    return msgspec.json.format(msgspec.json.encode(audit, order="sorted"), indent=1) + b"\n"


def parse_audit(data: bytes, *, file: str) -> AuditReport:
    """Parse the bytes of `audit_v1.json`.

    Raises:
        RunError: If they are not an audit.
    """
    try:
        return msgspec.json.decode(data, type=AuditReport)
    except msgspec.DecodeError as exc:
        raise RunError(f"{file}: not an audit: {exc}; make it again with `phasewatch audit RUN`") from exc
