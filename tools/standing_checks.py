"""Standing checks of a corpus of laboratory version 2: what it has to hold, and what must not tell the phase.

Each check has a limit and a state. The counts are those that the campaign has to reach. The shortcuts are rules that
see no telemetry, or one channel that gave a phase away in lab-v1. `tools.datasheet` renders them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from phasewatch.audit.leakage import LeakageResult
from phasewatch.dataset.split_files import compute_sample_group
from phasewatch.lab.plan_checks import (
    MAX_CHANCE_DISTANCE,
    MAX_ELAPSED_TIME_F1,
    MIN_IDLE_SHARE,
    OUTLINE_SCORES,
    compute_auc,
    score_outlines,
)
from phasewatch.profiles import IDLE_SAMPLES
from phasewatch.profiles.malicious import ROUTINES
from phasewatch.types import BundleStatus, EpisodeRole, Phase
from phasewatch.validate.verdict import BundleVerdict
from tools.recordings import LAB_VERSION, MIN_WINDOWS, RecordedEpisode

__all__ = [
    "CheckState",
    "StandingCheck",
    "check_counts",
    "check_shortcuts",
    "count_mixed_routines",
    "render_checks",
]

ELAPSED_TIME_QUESTION = "phase-from-elapsed-time"
DNS_CHANNEL = "netflow.dns_queries"
MAX_DNS_DISTANCE = 0.25  # from an AUC of 0.5; it was 0.45 in lab-v1
N_DRAWS = 200  # of whole episodes, for the interval of a shortcut
_TAILS = (0.025, 0.975)
_SEED = 23


class CheckState(StrEnum):
    """The state of a check."""

    MET = "met"
    PART = "in part"  # a count that grows while the campaign is recorded
    OPEN = "open"  # outside the limit, but the limit is within the interval
    NOT_MET = "not met"
    NOT_ASKED = "not asked"


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingCheck:
    """One check.

    Attributes:
        value, limit: Rendered figure, and what is required.
        aim: What is aimed at; empty without one.
    """

    about: str
    value: str
    limit: str
    state: CheckState
    aim: str = ""


def _check_count(about: str, value: float, must: float, *, aim: float | None = None, unit: str = "") -> StandingCheck:
    """Return a check of a number that has to reach a limit."""
    digits = 1 if unit else 0
    return StandingCheck(
        about=about,
        value=f"{value:.{digits}f}{unit}",
        limit=f"at least {must:g}{unit}",
        state=CheckState.MET if value >= must else CheckState.PART,
        aim="" if aim is None else f"{aim:g}{unit}",
    )


def check_counts(verdicts: Sequence[BundleVerdict], episodes: Sequence[RecordedEpisode]) -> tuple[StandingCheck, ...]:
    """Check the contents against what the campaign has to reach.

    Args:
        verdicts: All bundles.
        episodes: The usable ones.
    """
    accepted = [e for e in episodes if e.verdict.status is BundleStatus.ACCEPTED]
    of_role = {role: [e for e in accepted if e.manifest.role == role] for role in EpisodeRole}
    lab, soak = of_role[EpisodeRole.LAB], of_role[EpisodeRole.SOAK]
    hosts = {e.verdict.host_id for e in lab}
    debian = {e.verdict.host_id for e in lab if e.image == "debian"}
    with_onset = [e for e in lab if any(phase is Phase.INFECTING for phase, _, _ in e.spans)]
    by_routine = Counter(e.manifest.recording.routine for e in with_onset if e.manifest.recording)
    rarest = min(by_routine[row.name] for row in ROUTINES)
    seen = {e.verdict.host_id for e in episodes}
    baselines = Counter(e.verdict.host_id for e in of_role[EpisodeRole.COMMISSION])
    soak_h = sum(e.manifest.duration_s for e in soak) / 3600
    kinds = {
        kind
        for e in soak
        for kind, _, _ in (e.manifest.recording.load if e.manifest.recording else ())
        if kind not in IDLE_SAMPLES
    }
    megabytes = sum(v.bytes for v in verdicts) / 1e6
    return (
        _check_count("accepted lab episodes", len(lab), 240, aim=384),
        _check_count("drawn shapes with lab episodes", len(hosts), 16, aim=24),
        _check_count("of them with the Debian guest", len(debian), 4),
        _check_count("lab episodes with an onset of infecting", len(with_onset), 100, aim=150),
        _check_count("infections by the rarest of all routines", rarest, 8),
        _check_count("baseline episodes on the shape with the fewest", min((baselines[h] for h in seen), default=0), 3),
        _check_count("VM-hours of soak", soak_h, 30, aim=80, unit=" h"),
        _check_count("benign kinds in soak", len(kinds), 40),
        _check_share("share of soak time that is idle", _compute_idle_share(soak), MIN_IDLE_SHARE),
        StandingCheck(
            about="size of all bundles",
            value=f"{megabytes:.1f} MB",
            limit="at most 40 MB",
            state=CheckState.MET if megabytes <= 40 else CheckState.NOT_MET,
        ),
    )


def _check_share(about: str, share: float | None, must: float) -> StandingCheck:
    state = CheckState.NOT_ASKED if share is None else CheckState.MET if share >= must else CheckState.NOT_MET
    value = "·" if share is None else f"{share:.2f}"
    return StandingCheck(about=about, value=value, limit=f"at least {must:.2f}", state=state)


def _compute_idle_share(episodes: Sequence[RecordedEpisode]) -> float | None:
    """Return the share of labelled windows in which no load runs; None without windows."""
    load = np.concatenate([np.zeros(0, "U64"), *(e.load[e.phase >= 0] for e in episodes)])
    return float((load == "idle").mean()) if len(load) else None


def check_shortcuts(episodes: Sequence[RecordedEpisode], leaks: Sequence[LeakageResult]) -> tuple[StandingCheck, ...]:
    """Check what time, loads, durations and DNS questions alone tell.

    Args:
        episodes: The usable episodes.
        leaks: Results of the leakage probes.
    """
    lab = [e for e in episodes if e.manifest.role == EpisodeRole.LAB]
    checks = [_check_elapsed_time(leaks)]
    outlines = [e.build_outline() for e in lab]
    point = score_outlines(outlines)
    drawn = [score_outlines([outlines[i] for i in at]) for at in _draw_episodes(len(lab))]
    for name, about in OUTLINE_SCORES.items():
        values = [score for one in drawn if (score := one[name]) is not None]
        checks.append(_check_area(about, point[name], values, MAX_CHANCE_DISTANCE))
    checks.append(_check_share("share of benign lab windows that are idle", _compute_idle_share(_benign(lab)), 0.25))
    checks.append(_check_dns(lab))
    mixed = count_mixed_routines(episodes)
    checks.append(
        StandingCheck(
            about="episodes whose infection routine belongs to another sample group",
            value=str(mixed),
            limit="0",
            state=CheckState.MET if mixed == 0 else CheckState.NOT_MET,
        )
    )
    return tuple(checks)


def _benign(episodes: Sequence[RecordedEpisode]) -> list[RecordedEpisode]:
    return [e for e in episodes if e.is_benign]


def count_mixed_routines(episodes: Sequence[RecordedEpisode]) -> int:
    """Count the episodes that were infected by a routine of another sample group than their sample's.

    Without any, a fold that holds out a sample group has trained on none of its routines.
    """
    group_of = {row.name: row.group for row in ROUTINES}
    return sum(
        group_of.get(recording.routine) != compute_sample_group(e.manifest.profile, e.manifest.sample_name)
        for e in episodes
        if (recording := e.manifest.recording) is not None and recording.routine is not None
    )


def _check_elapsed_time(leaks: Sequence[LeakageResult]) -> StandingCheck:
    most = MAX_ELAPSED_TIME_F1[LAB_VERSION]
    value = next((leak.value for leak in leaks if leak.name == ELAPSED_TIME_QUESTION), None)
    is_known = value is not None and np.isfinite(value)
    state = CheckState.NOT_ASKED
    if value is not None and is_known:
        state = CheckState.MET if value <= most else CheckState.NOT_MET
    return StandingCheck(
        about="macro-F1 of the phase from the time since the first label",
        value=f"{value:.2f}" if is_known else "·",
        limit=f"at most {most:.2f}",
        state=state,
    )


def _check_dns(lab: Sequence[RecordedEpisode]) -> StandingCheck:
    about = f"AUC of infecting against clean from `{DNS_CHANNEL}` alone"
    sides = [[_select_known(e, phase) for e in lab] for phase in (Phase.INFECTING, Phase.CLEAN)]
    point = _compute_area(sides, range(len(lab)))
    drawn = [area for at in _draw_episodes(len(lab)) if (area := _compute_area(sides, at)) is not None]
    return _check_area(about, point, drawn, MAX_DNS_DISTANCE)


def _select_known(e: RecordedEpisode, phase: Phase) -> np.ndarray:
    values = e.means[DNS_CHANNEL][e.phase == phase.code]
    return np.asarray(values[np.isfinite(values)], np.float64)


def _compute_area(sides: Sequence[Sequence[np.ndarray]], at: Sequence[int]) -> float | None:
    positive, negative = (np.concatenate([np.zeros(0), *(side[i] for i in at)]) for side in sides)
    return compute_auc(positive, negative) if min(len(positive), len(negative)) >= MIN_WINDOWS else None


def _check_area(about: str, value: float | None, drawn: Sequence[float], distance: float) -> StandingCheck:
    """Return a check of an area against chance; the interval is over whole episodes drawn again."""
    low, high = 0.5 - distance, 0.5 + distance
    limit = f"{low:.2f} to {high:.2f}"
    if value is None or not np.isfinite(value):
        return StandingCheck(about=about, value="·", limit=limit, state=CheckState.NOT_ASKED)
    begin, end = np.quantile(drawn, _TAILS) if drawn else (value, value)
    state = CheckState.MET
    if not low <= value <= high:
        state = CheckState.NOT_MET if begin > high or end < low else CheckState.OPEN
    return StandingCheck(about=about, value=f"{value:.2f} [{begin:.2f}, {end:.2f}]", limit=limit, state=state)


def _draw_episodes(n: int) -> list[list[int]]:
    rng = np.random.default_rng(_SEED)
    return [rng.integers(0, n, n).tolist() for _ in range(N_DRAWS)] if n else []


def render_checks(
    counts: Sequence[StandingCheck], shortcuts: Sequence[StandingCheck], table: Callable[[list[list[str]]], str]
) -> str:
    """Render both tables; what is not met is bold.

    Args:
        table: Renders rows, the head first.
    """
    body = [[c.about, c.value, c.limit, c.aim or "·", _render_state(c.state)] for c in counts]
    rows = [[c.about, c.value, c.limit, _render_state(c.state)] for c in shortcuts]
    about = (
        "*In part* is a count that the recordings have not reached yet. An area has the interval of whole episodes "
        "drawn again: *open* is a figure outside its limit whose interval reaches the limit. *Not asked*: too few "
        "windows or sessions."
    )
    return (
        f"### Standing checks\n\n{about}\n\n{table([['count', 'here', 'must', 'aim', 'state'], *body])}\n\n"
        f"{table([['shortcut', 'here', 'limit', 'state'], *rows])}"
    )


def _render_state(state: CheckState) -> str:
    return f"**{state}**" if state is CheckState.NOT_MET else str(state)
