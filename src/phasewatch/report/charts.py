"""Plain values become Plotly figures: one function a picture, no disk, no run, no Plotly import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from phasewatch.evaluation.metric_table import ConfusionMatrix
from phasewatch.types import PHASES

PlotlyFigure = dict[str, Any]  # what Plotly.newPlot takes: {"data": […], "layout": {…}}

# Okabe & Ito 2008, told apart with any colour vision; the phases wear these five everywhere on the page.
INK, MUTED, GRID_COLOUR = "#1b1f24", "#5b6470", "#d9dde2"
BLUE, ORANGE, GREEN, SKY, VERMILLION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
PHASE_COLOURS = dict(zip(PHASES, (GREEN, ORANGE, VERMILLION, PURPLE, SKY), strict=True))
STATUS_STYLES = {
    "accepted": (GREEN, ""),
    "used": (BLUE, ""),
    "degraded": (ORANGE, "/"),
    "rejected": (VERMILLION, "x"),
    "errored": ("#000000", "."),
}
LINE_STYLES = (
    (INK, "circle", "solid"),
    (BLUE, "square", "dash"),
    (VERMILLION, "diamond", "dot"),
    (GREEN, "triangle-up", "dashdot"),
    (PURPLE, "x", "longdash"),
    (ORANGE, "star", "solid"),
    (SKY, "cross", "dash"),
)
NO_WHISKER = "none"  # no number to Plotly; a zero would be drawn, as the two caps of a whisker without length
COLOUR_SCALE = [[0.0, "#f7fbff"], [0.5, "#8cb9da"], [1.0, "#08519c"]]  # light to dark: also readable in grey on paper
_LIGHT_TEXT_FROM = 0.78  # of the scale: from here on white has more contrast than ink
_FONT_FAMILY = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
# A cell's outline and five strokes across it, each with the gap (None) that ends it.
HATCH_STROKES: tuple[tuple[float | None, float | None], ...] = (
    *((-0.46, -0.46), (0.46, -0.46), (0.46, 0.46), (-0.46, 0.46), (-0.46, -0.46), (None, None)),
    *((-0.46, 0.0), (0.0, -0.46), (None, None), (-0.46, 0.46), (0.46, -0.46), (None, None)),
    *((0.0, 0.46), (0.46, 0.0), (None, None), (-0.46, 0.23), (0.23, -0.46), (None, None)),
    *((-0.23, 0.46), (0.46, -0.23), (None, None)),
)
_MAX_NAME_CHARS = 44  # characters of a name in a picture; the table below it has the whole


def escape_text(text: str, longest: int = _MAX_NAME_CHARS) -> str:
    """Make a name from data harmless for Plotly, which reads `<b>`, `<a href>` and entities in any text."""
    clipped = text if len(text) <= longest else text[: longest - 1] + "…"
    return escape("".join(c if c.isprintable() else "\ufffd" for c in clipped), quote=False)


def round_value(value: float) -> float:
    """Four decimals: finer than any picture, and the page stays small."""
    return round(float(value), 4) + 0.0


def build_axis_ticks(labels: Sequence[str], *, slanted: bool = False) -> PlotlyFigure:
    """Give an axis of names, each at a place of its own.

    Places instead of names: two that are clipped alike stay two lines, and no name is read as a date.
    """
    words = [escape_text(label, 24) if slanted else _break_label(label) for label in labels]
    axis: PlotlyFigure = {"tickvals": list(range(len(labels))), "ticktext": words}
    return axis | {"tickangle": -45} if slanted else axis


def _break_label(label: str) -> str:
    """Break a long label at the space or hyphen nearest its middle: on a phone a picture has no room beside it."""
    breaks = [i + 1 for i, c in enumerate(label) if c in " -" and len(label) > 14]
    if not breaks:
        return escape_text(label)
    at = min(breaks, key=lambda i: abs(i - len(label) / 2))
    return f"{escape_text(label[:at].rstrip(), 22)}<br>{escape_text(label[at:], 22)}"


def build_heat_map_trace(
    z: list[list[float | None]], hover: list[list[str]], *, bar: str, most: int = 1
) -> PlotlyFigure:
    """Give a heat map with its scale, 0 to `most`, above the cells."""
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
        "colorbar": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 8, "len": 0.6, "x": 0, "xanchor": "left"}
        | {"title": {"text": escape_text(bar), "side": "top", "font": {"size": 11}}, "tickvals": [0, 1], "ticktext": ["0", str(most)], "tickfont": {"size": 10}},
    }  # fmt: skip


def build_cell_text_trace(z: list[list[float | None]], text: list[list[str]]) -> PlotlyFigure:
    """Write into the cells of `build_heat_map_trace`, light on dark and dark on all else: Plotly's own grey is lost on a middle blue."""
    at = [(i, j) for i, row in enumerate(text) for j, words in enumerate(row) if words]
    inks = ["#ffffff" if (z[i][j] or 0) > _LIGHT_TEXT_FROM else INK for i, j in at]
    words: PlotlyFigure = {"type": "scatter", "mode": "text", "x": [j for _, j in at], "y": [i for i, _ in at]}
    words |= {"text": [text[i][j] for i, j in at], "textfont": {"size": 12, "color": inks}}
    return words | {"hoverinfo": "skip", "showlegend": False}


