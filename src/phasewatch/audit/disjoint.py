"""What each recipe claims, checked on a finished fold by a road of its own: nothing of `split.build` is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from phasewatch.split import Fold, Part, SplitEpisode
from phasewatch.vocab import Role

LEARNT = (Part.TRAIN, Part.VAL_A, Part.VAL_B)
Episodes = Sequence[SplitEpisode]


def faults_of(fold: Fold, episodes: Mapping[str, SplitEpisode]) -> list[str]:
    """Say where a fold breaks what its recipe claims.

    Args:
        fold: One cut, of a recipe that is not leaky and holds something out.
        episodes: Every episode of the run by id, derived from its bundle.
    """
    where = f"{fold.recipe}-{fold.fold}"
    if strangers := sorted(set(fold.episodes) - set(episodes)):
        return [f"{where}: episode {strangers[0]} is in no bundle"]
    tested = [episodes[i] for i in fold.ids(Part.TEST)]
    learnt = [episodes[i] for part in LEARNT for i in fold.ids(part)]
    found = [*_shared(tested, learnt, "session", lambda e: f"{e.host_id}/{e.session}")]
    found += _shared(tested, learnt, "plan seed", lambda e: str(e.plan_seed))
    found += _twins(tested, learnt)
    found += _halves(fold, episodes)
    for claim in CLAIMS.get(fold.recipe, ()):
        found += claim(tested, learnt)
    return [f"{where}: {words}" for words in found]


def faults_over(folds: Sequence[Fold], episodes: Mapping[str, SplitEpisode]) -> list[str]:
    """Say where the folds of a recipe do not together test each lab episode of known phase exactly once."""
    if not folds or folds[0].recipe not in PARTITIONS:
        return []
    tested = Counter(i for fold in folds for i in fold.ids(Part.TEST))
    wanted = sorted(e.episode_id for e in episodes.values() if e.role is Role.LAB and e.phases)
    return [f"{folds[0].recipe}: {i} is tested {tested[i]} times, expected once" for i in wanted if tested[i] != 1]


def _shared(tested: Episodes, learnt: Episodes, what: str, key: Callable[[SplitEpisode], str]) -> Iterator[str]:
    for value in sorted({key(e) for e in tested} & {key(e) for e in learnt}):
        yield f"{what} {value} is tested and was learnt from"


def _twins(tested: Episodes, learnt: Episodes) -> Iterator[str]:
    """Find runs that are one run under two names: half of the smaller sketch in common."""
    sketches = [(e.episode_id, frozenset(e.proc_sketch)) for e in learnt]
    for e in tested:
        mine = frozenset(e.proc_sketch)
        for other, theirs in sketches:
            if mine and theirs and 2 * len(mine & theirs) >= min(len(mine), len(theirs)):
                yield f"{e.episode_id} is tested and its near-duplicate {other} was learnt from"


def _halves(fold: Fold, episodes: Mapping[str, SplitEpisode]) -> Iterator[str]:
    """Train, validation A and validation B may share no session either."""
    owner: dict[str, Part] = {}
    for part in LEARNT:
        for i in fold.ids(part):
            session = f"{episodes[i].host_id}/{episodes[i].session}"
            if owner.setdefault(session, part) is not part:
                yield f"session {session} is in {owner[session]} and in {part}"


def _hosts(tested: Episodes, learnt: Episodes) -> Iterator[str]:
    return _shared(tested, learnt, "host", lambda e: e.host_id)


def _groups(tested: Episodes, learnt: Episodes) -> Iterator[str]:
    return _shared(tested, learnt, "sample group", lambda e: str(e.sample_group))


def _time(tested: Episodes, learnt: Episodes) -> Iterator[str]:
    first_ns = min((e.started_wall_ns for e in tested), default=0)
    for e in learnt:
        if tested and e.started_wall_ns + round(e.duration_s * 1e9) > first_ns:
            yield f"{e.episode_id} was learnt from and had not ended when the first tested one began"


def _profiles(tested: Episodes, learnt: Episodes) -> Iterator[str]:
    return _shared(tested, learnt, "profile", lambda e: e.profile)


PARTITIONS = ("held_out_host", "held_out_sample", "held_out_both", "in_distribution")
CLAIMS: dict[str, tuple[Callable[[Episodes, Episodes], Iterator[str]], ...]] = {
    "held_out_host": (_hosts,),
    "held_out_sample": (_groups,),
    "held_out_both": (_hosts, _groups),
    "held_out_time": (_time,),
    "held_out_profile": (_profiles,),
}
