"""How a split holds out: the table of recipes, and how each cuts the episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from phasewatch.errors import SplitError, UsageError
from phasewatch.split.fold import SplitEpisode


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a split holds out.

    Attributes:
        cut: Episodes → (fold name, its test set); raises SplitError when the episodes cannot be cut so.
        spares_a_host: Validation is the next host; otherwise a share of the other sessions.
    """

    name: str
    about: str
    cut: Callable[[Sequence[SplitEpisode]], tuple[tuple[str, frozenset[str]], ...]]
    spares_a_host: bool = False
    leaky: bool = False


def _one_host_each(episodes: Sequence[SplitEpisode]) -> tuple[tuple[str, frozenset[str]], ...]:
    hosts = sorted({e.host_id for e in episodes})
    if len(hosts) < 2:
        found = f"only {hosts[0]!r}" if hosts else "none"
        raise SplitError(
            f"held_out_host: needs lab episodes of known phase from at least 2 hosts, found {found}; "
            "record on another host, or choose a recipe that holds out something else"
        )
    return tuple((h, frozenset(e.episode_id for e in episodes if e.host_id == h)) for h in hosts)


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="held_out_host",
        about="Tested on a host that training never saw.",
        cut=_one_host_each,
        spares_a_host=True,
    ),
)


def recipe_of(name: str) -> Recipe:
    """Find a recipe by its name.

    Raises:
        UsageError: If there is none; the message has the nearest names.
    """
    known = {r.name: r for r in RECIPES}
    if name not in known:
        near = get_close_matches(name, known, n=2) or sorted(known)
        raise UsageError(f"no split recipe {name!r}; did you mean {' or '.join(near)}?")
    return known[name]
