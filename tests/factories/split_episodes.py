"""Episodes as a split sees them, made of numbers alone."""

from __future__ import annotations

from phasewatch.splits import SplitEpisode
from phasewatch.types import PHASES, EpisodeRole, Phase

PROFILES = ("benign", "cryptomine", "exfil-drip")
GAP_NS = 1000 * 10**9  # from one session's start to the next's
LASTS_S = 100.0


def episode(
    number: int,
    host: str,
    profile: str = "benign",
    *,
    group: int = 0,
    session: str | None = None,
    role: EpisodeRole = EpisodeRole.LAB,
    plan_seed: int | None = None,
    sketch: tuple[int, ...] | None = None,
    phases: tuple[Phase, ...] = PHASES,
    started_ns: int | None = None,
) -> SplitEpisode:
    return SplitEpisode(
        episode_id=f"e{number:03}",
        host_id=host,
        profile=profile,
        sample_name=f"sample-{group}",
        sample_group=group,
        session=session or f"s{number:03}",
        role=role,
        agent=False,
        plan_seed=1000 + number if plan_seed is None else plan_seed,
        proc_sketch=tuple(range(100 * number, 100 * number + 8)) if sketch is None else sketch,
        started_wall_ns=number * GAP_NS if started_ns is None else started_ns,
        phases=phases,
        duration_s=LASTS_S,
    )


def corpus(hosts: int = 4, sessions: int = 12) -> list[SplitEpisode]:
    """Each session runs a benign machine beside a malicious one of the same sample group; hosts take turns."""
    made: list[SplitEpisode] = []
    for s in range(sessions):
        for h in range(hosts):
            began = (s * hosts + h) * GAP_NS
            for profile in ("benign", ("cryptomine", "exfil-drip")[s % 2]):
                made.append(
                    episode(len(made), f"host-{h}", profile, group=s // 2 % 4, session=f"h{h}s{s}", started_ns=began)
                )
    return made
