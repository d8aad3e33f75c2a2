"""Episodes to folds: cut by the recipe, embargo what is too near the test, choose who validates, and prove it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from phasewatch.errors import SplitError
from phasewatch.split.fold import VERSION, Coverage, Fold, Part, SplitEpisode, digest_of
from phasewatch.split.recipes import Recipe, recipe_of
from phasewatch.vocab import PHASES, Phase, Role

VALIDATION_SHARE = 0.15  # of the other sessions, where no host can be spared (DESIGN section 7)
MIN_EPISODES = 2  # of each profile in train; with fewer a model has seen one run, not a profile


def build_folds(recipe: str, episodes: Iterable[SplitEpisode], *, profiles: Sequence[str]) -> tuple[Fold, ...]:
    """Cut episodes into the folds of a recipe.

    Args:
        recipe: A name of RECIPES.
        episodes: All episodes of the run in any order; those that are not `lab` or of no known phase are passed over.
        profiles: All profiles that are registered; those without a test episode are named in each fold.

    Raises:
        SplitError: If the recipe cannot be built; it says which profile, host or session is missing.
    """
    row = recipe_of(recipe)
    lab = sorted((e for e in episodes if e.role is Role.LAB and e.phases), key=lambda e: (e.host_id, e.episode_id))
    if repeated := [i for i, n in Counter(e.episode_id for e in lab).items() if n > 1]:
        raise SplitError(f"{recipe}: episode {repeated[0]} stands twice; an episode is in exactly one set")
    near = near_duplicates(lab)
    return tuple(_build_fold(row, name, test, lab, near, profiles) for name, test in row.cut(lab))


def near_duplicates(episodes: Sequence[SplitEpisode]) -> Mapping[str, frozenset[str]]:
    """Name each episode's near-duplicates: equal `plan_seed`, or half of the smaller `proc_sketch` in common."""
    sketches = {e.episode_id: frozenset(e.proc_sketch) for e in episodes}
    holders: dict[int, list[str]] = defaultdict(list)
    for e in episodes:
        for digest in sketches[e.episode_id]:
            holders[digest].append(e.episode_id)
    shared: Counter[tuple[str, str]] = Counter()
    for ids in holders.values():
        shared.update((a, b) for i, a in enumerate(ids) for b in ids[i + 1 :])
    found: dict[str, set[str]] = defaultdict(set)
    for (a, b), n in shared.items():
        if 2 * n >= min(len(sketches[a]), len(sketches[b])):
            found[a].add(b)
            found[b].add(a)
    by_seed: dict[int, list[str]] = defaultdict(list)
    for e in episodes:
        by_seed[e.plan_seed].append(e.episode_id)
    for ids in by_seed.values():
        for i in ids:
            found[i].update(j for j in ids if j != i)
    return {i: frozenset(others) for i, others in found.items() if others}


def _order(purpose: str, session: str) -> str:
    return hashlib.sha256(f"{purpose}|{session}".encode()).hexdigest()


def _build_fold(
    row: Recipe,
    name: str,
    test: frozenset[str],
    lab: Sequence[SplitEpisode],
    near: Mapping[str, frozenset[str]],
    profiles: Sequence[str],
) -> Fold:
    embargoed = _embargo(test, lab, near)
    rest = [e for e in lab if e.episode_id not in test and e.episode_id not in embargoed]
    wanted = {e.profile for e in lab}
    tested_hosts = {e.host_id for e in lab if e.episode_id in test}
    spared = _next_host(tested_hosts, rest) if row.spares_a_host else None
    validation = "sessions"
    chosen = _share_of_sessions(rest)
    # With few hosts or runs the validation host may be all that could teach a profile; then sessions validate.
    if spared is not None:
        remaining = [e for e in rest if e.host_id != spared]
        its_sessions = {e.session for e in rest if e.host_id == spared}
        if len(its_sessions) >= 2 and not _lacking(wanted, remaining):
            validation, chosen = f"host:{spared}", its_sessions
    if len(chosen) < 2:
        raise SplitError(
            f"{row.name}, fold {name}: validation needs 2 sessions outside the test set and found {len(chosen)}; "
            "record more sessions"
        )
    halves = sorted(chosen, key=lambda s: _order("half", s))
    half_a = set(halves[::2])
    parts = {e.episode_id: Part.TEST for e in lab if e.episode_id in test} | dict.fromkeys(embargoed, Part.EMBARGOED)
    for e in rest:
        parts[e.episode_id] = (
            Part.TRAIN if e.session not in chosen else Part.VAL_A if e.session in half_a else Part.VAL_B
        )
    if lacking := _lacking(wanted, [e for e in rest if parts[e.episode_id] is Part.TRAIN]):
        words = ", ".join(f"{p} has {n}" for p, n in lacking.items())
        raise SplitError(
            f"{row.name}, fold {name}: each profile needs {MIN_EPISODES} episodes in train, but {words}; "
            "record more episodes of them on other hosts"
        )
    fold = Fold(
        version=VERSION,
        recipe=row.name,
        fold=name,
        leaky=row.leaky,
        validation=validation,
        episodes=parts,
        embargoed=embargoed,
        coverage=_coverage(lab, parts),
        untested_profiles=tuple(sorted(set(profiles) - {e.profile for e in lab if e.episode_id in test})),
        untested_phases=_untested_phases(lab, test),
        asserted=_assert_disjoint(row, lab, parts, validation),
        sha256="",
    )
    return replace(fold, sha256=digest_of(fold))


