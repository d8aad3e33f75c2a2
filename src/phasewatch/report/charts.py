"""Draw the figures of the report as SVG from plain values, without reading files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from phasewatch.evaluation.metric_table import ConfusionMatrix
from phasewatch.report.svg import LINE_HEIGHT, MARKER_SHAPES, SvgCanvas, clip_text, measure_text, wrap_text
from phasewatch.types import PHASES

__all__ = [
    "DARK_TEXT_FROM",
    "LIGHT_TEXT_FROM",
    "NARROW",
    "WIDE",
    "CurveLine",
    "HeatMapCell",
    "RibbonWindow",
    "ScoreMark",
    "ScoreSeries",
    "StageCounts",
    "SvgFigure",
    "draw_accounting",
    "draw_confusion",
    "draw_curve",
    "draw_heat_map",
    "draw_intervals",
    "draw_reliability",
    "draw_ribbon",
]

WIDE, NARROW = 820, 348  # pixels: the column of the page on a desktop, and on a phone 380 pixels wide
_MAX_NAME_CHARS = 44  # of a name in a figure; the table below shows it in full
_MAX_LABEL_CHARS = 90  # of a row label, which may take several lines
_SERIES_GAP = 14.0  # pixels between the marks of two series in one row
_LINE_DASHES = ("", "7 4", "2 3", "9 3 2 3", "14 4", "", "7 4")
_N_SERIES = len(_LINE_DASHES)  # colours s0 to s6 of the style sheet
# Opacity of a cell from which its text needs the other ink: in the dark theme, and in the light one.
DARK_TEXT_FROM, LIGHT_TEXT_FROM = 0.52, 0.74
_STATUS_STYLES = {"accepted": "s3", "used": "s1", "degraded": "s5", "rejected": "s2", "errored": "s0"}
_STATUS_HATCHES = {"degraded": "slash", "rejected": "cross", "errored": "dots"}


@dataclass(frozen=True, slots=True)
class SvgFigure:
    """One figure as two SVG elements: for a page of `WIDE` pixels, and for a phone."""

    wide: str
    narrow: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMark:
    """One score with its interval; the value is None if nothing was measured, the ends if there is no interval."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    words: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSeries:
    """Scores of one kind, one per row of the figure; scores with the same label share a row."""

    name: str
    scores: tuple[ScoreMark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveLine:
    """One line of a curve; each point has an abscissa, a value (None for a gap) and a hover text."""

    name: str
    points: tuple[tuple[float, float | None, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMapCell:
    """One combination of host and profile: number of test episodes, and the score if measured."""

    host_id: str
    profile: str
    n_episodes: int
    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RibbonWindow:
    """One window of an episode.

    Attributes:
        t_s: Centre of the window in seconds since the start of the first window.
        truth, decided: Codes of the true and of the predicted phase.
        p: Probability of each phase, in the order of PHASES.
    """

    t_s: float
    truth: int
    decided: int
    p: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCounts:
    """Number of bundles by outcome at one stage."""

    stage: str
    counts: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _Axis:
    """A linear or logarithmic scale from data to pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value; values outside are drawn at the edge."""
        low, high, at = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        share = (at - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One cell of a grid: shade from 0 to 1 (None if untested), text and hover text."""

    shade: float | None
    text: str
    title: str


def draw_intervals(series: Sequence[ScoreSeries], *, title: str, origin: str, is_gap: bool = False) -> SvgFigure:
    """Draw scores from 0 to 1, or differences around 0, with intervals; one row per label, the first label on top."""
    labels = list(dict.fromkeys(s.label for one in series for s in one.scores))
    ends = [v for one in series for s in one.scores for v in (s.value, s.low, s.high) if v is not None]
    low, high = _find_gap_range(ends) if is_gap else (0.0, max(1.0, *ends) if ends else 1.0)

    def draw(canvas: SvgCanvas) -> float:
        is_narrow = canvas.width == NARROW
        rendered = [[_render_mark(s, is_gap=is_gap, is_short=is_narrow) for s in one.scores] for one in series]
        right = max((measure_text(text, 11) for texts in rendered for text in texts), default=0) + 14
        names = [clip_text(label, _MAX_LABEL_CHARS) for label in labels]
        left = 6.0 if is_narrow else min(240.0, max((measure_text(name) for name in names), default=0) + 14)
        wrapped = [wrap_text(name, canvas.width - 12 if is_narrow else left - 10) for name in names]
        axis = _Axis(low, high, left, canvas.width - right)
        top = _draw_legend(canvas, [(one.name, f"s{k + 1}", MARKER_SHAPES[k]) for k, one in enumerate(series)])
        marks_height = 12.0 + _SERIES_GAP * max(1, len(series))
        # On a phone the label stands above its marks, elsewhere beside them.
        label_heights = [LINE_HEIGHT * len(lines) + 3 for lines in wrapped]
        heights = [h + marks_height if is_narrow else max(h + 2, marks_height) for h in label_heights]
        bottom = top + sum(heights) + 4
        _draw_vertical_grid(canvas, axis, _find_ticks(low, high, 4 if is_narrow else 8), top, bottom)
        if is_gap:
            canvas.add_line([(axis.place(0), top), (axis.place(0), bottom)], "rule strong")
        y = top
        for label, lines, label_height, height in zip(labels, wrapped, label_heights, heights, strict=True):
            middle = y + label_height + marks_height / 2 if is_narrow else y + height / 2
            first = y + LINE_HEIGHT if is_narrow else middle + 4 - LINE_HEIGHT * (len(lines) - 1) / 2
            for i, line in enumerate(lines):
                at = (left, "start") if is_narrow else (left - 10, "end")
                canvas.add_text(at[0], first + LINE_HEIGHT * i, line, anchor=at[1])
            for k, one in enumerate(series):
                at_y = middle + _SERIES_GAP * (k - (len(series) - 1) / 2)
                for mark, text in zip(one.scores, rendered[k], strict=True):
                    if mark.label == label:
                        _draw_mark(canvas, axis, mark, at_y, k, text)
            y += height
        return _draw_axis_title(canvas, f"{title} · {origin}" if origin else title, bottom + 34)

    return _draw_both(draw)


def draw_curve(lines: Sequence[CurveLine], *, x: str, y: str, origin: str, is_share: bool = False) -> SvgFigure:
    """Draw lines, each with its own symbol, dash and colour.

    The abscissa is logarithmic with a tick at each point; with `is_share` both axes run from 0 to 1.
    """
    at = sorted({p for line in lines for p, _, _ in line.points})
    top_value = max((v for line in lines for _, v, _ in line.points if v is not None), default=0.0)
    high = 1.0 if is_share else max(top_value * 1.05, 1e-6)

    def draw(canvas: SvgCanvas) -> float:
        top = _draw_legend(
            canvas,
            [(line.name, f"s{k % _N_SERIES}", MARKER_SHAPES[k % _N_SERIES]) for k, line in enumerate(lines)],
            dashes=_LINE_DASHES,
        )
        top = _draw_row_title(canvas, y, top)
        across = _Axis(0, 1, 44, canvas.width - 16)
        if not is_share and at:
            across = _Axis(at[0], max(at[-1], at[0] * 1.001), 44, canvas.width - 16, is_log=True)
        up = _Axis(0, high, top + 230, top)
        _draw_horizontal_grid(canvas, across, up, _find_ticks(0, high, 5))
        ticks = [(v, f"{v:g}") for v in at] if not is_share else _find_ticks(0, 1, 5)
        _draw_vertical_grid(canvas, across, _thin_ticks(ticks, across), top, top + 230)
        for k, line in enumerate(lines):
            style = f"s{k % _N_SERIES}"
            known = [(across.place(p), None if v is None else up.place(v), words) for p, v, words in line.points]
            for is_known, part in groupby(known, key=lambda point: point[1] is not None):
                if is_known:
                    points = [(px, py) for px, py, _ in part if py is not None]
                    canvas.add_line(points, f"line {style}", dash=_LINE_DASHES[k % _N_SERIES])
            for px, py, words in known:
                if py is not None:
                    shape = MARKER_SHAPES[k % _N_SERIES]
                    canvas.add_marker(
                        px, py, shape, f"mark {style}", title=f"{_clip(line.name)}: {clip_text(words, 90)}"
                    )
        return _draw_axis_title(canvas, f"{x} · {origin}" if origin else x, top + 230 + 34)

    return _draw_both(draw)


def draw_reliability(scores: Sequence[ScoreMark], at: Sequence[float], *, origin: str) -> SvgFigure:
    """Draw a reliability diagram: accuracy by confidence, with the diagonal of perfect calibration."""

    def draw(canvas: SvgCanvas) -> float:
        entries = [("measured", "s1", "circle"), ("perfect calibration", "s0", "")]
        top = _draw_legend(canvas, entries, dashes=("", "7 4"))
        top = _draw_row_title(canvas, "accuracy", top)
        side = min(canvas.width - 60, 340)
        across, up = _Axis(0, 1, 44, 44 + side), _Axis(0, 1, top + side, top)
        _draw_horizontal_grid(canvas, across, up, _find_ticks(0, 1, 5))
        _draw_vertical_grid(canvas, across, _find_ticks(0, 1, 5), top, top + side)
        canvas.add_line([(across.place(0), up.place(0)), (across.place(1), up.place(1))], "line s0", dash="7 4")
        known = [(across.place(x), s, s.value) for x, s in zip(at, scores, strict=True) if s.value is not None]
        canvas.add_line([(x, up.place(value)) for x, _, value in known], "line s1")
        for x, mark, value in known:
            if mark.low is not None and mark.high is not None:
                canvas.add_line([(x, up.place(mark.low)), (x, up.place(mark.high))], "line s1")
            canvas.add_marker(x, up.place(value), "circle", "mark s1", title=clip_text(mark.words, 90))
        words = "confidence (probability of the predicted phase)"
        return _draw_axis_title(
            canvas, f"{words} · {origin}" if origin else words, top + side + 34, middle=44 + side / 2
        )

    return _draw_both(draw)


def draw_heat_map(
    cells: Sequence[HeatMapCell], *, hosts: Sequence[str], profiles: Sequence[str], title: str, origin: str
) -> SvgFigure:
    """Draw the scores by host and profile as a grid; untested cells are hatched.

    Without scores, the shade is the number of test episodes.
    """
    at = {(c.host_id, c.profile): c for c in cells}
    is_scored = any(c.value is not None for c in cells)
    most = max((c.n_episodes for c in cells), default=0) or 1
    grid = [[_build_cell(host, p, at.get((host, p)), is_scored, most) for p in profiles] for host in hosts]
    turned = [list(column) for column in zip(*grid, strict=True)]
    has_untested = any(cell.shade is None and not cell.text for row in grid for cell in row)
    scale = (title, "0", "1" if is_scored else str(most))

    def draw(canvas: SvgCanvas) -> float:
        # A phone has no room for many columns, so the longer side goes down the page there.
        if canvas.width == NARROW and len(profiles) > len(hosts):
            return _draw_grid(
                canvas, turned, profiles, hosts, f"host · {origin}", scale=scale, has_untested=has_untested
            )
        return _draw_grid(canvas, grid, hosts, profiles, f"profile · {origin}", scale=scale, has_untested=has_untested)

    return _draw_both(draw)


def draw_confusion(matrix: ConfusionMatrix, *, origin: str) -> SvgFigure:
    """Draw the confusion matrix: one row per true phase, shaded by share of its windows, labelled with counts."""
    grid = []
    for truth, row in zip(matrix.labels, matrix.counts, strict=True):
        total = sum(row)
        grid.append(
            [
                _Cell(
                    shade=n / total if total else 0.0,
                    text=f"{n:.0f}",
                    title=f"true {_clip(truth)}, predicted {_clip(decided)}: {n:.0f} of {total:.0f} windows",
                )
                for decided, n in zip(matrix.labels, row, strict=True)
            ]
        )
    scale = ("share of the windows of the true phase", "0", "1")

    def draw(canvas: SvgCanvas) -> float:
        rows = [f"true {label}" for label in matrix.labels]
        return _draw_grid(canvas, grid, rows, matrix.labels, f"predicted phase · {origin}", scale=scale)

    return _draw_both(draw)


def draw_ribbon(windows: Sequence[RibbonWindow], *, stride_s: float, origin: str) -> SvgFigure:
    """Draw one episode: true and predicted phase as coloured bands above the probability of each phase.

    In the rows of probabilities a frame marks the true phase, as a cue besides colour.
    """

    def draw(canvas: SvgCanvas) -> float:
        left = 90.0
        start, end = (windows[0].t_s - stride_s / 2, windows[-1].t_s + stride_s / 2) if windows else (0.0, 1.0)
        axis = _Axis(start, end, left, canvas.width - 8)
        top = _draw_legend(canvas, [(str(phase), f"phase-{phase}", "square") for phase in PHASES])
        thin = (axis.end - axis.start) * stride_s / (end - start)
        for row, name in ((0, "true phase"), (1, "predicted")):
            y = top + 26 * row
            canvas.add_text(left - 8, y + 15, name, "ink small", anchor="end")
            for code, shade, runs in _group_windows(windows, row):
                x = axis.place(runs[0].t_s - stride_s / 2)
                words = f"{runs[0].t_s:.0f} s, {name}: {PHASES[code]}, p = {runs[0].p[code]:.2f}"
                if len(runs) > 1:
                    words = f"{runs[0].t_s:.0f} to {runs[-1].t_s:.0f} s, {name}: {PHASES[code]}"
                width = thin * len(runs)
                canvas.add_rectangle(x, y, width, 22, f"phase-{PHASES[code]}", opacity=shade, title=words)
        lanes = top + 60
        for code, phase in enumerate(PHASES):
            y = lanes + 21 * code
            canvas.add_text(left - 8, y + 13, f"p({phase})", "ink small", anchor="end")
            canvas.add_rectangle(axis.start, y, axis.end - axis.start, 18, "lane")
            for w in windows:
                if w.p[code] >= 0.01:
                    x = axis.place(w.t_s - stride_s / 2)
                    words = f"{w.t_s:.0f} s: p({phase}) = {w.p[code]:.2f}"
                    canvas.add_rectangle(x, y, thin, 18, "heat", opacity=w.p[code], title=words)
        for truth, runs in _group_truth(windows):
            x, y = axis.place(runs[0].t_s - stride_s / 2), lanes + 21 * truth
            canvas.add_rectangle(x, y, thin * len(runs), 18, "frame")
        bottom = lanes + 21 * len(PHASES)
        for value, text in _find_ticks(start, end, 4 if canvas.width == NARROW else 8):
            canvas.add_text(axis.place(value), bottom + 14, text, "ink small", anchor="middle")
        return _draw_axis_title(canvas, f"seconds · {origin}; frames: the true phase", bottom + 32)

    return _draw_both(draw)


def draw_accounting(stages: Sequence[StageCounts], *, origin: str) -> SvgFigure:
    """Draw the bundles of each stage as a stacked bar; outcomes differ in colour and hatching."""
    statuses = list(dict.fromkeys(status for stage in stages for status, _ in stage.counts))
    most = max((sum(n for _, n in stage.counts) for stage in stages), default=0) or 1

    def draw(canvas: SvgCanvas) -> float:
        left = max((measure_text(_clip(s.stage, 16)) for s in stages), default=0) + 14
        axis = _Axis(0, most, left, canvas.width - 20)
        top = _draw_legend(
            canvas,
            [
                (s, f"{_STATUS_STYLES.get(s, 's4')} hatched-{_STATUS_HATCHES.get(s, 'none')}", "square")
                for s in statuses
            ],
        )
        bottom = top + 34 * len(stages)
        _draw_vertical_grid(canvas, axis, _find_ticks(0, most, 4), top, bottom)
        for i, stage in enumerate(stages):
            y, before = top + 34 * i, 0
            canvas.add_text(left - 8, y + 19, _clip(stage.stage, 16), anchor="end")
            for status, n in stage.counts:
                x, width = axis.place(before), axis.place(before + n) - axis.place(before)
                style = _STATUS_STYLES.get(status, "s4")
                canvas.add_rectangle(x, y + 4, width, 24, f"bar {style}", title=f"{stage.stage}: {n:,} {status}")
                if hatch := _STATUS_HATCHES.get(status):
                    canvas.add_rectangle(x, y + 4, width, 24, f"hatch-{hatch}", title=f"{stage.stage}: {n:,} {status}")
                elif measure_text(f"{n:,}") + 8 < width:
                    canvas.add_text(x + width / 2, y + 20, f"{n:,}", "on-bar", anchor="middle")
                before += n
        return _draw_axis_title(canvas, f"bundles · {origin}" if origin else "bundles", bottom + 34)

    return _draw_both(draw)


def _draw_both(draw: Callable[[SvgCanvas], float]) -> SvgFigure:
    """Draw a figure at both widths; `draw` returns the height."""
    wide, narrow = SvgCanvas(WIDE), SvgCanvas(NARROW)
    return SvgFigure(wide=wide.render(draw(wide), "wide-figure"), narrow=narrow.render(draw(narrow), "narrow-figure"))


def _clip(name: str, longest: int = _MAX_NAME_CHARS) -> str:
    return clip_text(name, longest)


def _find_gap_range(ends: Sequence[float]) -> tuple[float, float]:
    """Return a range that holds zero and all ends, with a margin."""
    low, high = min(ends, default=-0.1), max(ends, default=0.1)
    edge = 0.05 * (max(high, 0) - min(low, 0)) + 0.005
    return min(low, 0) - edge, max(high, 0) + edge


def _find_ticks(low: float, high: float, at_most: int) -> list[tuple[float, str]]:
    """Return about `at_most` round values with their text.

    >>> _find_ticks(0, 1, 5)
    [(0.0, '0'), (0.2, '0.2'), (0.4, '0.4'), (0.6, '0.6'), (0.8, '0.8'), (1.0, '1')]
    """
    span = high - low
    raw = span / at_most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(round(i * step, 10), f"{round(i * step, 10):,g}") for i in range(first, last + 1)]


def _thin_ticks(ticks: Sequence[tuple[float, str]], axis: _Axis) -> list[tuple[float, str]]:
    """Drop the text of ticks that would overlap the text before them."""
    shown: list[tuple[float, str]] = []
    free = -math.inf
    for value, text in ticks:
        half = measure_text(text, 11) / 2
        is_free = axis.place(value) - half >= free
        shown.append((value, text if is_free else ""))
        if is_free:
            free = axis.place(value) + half + 5
    return shown


def _draw_legend(
    canvas: SvgCanvas, entries: Sequence[tuple[str, str, str]], *, dashes: Sequence[str] | None = None
) -> float:
    """Draw name, colour and symbol of each series, if there are several; return the pixel below."""
    if len(entries) < 2:
        return 8.0
    x, y = 4.0, 16.0
    for k, (name, style, shape) in enumerate(entries):
        words = _clip(name)
        indent = 22 if dashes is None else 34
        width = indent + measure_text(words) + 14
        if x > 4 and x + width > canvas.width:
            x, y = 4.0, y + 20
        if dashes is not None:
            canvas.add_line([(x, y - 4), (x + 28, y - 4)], f"line {style}", dash=dashes[k % len(dashes)])
        base, _, hatch = style.partition(" hatched-")
        if shape:
            canvas.add_marker(x + (8 if dashes is None else 14), y - 4, shape, f"mark {base}")
        if hatch and hatch != "none":
            canvas.add_rectangle(x + 4, y - 8, 8, 8, f"hatch-{hatch}")
        canvas.add_text(x + indent, y, words)
        x += width
    return y + 16


def _draw_row_title(canvas: SvgCanvas, words: str, top: float) -> float:
    """Write the name of the vertical axis above it; return the pixel below."""
    canvas.add_text(4, top + 8, words, "muted")
    return top + 24


def _draw_axis_title(canvas: SvgCanvas, words: str, y: float, *, middle: float | None = None) -> float:
    """Write the name of the horizontal axis in as many lines as it needs; return the height of the picture.

    The lines are centred on `middle`, or on the picture where that leaves no room.
    """
    lines = wrap_text(_clip(words, 110), canvas.width - 8)
    half = max(measure_text(line) for line in lines) / 2
    at = canvas.width / 2 if middle is None else min(max(middle, half + 4), canvas.width - half - 4)
    for line in lines:
        canvas.add_text(at, y, line, "muted", anchor="middle")
        y += LINE_HEIGHT
    return y - LINE_HEIGHT + 8


def _draw_vertical_grid(
    canvas: SvgCanvas, axis: _Axis, ticks: Sequence[tuple[float, str]], top: float, bottom: float
) -> None:
    for value, text in ticks:
        x = axis.place(value)
        canvas.add_line([(x, top), (x, bottom)], "rule")
        if text:
            canvas.add_text(x, bottom + 15, text, "ink small", anchor="middle")


def _draw_horizontal_grid(canvas: SvgCanvas, across: _Axis, up: _Axis, ticks: Sequence[tuple[float, str]]) -> None:
    for value, text in ticks:
        y = up.place(value)
        canvas.add_line([(across.start, y), (across.end, y)], "rule")
        canvas.add_text(across.start - 8, y + 4, text, "ink small", anchor="end")


def _render_mark(mark: ScoreMark, *, is_gap: bool, is_short: bool) -> str:
    """Render a score as `0.53 [0.48, 0.57]`; on a phone without the interval, which the table has."""
    if mark.value is None:
        return "no value"
    form = "+.2f" if is_gap else ".2f"
    value = f"{mark.value:{form}}"
    if is_short or mark.low is None or mark.high is None:
        return value
    return f"{value} [{mark.low:{form}}, {mark.high:{form}}]"


def _draw_mark(canvas: SvgCanvas, axis: _Axis, mark: ScoreMark, y: float, k: int, text: str) -> None:
    """Draw one score with its interval, and its number in the column on the right."""
    style = f"s{k + 1}"
    canvas.add_text(
        canvas.width - 4, y + 4, text, f"{'muted' if mark.value is None else f'text-{style}'} small", anchor="end"
    )
    if mark.value is None:
        return
    if mark.low is not None and mark.high is not None:
        low, high = axis.place(mark.low), axis.place(mark.high)
        canvas.add_line([(low, y), (high, y)], f"line {style}")
        for end in (low, high):
            canvas.add_line([(end, y - 4), (end, y + 4)], f"line {style}")
    words = f"{_clip(mark.label)}: {mark.value:.3f}" + (f" ({clip_text(mark.words, 90)})" if mark.words else "")
    canvas.add_marker(axis.place(mark.value), y, MARKER_SHAPES[k], f"mark {style}", title=words)


def _build_cell(host: str, profile: str, cell: HeatMapCell | None, is_scored: bool, most: int) -> _Cell:
    where = f"{_clip(profile)} on {_clip(host)}: "
    if cell is None or not cell.n_episodes:
        return _Cell(None, "", where + "untested")
    episodes = f"({cell.n_episodes} episode{'' if cell.n_episodes == 1 else 's'})"
    if not is_scored:
        return _Cell(cell.n_episodes / most, str(cell.n_episodes), f"{where}{cell.n_episodes} {episodes}")
    if cell.value is None:
        return _Cell(None, "–", f"{where}no value {episodes}")
    return _Cell(cell.value, f"{cell.value:.2f}", f"{where}{cell.value:.2f} {episodes}")


def _draw_grid(
    canvas: SvgCanvas,
    cells: Sequence[Sequence[_Cell]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    scale: tuple[str, str, str],
    has_untested: bool = False,
) -> float:
    """Draw a grid of shaded cells with row labels on the left and column labels below, and return the height."""
    left = min(0.36 * canvas.width, max((measure_text(_clip(r)) for r in rows), default=0) + 12)
    top = _draw_scale(canvas, scale, has_untested)
    width = min(64.0, (canvas.width - left - 26) / max(1, len(columns)))
    height = 30.0
    for i, row in enumerate(cells):
        y = top + height * i
        longest = int((left - 12) / measure_text("x"))
        canvas.add_text(left - 8, y + 19, _clip(rows[i], longest), anchor="end")
        for j, cell in enumerate(row):
            _draw_cell(canvas, cell, left + width * j, y, width - 2, height - 2)
    bottom = top + height * len(rows)
    is_turned = any(measure_text(_clip(c, 24)) > width - 4 for c in columns)
    depth = 18.0
    for j, column in enumerate(columns):
        x, name = left + width * (j + 0.5), _clip(column, 24)
        if is_turned:
            canvas.add_text(x + 4, bottom + 14, name, anchor="end", turned=True)
            depth = max(depth, 0.71 * measure_text(name) + 24)
        else:
            canvas.add_text(x, bottom + 15, name, anchor="middle")
    return _draw_axis_title(canvas, title, bottom + depth + 14, middle=left + width * len(columns) / 2)


def _draw_cell(canvas: SvgCanvas, cell: _Cell, x: float, y: float, width: float, height: float) -> None:
    if cell.shade is None:
        canvas.add_rectangle(x, y, width, height, "hatch-slash" if not cell.text else "lane", title=cell.title)
    else:
        canvas.add_rectangle(x, y, width, height, "lane")
        canvas.add_rectangle(x, y, width, height, "heat", opacity=round(cell.shade, 2), title=cell.title)
    if cell.text:
        is_small = measure_text(cell.text) > width - 2
        text = cell.text.removeprefix("0") if is_small and "." in cell.text else cell.text
        shade = round(cell.shade or 0.0, 2)
        ink = "on-high" if shade >= LIGHT_TEXT_FROM else "on-middle" if shade >= DARK_TEXT_FROM else "ink"
        canvas.add_text(x + width / 2, y + height / 2 + 4, text, f"{ink} small" if is_small else ink, anchor="middle")


def _draw_scale(canvas: SvgCanvas, scale: tuple[str, str, str], has_untested: bool) -> float:
    """Draw the shades with what they stand for; return the pixel below."""
    title, low, high = scale
    y = 16.0
    for line in wrap_text(_clip(title, 90), canvas.width - 8):
        canvas.add_text(4, y, line, "muted")
        y += LINE_HEIGHT
    canvas.add_text(4, y + 2, low, "ink small")
    for k in range(10):
        canvas.add_rectangle(16 + 10 * k, y - 7, 10, 10, "heat", opacity=k / 9)
    canvas.add_text(122, y + 2, high, "ink small")
    if has_untested:
        canvas.add_rectangle(160, y - 8, 14, 12, "hatch-slash")
        canvas.add_text(180, y + 2, "untested", "ink small")
    return y + 16


def _group_truth(windows: Sequence[RibbonWindow]) -> list[tuple[int, list[RibbonWindow]]]:
    """Group consecutive windows of the same true phase."""
    return [(truth, list(part)) for truth, part in groupby(windows, key=lambda w: w.truth)]


def _group_windows(windows: Sequence[RibbonWindow], row: int) -> list[tuple[int, float, list[RibbonWindow]]]:
    """Return code, opacity and windows of each rectangle: runs of the true phase, single windows of predictions."""
    if row == 0:
        return [(truth, 1.0, part) for truth, part in _group_truth(windows)]
    return [(w.decided, 0.3 + 0.7 * w.p[w.decided], [w]) for w in windows]
