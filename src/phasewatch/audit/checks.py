"""The result of an audit: one check per promise, and the file `audit_v1.json`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import msgspec

from phasewatch.errors import PhasewatchError, RunError

__all__ = [
    "REPORT_ONLY_SUFFIX",
    "AuditCheck",
    "AuditReport",
    "CheckOutcome",
    "build_check",
    "build_untested_check",
    "collect_refusals",
    "parse_audit",
    "render_audit",
]

REPORT_ONLY_SUFFIX = "Reported, without a limit."  # ends the promise of a figure without a limit
_MAX_SHOWN_FAULTS = 3  # faults that a check lists; the rest is counted


class CheckOutcome(StrEnum):
    """The outcome of a check; untested never counts as kept."""

    KEPT = "kept"
    BROKEN = "broken"
    UNTESTED = "untested"


class AuditCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The check of one promise.

    Attributes:
        name: Stable name in kebab-case.
        promise: What a reader may rely on if it is kept.
        words: What was checked, or the faults.
    """

    name: str
    promise: str
    fate: CheckOutcome
    words: str

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
