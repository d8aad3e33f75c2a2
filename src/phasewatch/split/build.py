"""Episodes to folds: cut by the recipe, embargo what is too near the test, choose who validates, and prove it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from phasewatch.errors import SplitError
from phasewatch.split.claims import MIN_EPISODES, assert_fold, assert_partition
from phasewatch.split.fold import VERSION, Coverage, Deal, Fold, Part, SplitEpisode, digest_of
from phasewatch.split.recipes import Cut, Recipe, Validation, order_of, recipe_of
from phasewatch.vocab import PHASES, Phase, Role

VALIDATION_SHARE = 0.15  # of the other sessions, where no host can be spared (DESIGN section 7)
DRIFT_DAYS = 7  # a store that spans less shows no drift
_DAY_NS = 86_400 * 10**9


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
    if not lab:
        raise SplitError(f"{recipe}: there is no lab episode of known phase; record some with `phasewatch record`")
    if repeated := [i for i, n in Counter(e.episode_id for e in lab).items() if n > 1]:
        raise SplitError(f"{recipe}: episode {repeated[0]} stands twice; an episode is in exactly one set")
    cuts = row.cut(lab)
    if row.by_window:
        return tuple(_deal_fold(row, cut, Deal(number=i, of=len(cuts)), lab, profiles) for i, cut in enumerate(cuts))
    whole = assert_partition(row, cuts, lab)
    maker = _Maker(row=row, lab=lab, near=near_duplicates(lab), profiles=profiles, whole=whole)
    return tuple(maker.make(cut) for cut in cuts)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """Makes the folds of one recipe over the same episodes."""

    row: Recipe
    lab: Sequence[SplitEpisode]
    near: Mapping[str, frozenset[str]]
    profiles: Sequence[str]
    whole: tuple[str, ...]

    def make(self, cut: Cut) -> Fold:
        row, lab = self.row, self.lab
        embargoed = _embargo(cut, lab, self.near)
        out = {*cut.test, *embargoed, *cut.excluded}
        rest = [e for e in lab if e.episode_id not in out]
        wanted = {e.profile for e in lab} - cut.untaught
        validation, chosen = self._choose(cut, rest, wanted)
        if len(chosen) < 2:
            raise SplitError(
                f"{row.name}, fold {cut.fold}: validation needs 2 sessions outside the test set and found {len(chosen)}; "
                "record more sessions"
            )
        half_a = set(sorted(chosen, key=lambda s: order_of("half", s))[::2])
        parts = (
            dict.fromkeys(cut.excluded, Part.EXCLUDED)
            | dict.fromkeys(embargoed, Part.EMBARGOED)
            | dict.fromkeys(cut.test, Part.TEST)
        )
        for e in rest:
            parts[e.episode_id] = (
                Part.TRAIN if e.session not in chosen else Part.VAL_A if e.session in half_a else Part.VAL_B
            )
        if lacking := _lacking(wanted, [e for e in rest if parts[e.episode_id] is Part.TRAIN]):
            words = ", ".join(f"{p} has {n}" for p, n in lacking.items())
            raise SplitError(
                f"{row.name}, fold {cut.fold}: each profile needs {MIN_EPISODES} episodes in train, but {words}; "
                f"record more episodes of them{_elsewhere(row)}"
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

    def _choose(self, cut: Cut, rest: Sequence[SplitEpisode], wanted: set[str]) -> tuple[str, set[str]]:
        """Say who validates, and give their sessions."""
        if self.row.validation is Validation.FOLD:
            return "fold", {e.session for e in rest if e.episode_id in cut.next}
        if self.row.validation is Validation.LAST:
            return "last", _last_sessions(rest)
        if self.row.validation is Validation.HOST:
            spared = _next_host({e.host_id for e in self.lab if e.episode_id in cut.test}, rest)
            its_sessions = {e.session for e in rest if e.host_id == spared}
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


def _embargo(cut: Cut, lab: Sequence[SplitEpisode], near: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Say of each episode that the recipe would let be learnt from and that stands too near to the test set, why."""
    tested_sessions = {e.session for e in lab if e.episode_id in cut.test}
    why: dict[str, str] = {}
    for e in lab:
        if e.episode_id in cut.test or e.episode_id in cut.excluded:
            continue
        if e.session in tested_sessions:
            why[e.episode_id] = f"shares session {e.session} with the test set"
        elif twins := near.get(e.episode_id, frozenset()) & cut.test:
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
    sessions = sorted({e.session for e in rest}, key=lambda s: order_of("validation", s))
    return set(sessions[: max(2, round(VALIDATION_SHARE * len(sessions)))])


def _last_sessions(rest: Sequence[SplitEpisode]) -> set[str]:
    """Choose the 15 % of the sessions that began last, at least one for each half."""
    began: dict[str, int] = {}
    for e in rest:
        began[e.session] = min(e.started_wall_ns, began.get(e.session, e.started_wall_ns))
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
