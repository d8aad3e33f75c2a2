"""What the page is made of: sections of blocks, each a picture, its sentences, its numbers and its command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phasewatch.artifacts import METRICS_FILE
from phasewatch.evaluation.metric_table import MetricRow
from phasewatch.report.charts import PlotlyFigure, ScoreMark


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """Numbers in words: `numeric` says which columns are set flush right."""

    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportBlock:
    """One picture with everything that belongs to it.

    Attributes:
        figure: None where it cannot be drawn; then `absent` says why and how to get it.
        is_table_open: The table stands open instead of behind a fold.
        command: What makes these numbers again; RUN is the folder of the page.
    """

    key: str
    title: str
    sentences: tuple[str, ...] = ()
    figure: PlotlyFigure | None = None
    absent: str = ""
    table: ReportTable | None = None
    table_name: str = "Numbers"
    is_table_open: bool = False
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSection:
    """A part of the page that answers one question; `points` is a list under the `lead`."""

    key: str
    title: str
    lead: str = ""
    points: tuple[str, ...] = ()
    blocks: tuple[ReportBlock, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadlineTile:
    """One number of the claim, large; `is_reference` marks what it is held against."""

    name: str
    value: str
    interval: str
    about: str
    is_reference: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadlineClaim:
    """The first thing that is read: the headline in words, the line to quote, its numbers, and whether they beat the clock."""

    words: str
    line: str
    tiles: tuple[HeadlineTile, ...]
    verdict: str
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPage:
    """The whole report as values; a template makes it HTML."""

    origin: str
    claim: HeadlineClaim
    notices: tuple[str, ...]
    sections: tuple[ReportSection, ...]

    def figures(self) -> dict[str, PlotlyFigure]:
        """Give each drawn figure under its block's fixed key."""
        return {b.key: b.figure for s in self.sections for b in s.blocks if b.figure is not None}


def build_score_mark(label: str, row: MetricRow | None) -> ScoreMark:
    """Turn a metric row into a mark of a picture; no row is a line that says so."""
    if row is None:
        return ScoreMark(label=label, value=None)
    return ScoreMark(label=label, value=row.value, low=row.low, high=row.high, words=_render_counts(row))


def _render_counts(row: MetricRow) -> str:
    """Say how much a number rests on: `612 windows, 41 episodes, 30 sessions, 5 hosts`."""
    parts = (
        (row.n_windows, "window"),
        (row.n_episodes, "episode"),
        (row.n_sessions, "session"),
        (row.n_hosts, "host"),
    )
    return ", ".join(render_count(n, word) for n, word in parts if n is not None)


def render_count(n: int, word: str) -> str:
    """Give `1 host`, `2 hosts`.

    >>> count(1, "host"), count(1200, "window")
    ('1 host', '1,200 windows')
    """
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def join_words(words: Sequence[str]) -> str:
    """Give `a`, `a and b`, `a, b and c`."""
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else "".join(words)


def render_number(value: float | None) -> str:
    """Give two decimals, or a dash where nothing was measured."""
    return "–" if value is None else f"{value:.2f}"


def render_interval(row: MetricRow) -> str:
    """Give `[0.64, 0.73]`, or why there is none."""
    if row.low is None or row.high is None:
        return f"no interval: {row.note}" if row.note else "no interval"
    return f"[{row.low:.2f}, {row.high:.2f}]"


def build_metric_table(rows: Sequence[tuple[str, str, MetricRow | None]]) -> ReportTable:
    """Set metric rows as a table: what, which metric, value, interval, and what they rest on."""

    def size(n: int | None) -> str:
        return "–" if n is None else f"{n:,}"

    body = tuple(
        (label, name, "–", f"no row in {METRICS_FILE}", "–", "–", "–")
        if row is None
        else (
            label,
            name,
            f"{row.value:.3f}" if row.value is not None else "–",
            render_interval(row),
            size(row.n_windows),
            size(row.n_episodes),
            size(row.n_sessions),
        )
        for label, name, row in rows
    )
    columns = ("of", "metric", "value", "95 % interval", "windows", "episodes", "sessions")
    return ReportTable(columns=columns, numeric=(False, False, True, False, True, True, True), rows=body)
