"""Test windows become what pictures show of them: the episodes worth looking at, where they ran, their origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.report.evidence import PLACE, Bundles, Predictions
from phasewatch.report.figures import Window
from phasewatch.vocab import BIN_NS, STRIDE_BINS, WINDOW_BINS

STRIDE_S = STRIDE_BINS * BIN_NS / 1e9
HALF_WINDOW_S = WINDOW_BINS * BIN_NS / 2e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One episode chosen for a ribbon."""

    rank: str
    episode_id: str
    host_id: str
    profile: str
    sample_name: str
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """The test windows behind the headline: one model, its first seed, agent off where such episodes exist."""

    predictions: Predictions
    at: NDArray[np.intp]
    seed: int
    agent_off: bool

    def count_by(self) -> dict[tuple[str, str], int]:
        """Count episodes of each (host, profile)."""
        p = self.predictions
        return dict(
            Counter((h, prof) for h, prof, _ in {(p.host_id[i], p.profile[i], p.episode_id[i]) for i in self.at})
        )


def scored(predictions: Predictions, model: str) -> Scored | None:
    """Take the windows that the headline rests on, or None where the model has none."""
    of_model = np.asarray([m == model for m in predictions.model], np.bool_)
    if not of_model.any():
        return None
    seeds = np.unique(predictions.seed[of_model])
    first = of_model & (predictions.seed == seeds[0])
    off = first & np.asarray([a == PLACE.agent for a in predictions.agent], np.bool_)
    chosen = off if off.any() else first
    return Scored(
        predictions=predictions,
        at=np.flatnonzero(chosen),
        seed=int(seeds[0]),
        agent_off=bool(off.any()),
    )


def chosen_episodes(of: Scored) -> tuple[Shown, ...]:
    """Choose the best, the median and the worst episode by windows right, of those whose phase changes if there are three.

    An episode that is clean from end to end shows little; of two or one only what there is.
    """
    p = of.predictions
    by_episode: dict[str, list[int]] = {}
    for i in of.at:
        by_episode.setdefault(p.episode_id[i], []).append(int(i))
    moving = {e: rows for e, rows in by_episode.items() if len({int(p.y_true[i]) for i in rows}) > 1}
    by_episode = moving if len(moving) >= 3 else by_episode
    ranked = sorted(by_episode, key=lambda e: (-float(np.mean(p.y_true[by_episode[e]] == p.y_pred[by_episode[e]])), e))
    places = {0: "only"} if len(ranked) == 1 else {0: "best", len(ranked) // 2: "median", len(ranked) - 1: "worst"}
    if len(ranked) == 2:
        places = {0: "better of two", 1: "worse of two"}
    return tuple(_shown(of, ranked[k], by_episode[ranked[k]], rank) for k, rank in sorted(places.items()))


def origin_words(of: Scored | None, bundles: Bundles | None) -> str:
    """Say whether the numbers come from real machines: of the test episodes, else of all usable bundles."""
    found: Sequence[tuple[str, int]] = ()
    if of is not None:
        pairs = {(of.predictions.origin[i], of.predictions.episode_id[i]) for i in of.at}
        found = sorted(Counter(origin for origin, _ in pairs).items())
    elif bundles is not None:
        found = bundles.by_origin
    if not found:
        return "origin unknown"
    if len(found) == 1:
        return found[0][0] or "origin unknown"
    return " + ".join(f"{n} {origin or 'of unknown origin'}" for origin, n in found)


def _shown(of: Scored, episode_id: str, rows: Sequence[int], rank: str) -> Shown:
    p = of.predictions
    ordered = sorted(rows, key=lambda i: int(p.t_center_ns[i]))
    start_ns = int(p.t_center_ns[ordered[0]])
    return Shown(
        rank=rank,
        episode_id=episode_id,
        host_id=p.host_id[ordered[0]],
        profile=p.profile[ordered[0]],
        sample_name=p.sample_name[ordered[0]],
        windows=tuple(
            Window(
                t_s=(int(p.t_center_ns[i]) - start_ns) / 1e9 + HALF_WINDOW_S,
                truth=int(p.y_true[i]),
                decided=int(p.y_pred[i]),
                p=tuple(float(v) for v in p.p[i]),
            )
            for i in ordered
        ),
    )
