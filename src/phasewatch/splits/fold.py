"""One cut of a run's episodes: who is in which set, what was checked, and its file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from enum import StrEnum

import msgspec

from phasewatch.errors import RunError
from phasewatch.types import EpisodeRole, Phase

FOLD_VERSION = 1


class SplitPart(StrEnum):
    """The set that an episode is in: A stops the training, B sets temperature and thresholds.

    An embargoed one stands too near to the test set, an excluded one is of what the recipe holds out beside its test
    set, and the windows of a dealt one go to all four sets.
    """

    TRAIN = "train"
    VAL_A = "val_a"
    VAL_B = "val_b"
    TEST = "test"
    EMBARGOED = "embargoed"
    EXCLUDED = "excluded"
    DEALT = "dealt"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitEpisode:
    """What a split needs to know of an episode.

    Attributes:
        session: Episodes of one session of one host ran at the same time; another host's session of that name is another.
        neighbours: Ids of the episodes that ran beside it, as its manifest says.
        session_host: The host by which its session goes, if its host recorded it together with others (see
            `join_neighbours`); its own host otherwise.
        proc_sketch: The smallest digests of increments of its proc counters; two runs that share half of them are one run.
        phases: The known phases that its windows have; an episode without any is in no set.
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
        """Session and host: what may not be torn apart."""
        return self.session, self.session_host or self.host_id


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldCoverage:
    """How many episodes of one profile on one host went where."""

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
    """How windows are dealt where sets are drawn window by window: fold `number` `of` so many."""

    number: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One cut of the episodes; what stands in `splits/<recipe>-<fold>.json`.

    Attributes:
        validation: Whose episodes validate: ``host:<host_id>``, ``sessions`` (a share of the others), ``fold`` (the next
            one), ``last`` (in time), or ``windows``.
        episodes: Episode → its set. Episodes of other roles or unknown phase are not listed.
        embargoed: Episode → why it may not be trained on, though the recipe alone would let it.
        excluded: Episode → what of it the recipe holds out.
        deal: Where windows, not episodes, are dealt to the sets.
        notes: What a reader of its scores must know.
        asserted: What was checked before this was written; a fold that fails is never made.
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
        """Give the episodes of one set, sorted."""
        return tuple(sorted(e for e, p in self.episodes.items() if p is part))


def render_fold(fold: Fold) -> bytes:
    """Give a fold as the bytes of its file: the same fold is the same bytes."""
    return msgspec.json.format(_render_canonical(fold), indent=1) + b"\n"


def parse_fold(data: bytes, *, file: str) -> Fold:
    """Read a fold's file.

    Raises:
        RunError: If it is no such file, or was changed after it was made.
    """
    try:
        fold = msgspec.json.decode(data, type=Fold)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RunError(
            f"{file}: not a split of version {FOLD_VERSION}: {exc}; make it again with `phasewatch split`"
        ) from exc
    if fold.sha256 != compute_fold_digest(fold):
        raise RunError(
            f"{file}: its hash does not fit its content, so it was edited; make it again with `phasewatch split`"
        )
    return fold


def _render_canonical(fold: Fold) -> bytes:
    return msgspec.json.encode(fold, order="sorted")


def compute_fold_digest(fold: Fold) -> str:
    """Digest all of a fold but the digest itself."""
    return hashlib.sha256(_render_canonical(replace(fold, sha256=""))).hexdigest()
