"""Build the Plotly figures of the report from plain values, without importing Plotly or reading files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from phasewatch.evaluation.metric_table import ConfusionMatrix
from phasewatch.types import PHASES

__all__ = [
    "COLOUR_SCALE",
    "PHASE_COLOURS",
    "CurveLine",
    "HeatMapCell",
    "PlotlyFigure",
    "RibbonWindow",
    "ScoreMark",
    "ScoreSeries",
    "StageCounts",
    "build_cell_text_trace",
    "draw_accounting",
    "draw_confusion",
    "draw_curve",
    "draw_heat_map",
    "draw_intervals",
    "draw_reliability",
    "draw_ribbon",
    "escape_text",
]

PlotlyFigure = dict[str, Any]  # argument of Plotly.newPlot: {"data": […], "layout": {…}}

# Palette for all types of colour vision (Okabe & Ito 2008); each phase has one of these colours in all figures.
INK, MUTED, GRID_COLOUR = "#1b1f24", "#5b6470", "#d9dde2"
BLUE, ORANGE, GREEN, SKY, VERMILLION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
PHASE_COLOURS = dict(zip(PHASES, (GREEN, ORANGE, VERMILLION, PURPLE, SKY), strict=True))
_STATUS_STYLES = {
    "accepted": (GREEN, ""),
    "used": (BLUE, ""),
    "degraded": (ORANGE, "/"),
    "rejected": (VERMILLION, "x"),
    "errored": ("#000000", "."),
}
_LINE_STYLES = (
    (INK, "circle", "solid"),
    (BLUE, "square", "dash"),
    (VERMILLION, "diamond", "dot"),
    (GREEN, "triangle-up", "dashdot"),
    (PURPLE, "x", "longdash"),
    (ORANGE, "star", "solid"),
    (SKY, "cross", "dash"),
)
_NO_WHISKER = "none"  # not a number, so Plotly draws nothing; a zero would be drawn as two caps
COLOUR_SCALE = [[0.0, "#f7fbff"], [0.5, "#8cb9da"], [1.0, "#08519c"]]  # light to dark: readable in greyscale print too
_LIGHT_TEXT_FROM = 0.78  # position on the colour scale from which white has more contrast than ink
_FONT_FAMILY = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
# Outline of a cell and five strokes across it; None ends a stroke.
_HATCH_STROKES: tuple[tuple[float | None, float | None], ...] = (
    *((-0.46, -0.46), (0.46, -0.46), (0.46, 0.46), (-0.46, 0.46), (-0.46, -0.46), (None, None)),
    *((-0.46, 0.0), (0.0, -0.46), (None, None), (-0.46, 0.46), (0.46, -0.46), (None, None)),
    *((0.0, 0.46), (0.46, 0.0), (None, None), (-0.46, 0.23), (0.23, -0.46), (None, None)),
    *((-0.23, 0.46), (0.46, -0.23), (None, None)),
)
_MAX_NAME_CHARS = 44  # of a name in a figure; the table below shows it in full


def escape_text(text: str, longest: int = _MAX_NAME_CHARS) -> str:
    """Escape and shorten a name from data, because Plotly interprets `<b>`, `<a href>` and entities in any text."""
    clipped = text if len(text) <= longest else text[: longest - 1] + "…"
    return escape("".join(c if c.isprintable() else "\ufffd" for c in clipped), quote=False)


def _round_value(value: float) -> float:
    """Round to four decimals, which is finer than any figure shows and keeps the page small."""
    return round(float(value), 4) + 0.0


def _build_axis_ticks(labels: Sequence[str], *, slanted: bool = False) -> PlotlyFigure:
    """Build a categorical axis with numeric tick positions.

    Positions instead of names separate two names with the same shortened text, and no name is parsed as a date.
    """
    words = [escape_text(label, 24) if slanted else _break_label(label) for label in labels]
    axis: PlotlyFigure = {"tickvals": list(range(len(labels))), "ticktext": words}
    return axis | {"tickangle": -45} if slanted else axis


def _break_label(label: str) -> str:
    """Break a long label at the space or hyphen nearest its middle; a phone screen has little room beside the plot."""
    breaks = [i + 1 for i, c in enumerate(label) if c in " -" and len(label) > 14]
    if not breaks:
        return escape_text(label)
    at = min(breaks, key=lambda i: abs(i - len(label) / 2))
    return f"{escape_text(label[:at].rstrip(), 22)}<br>{escape_text(label[at:], 22)}"


def _build_heat_map_trace(
    z: list[list[float | None]], hover: list[list[str]], *, bar: str, most: int = 1
) -> PlotlyFigure:
    """Build a heat-map trace with its colour bar, labelled 0 to `most`, above the cells.

    Args:
        z: Rows of cell values from 0 to 1; None leaves a cell empty.
        hover: Hover text of each cell.
        bar: Title of the colour bar.
        most: Number that a value of 1 stands for.
    """
    return {
        "type": "heatmap",
        "z": z,
        "zmin": 0,
        "zmax": 1,
        "colorscale": COLOUR_SCALE,
        "customdata": hover,
        "hovertemplate": "%{customdata}<extra></extra>",
        "xgap": 2,
        "ygap": 2,
        "colorbar": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.0,
            "yanchor": "bottom",
            "thickness": 8,
            "len": 0.6,
            "title": {"text": escape_text(bar), "side": "top", "font": {"size": 11}},
            "tickvals": [0, 1],
            "ticktext": ["0", str(most)],
            "tickfont": {"size": 10},
        },
    }


def build_cell_text_trace(z: list[list[float | None]], text: list[list[str]]) -> PlotlyFigure:
    """Build the text of the cells of a heat map: white on dark cells, ink on all others.

    Plotly's own text colour has too little contrast on the middle of the scale.
    """
    at = [(i, j) for i, row in enumerate(text) for j, words in enumerate(row) if words]
    inks = ["#ffffff" if (z[i][j] or 0) > _LIGHT_TEXT_FROM else INK for i, j in at]
    words: PlotlyFigure = {"type": "scatter", "mode": "text", "x": [j for _, j in at], "y": [i for i, _ in at]}
    words |= {"text": [text[i][j] for i, j in at], "textfont": {"size": 12, "color": inks}}
    return words | {"hoverinfo": "skip", "showlegend": False}


def _build_layout(*, height: int, title: str, origin: str) -> PlotlyFigure:
    """Build the common layout; the origin is part of the axis title, so that a copied figure shows it."""
    words = " · ".join(part for part in (escape_text(title, 60), escape_text(origin)) if part)
    axis = {"fixedrange": True, "automargin": True, "zeroline": False, "showgrid": False, "gridcolor": GRID_COLOUR}
    axis |= {"linecolor": GRID_COLOUR, "ticks": "", "tickfont": {"size": 12}}
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 8, "r": 12, "t": 46, "b": 8},
        "font": {"family": _FONT_FAMILY, "size": 12, "color": INK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "dragmode": False,
        "hoverlabel": {"font": {"family": _FONT_FAMILY}},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 11}},
        "xaxis": axis | {"title": {"text": words, "font": {"size": 12, "color": MUTED}, "standoff": 8}},
        "yaxis": dict(axis),
    }


# Symbol and colour of a series, and the colour of its numbers, which is darker if the symbol has too little contrast.
_MARKER_STYLES = (
    ("circle", BLUE, BLUE),
    ("diamond-open", VERMILLION, "#b34700"),
    ("square-open", GREEN, "#00724f"),
)


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


def draw_intervals(series: Sequence[ScoreSeries], *, title: str, origin: str, is_gap: bool = False) -> PlotlyFigure:
    """Draw scores from 0 to 1, or differences around 0, with intervals; one row per label, the first label on top."""
    labels = list(dict.fromkeys(s.label for one in series for s in one.scores))
    place = {label: i for i, label in enumerate(labels)}
    spread = 0.24 if len(series) > 1 else 0.0
    data: list[PlotlyFigure] = []
    for k, one in enumerate(series):
        shift = spread * (k / (len(series) - 1) - 0.5) if len(series) > 1 else 0.0
        symbol, colour, ink = _MARKER_STYLES[k % len(_MARKER_STYLES)]
        known = [(s, s.value) for s in one.scores if s.value is not None]
        is_lowest = 0 < k == len(series) - 1  # above its mark a number would stand on the upper mark's whisker
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": escape_text(one.name),
                "x": [_round_value(v) for _, v in known],
                "y": [place[s.label] + shift for s, _ in known],
                "text": [f"{v:+.2f}" if is_gap else f"{v:.2f}" for _, v in known],
                "textposition": "bottom center" if is_lowest else "top center",
                "textfont": {"size": 11, "color": ink},
                "cliponaxis": False,
                "marker": {"symbol": symbol, "size": 10, "color": colour, "line": {"width": 2, "color": colour}},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [_NO_WHISKER if s.high is None else _round_value(s.high - v) for s, v in known],
                    "arrayminus": [_NO_WHISKER if s.low is None else _round_value(v - s.low) for s, v in known],
                    "color": colour,
                    "thickness": 2,
                    "width": 5,
                },
                "customdata": [
                    f"{escape_text(s.label)}: {v:.3f}{_render_interval_suffix(s)}<br>{escape_text(s.words, 90)}"
                    for s, v in known
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )
    data += _draw_missing_labels(series, place)
    layout = _build_layout(height=112 + 50 * max(1, len(labels)), title=title, origin=origin)
    layout["xaxis"] |= {"range": [-0.02, 1.05], "showgrid": True, "dtick": 0.2}
    if is_gap:
        ends = [v for one in series for s in one.scores for v in (s.value, s.low, s.high) if v is not None]
        low, high = min(ends, default=-0.1), max(ends, default=0.1)
        edge = 0.1 * (max(high, 0) - min(low, 0)) + 0.01
        layout["xaxis"] |= {
            "range": [_round_value(min(low, 0) - edge), _round_value(max(high, 0) + edge)],
            "zeroline": True,
            "zerolinecolor": INK,
            "dtick": None,
        }
    layout["yaxis"] |= _build_axis_ticks(labels) | {"range": [len(labels) - 0.4, -0.6]}
    layout["showlegend"] = len(series) > 1
    layout["margin"]["t"] = 46 if len(series) > 1 else 22
    return {"data": data, "layout": layout}


def draw_curve(lines: Sequence[CurveLine], *, x: str, y: str, origin: str, is_share: bool = False) -> PlotlyFigure:
    """Draw lines, each with its own symbol, dash and colour.

    The abscissa is logarithmic with a tick at each point; with `is_share` both axes run from 0 to 1.
    """
    data = []
    for k, line in enumerate(lines):
        colour, symbol, dash = _LINE_STYLES[k % len(_LINE_STYLES)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape_text(line.name),
                "x": [_round_value(p) for p, _, _ in line.points],
                "y": [None if v is None else _round_value(v) for _, v, _ in line.points],
                "line": {"color": colour, "dash": dash, "width": 2},
                "marker": {"symbol": symbol, "size": 9, "color": colour},
                "customdata": [escape_text(words, 90) for _, _, words in line.points],
                "hovertemplate": "%{customdata}<extra>" + escape_text(line.name) + "</extra>",
            }
        )
    layout = _build_layout(height=380, title=x, origin=origin)
    layout["margin"]["t"] = 30 + 20 * -(-len(lines) // 2)  # a phone screen fits two legend entries per line
    at = sorted({p for line in lines for p, _, _ in line.points})
    layout["yaxis"] |= {"title": {"text": escape_text(y)}, "rangemode": "tozero", "showgrid": True}
    if is_share:
        for axis in ("xaxis", "yaxis"):
            layout[axis] |= {"range": [0, 1.02], "showgrid": True, "dtick": 0.2}
    else:
        layout["xaxis"] |= {"type": "log", "tickvals": at, "ticktext": [f"{p:g}" for p in at], "showgrid": True}
    return {"data": data, "layout": layout}


def draw_reliability(scores: Sequence[ScoreMark], at: Sequence[float], *, origin: str) -> PlotlyFigure:
    """Draw a reliability diagram: accuracy by confidence, with the diagonal of perfect calibration."""
    known = [(x, s, s.value) for x, s in zip(at, scores, strict=True) if s.value is not None]
    line: PlotlyFigure = {"type": "scatter", "mode": "lines", "name": "perfect calibration", "x": [0, 1], "y": [0, 1]}
    line |= {"line": {"color": MUTED, "dash": "dash", "width": 1.5}, "hoverinfo": "skip"}
    marks: PlotlyFigure = {"type": "scatter", "mode": "lines+markers", "name": "measured"}
    marks |= {"x": [_round_value(x) for x, _, _ in known], "y": [_round_value(v) for _, _, v in known]}
    marks |= {"line": {"color": BLUE, "width": 1.5}, "marker": {"color": BLUE, "size": 9}}
    marks["error_y"] = {"type": "data", "symmetric": False, "color": BLUE, "thickness": 2, "width": 5}
    marks["error_y"] |= {
        "array": [_NO_WHISKER if s.high is None else _round_value(s.high - v) for _, s, v in known],
        "arrayminus": [_NO_WHISKER if s.low is None else _round_value(v - s.low) for _, s, v in known],
    }
    marks |= {
        "customdata": [escape_text(s.words, 90) for _, s, _ in known],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    layout = _build_layout(height=400, title="confidence (probability of the predicted phase)", origin=origin)
    layout["xaxis"] |= {"range": [0, 1.02], "showgrid": True, "dtick": 0.2}
    layout["yaxis"] |= {"range": [0, 1.02], "showgrid": True, "dtick": 0.2, "title": {"text": "accuracy"}}
    return {"data": [line, marks], "layout": layout}


def draw_heat_map(
    cells: Sequence[HeatMapCell], *, hosts: Sequence[str], profiles: Sequence[str], title: str, origin: str
) -> PlotlyFigure:
    """Draw the scores by host and profile as a heat map; untested cells are hatched."""
    at = {(c.host_id, c.profile): c for c in cells}
    is_scored = any(c.value is not None for c in cells)
    most = max((c.n_episodes for c in cells), default=0) or 1
    z: list[list[float | None]] = []
    text: list[list[str]] = []
    hover: list[list[str]] = []
    hatch_x: list[float | None] = []
    hatch_y: list[float | None] = []
    for i, host in enumerate(hosts):
        found = [at.get((host, profile)) for profile in profiles]
        # Without scores, the shade shows the number of test episodes.
        z.append([None if c is None or not c.n_episodes else _compute_shade(c, is_scored, most) for c in found])
        text.append([_render_cell_text(c, is_scored) for c in found])
        hover.append([_render_cell_hover(host, p, c) for p, c in zip(profiles, found, strict=True)])
        for j, c in enumerate(found):
            if c is None or not c.n_episodes:
                hatch_x += [x if x is None else j + x for x, _ in _HATCH_STROKES]
                hatch_y += [y if y is None else i + y for _, y in _HATCH_STROKES]
    hatch: PlotlyFigure = {"type": "scatter", "mode": "lines", "x": hatch_x, "y": hatch_y, "hoverinfo": "skip"}
    hatch |= {"line": {"color": MUTED, "width": 1}, "name": "untested", "showlegend": bool(hatch_x)}
    layout = _build_layout(height=160 + 46 * max(1, len(hosts)), title="profile", origin=origin)
    layout["legend"] |= {"x": 1, "xanchor": "right"}
    layout["xaxis"] |= _build_axis_ticks(profiles, slanted=True) | {"range": [-0.5, len(profiles) - 0.5]}
    layout["yaxis"] |= _build_axis_ticks(hosts) | {"range": [len(hosts) - 0.5, -0.5]}
    layout["plot_bgcolor"] = "#ffffff"
    shades = _build_heat_map_trace(z, hover, bar=title, most=1 if is_scored else most)
    return {"data": [shades, hatch, build_cell_text_trace(z, text)], "layout": layout}


def draw_confusion(matrix: ConfusionMatrix, *, origin: str) -> PlotlyFigure:
    """Draw the confusion matrix: one row per true phase, shaded by share of its windows, labelled with counts."""
    z: list[list[float | None]] = []
    text, hover = [], []
    for truth, row in zip(matrix.labels, matrix.counts, strict=True):
        total = sum(row)
        z.append([_round_value(n / total) if total else None for n in row])
        text.append([f"{n:.0f}" for n in row])
        hover.append(
            [
                f"true {escape_text(truth)}, predicted {escape_text(d)}: {n:.0f} of {total:.0f} windows"
                for d, n in zip(matrix.labels, row, strict=True)
            ]
        )
    layout = _build_layout(height=180 + 46 * len(matrix.labels), title="predicted phase", origin=origin)
    layout["xaxis"] |= _build_axis_ticks(matrix.labels, slanted=True)
    layout["yaxis"] |= _build_axis_ticks(matrix.labels) | {
        "title": {"text": "true phase"},
        "range": [len(matrix.labels) - 0.5, -0.5],
    }
    return {
        "data": [
            _build_heat_map_trace(z, hover, bar="share of the windows of the true phase"),
            build_cell_text_trace(z, text),
        ],
        "layout": layout,
    }


def draw_ribbon(windows: Sequence[RibbonWindow], *, stride_s: float, origin: str) -> PlotlyFigure:
    """Draw one episode: true and predicted phase as coloured bands above a heat map of the phase probabilities."""
    layout = _build_layout(height=330, title="seconds", origin=origin)
    layout["margin"]["t"] = 62  # the legend takes three lines on a phone screen
    data: list[PlotlyFigure] = []
    for row, name in ((0, "true phase"), (1, "predicted")):
        for code, phase in enumerate(PHASES):
            chosen = [w for w in windows if (w.truth if row == 0 else w.decided) == code]
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "showlegend": False,
                    "base": [_round_value(w.t_s - stride_s / 2) for w in chosen],
                    "x": [stride_s] * len(chosen),
                    "y": [row] * len(chosen),
                    "width": 0.86,
                    "marker": {
                        "color": PHASE_COLOURS[phase],
                        "opacity": [1.0 if row == 0 else _round_value(0.3 + 0.7 * w.p[code]) for w in chosen],
                        "line": {"width": 0},
                    },
                    "customdata": [f"{w.t_s:.0f} s, {name}: {phase}, p = {w.p[code]:.2f}" for w in chosen],
                    "hovertemplate": "%{customdata}<extra></extra>",
                }
            )
    lanes: PlotlyFigure = {
        "type": "heatmap",
        "x": [_round_value(w.t_s) for w in windows],
        "y": [2.2 + i for i in range(len(PHASES))],
        "z": [[_round_value(w.p[i]) for w in windows] for i in range(len(PHASES))],
        "zmin": 0,
        "zmax": 1,
        "colorscale": COLOUR_SCALE,
        "showscale": False,
        "hovertemplate": "%{x:.0f} s: p = %{z:.2f}<extra></extra>",
    }
    data += [lanes, *_draw_truth_lines(windows, stride_s), *_draw_phase_legend()]
    names = ["true phase", "predicted", *(f"p({phase})" for phase in PHASES)]
    end_s = max((w.t_s for w in windows), default=0.0) + stride_s
    layout["xaxis"] |= {"range": [0, _round_value(end_s)]}
    layout["yaxis"] |= {"tickvals": [0, 1, *lanes["y"]], "ticktext": names, "range": [6.75, -0.55]}
    layout["barmode"], layout["bargap"] = "overlay", 0
    return {"data": data, "layout": layout}


def draw_accounting(stages: Sequence[StageCounts], *, origin: str) -> PlotlyFigure:
    """Draw the number of bundles by outcome, one bar per stage; each outcome has its own colour and hatching."""
    statuses = list(dict.fromkeys(status for stage in stages for status, _ in stage.counts))
    data = []
    for status in statuses:
        colour, pattern = _STATUS_STYLES.get(status, (PURPLE, "-"))
        counts = [dict(stage.counts).get(status, 0) for stage in stages]
        bar: PlotlyFigure = {
            "type": "bar",
            "orientation": "h",
            "name": escape_text(status),
            "x": counts,
            "y": [*range(len(stages))],
        }
        bar |= {
            "marker": {
                "color": colour,
                "pattern": {"shape": pattern, "fgcolor": "#fff", "fillmode": "overlay", "solidity": 0.3},
            }
        }
        bar |= {"text": [f"{n:,}" if n and not pattern else "" for n in counts], "textposition": "inside"}
        bar |= {
            "width": 0.6,
            "hovertemplate": "%{x:,} " + escape_text(status) + "<extra></extra>",
            "textangle": 0,
            "insidetextanchor": "middle",
        }
        data.append(bar)
    layout = _build_layout(height=130 + 56 * max(1, len(stages)), title="bundles", origin=origin)
    layout["xaxis"] |= {"showgrid": True, "rangemode": "tozero"}
    layout["yaxis"] |= _build_axis_ticks([s.stage for s in stages]) | {"range": [len(stages) - 0.5, -0.5]}
    layout["barmode"], layout["legend"]["traceorder"] = "stack", "normal"
    return {"data": data, "layout": layout}


def _render_interval_suffix(score: ScoreMark) -> str:
    """Render ` [low, high]`, or nothing without an interval."""
    return "" if score.low is None or score.high is None else f" [{score.low:.2f}, {score.high:.2f}]"


def _draw_missing_labels(series: Sequence[ScoreSeries], place: dict[str, int]) -> list[PlotlyFigure]:
    """Label the rows without any mark as "no value", so that they do not look like a zero."""
    measured = {s.label for one in series for s in one.scores if s.value is not None}
    empty = [label for label in place if label not in measured]
    if not empty:
        return []
    trace: PlotlyFigure = {
        "type": "scatter",
        "mode": "text",
        "x": [0.0] * len(empty),
        "y": [place[label] for label in empty],
    }
    trace |= {"text": ["no value"] * len(empty), "textposition": "middle right", "hoverinfo": "skip"}
    return [trace | {"textfont": {"color": MUTED, "size": 11}, "showlegend": False}]


def _compute_shade(cell: HeatMapCell, is_scored: bool, most: int) -> float | None:
    if is_scored:
        return None if cell.value is None else _round_value(cell.value)
    return _round_value(cell.n_episodes / most)


def _render_cell_text(cell: HeatMapCell | None, is_scored: bool) -> str:
    if cell is None or not cell.n_episodes:
        return ""
    if not is_scored:
        return str(cell.n_episodes)
    return "–" if cell.value is None else f"{cell.value:.2f}"


def _render_cell_hover(host: str, profile: str, cell: HeatMapCell | None) -> str:
    where = f"{escape_text(profile)} on {escape_text(host)}: "
    if cell is None or not cell.n_episodes:
        return where + "untested"
    plural = "" if cell.n_episodes == 1 else "s"
    score = "no value" if cell.value is None else f"{cell.value:.2f}"
    return f"{where}{score} ({cell.n_episodes} episode{plural})"


def _draw_truth_lines(windows: Sequence[RibbonWindow], stride_s: float) -> list[PlotlyFigure]:
    """Draw a dark line with a white edge at the true phase in the probability rows, as a cue besides colour."""
    x: list[float | None] = []
    y: list[float | None] = []
    for w in windows:
        left, right, lane = _round_value(w.t_s - stride_s / 2), _round_value(w.t_s + stride_s / 2), 2.2 + w.truth
        if len(x) > 2 and x[-2] == left and y[-2] == lane:  # extend the previous segment
            x[-2] = right
        else:
            x += [left, right, None]
            y += [lane, lane, None]
    line: PlotlyFigure = {"type": "scatter", "mode": "lines", "name": "true phase", "x": x, "y": y, "hoverinfo": "skip"}
    edge = line | {"line": {"color": "#ffffff", "width": 6}, "showlegend": False}
    return [edge, line | {"line": {"color": INK, "width": 2.5}}]


def _draw_phase_legend() -> list[PlotlyFigure]:
    """Build the legend of all five phases, including those that the episode does not have."""
    mark: PlotlyFigure = {"type": "scatter", "mode": "markers", "x": [None], "y": [None]}
    return [
        mark | {"name": str(p), "marker": {"symbol": "square", "size": 11, "color": colour}}
        for p, colour in PHASE_COLOURS.items()
    ]
