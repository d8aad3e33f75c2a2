"""Checks of a plan before anything is recorded: what elapsed time, a running load and durations alone would tell.

Each baseline is a classifier that sees nothing of the machine. It is scored on simulated episodes of the plan, so the
score is a property of the plan and not of the few episodes that were drawn. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import PlanError
from phasewatch.lab.plan import PhaseWalk, PlanSpec, RecordingSession, build_rng, draw_phases
from phasewatch.lab.walks import LoadSpan, draw_load_walk
from phasewatch.profiles import IDLE_SAMPLE, draw_episode_length
from phasewatch.types import BENIGN_PROFILE, PHASES, STRIDE_S, WINDOW_S, EpisodeRole, Phase

__all__ = [
    "MAX_CHANCE_DISTANCE",
    "MAX_ELAPSED_TIME_F1",
    "MIN_IDLE_SHARE",
    "OUTLINE_SCORES",
    "EpisodeOutline",
    "PlanBaseline",
    "PlanBaselines",
    "check_plan",
    "compute_auc",
    "compute_elapsed_time_f1",
    "compute_plan_baselines",
    "compute_window_phases",
    "estimate_elapsed_time_f1",
    "refuse_leaky_plan",
    "score_outlines",
]

# Above it, elapsed time alone predicts the phase too well; by version of the laboratory.
MAX_ELAPSED_TIME_F1 = {1: 0.25, 2: 0.30}
MAX_CHANCE_DISTANCE = 0.05  # from an AUC of 0.5, for the load and for durations
MIN_IDLE_SHARE = 0.25  # of benign time
_N_SIMULATED_EPISODES = 1500  # for learning, and as many for scoring
_SMOOTHING_WINDOWS = 1  # neighbouring windows on either side that are averaged
_ANY_LOAD = "load"


def compute_window_phases(walk: PhaseWalk) -> NDArray[np.int64]:
    """Compute the phase of each 10 s window with a stride of 5 s.

    Returns:
        ``(n,)`` int64 phase codes: the phase with the largest share of the window; ties go to the later phase.
    """
    ends = np.cumsum([seconds for _, seconds in walk])
    starts = ends - [seconds for _, seconds in walk]
    count = int((ends[-1] - WINDOW_S) // STRIDE_S) + 1 if ends[-1] >= WINDOW_S else 0
    begins = np.arange(count)[:, None] * STRIDE_S
    inside = np.clip(np.minimum(ends, begins + WINDOW_S) - np.maximum(starts, begins), 0, None)
    codes = np.array([phase.code for phase, _ in walk])
    share = np.stack([inside[:, codes == code].sum(axis=1) for code in range(len(PHASES))], axis=1).round(6)
    last = np.stack(
        [np.where((inside > 0) & (codes == code), starts, -1.0).max(axis=1) for code in range(len(PHASES))], axis=1
    )
    return np.lexsort((last, share), axis=1)[:, -1]


def compute_elapsed_time_f1(draw: Callable[[np.random.Generator], PhaseWalk], rng: np.random.Generator) -> float:
    """Score a classifier that knows only the time since the first label.

    Args:
        draw: Draws the phases of one episode.
        rng: Random numbers for all draws.

    Returns:
        Macro-F1 over the five phases on unseen walks, the higher of plain and class-balanced voting.
    """
    train = [compute_window_phases(draw(rng)) for _ in range(_N_SIMULATED_EPISODES)]
    test = [compute_window_phases(draw(rng)) for _ in range(_N_SIMULATED_EPISODES)]
    length = max(len(codes) for codes in train + test)
    votes = np.zeros((length + 2 * _SMOOTHING_WINDOWS, len(PHASES)))
    for codes in train:
        votes[_SMOOTHING_WINDOWS + np.arange(len(codes)), codes] += 1
    smooth = np.stack([votes[shift : shift + length] for shift in range(2 * _SMOOTHING_WINDOWS + 1)]).sum(axis=0)
    truth = np.concatenate(test)
    window = np.concatenate([np.arange(len(codes)) for codes in test])
    balanced = smooth / np.maximum(smooth.sum(axis=0), 1)
    return max(_compute_macro_f1(truth, table.argmax(axis=1)[window]) for table in (smooth, balanced))


def _compute_macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    scores = []
    for code in range(len(PHASES)):
        n_correct = int(((truth == code) & (predicted == code)).sum())
        n_both = int((truth == code).sum() + (predicted == code).sum())
        scores.append(2 * n_correct / n_both if n_both else 0.0)
    return float(np.mean(scores))


def estimate_elapsed_time_f1(spec: PlanSpec, seed: int = 0) -> float:
    """Estimate the macro-F1 of a classifier that knows only elapsed time, from 1500 + 1500 simulated episodes."""
    return compute_elapsed_time_f1(partial(_draw_episode_phases, spec), build_rng(seed, "elapsed time"))


def _draw_episode_phases(spec: PlanSpec, rng: np.random.Generator) -> PhaseWalk:
    """Draw the phases of a lab episode, benign with the plan's benign share."""
    length_s = draw_episode_length(rng, between_s=spec.episode_s)
    return ((Phase.CLEAN, length_s),) if rng.random() < spec.benign_share else draw_phases(spec, rng, length_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBaseline:
    """The score of one baseline.

    Attributes:
        name: Key of the baseline.
        about: What the baseline knows and what it has to tell apart.
        value: Its score on simulated episodes of the plan.
        drawn: Its score on the episodes that the plan drew; None where they do not suffice.
        low, high: Accepted interval of `value`.
    """

    name: str
    about: str
    value: float
    drawn: float | None
    low: float
    high: float

    @property
    def is_accepted(self) -> bool:
        """Whether the score is within its limits."""
        return self.low <= self.value <= self.high


PlanBaselines = tuple[PlanBaseline, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeOutline:
    """Phases and loads of one episode, without anything that a machine would show.

    Attributes:
        phases: Phases and their seconds, in order.
        loads: Loads and idle spans, in order.
        is_benign: Whether no malware runs.
    """

    phases: PhaseWalk
    loads: tuple[LoadSpan, ...]
    is_benign: bool


def compute_auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float | None:
    """Compute the area under the ROC curve of scores, ties counted half.

    Args:
        positive, negative: ``(n,)`` and ``(m,)`` float64 scores.

    Returns:
        The area; None if a side is empty. Source: Mann-Whitney U.
    """
    if not len(positive) or not len(negative):
        return None
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left")
    up_to = np.searchsorted(ordered, positive, "right")
    return float((below + up_to).sum() / 2 / len(positive) / len(negative))


# Name → what the score of a rule that sees no telemetry means.
OUTLINE_SCORES = {
    "load_armed": "AUC of armed against clean from whether a load runs",
    "load_dormant": "AUC of dormant against clean from whether a load runs",
    "duration": "AUC of active against busy benign from how long it has lasted",
    "whole_duration": "AUC of active against busy benign from how long it lasts",
}


def score_outlines(outlines: Sequence[EpisodeOutline]) -> dict[str, float | None]:
    """Score rules that know only loads or durations on episodes, by name (`OUTLINE_SCORES`).

    Returns:
        Areas under the ROC curve; None where the episodes lack one of the two sides.
    """
    return {
        "load_armed": _score_load(Phase.ARMED, outlines),
        "load_dormant": _score_load(Phase.DORMANT, outlines),
        "duration": _score_duration(outlines),
        "whole_duration": _score_whole_duration(outlines),
    }


def compute_plan_baselines(
    spec: PlanSpec, sessions: Sequence[RecordingSession] = (), *, seed: int = 0
) -> PlanBaselines:
    """Score the baselines of a plan.

    Args:
        spec: The plan; version 1 has only the baseline of elapsed time.
        sessions: Its sessions, for the scores on the episodes that it drew.
        seed: Seed of the simulation.
    """
    elapsed = PlanBaseline(
        name="elapsed_time",
        about="macro-F1 of the phase from the time since the first label",
        value=estimate_elapsed_time_f1(spec, seed),
        drawn=None,
        low=0.0,
        high=MAX_ELAPSED_TIME_F1[spec.workloads],
    )
    if spec.workloads < 2:
        return (elapsed,)
    rng = build_rng(seed, "baselines")
    simulated = [_draw_outline(spec, rng) for _ in range(_N_SIMULATED_EPISODES)]
    drawn = [
        EpisodeOutline(phases=slot.phases, loads=slot.loads, is_benign=slot.profile == BENIGN_PROFILE)
        for session in sessions
        for slot in session.slots
        if slot.role is EpisodeRole.LAB
    ]
    rows = [elapsed]
    near = {"low": 0.5 - MAX_CHANCE_DISTANCE, "high": 0.5 + MAX_CHANCE_DISTANCE}
    drawn_scores = score_outlines(drawn)
    for name, value in score_outlines(simulated).items():
        if value is not None:
            about = OUTLINE_SCORES[name]
            rows.append(PlanBaseline(name=name, about=about, value=value, drawn=drawn_scores[name], **near))
    rows.append(
        PlanBaseline(
            name="idle_share",
            about="share of benign time that is idle",
            value=_compute_idle_share(simulated),
            drawn=_compute_idle_share(drawn) if any(each.is_benign for each in drawn) else None,
            low=MIN_IDLE_SHARE,
            high=1.0,
        )
    )
    return tuple(rows)


def check_plan(
    spec: PlanSpec, sessions: Sequence[RecordingSession] = (), *, seed: int = 0, force: bool = False
) -> PlanBaselines:
    """Return the baselines of a plan, and refuse a plan above a limit.

    Raises:
        PlanError: If a baseline is outside its limits, unless forced.
    """
    rows = compute_plan_baselines(spec, sessions, seed=seed)
    if not force:
        refuse_leaky_plan(spec, rows)
    return rows


def refuse_leaky_plan(spec: PlanSpec, baselines: PlanBaselines) -> None:
    """Raise PlanError if a baseline of a plan is outside its limits; the message names the first."""
    for row in baselines:
        if not row.is_accepted:
            remedy = (
                "Leave out `order`, vary phase_s" if row.name == "elapsed_time" else "Change busy_share, idle_share"
            )
            raise PlanError(
                f"plan {spec.name}: {row.about} is {row.value:.2f}, accepted are {row.low:.2f} to {row.high:.2f}. "
                f"{remedy}, or record it with --force"
            )


def _draw_outline(spec: PlanSpec, rng: np.random.Generator) -> EpisodeOutline:
    """Draw an episode as the plan does: benign or not, then the same coin and the same walk of loads for both."""
    length_s = draw_episode_length(rng, between_s=spec.episode_s)
    is_benign = bool(rng.random() < spec.benign_share)
    phases = ((Phase.CLEAN, length_s),) if is_benign else draw_phases(spec, rng, length_s)
    loads: tuple[LoadSpan, ...] = (LoadSpan(kind=IDLE_SAMPLE, start_s=0.0, end_s=length_s),)
    if rng.random() < spec.busy_share:
        loads = draw_load_walk(
            rng,
            length_s=length_s,
            between_s=spec.phase_s,
            idle_share=spec.idle_share,
            idle_kind=IDLE_SAMPLE,
            choose_kind=lambda: _ANY_LOAD,
            draw_knobs=lambda kind: (),
        )
    return EpisodeOutline(phases=phases, loads=loads, is_benign=is_benign)


def _list_window_starts(length_s: float) -> NDArray[np.float64]:
    count = int((length_s - WINDOW_S) // STRIDE_S) + 1 if length_s >= WINDOW_S else 0
    return np.asarray(np.arange(count) * STRIDE_S, np.float64)


def _compute_load_share(outline: EpisodeOutline) -> NDArray[np.float64]:
    """Compute the share of each window during which a load runs: ``(n,)`` float64."""
    starts = _list_window_starts(sum(seconds for _, seconds in outline.phases))
    share = np.zeros(len(starts))
    for span in outline.loads:
        if not span.is_idle:
            share += np.clip(np.minimum(span.end_s, starts + WINDOW_S) - np.maximum(span.start_s, starts), 0, None)
    return np.asarray(share / WINDOW_S, np.float64)


def _score_load(phase: Phase, outlines: Iterable[EpisodeOutline]) -> float | None:
    """Score a rule that knows only how much load runs: the AUC of a phase against clean."""
    scores: dict[bool, list[NDArray[np.float64]]] = {True: [np.zeros(0)], False: [np.zeros(0)]}
    for outline in outlines:
        share, codes = _compute_load_share(outline), compute_window_phases(outline.phases)
        scores[True].append(share[codes == phase.code])
        scores[False].append(share[codes == Phase.CLEAN.code])
    return compute_auc(np.concatenate(scores[True]), np.concatenate(scores[False]))


def _list_busy_intervals(outlines: Iterable[EpisodeOutline]) -> dict[bool, list[tuple[float, float]]]:
    """Return (start, end) of active phases under True, and of loads in benign episodes under False, in seconds."""
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for outline in outlines:
        if outline.is_benign:
            found[False] += [(span.start_s, span.end_s) for span in outline.loads if not span.is_idle]
            continue
        at_s = 0.0
        for phase, seconds in outline.phases:
            if phase is Phase.ACTIVE:
                found[True].append((at_s, at_s + seconds))
            at_s += seconds
    return found


def _score_duration(outlines: Iterable[EpisodeOutline]) -> float | None:
    """Score a rule that knows only how long the present activity has lasted, once per stride."""
    found = _list_busy_intervals(outlines)
    elapsed = {key: [np.arange(0, end - start, STRIDE_S) for start, end in found[key]] for key in found}
    return compute_auc(*(np.concatenate([np.zeros(0), *elapsed[key]]) for key in (True, False)))


def _score_whole_duration(outlines: Iterable[EpisodeOutline]) -> float | None:
    """Score a rule that knows only the whole duration of each activity."""
    found = _list_busy_intervals(outlines)
    return compute_auc(*(np.array([end - start for start, end in found[key]]) for key in (True, False)))


def _compute_idle_share(outlines: Iterable[EpisodeOutline]) -> float:
    benign = [outline for outline in outlines if outline.is_benign]
    idle_s = sum(span.end_s - span.start_s for each in benign for span in each.loads if span.is_idle)
    all_s = sum(seconds for each in benign for _, seconds in each.phases)
    return idle_s / all_s if all_s else 1.0
