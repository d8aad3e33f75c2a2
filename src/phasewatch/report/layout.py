"""Layout types of the report (sections of blocks) and the helpers that render numbers and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phasewatch.artifacts import METRICS_FILE
from phasewatch.evaluation.metric_table import MetricRow
from phasewatch.report.charts import ScoreMark, SvgFigure

__all__ = [
    "HeadlineClaim",
    "HeadlineTile",
    "ReportBlock",
    "ReportPage",
    "ReportSection",
    "ReportTable",
    "build_metric_table",
    "build_score_mark",
    "join_words",
    "render_count",
    "render_interval",
    "render_number",
    "render_signed_interval",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """A table of rendered cells.

    Attributes:
        numeric: One flag a column; numeric columns are right-aligned.
    """

    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportBlock:
    """One figure with its description, its numbers and the command that reproduces them.

    Attributes:
        sentences: Description: what was measured, on what data, and how to read it.
        figure: None if it cannot be drawn; `absent` then gives the reason and the remedy.
        is_table_open: Whether the table is expanded when the page opens.
        command: Shell command that reproduces the numbers; RUN is the run's folder.
    """

    key: str
    title: str
    sentences: tuple[str, ...] = ()
    figure: SvgFigure | None = None
    absent: str = ""
    table: ReportTable | None = None
    table_name: str = "Numbers"
    is_table_open: bool = False
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSection:
    """A section of the report: an introduction (`lead`), a bullet list (`points`) and blocks."""

    key: str
    title: str
    lead: str = ""
    points: tuple[str, ...] = ()
    blocks: tuple[ReportBlock, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadlineTile:
    """One large number below the headline; `is_reference` marks a baseline."""

    name: str
    value: str
    interval: str
    about: str
    is_reference: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadlineClaim:
    """The headline of the report.

    Attributes:
        words: The headline as a sentence.
        scores: The scores as a sentence, if the headline is about alarms.
        line: The headline line of the run, for quotation.
        tiles: Its numbers, with the baselines.
        verdict: The comparison with the time-only baseline, in words.
        holds: Whether the model beats the time-only baseline.
    """

    words: str
    line: str
    tiles: tuple[HeadlineTile, ...]
    verdict: str
    holds: bool
    scores: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPage:
    """The complete report as plain values; `html` and `markdown` render it.

    Attributes:
        facts: What was tested, as names and values: store, recordings, machines, model, run.
    """

    origin: str
    claim: HeadlineClaim
    notices: tuple[str, ...]
    sections: tuple[ReportSection, ...]
    facts: tuple[tuple[str, str], ...] = ()

    def figures(self) -> dict[str, SvgFigure]:
        """Return the figures by the key of their block."""
        return {b.key: b.figure for s in self.sections for b in s.blocks if b.figure is not None}


def build_score_mark(label: str, row: MetricRow | None) -> ScoreMark:
    """Convert a metric row to a chart mark; a missing row becomes a mark without a value."""
    if row is None:
        return ScoreMark(label=label, value=None)
    return ScoreMark(label=label, value=row.value, low=row.low, high=row.high, words=_render_counts(row))


def _render_counts(row: MetricRow) -> str:
    """Render the sample sizes: `612 windows, 41 episodes, 30 sessions, 5 hosts`."""
    parts = (
        (row.n_windows, "window"),
        (row.n_episodes, "episode"),
        (row.n_sessions, "session"),
        (row.n_hosts, "host"),
    )
    return ", ".join(render_count(n, word) for n, word in parts if n is not None)


def render_count(n: int, word: str) -> str:
    """Render a count with its noun: `1 host`, `2 hosts`.

    >>> render_count(1, "host"), render_count(1200, "window")
    ('1 host', '1,200 windows')
    """
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def join_words(words: Sequence[str]) -> str:
    """Join words as an enumeration: `a`, `a and b`, `a, b and c`."""
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else "".join(words)


def render_number(value: float | None) -> str:
    """Render a number with two decimals, or a dash for None."""
    return "–" if value is None else f"{value:.2f}"


def render_interval(row: MetricRow) -> str:
    """Render a confidence interval as `[0.64, 0.73]`, or the reason why it is missing."""
    if row.low is None or row.high is None:
        return f"no interval: {row.note}" if row.note else "no interval"
    return f"[{row.low:.2f}, {row.high:.2f}]"


def render_signed_interval(row: MetricRow) -> str:
    """Render the interval of a difference as `[-0.02, +0.10]`, or the reason why it is missing."""
    if row.low is None or row.high is None:
        return render_interval(row)
    return f"[{row.low:+.2f}, {row.high:+.2f}]"


def build_metric_table(rows: Sequence[tuple[str, str, MetricRow | None]]) -> ReportTable:
    """Build a table of metric rows.

    Args:
        rows: ``(group, metric name, row)`` triples; a row of None is listed as missing.
    """

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
    columns = ("group", "metric", "value", "95 % interval", "windows", "episodes", "sessions")
    return ReportTable(columns=columns, numeric=(False, False, True, False, True, True, True), rows=body)
