"""The loads of an episode: spans of benign kinds and of idleness. Pure; random numbers are handed in.

The walk is the same for benign and malicious episodes, and its spans last as long as phases do. So neither the presence
nor the duration of a load tells whether malware runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from phasewatch.profiles import IDLE_SAMPLES
from phasewatch.profiles.phase_walk import draw_stay

__all__ = ["LoadSpan", "draw_load_walk", "list_load_kinds"]

_MIN_REST_S = 1.0  # a shorter remainder is added to the span before it

# Kind → intensities of one span, ``(name, value)``.
KnobDraw = Callable[[str], tuple[tuple[str, float], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpan:
    """One benign kind between two times of an episode.

    Attributes:
        kind: The benign sample; an idle form between loads.
        start_s, end_s: Seconds since the first label.
        knobs: ``(name, value)`` of its intensities.
    """

    kind: str
    start_s: float
    end_s: float
    knobs: tuple[tuple[str, float], ...] = ()

    @property
    def is_idle(self) -> bool:
        """Whether nothing but background events runs."""
        return self.kind in IDLE_SAMPLES


def list_load_kinds(loads: tuple[LoadSpan, ...]) -> tuple[str, ...]:
    """Return the kinds of some spans without the idle forms, each once, in order of appearance."""
    return tuple(dict.fromkeys(span.kind for span in loads if not span.is_idle))


def draw_load_walk(
    rng: np.random.Generator,
    *,
    length_s: float,
    between_s: tuple[float, float],
    idle_share: float,
    idle_kind: str,
    choose_kind: Callable[[], str],
    draw_knobs: KnobDraw,
) -> tuple[LoadSpan, ...]:
    """Draw the loads of one episode: each span is idle with probability `idle_share`, but at least one is a load.

    Args:
        rng: A generator for this purpose alone.
        length_s: Length of the episode; the walk is cut there.
        between_s: Shortest and longest span, log-uniform.
        idle_share: Probability that a span is idle.
        idle_kind: The idle form of the episode's sample group.
        choose_kind: Chooses the kind of the next load.
        draw_knobs: Draws the intensities of a kind.

    Returns:
        Spans in order that fill the episode.
    """
    ends: list[float] = []
    at_s = 0.0
    while at_s < length_s:
        at_s = min(length_s, round(at_s + draw_stay(rng, between_s, is_log_uniform=True), 3))
        if length_s - at_s < _MIN_REST_S:
            at_s = length_s
        ends.append(at_s)
    are_idle = rng.random(len(ends)) < idle_share
    if are_idle.all():
        are_idle[int(rng.integers(0, len(ends)))] = False
    spans: list[LoadSpan] = []
    start_s = 0.0
    for end_s, is_idle in zip(ends, are_idle, strict=True):
        kind = idle_kind if is_idle else choose_kind()
        if is_idle and spans and spans[-1].is_idle:  # two idle spans in a row are one
            spans[-1] = LoadSpan(kind=kind, start_s=spans[-1].start_s, end_s=end_s)
        else:
            knobs = () if is_idle else draw_knobs(kind)
            spans.append(LoadSpan(kind=kind, start_s=start_s, end_s=end_s, knobs=knobs))
        start_s = end_s
    return tuple(spans)
