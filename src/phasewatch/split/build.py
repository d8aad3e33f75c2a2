"""Episodes to folds: cut by the recipe, embargo what is too near the test, choose who validates, and prove it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from phasewatch.errors import SplitError
from phasewatch.split.aside import MIN_EPISODES, AsideCode, SetAside, find_odd, is_enough, set_aside
from phasewatch.split.claims import assert_fold, assert_partition
from phasewatch.split.fold import VERSION, Coverage, Deal, Fold, Part, SplitEpisode, digest_of
from phasewatch.split.near import NearDuplicates, near_duplicates
from phasewatch.split.recipes import Cut, Recipe, Validation, order_of_sitting, recipe_of
from phasewatch.vocab import PHASES, Phase, Role

VALIDATION_SHARE = 0.15  # of the other sessions, where no host can be spared (DESIGN section 7)
DRIFT_DAYS = 7  # a store that spans less shows no drift
_DAY_NS = 86_400 * 10**9

Sitting = tuple[str, str]  # session and host


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitInput:
    """The episodes that a split can use, compared with each other once for all recipes.

    Attributes:
        lab: Of role `lab` and of a known phase, in the order (host, episode).
        odd: Those that no recipe uses, by name.
    """

    lab: tuple[SplitEpisode, ...]
    odd: tuple[SetAside, ...]
    near: NearDuplicates


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeSplit:
    """The folds of a recipe, and the episodes that this recipe alone sets aside."""

    folds: tuple[Fold, ...]
    set_aside: tuple[SetAside, ...]


class _Untaught(Exception):
    """Some profiles are too rare in the train set of a fold; `these` are the episodes to blame, `words` the first fold's."""

    def __init__(self, these: Mapping[str, AsideCode], words: str) -> None:
        super().__init__(words)
        self.these, self.words = these, words


def build_folds(recipe: str, episodes: Iterable[SplitEpisode], *, profiles: Sequence[str]) -> tuple[Fold, ...]:
    """Cut episodes into the folds of a recipe; see `build_split`, which also names what was set aside."""
    return build_split(recipe, prepare(episodes), profiles=profiles).folds


def prepare(episodes: Iterable[SplitEpisode]) -> SplitInput:
    """Choose what can be split and find near-duplicates in it.

    Args:
        episodes: All episodes of the run in any order; those that are not `lab` or of no known phase are passed over.

    Raises:
        SplitError: If an episode stands twice.
    """
    lab = sorted((e for e in episodes if e.role is Role.LAB and e.phases), key=lambda e: (e.host_id, e.episode_id))
    if repeated := [i for i, n in Counter(e.episode_id for e in lab).items() if n > 1]:
        raise SplitError(f"episode {repeated[0]} stands twice; an episode is in exactly one set")
    odd = find_odd(lab)
    ids = {o.episode_id for o in odd}
    usable = join_neighbours([e for e in lab if e.episode_id not in ids])
    return SplitInput(lab=usable, odd=odd, near=near_duplicates(usable))


def join_neighbours(lab: Sequence[SplitEpisode]) -> tuple[SplitEpisode, ...]:
    """Join sessions of two hosts where their episodes name each other as neighbours.

    One side alone can claim to have run beside anything, so both must say it, and give the session the same name.
    """
    known = {e.episode_id: e for e in lab}
    leader: dict[Sitting, Sitting] = {e.sitting: e.sitting for e in lab}

    def find(sitting: Sitting) -> Sitting:
        while leader[sitting] != sitting:
            leader[sitting] = sitting = leader[leader[sitting]]
        return sitting

    for e in lab:
        for other in (known[i] for i in e.neighbours if i in known):
            if other.session == e.session and e.episode_id in other.neighbours:
                first, second = sorted((find(e.sitting), find(other.sitting)))
                leader[second] = first
    return tuple(replace(e, side_by_side=find(e.sitting)[1]) for e in lab)


def build_split(recipe: str, given: SplitInput, *, profiles: Sequence[str]) -> RecipeSplit:
    """Cut episodes into the folds of a recipe.

    An episode that would keep a fold from being built is set aside for this recipe, and the recipe is built without it,
    as long as that leaves benign episodes and half of the hosts on which anything malicious ran.

    Args:
        recipe: A name of RECIPES.
        given: What `prepare` chose.
        profiles: All profiles that are registered; those without a test episode are named in each fold.

    Raises:
        SplitError: If the recipe cannot be built; it says which profile, host or session is missing.
    """
    row, lab = recipe_of(recipe), given.lab
    aside: dict[str, AsideCode] = {}
    while True:
        kept = [e for e in lab if e.episode_id not in aside]
        if not kept:
            words = f" besides {len(given.odd)} that are set aside" if given.odd else ""
            raise SplitError(
                f"{recipe}: there is no lab episode of known phase{words}; record some with `phasewatch record`"
            )
        try:
            folds = _build(row, kept, given.near, profiles)
        except _Untaught as untaught:
            aside |= untaught.these
            if not untaught.these or not is_enough(lab, aside):
                raise SplitError(untaught.words) from None
        else:
            named = [
                replace(set_aside(e, aside[e.episode_id]), recipes=(recipe,)) for e in lab if e.episode_id in aside
            ]
            return RecipeSplit(folds=folds, set_aside=tuple(sorted(named)))


