"""Odd episodes, set aside by name before a split is made, so that one bundle costs no recipe and no other host's fold."""

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

MIN_EPISODES = 2  # of each profile in train; with fewer a model has seen one run, not a profile
_USABLE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._+@=,()~-]{0,98}[A-Za-z0-9_+@=,()~-])?")
_RESERVED_NAMES = frozenset({"con", "prn", "aux", "nul"})  # files of this name exist on no Windows disk
_IGNORED_CHARS = re.compile(r"[ ._-]+")


class SetAsideCode(StrEnum):
    """Why an episode is in no split."""

    NAME = "name-unusable"
    LOOK_ALIKE = "profile-look-alike"
    ID_TAKEN = "episode-id-taken"
    COPY = "copy-of-another-host"
    RARE = "profile-rare"
    NOT_IN_TRAIN = "profile-not-in-train"

    @property
    def about(self) -> str:
        """What it means, and what to do."""
        return _CODE_TEXTS[self]


_CODE_TEXTS = {
    SetAsideCode.NAME: "its profile or sample name cannot name a file; record it under letters, digits, '-', '_' and '.'",
    SetAsideCode.LOOK_ALIKE: "its profile is spelled almost like a registered one; record it under that name or another",
    SetAsideCode.ID_TAKEN: "another host holds an episode of this id; ids are unique in a store, record it again",
    SetAsideCode.COPY: "half of its proc rows are those of another host with more episodes of its own; remove the copy",
    SetAsideCode.RARE: f"its profile has fewer than {MIN_EPISODES} episodes; record more of it",
    SetAsideCode.NOT_IN_TRAIN: (
        f"a fold would leave fewer than {MIN_EPISODES} episodes of its profile in train; "
        "record it on more hosts, with more samples and in more sessions"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SetAsideEpisode:
    """One episode that no fold of some recipes lists.

    Attributes:
        recipes: Which ones; empty for every recipe.
    """

    host_id: str
    episode_id: str
    profile: str
    code: SetAsideCode
    recipes: tuple[str, ...] = ()


def build_set_aside(e: SplitEpisode, code: SetAsideCode) -> SetAsideEpisode:
    """Return the entry of one episode, for every recipe."""
    return SetAsideEpisode(host_id=e.host_id, episode_id=e.episode_id, profile=e.profile, code=code)


def find_unusable_episodes(lab: Sequence[SplitEpisode]) -> tuple[SetAsideEpisode, ...]:
    """Return the episodes that no recipe can use, each with its first reason.

    A name that is odd counts before a number: an episode under a name like ``a/b`` makes no other profile less rare.
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
    if has_enough_episodes(
        rest(), {e.episode_id for e in rare}
    ):  # in a store of a few episodes a recipe says what is missing
        note(rare, SetAsideCode.RARE)
    return tuple(sorted(odd.values()))


def has_enough_episodes(lab: Sequence[SplitEpisode], aside: Container[str]) -> bool:
    """Whether what stays is still the store that was recorded: benign episodes, and half of the hosts with others."""
    before = {e.host_id for e in lab if e.profile != BENIGN_PROFILE}
    after = {e.host_id for e in lab if e.profile != BENIGN_PROFILE and e.episode_id not in aside}
    had_benign = any(e.profile == BENIGN_PROFILE for e in lab)
    has_benign = any(e.profile == BENIGN_PROFILE and e.episode_id not in aside for e in lab)
    return 2 * len(after) >= len(before) and has_benign == had_benign and any(e.episode_id not in aside for e in lab)


def _is_usable_name(name: str) -> bool:
    """Whether a name can stand in the name of a file on any disk.

    >>> [is_usable_name(n) for n in ("beacon-c2", "a/b", "..", "nul", "")]
    [True, False, False, False, False]
    """
    return _USABLE_NAME.fullmatch(name) is not None and name.partition(".")[0].lower() not in _RESERVED_NAMES


def _is_profile_lookalike(profile: str) -> bool:
    """Whether a profile is a registered one but for case, spaces and punctuation.

    >>> [looks_registered(n) for n in ("benign", "Benign", "crypto_mine", "mine")]
    [False, True, True, False]
    """
    known = {p.name for p in PROFILES}
    return profile not in known and _normalise_name(profile) in {_normalise_name(name) for name in known}


def _normalise_name(name: str) -> str:
    return _IGNORED_CHARS.sub("", name.lower())
