"""Exclude unusable episodes before a split, so that one bundle does not make a recipe or another host's fold fail."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from phasewatch.profiles import PROFILES
from phasewatch.splits.fold import SplitEpisode
from phasewatch.splits.near import find_copied_episodes
from phasewatch.types import BENIGN_PROFILE

__all__ = [
    "MIN_EPISODES",
    "SetAsideCode",
    "SetAsideEpisode",
    "build_set_aside",
    "find_unusable_episodes",
    "has_enough_episodes",
]

MIN_EPISODES = 2  # of each profile in train; with one a model has seen a run, not a profile
_USABLE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._+@=,()~-]{0,98}[A-Za-z0-9_+@=,()~-])?")
_RESERVED_NAMES = frozenset({"con", "prn", "aux", "nul"})  # not allowed as file names on Windows
_IGNORED_CHARS = re.compile(r"[ ._-]+")


class SetAsideCode(StrEnum):
    """The reason why an episode is in no split."""

    NAME = "name-unusable"
    LOOK_ALIKE = "profile-look-alike"
    ID_TAKEN = "episode-id-taken"
    COPY = "copy-of-another-host"
    RARE = "profile-rare"
    NOT_IN_TRAIN = "profile-not-in-train"

    @property
    def about(self) -> str:
        """The meaning of the code, and what to do."""
        return _CODE_TEXTS[self]


_CODE_TEXTS = {
    SetAsideCode.NAME: (
        "its profile or sample name cannot be a file name; record it with a name of letters, digits, '-', '_' and '.'"
    ),
    SetAsideCode.LOOK_ALIKE: (
        "its profile name is almost that of a registered profile; record it with that name or a different one"
    ),
    SetAsideCode.ID_TAKEN: "another host has an episode with this id; ids are unique in a store, record it again",
    SetAsideCode.COPY: "half of its proc rows are those of another host that has more episodes; remove the copy",
    SetAsideCode.RARE: f"its profile has fewer than {MIN_EPISODES} episodes; record more of it",
    SetAsideCode.NOT_IN_TRAIN: (
        f"a fold would leave fewer than {MIN_EPISODES} episodes of its profile in train; "
        "record it on more hosts, with more samples and in more sessions"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SetAsideEpisode:
    """An episode that is in no fold of some recipes.

    Attributes:
        code: The reason.
        recipes: Names of the recipes; empty for all.
    """

    host_id: str
    episode_id: str
    profile: str
    code: SetAsideCode
    recipes: tuple[str, ...] = ()


def build_set_aside(e: SplitEpisode, code: SetAsideCode) -> SetAsideEpisode:
    """Return the entry of one episode for all recipes."""
    return SetAsideEpisode(host_id=e.host_id, episode_id=e.episode_id, profile=e.profile, code=code)


def find_unusable_episodes(lab: Sequence[SplitEpisode]) -> tuple[SetAsideEpisode, ...]:
    """Return the episodes that no recipe can use, each with its first reason.

    Names are checked before counts: an episode with an unusable name does not count for its profile.
    """
    odd: dict[tuple[str, str], SetAsideEpisode] = {}

    def note(these: Iterable[SplitEpisode], code: SetAsideCode) -> None:
        for e in these:
            odd[e.host_id, e.episode_id] = build_set_aside(e, code)

    def rest() -> list[SplitEpisode]:
        return [e for e in lab if (e.host_id, e.episode_id) not in odd]

    note((e for e in lab if not (_is_usable_name(e.profile) and _is_usable_name(e.sample_name))), SetAsideCode.NAME)
    note((e for e in rest() if _is_profile_lookalike(e.profile)), SetAsideCode.LOOK_ALIKE)
    copies = find_copied_episodes(rest())
    note((e for e in rest() if e.episode_id in copies), SetAsideCode.COPY)
    count = Counter(e.profile for e in rest())
    rare = [e for e in rest() if count[e.profile] < MIN_EPISODES]
    # In a store of a few episodes rare ones are kept, and the recipe's error names what is missing.
    if has_enough_episodes(rest(), {e.episode_id for e in rare}):
        note(rare, SetAsideCode.RARE)
    return tuple(sorted(odd.values()))


def has_enough_episodes(lab: Sequence[SplitEpisode], aside: Container[str]) -> bool:
    """Return whether benign episodes, and half of the hosts with malicious ones, remain without `aside`."""
    before = {e.host_id for e in lab if e.profile != BENIGN_PROFILE}
    after = {e.host_id for e in lab if e.profile != BENIGN_PROFILE and e.episode_id not in aside}
    had_benign = any(e.profile == BENIGN_PROFILE for e in lab)
    has_benign = any(e.profile == BENIGN_PROFILE and e.episode_id not in aside for e in lab)
    return 2 * len(after) >= len(before) and has_benign == had_benign and any(e.episode_id not in aside for e in lab)


def _is_usable_name(name: str) -> bool:
    """Return whether a name can be part of a file name on any disk.

    >>> [_is_usable_name(n) for n in ("beacon-c2", "a/b", "..", "nul", "")]
    [True, False, False, False, False]
    """
    return _USABLE_NAME.fullmatch(name) is not None and name.partition(".")[0].lower() not in _RESERVED_NAMES


def _is_profile_lookalike(profile: str) -> bool:
    """Return whether a profile's name differs from a registered one in case, spaces and punctuation alone.

    >>> [_is_profile_lookalike(n) for n in ("benign", "Benign", "crypto_mine", "mine")]
    [False, True, True, False]
    """
    known = {p.name for p in PROFILES}
    return profile not in known and _normalise_name(profile) in {_normalise_name(name) for name in known}


def _normalise_name(name: str) -> str:
    return _IGNORED_CHARS.sub("", name.lower())
