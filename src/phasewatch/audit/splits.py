"""Checks of finished folds against what their recipe claims, independent of the code that built them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

from phasewatch.splits import Fold, SplitEpisode, SplitPart
from phasewatch.splits.fold import TRAINING_PARTS, SplitEpisodes
from phasewatch.types import EpisodeRole

__all__ = [
    "find_fold_faults",
    "find_partition_faults",
    "find_uninformative_digests",
]

_MAX_DIGEST_HOLDERS = 16


def find_fold_faults(fold: Fold, episodes: Mapping[str, SplitEpisode], crowded: Set[int] = frozenset()) -> list[str]:
    """Return where a fold breaks what its recipe claims.

    Args:
        fold: One cut, of a recipe that is not leaky and holds something out.
        episodes: Every episode of the run by id, derived from its bundle.
        crowded: Digests of proc rows that tell nothing (see `find_uninformative_digests`).
    """
    where = f"{fold.recipe}-{fold.fold}"
    if strangers := sorted(set(fold.episodes) - set(episodes)):
        return [f"{where}: episode {strangers[0]} is in no bundle"]
    tested = [episodes[i] for i in fold.ids(SplitPart.TEST)]
    learnt = [episodes[i] for part in TRAINING_PARTS for i in fold.ids(part)]
    found = [*_find_shared(tested, learnt, "session", lambda e: f"{e.host_id}/{e.session}")]
    found += _find_shared(
        [e for e in tested if e.plan_seed],
        [e for e in learnt if e.plan_seed],
        "plan seed",
        lambda e: f"{e.host_id}/{e.plan_seed}",
    )
    found += _find_near_duplicates(tested, learnt, crowded)
    found += _find_shared_sessions(fold, episodes)
    for claim in _RECIPE_CLAIMS.get(fold.recipe, ()):
        found += claim(tested, learnt)
    return [f"{where}: {words}" for words in found]


def find_partition_faults(
    folds: Sequence[Fold], episodes: Mapping[str, SplitEpisode], set_aside: Set[str] = frozenset()
) -> list[str]:
    """Return where the folds of a recipe do not together test each lab episode of known phase exactly once.

    Args:
        folds: Of one recipe.
        episodes: Every episode of the run by id.
        set_aside: Those that the recipe does without, by name.
    """
    if not folds or folds[0].recipe not in _PARTITION_RECIPES:
        return []
    tested = Counter(i for fold in folds for i in fold.ids(SplitPart.TEST))
    wanted = sorted(e.episode_id for e in episodes.values() if e.role is EpisodeRole.LAB and e.phases)
    return [
        f"{folds[0].recipe}: {i} is tested {tested[i]} times, expected {expected}"
        for i in wanted
        if tested[i] != (expected := 0 if i in set_aside else 1)
    ]


def _find_shared(
    tested: SplitEpisodes, learnt: SplitEpisodes, what: str, key: Callable[[SplitEpisode], str]
) -> Iterator[str]:
    for value in sorted({key(e) for e in tested} & {key(e) for e in learnt}):
        yield f"{what} {value} is tested and was learnt from"


def _find_near_duplicates(tested: SplitEpisodes, learnt: SplitEpisodes, crowded: Set[int]) -> Iterator[str]:
    """Find runs that are one run under two names: an equal sketch, or half of the smaller one in common."""
    whole = {frozenset(e.proc_sketch): e.episode_id for e in tested if e.proc_sketch}
    holders: dict[int, list[str]] = defaultdict(list)
    size: dict[str, int] = {}
    for sketch, i in whole.items():
        size[i] = len(sketch - crowded)
        for digest in sketch - crowded:
            holders[digest].append(i)
    for e in learnt:
        if (same := whole.get(frozenset(e.proc_sketch))) is not None:
            yield f"{same} is tested and its near-duplicate {e.episode_id} was learnt from"
            continue
        mine = set(e.proc_sketch) - crowded
        for i, n in sorted(Counter(i for digest in mine for i in holders.get(digest, ())).items()):
            if 2 * n >= min(len(mine), size[i]):
                yield f"{i} is tested and its near-duplicate {e.episode_id} was learnt from"


def find_uninformative_digests(episodes: Iterable[SplitEpisode]) -> frozenset[int]:
    """Return the digests that more than MAX_HOLDERS different sketches hold; they tell nothing about two of them."""
    count = Counter(digest for sketch in {frozenset(e.proc_sketch) for e in episodes} for digest in sketch)
    return frozenset(digest for digest, n in count.items() if n > _MAX_DIGEST_HOLDERS)


def _find_shared_sessions(fold: Fold, episodes: Mapping[str, SplitEpisode]) -> Iterator[str]:
    """Train, validation A and validation B may share no session either."""
    owner: dict[str, SplitPart] = {}
    for part in TRAINING_PARTS:
        for i in fold.ids(part):
            session = f"{episodes[i].host_id}/{episodes[i].session}"
            if owner.setdefault(session, part) is not part:
                yield f"session {session} is in {owner[session]} and in {part}"


def _find_shared_hosts(tested: SplitEpisodes, learnt: SplitEpisodes) -> Iterator[str]:
    return _find_shared(tested, learnt, "host", lambda e: e.host_id)


def _find_shared_groups(tested: SplitEpisodes, learnt: SplitEpisodes) -> Iterator[str]:
    return _find_shared(tested, learnt, "sample group", lambda e: str(e.sample_group))


def _find_time_overlap(tested: SplitEpisodes, learnt: SplitEpisodes) -> Iterator[str]:
    first_ns = min((e.started_wall_ns for e in tested), default=0)
    for e in learnt:
        if tested and e.started_wall_ns + round(e.duration_s * 1e9) > first_ns:
            yield f"{e.episode_id} was learnt from and had not ended when the first tested one began"


def _find_shared_profiles(tested: SplitEpisodes, learnt: SplitEpisodes) -> Iterator[str]:
    return _find_shared(tested, learnt, "profile", lambda e: e.profile)


_PARTITION_RECIPES = ("held_out_host", "held_out_sample", "held_out_both", "in_distribution")
_RECIPE_CLAIMS: dict[str, tuple[Callable[[SplitEpisodes, SplitEpisodes], Iterator[str]], ...]] = {
    "held_out_host": (_find_shared_hosts,),
    "held_out_sample": (_find_shared_groups,),
    "held_out_both": (_find_shared_hosts, _find_shared_groups),
    "held_out_time": (_find_time_overlap,),
    "held_out_profile": (_find_shared_profiles,),
}
