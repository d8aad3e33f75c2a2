"""Folds: the assignment of a run's episodes to sets, and its file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import msgspec

from phasewatch.errors import RunError
from phasewatch.types import EpisodeRole, Phase

__all__ = [
    "FOLD_VERSION",
    "TRAINING_PARTS",
    "Fold",
    "FoldCoverage",
    "RandomWindowSplit",
    "SplitEpisode",
    "SplitEpisodes",
    "SplitPart",
    "compute_fold_digest",
    "has_single_host",
    "parse_fold",
    "render_fold",
]

FOLD_VERSION = 1


class SplitPart(StrEnum):
    """The set of an episode.

    Validation A stops the training; validation B fits temperature, phase filter and alarm. An embargoed episode is too
    close to the test set (same session, near-duplicate). An excluded one shares what the recipe holds out. The windows
    of a dealt one go to all four sets (random window split).
    """

    TRAIN = "train"
    VAL_A = "val_a"
    VAL_B = "val_b"
    TEST = "test"
    EMBARGOED = "embargoed"
    EXCLUDED = "excluded"
    DEALT = "dealt"


TRAINING_PARTS = (SplitPart.TRAIN, SplitPart.VAL_A, SplitPart.VAL_B)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitEpisode:
    """The facts of an episode that a split needs.

    Attributes:
        session: Name of the recording session. Episodes of one session and host ran at the same time.
        neighbours: Ids of the episodes that ran at the same time, from its manifest.
        session_host: Host that identifies its session if several hosts recorded it together; empty for its own host.
        proc_sketch: Smallest digests of the increments of its proc counters; runs that share half of them are one run.
        phases: Known phases of its windows; an episode without any is in no set.
    """

    episode_id: str
    host_id: str
    profile: str
    sample_name: str
    sample_group: int
    session: str
    role: EpisodeRole
    agent: bool
    plan_seed: int
    proc_sketch: tuple[int, ...]
    started_wall_ns: int
    phases: tuple[Phase, ...]
    duration_s: float = 0.0
    neighbours: tuple[str, ...] = ()
    session_host: str = ""

    @property
    def session_key(self) -> tuple[str, str]:
        """Session and host; episodes with the same key are never on two sides of a split."""
        return self.session, self.session_host or self.host_id


SplitEpisodes = Sequence[SplitEpisode]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldCoverage:
    """Number of episodes of one profile on one host in each set."""

    host_id: str
    profile: str
    train: int
    val_a: int
    val_b: int
    test: int
    embargoed: int
    excluded: int = 0
    dealt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWindowSplit:
    """A random assignment of windows to sets: fold `number`, from 0, `of` a number of folds."""

    number: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One fold of a recipe; the content of `splits/<recipe>-<fold>.json`.

    Attributes:
        validation: Source of the validation sets: ``host:<host_id>``, ``sessions`` (a share of the other sessions),
            ``fold`` (the next fold), ``last`` (the last sessions in time), or ``windows``.
        episodes: Episode → its set. Episodes of other roles or unknown phase are not listed.
        embargoed: Episode → why it is not used for training although the recipe alone would allow it.
        excluded: Episode → what it shares with the test set that the recipe holds out.
        deal: The random window split; None where episodes are assigned.
        notes: Warnings for a reader of its scores.
        asserted: Claims that were checked before the fold was written.
        sha256: Digest of the canonical JSON of all other fields.
    """

    version: int
    recipe: str
    fold: str
    leaky: bool
    validation: str
    episodes: dict[str, SplitPart]
    embargoed: dict[str, str]
    coverage: tuple[FoldCoverage, ...]
    untested_profiles: tuple[str, ...]
    untested_phases: tuple[Phase, ...]
    asserted: tuple[str, ...]
    sha256: str
    excluded: dict[str, str] = field(default_factory=dict)
    deal: RandomWindowSplit | None = None
    notes: tuple[str, ...] = ()

    def ids(self, part: SplitPart) -> tuple[str, ...]:
        """Return the episodes of one set, sorted."""
        return tuple(sorted(e for e, p in self.episodes.items() if p is part))


def render_fold(fold: Fold) -> bytes:
    """Render the file of a fold; the same fold gives the same bytes."""
    return msgspec.json.format(_render_canonical(fold), indent=1) + b"\n"


def parse_fold(data: bytes, *, file: str) -> Fold:
    """Parse the file of a fold.

    Raises:
        RunError: If it is not a fold, or was edited.
    """
    try:
        fold = msgspec.json.decode(data, type=Fold)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RunError(
            f"{file}: not a split of version {FOLD_VERSION}: {exc}; make it again with `phasewatch split`"
        ) from exc
    if fold.sha256 != compute_fold_digest(fold):
        raise RunError(
            f"{file}: the digest does not match the content, so it was edited; make it again with `phasewatch split`"
        )
    return fold


def _render_canonical(fold: Fold) -> bytes:
    return msgspec.json.encode(fold, order="sorted")


def has_single_host(folds: Iterable[Fold]) -> bool:
    """Return whether the folds of a run have episodes of one host alone, so that no score on another host exists."""
    return len({row.host_id for fold in folds for row in fold.coverage}) == 1


def compute_fold_digest(fold: Fold) -> str:
    """Compute the digest of a fold over all of its fields but `sha256`."""
    return hashlib.sha256(_render_canonical(replace(fold, sha256=""))).hexdigest()
