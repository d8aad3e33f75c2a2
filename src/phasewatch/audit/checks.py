"""What an audit says: one check a promise, with the words and the place; and its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import msgspec

from phasewatch.errors import PhasewatchError, RunError

REPORT_ONLY_SUFFIX = "Reported, without a limit."  # how the promise of a figure ends that nothing can break
MAX_SHOWN_FAULTS = 3  # places that a check names; the rest is counted


class CheckOutcome(StrEnum):
    """What became of a promise: untested says why, and never counts as kept."""

    KEPT = "kept"
    BROKEN = "broken"
    UNTESTED = "untested"


class AuditCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One promise.

    Attributes:
        name: Stable, in kebab-case.
        promise: What a reader may rely on if it was kept.
        words: What was looked at, or what was found instead.
    """

    name: str
    promise: str
    fate: CheckOutcome
    words: str

    @property
    def is_reported(self) -> bool:
        """Whether it is a figure without a limit: it was found, and promises nothing."""
        return self.fate is CheckOutcome.KEPT and self.promise.endswith(REPORT_ONLY_SUFFIX)

    @property
    def outcome_label(self) -> str:
        """Its fate in a word, for people."""
        return "reported" if self.is_reported else str(self.fate)


class AuditReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All checks of one run, over the files named with their digests."""

    inputs: dict[str, str]
    checks: tuple[AuditCheck, ...]

    @property
    def failed_checks(self) -> tuple[AuditCheck, ...]:
        """The promises that were not kept."""
        return tuple(check for check in self.checks if check.fate is CheckOutcome.BROKEN)

    @property
    def passes(self) -> bool:
        """Whether no promise was broken; untested ones are named beside it."""
        return not self.failed_checks

    @property
    def summary(self) -> str:
        """What became of the promises, in a line."""
        if not self.passes:
            return f"the run breaks {len(self.failed_checks)} of its promises"
        untested = sum(check.fate is CheckOutcome.UNTESTED for check in self.checks)
        return "the run keeps its promises" + (f", but for {untested} that could not be tested" if untested else "")


def build_check(name: str, promise: str, faults: Iterable[str], *, looked_at: str) -> AuditCheck:
    """Make a check of what was found wrong: nothing keeps the promise."""
    found = list(faults)
    if not found:
        return AuditCheck(name=name, promise=promise, fate=CheckOutcome.KEPT, words=looked_at)
    more = f" (and {len(found) - MAX_SHOWN_FAULTS} more)" if len(found) > MAX_SHOWN_FAULTS else ""
    return AuditCheck(
        name=name, promise=promise, fate=CheckOutcome.BROKEN, words="; ".join(found[:MAX_SHOWN_FAULTS]) + more
    )


def build_untested_check(name: str, promise: str, why: str) -> AuditCheck:
    """Make a check that could not be done."""
    return AuditCheck(name=name, promise=promise, fate=CheckOutcome.UNTESTED, words=why)


@contextmanager
def collect_refusals(faults: list[str]) -> Iterator[None]:
    """Turn a refusal inside the block into a fault: what cannot even be read does not keep a promise."""
    try:
        yield
    except PhasewatchError as error:
        faults.append(str(error))


def render_audit(audit: AuditReport) -> bytes:
    """Give the bytes of `audit_v1.json`."""
    return msgspec.json.format(msgspec.json.encode(audit, order="sorted"), indent=1) + b"\n"


def parse_audit(data: bytes, *, file: str) -> AuditReport:
    """Read `audit_v1.json`.

    Raises:
        RunError: If it is none.
    """
    try:
        return msgspec.json.decode(data, type=AuditReport)
    except msgspec.DecodeError as exc:
        raise RunError(f"{file}: not an audit: {exc}; make it again with `phasewatch audit RUN`") from exc