def _embargo(test: frozenset[str], lab: Sequence[SplitEpisode], near: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Say of each episode outside the test set that stands too near to it, why."""
    tested_sessions = {e.session for e in lab if e.episode_id in test}
    why: dict[str, str] = {}
    for e in lab:
        if e.episode_id in test:
            continue
        if e.session in tested_sessions:
            why[e.episode_id] = f"shares session {e.session} with the test set"
        elif twins := near.get(e.episode_id, frozenset()) & test:
            why[e.episode_id] = f"near-duplicate of {min(twins)} in the test set"
    return why


def _next_host(tested: set[str], rest: Sequence[SplitEpisode]) -> str | None:
    """Give the host after the tested one in sorted order, round the end; None when there is no other."""
    others = sorted({e.host_id for e in rest} - tested)
    if not others:
        return None
    return next((h for h in others if h > max(tested)), others[0])


def _share_of_sessions(rest: Sequence[SplitEpisode]) -> set[str]:
    """Choose 15 % of the sessions by hash, at least one for each half."""
    sessions = sorted({e.session for e in rest}, key=lambda s: _order("validation", s))
    return set(sessions[: max(2, round(VALIDATION_SHARE * len(sessions)))])


def _lacking(wanted: set[str], train: Sequence[SplitEpisode]) -> dict[str, int]:
    have = Counter(e.profile for e in train)
    return {p: have[p] for p in sorted(wanted) if have[p] < MIN_EPISODES}


def _coverage(lab: Sequence[SplitEpisode], parts: Mapping[str, Part]) -> tuple[Coverage, ...]:
    counts: dict[tuple[str, str], Counter[Part]] = defaultdict(Counter)
    for e in lab:
        counts[e.host_id, e.profile][parts[e.episode_id]] += 1
    return tuple(
        Coverage(host_id=h, profile=p, **{str(part): c[part] for part in Part}) for (h, p), c in sorted(counts.items())
    )


def _untested_phases(lab: Sequence[SplitEpisode], test: frozenset[str]) -> tuple[Phase, ...]:
    tested = {phase for e in lab if e.episode_id in test for phase in e.phases}
    return tuple(p for p in PHASES if p not in tested)


def _assert_disjoint(
    row: Recipe, lab: Sequence[SplitEpisode], parts: Mapping[str, Part], validation: str
) -> tuple[str, ...]:
    """Check what the recipe claims on the finished fold, by another road than the one that built it."""
    learnt = [e for e in lab if parts[e.episode_id] in (Part.TRAIN, Part.VAL_A, Part.VAL_B)]
    tested = [e for e in lab if parts[e.episode_id] is Part.TEST]
    by_part = {p: {e.session for e in lab if parts[e.episode_id] is p} for p in Part if p is not Part.EMBARGOED}
    claims = {
        "every episode is in exactly one set": len(parts) == len(lab),
        "the test set is not empty": bool(tested),
        "train, validation A, validation B and test share no session": sum(map(len, by_part.values()))
        == len(set().union(*by_part.values())),
        "no plan seed of the test set was learnt from": not {e.plan_seed for e in learnt}
        & {e.plan_seed for e in tested},
        f"each profile has at least {MIN_EPISODES} episodes in train": True,  # refused above, with its names
    }
    if row.spares_a_host:
        claims["no host of the test set was learnt from"] = not {e.host_id for e in learnt} & {
            e.host_id for e in tested
        }
    if validation.startswith("host:"):
        of_train = {e.host_id for e in lab if parts[e.episode_id] is Part.TRAIN}
        claims["the validation host is not in train"] = validation.removeprefix("host:") not in of_train
    if broken := [words for words, holds in claims.items() if not holds]:
        raise SplitError(f"{row.name}: not so: {'; '.join(broken)}")
    return tuple(claims)
