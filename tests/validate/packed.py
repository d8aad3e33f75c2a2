"""Episodes as a reader gets them: packed and unpacked, so that the manifest lists its rows."""

from __future__ import annotations

from tests.factories.bundles import members_of

from phasewatch.bundle.archive import pack_bundle, unpack_bundle
from phasewatch.bundle.model import Episode
from phasewatch.bundle.problems import BundleFinding
from phasewatch.validate import checks


def findings(whole: Episode) -> tuple[BundleFinding, ...]:
    """Run the gates on an episode that went through a file."""
    return checks.find_episode_problems(
        unpack_bundle(pack_bundle(whole.manifest, members_of(whole), level=1), file="x")
    )


def codes(whole: Episode) -> set[str]:
    """Return the codes alone."""
    return {f.code for f in findings(whole)}


def the(code: str, whole: Episode) -> BundleFinding:
    """Return the finding of a code, which there must be."""
    return next(f for f in findings(whole) if f.code == code)
