"""Episodes as a reader gets them: packed and unpacked, so that the manifest lists its rows."""

from __future__ import annotations

from tests.builders import members_of

from phasewatch.episode.bundle import pack, unpack
from phasewatch.episode.findings import Finding
from phasewatch.episode.model import Episode
from phasewatch.validate import gates


def findings(whole: Episode) -> tuple[Finding, ...]:
    """Run the gates on an episode that went through a file."""
    return gates.check(unpack(pack(whole.manifest, members_of(whole), level=1), file="x"))


def codes(whole: Episode) -> set[str]:
    """Give the codes alone."""
    return {f.code for f in findings(whole)}


def the(code: str, whole: Episode) -> Finding:
    """Give the finding of a code, which there must be."""
    return next(f for f in findings(whole) if f.code == code)