def build_layout(*, height: int, title: str, origin: str) -> PlotlyFigure:
    """Set what all pictures share; the origin stands under the axis, so that it goes wherever the picture is copied."""
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


# Symbol and colour of a series, and the colour of its small numbers: a darker one, where the mark's own is too light to read.
_MARKER_STYLES = (
    ("circle", BLUE, BLUE),
    ("diamond-open", VERMILLION, "#b34700"),
    ("square-open", GREEN, "#00724f"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMark:
    """One measured number: its interval is absent where none can be given, its value where nothing was measured."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    words: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSeries:
    """Scores of one kind, one a row of the picture; rows of equal label share a line."""

    name: str
    scores: tuple[ScoreMark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveLine:
    """One line of a curve: abscissa, value (None: there is none) and the words of each point."""

    name: str
    points: tuple[tuple[float, float | None, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMapCell:
    """One host × profile: how many episodes were tested there, and the score if one was measured."""

    host_id: str
    profile: str
    n_episodes: int
    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RibbonWindow:
    """One window of a ribbon: its middle since the first window's start, truth, decision, and p of each phase."""

    t_s: float
    truth: int
    decided: int
    p: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCounts:
    """What became of the bundles at one stage."""

    stage: str
    counts: tuple[tuple[str, int], ...]


def draw_intervals(series: Sequence[ScoreSeries], *, title: str, origin: str, is_gap: bool = False) -> PlotlyFigure:
    """Draw scores from 0 to 1, or gaps around 0, as marks with their intervals, one line a label, first label on top."""
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
                "x": [round_value(v) for _, v in known],
                "y": [place[s.label] + shift for s, _ in known],
                "text": [f"{v:+.2f}" if is_gap else f"{v:.2f}" for _, v in known],
                "textposition": "bottom center" if is_lowest else "top center",
                "textfont": {"size": 11, "color": ink},
                "cliponaxis": False,
                "marker": {"symbol": symbol, "size": 10, "color": colour, "line": {"width": 2, "color": colour}},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [NO_WHISKER if s.high is None else round_value(s.high - v) for s, v in known],
                    "arrayminus": [NO_WHISKER if s.low is None else round_value(v - s.low) for s, v in known],
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
    layout = build_layout(height=112 + 50 * max(1, len(labels)), title=title, origin=origin)
    layout["xaxis"] |= {"range": [-0.02, 1.05], "showgrid": True, "dtick": 0.2}
    if is_gap:
        ends = [v for one in series for s in one.scores for v in (s.value, s.low, s.high) if v is not None]
        low, high = min(ends, default=-0.1), max(ends, default=0.1)
        edge = 0.1 * (max(high, 0) - min(low, 0)) + 0.01
        layout["xaxis"] |= {
            "range": [round_value(min(low, 0) - edge), round_value(max(high, 0) + edge)],
            "zeroline": True,
            "zerolinecolor": INK,
            "dtick": None,
        }
    layout["yaxis"] |= build_axis_ticks(labels) | {"range": [len(labels) - 0.4, -0.6]}
    layout["showlegend"] = len(series) > 1
    layout["margin"]["t"] = 46 if len(series) > 1 else 22
    return {"data": data, "layout": layout}


def draw_curve(lines: Sequence[CurveLine], *, x: str, y: str, origin: str) -> PlotlyFigure:
    """Draw lines over a logarithmic abscissa, each with a mark, a dash and a colour of its own."""
    data = []
    for k, line in enumerate(lines):
        colour, symbol, dash = LINE_STYLES[k % len(LINE_STYLES)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape_text(line.name),
                "x": [round_value(p) for p, _, _ in line.points],
                "y": [None if v is None else round_value(v) for _, v, _ in line.points],
                "line": {"color": colour, "dash": dash, "width": 2},
                "marker": {"symbol": symbol, "size": 9, "color": colour},
                "customdata": [escape_text(words, 90) for _, _, words in line.points],
                "hovertemplate": "%{customdata}<extra>" + escape_text(line.name) + "</extra>",
            }
        )
    layout = build_layout(height=380, title=x, origin=origin)
    layout["margin"]["t"] = 30 + 20 * -(-len(lines) // 2)  # on a phone the legend takes a line for two names
    at = sorted({p for line in lines for p, _, _ in line.points})
    layout["xaxis"] |= {"type": "log", "tickvals": at, "ticktext": [f"{p:g}" for p in at], "showgrid": True}
    layout["yaxis"] |= {"title": {"text": escape_text(y)}, "rangemode": "tozero", "showgrid": True}
    return {"data": data, "layout": layout}


def draw_reliability(scores: Sequence[ScoreMark], at: Sequence[float], *, origin: str) -> PlotlyFigure:
    """Draw how often windows of a confidence were right, beside the diagonal on which they would be as often as they say."""
    known = [(x, s, s.value) for x, s in zip(at, scores, strict=True) if s.value is not None]
    line: PlotlyFigure = {"type": "scatter", "mode": "lines", "name": "as often as said", "x": [0, 1], "y": [0, 1]}
    line |= {"line": {"color": MUTED, "dash": "dash", "width": 1.5}, "hoverinfo": "skip"}
    marks: PlotlyFigure = {"type": "scatter", "mode": "lines+markers", "name": "measured"}
    marks |= {"x": [round_value(x) for x, _, _ in known], "y": [round_value(v) for _, _, v in known]}
    marks |= {"line": {"color": BLUE, "width": 1.5}, "marker": {"color": BLUE, "size": 9}}
    marks["error_y"] = {"type": "data", "symmetric": False, "color": BLUE, "thickness": 2, "width": 5}
    marks["error_y"] |= {
        "array": [NO_WHISKER if s.high is None else round_value(s.high - v) for _, s, v in known],
        "arrayminus": [NO_WHISKER if s.low is None else round_value(v - s.low) for _, s, v in known],
    }
    marks |= {
        "customdata": [escape_text(s.words, 90) for _, s, _ in known],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    layout = build_layout(height=400, title="probability of the decided phase", origin=origin)
    layout["xaxis"] |= {"range": [0, 1.02], "showgrid": True, "dtick": 0.2}
    layout["yaxis"] |= {"range": [0, 1.02], "showgrid": True, "dtick": 0.2, "title": {"text": "share right"}}
    return {"data": [line, marks], "layout": layout}


def draw_heat_map(
    cells: Sequence[HeatMapCell], *, hosts: Sequence[str], profiles: Sequence[str], title: str, origin: str
) -> PlotlyFigure:
    """Draw host × profile: the score where it was measured, hatched where no episode was tested."""
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
        # Without a score the shade is the number of episodes: still the map of what was tested.
        z.append([None if c is None or not c.n_episodes else _compute_shade(c, is_scored, most) for c in found])
        text.append([_render_cell_text(c, is_scored) for c in found])
        hover.append([_render_cell_hover(host, p, c) for p, c in zip(profiles, found, strict=True)])
        for j, c in enumerate(found):
            if c is None or not c.n_episodes:
                hatch_x += [x if x is None else j + x for x, _ in HATCH_STROKES]
                hatch_y += [y if y is None else i + y for _, y in HATCH_STROKES]
    hatch: PlotlyFigure = {"type": "scatter", "mode": "lines", "x": hatch_x, "y": hatch_y, "hoverinfo": "skip"}
    hatch |= {"line": {"color": MUTED, "width": 1}, "name": "untested", "showlegend": bool(hatch_x)}
    layout = build_layout(height=160 + 46 * max(1, len(hosts)), title="profile", origin=origin)
    layout["legend"] |= {"x": 1, "xanchor": "right"}
    layout["xaxis"] |= build_axis_ticks(profiles, slanted=True) | {"range": [-0.5, len(profiles) - 0.5]}
    layout["yaxis"] |= build_axis_ticks(hosts) | {"range": [len(hosts) - 0.5, -0.5]}
    layout["plot_bgcolor"] = "#ffffff"
    shades = build_heat_map_trace(z, hover, bar=title, most=1 if is_scored else most)
    return {"data": [shades, hatch, build_cell_text_trace(z, text)], "layout": layout}


def draw_confusion(matrix: ConfusionMatrix, *, origin: str) -> PlotlyFigure:
    """Draw each true phase as a row: the share of its windows that were decided as each phase, with the counts."""
    z: list[list[float | None]] = []
    text, hover = [], []
    for truth, row in zip(matrix.labels, matrix.counts, strict=True):
        total = sum(row)
        z.append([round_value(n / total) if total else None for n in row])
        text.append([f"{n:.0f}" for n in row])
        hover.append(
            [
                f"truth {escape_text(truth)}, decided {escape_text(d)}: {n:.0f} of {total:.0f} windows"
                for d, n in zip(matrix.labels, row, strict=True)
            ]
        )
    layout = build_layout(height=180 + 46 * len(matrix.labels), title="decided", origin=origin)
    layout["xaxis"] |= build_axis_ticks(matrix.labels, slanted=True)
    layout["yaxis"] |= build_axis_ticks(matrix.labels) | {
        "title": {"text": "truth"},
        "range": [len(matrix.labels) - 0.5, -0.5],
    }
    return {
        "data": [build_heat_map_trace(z, hover, bar="share of the true phase"), build_cell_text_trace(z, text)],
        "layout": layout,
    }


def draw_ribbon(windows: Sequence[RibbonWindow], *, stride_s: float, origin: str) -> PlotlyFigure:
    """Draw one episode: truth above decision as coloured bands, below them the probability of each phase as shading."""
    layout = build_layout(height=330, title="seconds", origin=origin)
    layout["margin"]["t"] = 62  # on a phone the legend takes three lines
    data: list[PlotlyFigure] = []
    for row, name in ((0, "truth"), (1, "decided")):
        for code, phase in enumerate(PHASES):
            chosen = [w for w in windows if (w.truth if row == 0 else w.decided) == code]
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "showlegend": False,
                    "base": [round_value(w.t_s - stride_s / 2) for w in chosen],
                    "x": [stride_s] * len(chosen),
                    "y": [row] * len(chosen),
                    "width": 0.86,
                    "marker": {
                        "color": PHASE_COLOURS[phase],
                        "opacity": [1.0 if row == 0 else round_value(0.3 + 0.7 * w.p[code]) for w in chosen],
                        "line": {"width": 0},
                    },
                    "customdata": [f"{w.t_s:.0f} s, {name}: {phase}, p = {w.p[code]:.2f}" for w in chosen],
                    "hovertemplate": "%{customdata}<extra></extra>",
                }
            )
    lanes: PlotlyFigure = {
        "type": "heatmap",
        "x": [round_value(w.t_s) for w in windows],
        "y": [2.2 + i for i in range(len(PHASES))],
        "z": [[round_value(w.p[i]) for w in windows] for i in range(len(PHASES))],
        "zmin": 0,
        "zmax": 1,
        "colorscale": COLOUR_SCALE,
        "showscale": False,
        "hovertemplate": "%{x:.0f} s: p = %{z:.2f}<extra></extra>",
    }
    data += [lanes, *_draw_truth_lines(windows, stride_s), *_draw_phase_legend()]
    names = ["truth", "decided", *(f"p({phase})" for phase in PHASES)]
    end_s = max((w.t_s for w in windows), default=0.0) + stride_s
    layout["xaxis"] |= {"range": [0, round_value(end_s)]}
    layout["yaxis"] |= {"tickvals": [0, 1, *lanes["y"]], "ticktext": names, "range": [6.75, -0.55]}
    layout["barmode"], layout["bargap"] = "overlay", 0
    return {"data": data, "layout": layout}


def draw_accounting(stages: Sequence[StageCounts], *, origin: str) -> PlotlyFigure:
    """Draw what became of the bundles, one bar a stage, each status with its own colour and hatching."""
    statuses = list(dict.fromkeys(status for stage in stages for status, _ in stage.counts))
    data = []
    for status in statuses:
        colour, pattern = STATUS_STYLES.get(status, (PURPLE, "-"))
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
    layout = build_layout(height=130 + 56 * max(1, len(stages)), title="bundles", origin=origin)
    layout["xaxis"] |= {"showgrid": True, "rangemode": "tozero"}
    layout["yaxis"] |= build_axis_ticks([s.stage for s in stages]) | {"range": [len(stages) - 0.5, -0.5]}
    layout["barmode"], layout["legend"]["traceorder"] = "stack", "normal"
    return {"data": data, "layout": layout}


def _render_interval_suffix(score: ScoreMark) -> str:
    """Give ` [low, high]`, or nothing where there is no interval."""
    return "" if score.low is None or score.high is None else f" [{score.low:.2f}, {score.high:.2f}]"


def _draw_missing_labels(series: Sequence[ScoreSeries], place: dict[str, int]) -> list[PlotlyFigure]:
    """Say "no number" on a line that has no mark at all, so that it does not look like a zero."""
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
    trace |= {"text": ["no number"] * len(empty), "textposition": "middle right", "hoverinfo": "skip"}
    return [trace | {"textfont": {"color": MUTED, "size": 11}, "showlegend": False}]


def _compute_shade(cell: HeatMapCell, is_scored: bool, most: int) -> float | None:
    if is_scored:
        return None if cell.value is None else round_value(cell.value)
    return round_value(cell.n_episodes / most)


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
    score = "no number" if cell.value is None else f"{cell.value:.2f}"
    return f"{where}{score} ({cell.n_episodes} episode{plural})"


def _draw_truth_lines(windows: Sequence[RibbonWindow], stride_s: float) -> list[PlotlyFigure]:
    """Mark in the probability lanes where the truth was, dark on a white edge, so that colour is never the only carrier."""
    x: list[float | None] = []
    y: list[float | None] = []
    for w in windows:
        left, right, lane = round_value(w.t_s - stride_s / 2), round_value(w.t_s + stride_s / 2), 2.2 + w.truth
        if len(x) > 2 and x[-2] == left and y[-2] == lane:  # the line before goes on
            x[-2] = right
        else:
            x += [left, right, None]
            y += [lane, lane, None]
    line: PlotlyFigure = {"type": "scatter", "mode": "lines", "name": "truth", "x": x, "y": y, "hoverinfo": "skip"}
    edge = line | {"line": {"color": "#ffffff", "width": 6}, "showlegend": False}
    return [edge, line | {"line": {"color": INK, "width": 2.5}}]


def _draw_phase_legend() -> list[PlotlyFigure]:
    """Name all five colours in every ribbon, also those of phases that this episode lacks."""
    mark: PlotlyFigure = {"type": "scatter", "mode": "markers", "x": [None], "y": [None]}
    return [
        mark | {"name": str(p), "marker": {"symbol": "square", "size": 11, "color": colour}}
        for p, colour in PHASE_COLOURS.items()
    ]