def _build(row: Recipe, lab: Sequence[SplitEpisode], near: NearDuplicates, profiles: Sequence[str]) -> tuple[Fold, ...]:
    cuts = row.cut(lab)
    if row.by_window:
        return tuple(_deal_fold(row, cut, Deal(number=i, of=len(cuts)), lab, profiles) for i, cut in enumerate(cuts))
    whole = assert_partition(row, cuts, lab)
    maker = _Maker(row=row, lab=lab, near=near, profiles=profiles, whole=whole)
    folds: list[Fold] = []
    blamed: dict[str, AsideCode] = {}
    words = ""
    for cut in cuts:
        try:
            folds.append(maker.make(cut))
        except _Untaught as untaught:
            blamed |= untaught.these
            words = words or untaught.words
    if words:
        raise _Untaught(blamed, words)
    return tuple(folds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """Makes the folds of one recipe over the same episodes."""

    row: Recipe
    lab: Sequence[SplitEpisode]
    near: NearDuplicates
    profiles: Sequence[str]
    whole: tuple[str, ...]

    def make(self, cut: Cut) -> Fold:
        row, lab = self.row, self.lab
        embargoed, twins = _embargo(cut, lab, self.near)
        out = {*cut.test, *embargoed, *cut.excluded}
        rest = [e for e in lab if e.episode_id not in out]
        wanted = {e.profile for e in lab} - cut.untaught
        validation, chosen = self._choose(cut, rest, wanted)
        if len(chosen) < 2:
            raise SplitError(
                f"{row.name}, fold {cut.fold}: validation needs 2 sessions outside the test set and found {len(chosen)}; "
                "record more sessions"
            )
        half_a = set(sorted(chosen, key=lambda s: order_of_sitting("half", s))[::2])
        parts = (
            dict.fromkeys(cut.excluded, Part.EXCLUDED)
            | dict.fromkeys(embargoed, Part.EMBARGOED)
            | dict.fromkeys(cut.test, Part.TEST)
        )
        for e in rest:
            parts[e.episode_id] = (
                Part.TRAIN if e.sitting not in chosen else Part.VAL_A if e.sitting in half_a else Part.VAL_B
            )
        if lacking := _lacking(wanted, [e for e in rest if parts[e.episode_id] is Part.TRAIN]):
            words = ", ".join(f"{p} has {n}" for p, n in lacking.items())
            raise _Untaught(
                _to_blame(lab, lacking, twins),
                f"{row.name}, fold {cut.fold}: each profile needs {MIN_EPISODES} episodes in train, but {words}; "
                f"record more episodes of them{_elsewhere(row)}",
            )
        return _seal(
            Fold(
                version=VERSION,
                recipe=row.name,
                fold=cut.fold,
                leaky=row.leaky,
                validation=validation,
                episodes=dict(sorted(parts.items())),
                embargoed=embargoed,
                excluded={i: why for i, why in cut.excluded.items() if i not in embargoed},
                coverage=_coverage(lab, parts),
                untested_profiles=_untested_profiles(self.profiles, lab, cut.test),
                untested_phases=_untested_phases(lab, cut.test),
                asserted=(*assert_fold(row, lab, parts, validation), *self.whole),
                notes=_notes(row, lab),
                sha256="",
            )
        )

    def _choose(self, cut: Cut, rest: Sequence[SplitEpisode], wanted: set[str]) -> tuple[str, set[Sitting]]:
        """Return who validates, and their sessions."""
        if self.row.validation is Validation.FOLD:
            return "fold", {e.sitting for e in rest if e.episode_id in cut.next}
        if self.row.validation is Validation.LAST:
            return "last", _last_sessions(rest)
        if self.row.validation is Validation.HOST:
            spared = _next_host({e.host_id for e in self.lab if e.episode_id in cut.test}, rest)
            its_sessions = {e.sitting for e in rest if e.host_id == spared}
            # With few hosts or runs it may be all that could teach a profile; then sessions validate.
            if len(its_sessions) >= 2 and not _lacking(wanted, [e for e in rest if e.host_id != spared]):
                return f"host:{spared}", its_sessions
        return "sessions", _share_of_sessions(rest)


def _deal_fold(row: Recipe, cut: Cut, deal: Deal, lab: Sequence[SplitEpisode], profiles: Sequence[str]) -> Fold:
    parts = {e.episode_id: Part.DEALT for e in lab}
    return _seal(
        Fold(
            version=VERSION,
            recipe=row.name,
            fold=cut.fold,
            leaky=row.leaky,
            validation="windows",
            episodes=parts,
            embargoed={},
            coverage=_coverage(lab, parts),
            untested_profiles=_untested_profiles(profiles, lab, parts),
            untested_phases=_untested_phases(lab, parts),
            asserted=("every window is in exactly one set", "over the folds each window is tested exactly once"),
            deal=deal,
            notes=("leaky: windows of one episode are learnt from and tested; never a headline",),
            sha256="",
        )
    )


def _seal(fold: Fold) -> Fold:
    return replace(fold, sha256=digest_of(fold))


def _embargo(cut: Cut, lab: Sequence[SplitEpisode], near: NearDuplicates) -> tuple[dict[str, str], Mapping[str, str]]:
    """Return why each episode that the recipe would let be learnt from stands too near to the test set.

    Also returns the near-duplicate in the test set of those that have one.
    """
    tested = {e.sitting for e in lab if e.episode_id in cut.test}
    others = [e for e in lab if e.episode_id not in cut.test and e.episode_id not in cut.excluded]
    twins = near.find_twins([e.episode_id for e in others if e.sitting not in tested], cut.test)
    why: dict[str, str] = {}
    for e in others:
        if e.sitting in tested:
            why[e.episode_id] = f"shares session {e.session} with the test set"
        elif e.episode_id in twins:
            why[e.episode_id] = f"near-duplicate of {twins[e.episode_id]} in the test set"
    return why, twins


def _to_blame(
    lab: Sequence[SplitEpisode], lacking: Mapping[str, int], twins: Mapping[str, str]
) -> dict[str, AsideCode]:
    """Return the episodes without which no profile is lacking: copies on another host in the test set, else the profile's.

    A profile that only lacks because another host's test set holds copies of it is not to blame.
    """
    of = {e.episode_id: e for e in lab}
    blamed: dict[str, AsideCode] = {}
    for profile in lacking:
        copied = {twin for i, twin in twins.items() if of[i].profile == profile and of[twin].host_id != of[i].host_id}
        if copied:
            blamed |= dict.fromkeys(copied, AsideCode.COPY)
        else:
            blamed |= {e.episode_id: AsideCode.NOT_IN_TRAIN for e in lab if e.profile == profile}
    return blamed


def _next_host(tested: set[str], rest: Sequence[SplitEpisode]) -> str | None:
    """Return the host after the tested one in sorted order, round the end; None when there is no other.

    A host of a single session cannot validate: it is passed over, unless all are.
    """
    sessions = {h: len({e.sitting for e in rest if e.host_id == h}) for h in {e.host_id for e in rest} - tested}
    others = sorted(h for h, n in sessions.items() if n >= 2) or sorted(sessions)
    if not others:
        return None
    return next((h for h in others if h > max(tested)), others[0])


def _share_of_sessions(rest: Sequence[SplitEpisode]) -> set[Sitting]:
    """Choose 15 % of the sessions by hash, at least one for each half."""
    sessions = sorted({e.sitting for e in rest}, key=lambda s: order_of_sitting("validation", s))
    return set(sessions[: max(2, round(VALIDATION_SHARE * len(sessions)))])


def _last_sessions(rest: Sequence[SplitEpisode]) -> set[Sitting]:
    """Choose the 15 % of the sessions that began last, at least one for each half."""
    began: dict[Sitting, int] = {}
    for e in rest:
        began[e.sitting] = min(e.started_wall_ns, began.get(e.sitting, e.started_wall_ns))
    sessions = sorted(began, key=lambda s: (-began[s], s))
    return set(sessions[: max(2, round(VALIDATION_SHARE * len(sessions)))])


def _lacking(wanted: set[str], train: Sequence[SplitEpisode]) -> dict[str, int]:
    have = Counter(e.profile for e in train)
    return {p: have[p] for p in sorted(wanted) if have[p] < MIN_EPISODES}


def _elsewhere(row: Recipe) -> str:
    places = {"host": "on other hosts", "sample group": "with other samples"}
    where = " and ".join(places[what] for what in row.apart if what in places)
    return f" {where}" if where else ""


def _coverage(lab: Sequence[SplitEpisode], parts: Mapping[str, Part]) -> tuple[Coverage, ...]:
    counts: dict[tuple[str, str], Counter[Part]] = defaultdict(Counter)
    for e in lab:
        counts[e.host_id, e.profile][parts[e.episode_id]] += 1
    return tuple(
        Coverage(host_id=h, profile=p, **{str(part): c[part] for part in Part}) for (h, p), c in sorted(counts.items())
    )


def _untested_profiles(profiles: Sequence[str], lab: Sequence[SplitEpisode], test: Iterable[str]) -> tuple[str, ...]:
    tested = set(test)
    return tuple(sorted(set(profiles) - {e.profile for e in lab if e.episode_id in tested}))


def _untested_phases(lab: Sequence[SplitEpisode], test: Iterable[str]) -> tuple[Phase, ...]:
    among = set(test)
    tested = {phase for e in lab if e.episode_id in among for phase in e.phases}
    return tuple(p for p in PHASES if p not in tested)


def _notes(row: Recipe, lab: Sequence[SplitEpisode]) -> tuple[str, ...]:
    if row.validation is not Validation.LAST:
        return ()
    days = (max(e.started_wall_ns for e in lab) - min(e.started_wall_ns for e in lab)) / _DAY_NS
    return (f"the store spans {days:.1f} days: no drift can be seen",) if days < DRIFT_DAYS else ()
