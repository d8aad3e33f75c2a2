"""What an audit says: one check a promise, with the words and the place; and its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import msgspec

from phasewatch.errors import PhasewatchError, RunError

AUDIT = "audit_v1.json"
REPORTED = "Reported, without a limit."  # how the promise of a figure ends that nothing can break
SHOWN = 3  # places that a check names; the rest is counted


class Fate(StrEnum):
    """What became of a promise: untested says why, and never counts as kept."""

    KEPT = "kept"
    BROKEN = "broken"
    UNTESTED = "untested"


class Check(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One promise.

    Attributes:
        name: Stable, in kebab-case.
        promise: What a reader may rely on if it was kept.
        words: What was looked at, or what was found instead.
    """

    name: str
    promise: str
    fate: Fate
    words: str

    @property
    def is_reported(self) -> bool:
        """Whether it is a figure without a limit: it was found, and promises nothing."""
        return self.fate is Fate.KEPT and self.promise.endswith(REPORTED)

    @property
    def shown(self) -> str:
        """Its fate in a word, for people."""
        return "reported" if self.is_reported else str(self.fate)


class Audit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All checks of one run, over the files named with their digests."""

    inputs: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[Check, ...]:
        """The promises that were not kept."""
        return tuple(check for check in self.checks if check.fate is Fate.BROKEN)

    @property
    def passes(self) -> bool:
        """Whether no promise was broken; untested ones are named beside it."""
        return not self.broken

    @property
    def words(self) -> str:
        """What became of the promises, in a line."""
        if not self.passes:
            return f"the run breaks {len(self.broken)} of its promises"
        untested = sum(check.fate is Fate.UNTESTED for check in self.checks)
        return "the run keeps its promises" + (f", but for {untested} that could not be tested" if untested else "")


def judge(name: str, promise: str, faults: Iterable[str], *, looked_at: str) -> Check:
    """Make a check of what was found wrong: nothing keeps the promise."""
    found = list(faults)
    if not found:
        return Check(name=name, promise=promise, fate=Fate.KEPT, words=looked_at)
    more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
    return Check(name=name, promise=promise, fate=Fate.BROKEN, words="; ".join(found[:SHOWN]) + more)


def untested(name: str, promise: str, why: str) -> Check:
    """Make a check that could not be done."""
    return Check(name=name, promise=promise, fate=Fate.UNTESTED, words=why)


@contextmanager
def collecting(faults: list[str]) -> Iterator[None]:
    """Turn a refusal inside the block into a fault: what cannot even be read does not keep a promise."""
    try:
        yield
    except PhasewatchError as error:
        faults.append(str(error))


def render_audit(audit: Audit) -> bytes:
    """Give the bytes of `audit_v1.json`."""
    return msgspec.json.format(msgspec.json.encode(audit, order="sorted"), indent=1) + b"\n"


def parse_audit(data: bytes, *, file: str) -> Audit:
    """Read `audit_v1.json`.

    Raises:
        RunError: If it is none.
    """
    try:
        return msgspec.json.decode(data, type=Audit)
    except msgspec.DecodeError as exc:
        raise RunError(f"{file}: not an audit: {exc}; make it again with `phasewatch audit RUN`") from exc
