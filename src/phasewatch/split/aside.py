"""Odd episodes, set aside by name before a split is made, so that one bundle costs no recipe and no other host's fold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from phasewatch.profiles import PROFILES
from phasewatch.split.fold import SplitEpisode
from phasewatch.split.near import find_copies
from phasewatch.vocab import BENIGN

MIN_EPISODES = 2  # of each profile in train; with fewer a model has seen one run, not a profile
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._+@=,()~-]{0,98}[A-Za-z0-9_+@=,()~-])?")
_RESERVED = frozenset({"con", "prn", "aux", "nul"})  # files of this name exist on no Windows disk
_IGNORED = re.compile(r"[ ._-]+")


class AsideCode(StrEnum):
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
        return _ABOUT[self]


_ABOUT = {
    AsideCode.NAME: "its profile or sample name cannot name a file; record it under letters, digits, '-', '_' and '.'",
    AsideCode.LOOK_ALIKE: "its profile is spelled almost like a registered one; record it under that name or another",
    AsideCode.ID_TAKEN: "another host holds an episode of this id; ids are unique in a store, record it again",
    AsideCode.COPY: "half of its proc rows are those of another host with more episodes of its own; remove the copy",
    AsideCode.RARE: f"its profile has fewer than {MIN_EPISODES} episodes; record more of it",
    AsideCode.NOT_IN_TRAIN: (
        f"a fold would leave fewer than {MIN_EPISODES} episodes of its profile in train; "
        "record it on more hosts, with more samples and in more sessions"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SetAside:
    """One episode that no fold of some recipes lists.

    Attributes:
        recipes: Which ones; empty for every recipe.
    """

    host_id: str
    episode_id: str
    profile: str
    code: AsideCode
    recipes: tuple[str, ...] = ()


def set_aside(e: SplitEpisode, code: AsideCode) -> SetAside:
    """Return the entry of one episode, for every recipe."""
    return SetAside(host_id=e.host_id, episode_id=e.episode_id, profile=e.profile, code=code)


def find_odd(lab: Sequence[SplitEpisode]) -> tuple[SetAside, ...]:
    """Return the episodes that no recipe can use, each with its first reason.

    A name that is odd counts before a number: an episode under a name like ``a/b`` makes no other profile less rare.
    """
    odd: dict[tuple[str, str], SetAside] = {}

    def note(these: Iterable[SplitEpisode], code: AsideCode) -> None:
        for e in these:
            odd[e.host_id, e.episode_id] = set_aside(e, code)

    def rest() -> list[SplitEpisode]:
        return [e for e in lab if (e.host_id, e.episode_id) not in odd]

    note((e for e in lab if not (is_usable_name(e.profile) and is_usable_name(e.sample_name))), AsideCode.NAME)
    note((e for e in rest() if looks_registered(e.profile)), AsideCode.LOOK_ALIKE)
    copies = find_copies(rest())
    note((e for e in rest() if e.episode_id in copies), AsideCode.COPY)
    count = Counter(e.profile for e in rest())
    rare = [e for e in rest() if count[e.profile] < MIN_EPISODES]
    if is_enough(rest(), {e.episode_id for e in rare}):  # in a store of a few episodes a recipe says what is missing
        note(rare, AsideCode.RARE)
    return tuple(sorted(odd.values()))


def is_enough(lab: Sequence[SplitEpisode], aside: Container[str]) -> bool:
    """Whether what stays is still the store that was recorded: benign episodes, and half of the hosts with others."""
    before = {e.host_id for e in lab if e.profile != BENIGN}
    after = {e.host_id for e in lab if e.profile != BENIGN and e.episode_id not in aside}
    had_benign = any(e.profile == BENIGN for e in lab)
    has_benign = any(e.profile == BENIGN and e.episode_id not in aside for e in lab)
    return 2 * len(after) >= len(before) and has_benign == had_benign and any(e.episode_id not in aside for e in lab)


def is_usable_name(name: str) -> bool:
    """Whether a name can stand in the name of a file on any disk.

    >>> [is_usable_name(n) for n in ("beacon-c2", "a/b", "..", "nul", "")]
    [True, False, False, False, False]
    """
    return _NAME.fullmatch(name) is not None and name.partition(".")[0].lower() not in _RESERVED


def looks_registered(profile: str) -> bool:
    """Whether a profile is a registered one but for case, spaces and punctuation.

    >>> [looks_registered(n) for n in ("benign", "Benign", "crypto_mine", "mine")]
    [False, True, True, False]
    """
    known = {p.name for p in PROFILES}
    return profile not in known and _plain(profile) in {_plain(name) for name in known}


def _plain(name: str) -> str:
    return _IGNORED.sub("", name.lower())
