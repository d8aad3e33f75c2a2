"""Build the folds of a recipe: test set, embargo, validation sets, and checks of the result."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from phasewatch.errors import SplitError
from phasewatch.splits.aside import (
    MIN_EPISODES,
    SetAsideCode,
    SetAsideEpisode,
    build_set_aside,
    find_unusable_episodes,
    has_enough_episodes,
)
from phasewatch.splits.fold import (
    FOLD_VERSION,
    TRAINING_PARTS,
    Fold,
    FoldCoverage,
    RandomWindowSplit,
    SplitEpisode,
    SplitPart,
    compute_fold_digest,
)
from phasewatch.splits.near import NO_SEED, NearDuplicates, find_near_duplicates
from phasewatch.splits.recipes import (
    HELD_OUT_KEYS,
    FoldPlan,
    Recipe,
    ValidationScheme,
    compute_session_order,
    find_recipe,
)
from phasewatch.types import PHASES, EpisodeRole, Phase

__all__ = [
    "DRIFT_DAYS",
    "RecipeSplit",
    "SplitInput",
    "assign_random_windows",
    "build_folds",
    "build_split",
    "check_fold",
    "check_partition",
    "prepare_split",
]


def check_partition(row: Recipe, cuts: Sequence[FoldPlan], lab: Sequence[SplitEpisode]) -> tuple[str, ...]:
    """Check that each episode is tested in exactly one fold, if the recipe claims it, and return the claim.

    Raises:
        SplitError: If an episode is not.
    """
    if not row.partitions:
        return ()
    tested = Counter(i for cut in cuts for i in cut.test)
    if odd := sorted(e.episode_id for e in lab if tested[e.episode_id] != 1):
        raise SplitError(f"{row.name}: episode {odd[0]} is tested {tested[odd[0]]} times, expected once")
    return ("over the folds each episode is tested exactly once",)


def check_fold(
    row: Recipe, lab: Sequence[SplitEpisode], parts: Mapping[str, SplitPart], validation: str
) -> tuple[str, ...]:
    """Check the claims of a recipe for one fold, and return them.

    Args:
        row: The recipe.
        lab: All episodes of the split.
        parts: Episode → its set.
        validation: Source of the validation sets, as `Fold.validation`.

    Raises:
        SplitError: If a claim does not hold.
    """
    of_part = {part: [e for e in lab if parts[e.episode_id] is part] for part in SplitPart}
    learnt, tested = [e for part in TRAINING_PARTS for e in of_part[part]], of_part[SplitPart.TEST]
    sessions = [{e.session_key for e in of_part[part]} for part in (*TRAINING_PARTS, SplitPart.TEST)]
    claims = {
        "every episode is in exactly one set": len(parts) == len(lab),
        "the test set is not empty" if row.tests else "nothing is tested": bool(tested) is row.tests,
        "train, validation A and validation B are not empty": all(of_part[part] for part in TRAINING_PARTS),
        "train, validation A, validation B and test share no session": sum(map(len, sessions))
        == len(set().union(*sessions)),
        "no plan seed of the test set was learnt from": not _collect_plan_seeds(learnt) & _collect_plan_seeds(tested),
        # Checked before, where the error names the profiles.
        f"each profile that is not held out has at least {MIN_EPISODES} episodes in train": True,
    }
    for what in row.held_out:
        key = HELD_OUT_KEYS[what]
        claims[f"no {what} of the test set was learnt from"] = not {*map(key, learnt)} & {*map(key, tested)}
    if validation.startswith("host:"):
        of_train = {e.host_id for e in of_part[SplitPart.TRAIN]}
        claims["the validation host is not in train"] = validation.removeprefix("host:") not in of_train
    if row.validation is ValidationScheme.LAST:
        began = min((e.started_wall_ns for e in tested), default=0)
        ended = max((e.started_wall_ns + round(e.duration_s * 1e9) for e in learnt), default=0)
        claims["all that was learnt from ended before the first test episode began"] = ended <= began
    if broken := [words for words, holds in claims.items() if not holds]:
        raise SplitError(f"{row.name}: these claims of the fold do not hold: {'; '.join(broken)}")
    return tuple(claims)


def _collect_plan_seeds(episodes: Sequence[SplitEpisode]) -> set[tuple[str, int]]:
    """Return the plan seeds, each with its host, because equal seeds on two hosts are unrelated."""
    return {(e.host_id, e.plan_seed) for e in episodes if e.plan_seed != NO_SEED}


_VALIDATION_SHARE = 0.15  # of the other sessions, if no host can be spared
DRIFT_DAYS = 7  # a store of a shorter span shows no drift
_DAY_NS = 86_400 * 10**9

_SessionKey = tuple[str, str]  # session and host


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitInput:
    """The usable episodes of a run, with their near-duplicates, for all recipes.

    Attributes:
        lab: Episodes of role `lab` with a known phase, in the order (host, episode).
        set_aside: Episodes that no recipe uses.
        near: Near-duplicates among `lab`.
    """

    lab: tuple[SplitEpisode, ...]
    set_aside: tuple[SetAsideEpisode, ...]
    near: NearDuplicates


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeSplit:
    """The folds of a recipe, and the episodes that only this recipe sets aside."""

    folds: tuple[Fold, ...]
    set_aside: tuple[SetAsideEpisode, ...]


class _RareProfilesError(Exception):
    """Some profiles are too rare in the train set of a fold.

    Attributes:
        blocking: Episodes without which the fold can be built.
        message: The error of the fold.
    """

    def __init__(self, blocking: Mapping[str, SetAsideCode], message: str) -> None:
        super().__init__(message)
        self.blocking, self.message = blocking, message


def build_folds(recipe: str, episodes: Iterable[SplitEpisode], *, profiles: Sequence[str]) -> tuple[Fold, ...]:
    """Build the folds of a recipe from all episodes of a run; see `prepare_split` and `build_split`."""
    return build_split(recipe, prepare_split(episodes), profiles=profiles).folds


def prepare_split(episodes: Iterable[SplitEpisode]) -> SplitInput:
    """Select the usable episodes and find the near-duplicates among them.

    Args:
        episodes: All episodes of the run in any order; other roles than `lab` and unknown phases are left out.

    Raises:
        SplitError: If an episode id occurs twice.
    """
    lab = sorted(
        (e for e in episodes if e.role is EpisodeRole.LAB and e.phases), key=lambda e: (e.host_id, e.episode_id)
    )
    if repeated := [i for i, n in Counter(e.episode_id for e in lab).items() if n > 1]:
        raise SplitError(f"episode {repeated[0]} occurs twice; an episode is in exactly one set")
    odd = find_unusable_episodes(lab)
    ids = {o.episode_id for o in odd}
    usable = _join_neighbour_sessions([e for e in lab if e.episode_id not in ids])
    return SplitInput(lab=usable, set_aside=odd, near=find_near_duplicates(usable))


def _join_neighbour_sessions(lab: Sequence[SplitEpisode]) -> tuple[SplitEpisode, ...]:
    """Join sessions of two hosts whose episodes name each other as neighbours.

    Both sides must name the other and have the same session name, because one side alone could claim anything.
    """
    known = {e.episode_id: e for e in lab}
    leader: dict[_SessionKey, _SessionKey] = {e.session_key: e.session_key for e in lab}

    def find(session: _SessionKey) -> _SessionKey:
        while leader[session] != session:
            leader[session] = session = leader[leader[session]]
        return session

    for e in lab:
        for other in (known[i] for i in e.neighbours if i in known):
            if other.session == e.session and e.episode_id in other.neighbours:
                first, second = sorted((find(e.session_key), find(other.session_key)))
                leader[second] = first
    return tuple(replace(e, session_host=find(e.session_key)[1]) for e in lab)


def build_split(recipe: str, given: SplitInput, *, profiles: Sequence[str]) -> RecipeSplit:
    """Build the folds of a recipe.

    An episode that prevents a fold is set aside for this recipe, and the recipe is built without it, if benign episodes
    and half of the hosts with malicious ones remain.

    Args:
        recipe: Name of a recipe.
        given: Result of `prepare_split`.
        profiles: All registered profiles; each fold names those without a test episode.

    Raises:
        SplitError: If the recipe cannot be built, naming the profile, host or session that is missing.
    """
    row, lab = find_recipe(recipe), given.lab
    aside: dict[str, SetAsideCode] = {}
    while True:
        kept = [e for e in lab if e.episode_id not in aside]
        if not kept:
            excluded = f" except {len(given.set_aside)} that are set aside" if given.set_aside else ""
            raise SplitError(
                f"{recipe}: no lab episode with a known phase{excluded}; record some with `phasewatch record`"
            )
        try:
            folds = _build_recipe(row, kept, given.near, profiles)
        except _RareProfilesError as exc:
            aside |= exc.blocking
            if not exc.blocking or not has_enough_episodes(lab, aside):
                raise SplitError(exc.message) from None
        else:
            named = [
                replace(build_set_aside(e, aside[e.episode_id]), recipes=(recipe,))
                for e in lab
                if e.episode_id in aside
            ]
            return RecipeSplit(folds=folds, set_aside=tuple(sorted(named)))


def _build_recipe(
    row: Recipe, lab: Sequence[SplitEpisode], near: NearDuplicates, profiles: Sequence[str]
) -> tuple[Fold, ...]:
    cuts = row.cut(lab)
    if row.by_window:
        return tuple(
            _build_random_fold(row, cut, RandomWindowSplit(number=i, of=len(cuts)), lab, profiles)
            for i, cut in enumerate(cuts)
        )
    claims = check_partition(row, cuts, lab)
    builder = _FoldBuilder(row=row, lab=lab, near=near, profiles=profiles, partition_claims=claims)
    folds: list[Fold] = []
    errors: list[_RareProfilesError] = []
    for cut in cuts:
        try:
            folds.append(builder.build(cut))
        except _RareProfilesError as exc:
            errors.append(exc)
    if errors:
        blocking = {episode: code for error in errors for episode, code in error.blocking.items()}
        raise _RareProfilesError(blocking, errors[0].message)
    return tuple(folds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FoldBuilder:
    """Builds the folds of one recipe over the same episodes."""

    row: Recipe
    lab: Sequence[SplitEpisode]
    near: NearDuplicates
    profiles: Sequence[str]
    partition_claims: tuple[str, ...]

    def build(self, cut: FoldPlan) -> Fold:
        row, lab = self.row, self.lab
        embargoed, twins = _find_embargoed(cut, lab, self.near)
        out = {*cut.test, *embargoed, *cut.excluded}
        rest = [e for e in lab if e.episode_id not in out]
        wanted = {e.profile for e in lab} - cut.held_out_profiles
        validation, chosen = self._choose_validation(cut, rest, wanted)
        if len(chosen) < 2:
            raise SplitError(
                f"{row.name}, fold {cut.fold}: validation needs 2 sessions outside the test set, found {len(chosen)}; "
                "record more sessions"
            )
        half_a = set(sorted(chosen, key=lambda s: compute_session_order("half", s))[::2])
        parts = (
            dict.fromkeys(cut.excluded, SplitPart.EXCLUDED)
            | dict.fromkeys(embargoed, SplitPart.EMBARGOED)
            | dict.fromkeys(cut.test, SplitPart.TEST)
        )
        for e in rest:
            parts[e.episode_id] = (
                SplitPart.TRAIN
                if e.session_key not in chosen
                else SplitPart.VAL_A
                if e.session_key in half_a
                else SplitPart.VAL_B
            )
        if rare := _count_rare_profiles(wanted, [e for e in rest if parts[e.episode_id] is SplitPart.TRAIN]):
            counts = ", ".join(f"{p} has {n}" for p, n in rare.items())
            raise _RareProfilesError(
                _find_blocking_episodes(lab, rare, twins),
                f"{row.name}, fold {cut.fold}: each profile needs {MIN_EPISODES} episodes in train, but {counts}; "
                f"record more episodes of them{_render_remedy(row)}",
            )
        return _add_digest(
            Fold(
                version=FOLD_VERSION,
                recipe=row.name,
                fold=cut.fold,
                leaky=row.leaky,
                validation=validation,
                episodes=dict(sorted(parts.items())),
                embargoed=embargoed,
                excluded={i: why for i, why in cut.excluded.items() if i not in embargoed},
                coverage=_count_coverage(lab, parts),
                untested_profiles=_find_untested_profiles(self.profiles, lab, cut.test),
                untested_phases=_find_untested_phases(lab, cut.test),
                asserted=(*check_fold(row, lab, parts, validation), *self.partition_claims),
                notes=_build_notes(row, lab),
                sha256="",
            )
        )

    def _choose_validation(
        self, cut: FoldPlan, rest: Sequence[SplitEpisode], wanted: set[str]
    ) -> tuple[str, set[_SessionKey]]:
        """Return the source of the validation sets, as `Fold.validation`, and their sessions."""
        if self.row.validation is ValidationScheme.FOLD:
            return "fold", {e.session_key for e in rest if e.episode_id in cut.validation_ids}
        if self.row.validation is ValidationScheme.LAST:
            return "last", _choose_last_sessions(rest)
        if self.row.validation is ValidationScheme.HOST:
            spared = _find_next_host({e.host_id for e in self.lab if e.episode_id in cut.test}, rest)
            its_sessions = {e.session_key for e in rest if e.host_id == spared}
            # With few hosts it may hold the only episodes of a profile; then a share of the sessions validates.
            if len(its_sessions) >= 2 and not _count_rare_profiles(wanted, [e for e in rest if e.host_id != spared]):
                return f"host:{spared}", its_sessions
        return "sessions", _choose_random_sessions(rest)


def _build_random_fold(
    row: Recipe, cut: FoldPlan, deal: RandomWindowSplit, lab: Sequence[SplitEpisode], profiles: Sequence[str]
) -> Fold:
    parts = {e.episode_id: SplitPart.DEALT for e in lab}
    return _add_digest(
        Fold(
            version=FOLD_VERSION,
            recipe=row.name,
            fold=cut.fold,
            leaky=row.leaky,
            validation="windows",
            episodes=parts,
            embargoed={},
            coverage=_count_coverage(lab, parts),
            untested_profiles=_find_untested_profiles(profiles, lab, parts),
            untested_phases=_find_untested_phases(lab, parts),
            asserted=("every window is in exactly one set", "over the folds each window is tested exactly once"),
            deal=deal,
            notes=("leaky: windows of one episode are learnt from and tested; never a headline",),
            sha256="",
        )
    )


def _add_digest(fold: Fold) -> Fold:
    return replace(fold, sha256=compute_fold_digest(fold))


def _find_embargoed(
    cut: FoldPlan, lab: Sequence[SplitEpisode], near: NearDuplicates
) -> tuple[dict[str, str], Mapping[str, str]]:
    """Return the episodes that are too close to the test set → why, and their near-duplicates in the test set."""
    tested = {e.session_key for e in lab if e.episode_id in cut.test}
    others = [e for e in lab if e.episode_id not in cut.test and e.episode_id not in cut.excluded]
    twins = near.find_twins([e.episode_id for e in others if e.session_key not in tested], cut.test)
    why: dict[str, str] = {}
    for e in others:
        if e.session_key in tested:
            why[e.episode_id] = f"shares session {e.session} with the test set"
        elif e.episode_id in twins:
            why[e.episode_id] = f"near-duplicate of {twins[e.episode_id]} in the test set"
    return why, twins


def _find_blocking_episodes(
    lab: Sequence[SplitEpisode], rare: Mapping[str, int], twins: Mapping[str, str]
) -> dict[str, SetAsideCode]:
    """Return the episodes without which the fold has no rare profile.

    If a profile is rare because its episodes have copies in another host's test set, these are the copies. Otherwise
    they are all episodes of the profile.
    """
    by_id = {e.episode_id: e for e in lab}
    blocking: dict[str, SetAsideCode] = {}
    for profile in rare:
        copies = {
            twin for i, twin in twins.items() if by_id[i].profile == profile and by_id[twin].host_id != by_id[i].host_id
        }
        if copies:
            blocking |= dict.fromkeys(copies, SetAsideCode.COPY)
        else:
            blocking |= {e.episode_id: SetAsideCode.NOT_IN_TRAIN for e in lab if e.profile == profile}
    return blocking


def _find_next_host(tested: set[str], rest: Sequence[SplitEpisode]) -> str | None:
    """Return the host after the tested one in sorted order, cyclically; None without another host.

    A host of a single session is skipped, unless all hosts have one.
    """
    sessions = {h: len({e.session_key for e in rest if e.host_id == h}) for h in {e.host_id for e in rest} - tested}
    others = sorted(h for h, n in sessions.items() if n >= 2) or sorted(sessions)
    if not others:
        return None
    return next((h for h in others if h > max(tested)), others[0])


def _choose_random_sessions(rest: Sequence[SplitEpisode]) -> set[_SessionKey]:
    """Choose 15 % of the sessions by hash, at least one for each validation set."""
    sessions = sorted({e.session_key for e in rest}, key=lambda s: compute_session_order("validation", s))
    return set(sessions[: max(2, round(_VALIDATION_SHARE * len(sessions)))])


def _choose_last_sessions(rest: Sequence[SplitEpisode]) -> set[_SessionKey]:
    """Choose the 15 % of the sessions that began last, at least one for each validation set."""
    began: dict[_SessionKey, int] = {}
    for e in rest:
        began[e.session_key] = min(e.started_wall_ns, began.get(e.session_key, e.started_wall_ns))
    sessions = sorted(began, key=lambda s: (-began[s], s))
    return set(sessions[: max(2, round(_VALIDATION_SHARE * len(sessions)))])


def _count_rare_profiles(wanted: set[str], train: Sequence[SplitEpisode]) -> dict[str, int]:
    have = Counter(e.profile for e in train)
    return {p: have[p] for p in sorted(wanted) if have[p] < MIN_EPISODES}


def _render_remedy(row: Recipe) -> str:
    places = {"host": "on other hosts", "sample group": "with other samples"}
    where = " and ".join(places[what] for what in row.held_out if what in places)
    return f" {where}" if where else ""


def _count_coverage(lab: Sequence[SplitEpisode], parts: Mapping[str, SplitPart]) -> tuple[FoldCoverage, ...]:
    counts: dict[tuple[str, str], Counter[SplitPart]] = defaultdict(Counter)
    for e in lab:
        counts[e.host_id, e.profile][parts[e.episode_id]] += 1
    return tuple(
        FoldCoverage(host_id=h, profile=p, **{str(part): c[part] for part in SplitPart})
        for (h, p), c in sorted(counts.items())
    )


def _find_untested_profiles(
    profiles: Sequence[str], lab: Sequence[SplitEpisode], test: Iterable[str]
) -> tuple[str, ...]:
    tested = set(test)
    return tuple(sorted(set(profiles) - {e.profile for e in lab if e.episode_id in tested}))


def _find_untested_phases(lab: Sequence[SplitEpisode], test: Iterable[str]) -> tuple[Phase, ...]:
    among = set(test)
    tested = {phase for e in lab if e.episode_id in among for phase in e.phases}
    return tuple(p for p in PHASES if p not in tested)


def _build_notes(row: Recipe, lab: Sequence[SplitEpisode]) -> tuple[str, ...]:
    if row.validation is not ValidationScheme.LAST:
        return ()
    days = (max(e.started_wall_ns for e in lab) - min(e.started_wall_ns for e in lab)) / _DAY_NS
    return (f"the store spans {days:.1f} days: no drift can be seen",) if days < DRIFT_DAYS else ()


def assign_random_windows(deal: RandomWindowSplit, windows: Iterable[tuple[str, int]]) -> list[SplitPart]:
    """Assign each window to a set by its hash (leaky; for the comparison of split protocols only).

    A window is in the test set of exactly one fold, and in a validation set of the fold before.

    Args:
        deal: The fold, and the number of folds.
        windows: Episode id and ``t_center_ns`` of each window.
    """
    return [_assign_random_window(deal, episode_id, t_center_ns) for episode_id, t_center_ns in windows]


def _assign_random_window(deal: RandomWindowSplit, episode_id: str, t_center_ns: int) -> SplitPart:
    digest = hashlib.sha256(f"random_windows|{episode_id}|{t_center_ns}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") % deal.of
    if place == deal.number:
        return SplitPart.TEST
    if place == (deal.number + 1) % deal.of:
        return SplitPart.VAL_A if digest[8] % 2 else SplitPart.VAL_B
    return SplitPart.TRAIN
