"""What a recipe claims, checked on the finished fold by another road than the one that built it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from phasewatch.errors import SplitError
from phasewatch.split.aside import MIN_EPISODES
from phasewatch.split.fold import Part, SplitEpisode
from phasewatch.split.near import NO_SEED
from phasewatch.split.recipes import APART, Cut, Recipe, Validation

LEARNT = (Part.TRAIN, Part.VAL_A, Part.VAL_B)


def assert_partition(row: Recipe, cuts: Sequence[Cut], lab: Sequence[SplitEpisode]) -> tuple[str, ...]:
    """Check that the folds together test each episode once, where the recipe says so.

    Raises:
        SplitError: If they do not.
    """
    if not row.partitions:
        return ()
    tested = Counter(i for cut in cuts for i in cut.test)
    if odd := sorted(e.episode_id for e in lab if tested[e.episode_id] != 1):
        raise SplitError(f"{row.name}: episode {odd[0]} is tested {tested[odd[0]]} times, expected once")
    return ("over the folds each episode is tested exactly once",)


def assert_fold(
    row: Recipe, lab: Sequence[SplitEpisode], parts: Mapping[str, Part], validation: str
) -> tuple[str, ...]:
    """Check what the recipe claims of one fold; gives the claims in words.

    Raises:
        SplitError: If one does not hold.
    """
    of_part = {part: [e for e in lab if parts[e.episode_id] is part] for part in Part}
    learnt, tested = [e for part in LEARNT for e in of_part[part]], of_part[Part.TEST]
    sessions = [{e.sitting for e in of_part[part]} for part in (*LEARNT, Part.TEST)]
    claims = {
        "every episode is in exactly one set": len(parts) == len(lab),
        "the test set is not empty" if row.tests else "nothing is tested": bool(tested) is row.tests,
        "train, validation A and validation B are not empty": all(of_part[part] for part in LEARNT),
        "train, validation A, validation B and test share no session": sum(map(len, sessions))
        == len(set().union(*sessions)),
        "no plan seed of the test set was learnt from": not _seeds(learnt) & _seeds(tested),
        f"each profile that is not held out has at least {MIN_EPISODES} episodes in train": True,  # refused before, by name
    }
    for what in row.apart:
        key = APART[what]
        claims[f"no {what} of the test set was learnt from"] = not {*map(key, learnt)} & {*map(key, tested)}
    if validation.startswith("host:"):
        of_train = {e.host_id for e in of_part[Part.TRAIN]}
        claims["the validation host is not in train"] = validation.removeprefix("host:") not in of_train
    if row.validation is Validation.LAST:
        began = min((e.started_wall_ns for e in tested), default=0)
        ended = max((e.started_wall_ns + round(e.duration_s * 1e9) for e in learnt), default=0)
        claims["all that was learnt from ended before the first test episode began"] = ended <= began
    if broken := [words for words, holds in claims.items() if not holds]:
        raise SplitError(f"{row.name}: not so: {'; '.join(broken)}")
    return tuple(claims)


def _seeds(episodes: Sequence[SplitEpisode]) -> set[tuple[str, int]]:
    """Return the plan seeds, each with its host: two hosts that name one number have planned nothing together."""
    return {(e.host_id, e.plan_seed) for e in episodes if e.plan_seed != NO_SEED}
