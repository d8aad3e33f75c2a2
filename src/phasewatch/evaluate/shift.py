"""One model on watch: its alarms live through test and soak, each fold at the threshold that it was allowed to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.evaluate.alarms import Spans, outcome, watch
from phasewatch.evaluate.bootstrap import Floats
from phasewatch.evaluate.said import Board, Said
from phasewatch.models.alarm import BUDGET, choose_alarm
from phasewatch.models.filter import Track

BUDGETS = (0.25, 0.5, 1.0, 2.0, 3.0, 6.0)  # false alarms per VM-hour that an operator might allow
RECIPES = ("held_out_host", "held_out_both")  # in the second the benign kind is new too


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """What a bundle says of an episode beyond its windows: label spans, and the rates of `DAMAGE`, ``(n_bins, 4)``."""

    spans: Spans
    t0_ns: int
    rates: NDArray[np.floating]
    group: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """What was said under one recipe, threat model, table and filter: of the test sets, of validation B, of the soak."""

    test: Board
    val_b: Board | None
    soak: Board | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WatchedEpisode:
    """One episode as one model saw it."""

    id: str
    host_id: str
    session: str
    profile: str
    t_center_ns: NDArray[np.int64]
    y: NDArray[np.int64]
    probabilities: Floats
    spans: Spans

    @property
    def watched(self) -> tuple[Spans, NDArray[np.int64], Floats]:
        """What `alarms.watch` takes."""
        return self.spans, self.t_center_ns, self.probabilities


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lived:
    """What became of episodes, each at its fold's own thresholds: ``(E,)``, and ``(budgets, E)``."""

    episodes: tuple[WatchedEpisode, ...]
    onset_ns: NDArray[np.int64]
    exposure_s: Floats
    false_alarms: NDArray[np.int64]
    delay_s: Floats

    @property
    def begun(self) -> NDArray[np.bool_]:
        """Whether anything ran in each, ``(E,)``."""
        marked: NDArray[np.bool_] = self.onset_ns >= 0
        return marked

    @property
    def hours(self) -> float:
        """VM-hours in which a false alarm could have been raised."""
        return float(self.exposure_s.sum()) / 3600


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shift:
    """What one model with one seed would have been for an operator.

    Attributes:
        budgets: Those of the first axis of both; `BUDGET` is one of them.
        thresholds: Each fold's at `BUDGET`.
    """

    test: Lived
    soak: Lived
    budgets: tuple[float, ...]
    thresholds: tuple[float, ...]


def live_through(
    own: Sequence[Said],
    parts: Parts,
    recorded: Mapping[str, Recorded],
    agent: str | None,
    budgets: tuple[float, ...] = BUDGETS,
) -> Shift | str:
    """Set each fold's threshold by what it may see, then live through its test and its soak; or say why not."""
    tests, soaks, thresholds = [], [], []
    for said in own:
        hosts = set(said.shown.host_id)
        groups = {recorded[i].group for i in said.shown.episode_id if i in recorded}
        is_both = parts.test.recipe == "held_out_both"

        def is_near(
            e: WatchedEpisode, hosts: set[str] = hosts, groups: set[int] = groups, both: bool = is_both
        ) -> bool:
            return e.host_id in hosts and (not both or recorded[e.id].group in groups)

        def is_far(e: WatchedEpisode, hosts: set[str] = hosts, groups: set[int] = groups, both: bool = is_both) -> bool:
            return e.host_id not in hosts and not (both and recorded[e.id].group in groups)

        soak = _episodes(_same(parts.soak, said), recorded)
        heard = [*_episodes(_same(parts.val_b, said), recorded), *filter(is_far, soak)]
        if not heard:
            return f"fold {said.fold} has no validation B and no soak of other hosts to set a threshold by"
        at = _thresholds(heard, budgets)
        thresholds.append(at[budgets.index(BUDGET)])
        tests.append(_lived(_episodes(said, recorded, agent), at))
        soaks.append(_lived(list(filter(is_near, soak)), at))
    test = _joined(tests)
    if not test.episodes:
        return "no test episode has label spans in the grids"
    return Shift(test=test, soak=_joined(soaks), budgets=budgets, thresholds=tuple(thresholds))


def _thresholds(heard: Sequence[WatchedEpisode], budgets: Sequence[float]) -> tuple[float, ...]:
    """Choose the threshold of each budget as training does, from what a fold may hear."""
    track = Track(
        y=np.concatenate([e.y for e in heard]),
        of=np.repeat(np.arange(len(heard)), [len(e.y) for e in heard]),
        t_center_ns=np.concatenate([e.t_center_ns for e in heard]),
    )
    p = np.concatenate([e.probabilities for e in heard])
    return tuple(choose_alarm(p, track, budget=budget).theta for budget in budgets)


def _same(board: Board | None, said: Said) -> Said | None:
    """Find what the same cell said of another part."""
    key = (said.model, said.seed, said.fold)
    return next((s for s in (board.said if board else ()) if (s.model, s.seed, s.fold) == key), None)


def _episodes(said: Said | None, recorded: Mapping[str, Recorded], agent: str | None = None) -> list[WatchedEpisode]:
    if said is None:
        return []
    s = said.shown
    _, first, count = np.unique(s.episode_id.astype(str), return_index=True, return_counts=True)
    found = []
    for at, n in sorted(zip(first.tolist(), count.tolist(), strict=True)):
        known = recorded.get(s.episode_id[at])
        if known is None or not known.spans or agent not in (None, s.agent[at]):
            continue
        found.append(
            WatchedEpisode(
                id=s.episode_id[at], host_id=s.host_id[at], session=s.session[at], profile=s.profile[at],
                t_center_ns=s.t_center_ns[at : at + n], y=s.y_true[at : at + n], probabilities=said.answer.probabilities[at : at + n],
                spans=known.spans,
            )
        )  # fmt: skip
    return found


def _lived(episodes: Sequence[WatchedEpisode], thresholds: Sequence[float]) -> Lived:
    watched = watch([e.watched for e in episodes])
    found = outcome(watched, thresholds)
    return Lived(
        episodes=tuple(episodes), onset_ns=watched.onset_ns, exposure_s=watched.exposure_s,
        false_alarms=found.false_alarms, delay_s=found.delay_s,
    )  # fmt: skip


def _joined(parts: Sequence[Lived]) -> Lived:
    return Lived(
        episodes=tuple(e for part in parts for e in part.episodes),
        onset_ns=np.concatenate([p.onset_ns for p in parts]),
        exposure_s=np.concatenate([p.exposure_s for p in parts]),
        false_alarms=np.concatenate([p.false_alarms for p in parts], axis=1),
        delay_s=np.concatenate([p.delay_s for p in parts], axis=1),
    )
