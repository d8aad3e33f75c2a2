"""Plain values become Plotly figures: one function a picture, no disk, no run, no Plotly import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phasewatch.report.drawing import (
    BLUE,
    GREEN,
    HATCH,
    INK,
    LINES,
    MUTED,
    NO_WHISKER,
    PHASE_COLOURS,
    PURPLE,
    SHADES,
    STATUS_STYLES,
    VERMILLION,
    Figure,
    layout_of,
    numbers,
    safe,
    short,
    squares,
    ticks,
)
from phasewatch.vocab import PHASES

# Symbol and colour of a series, and the colour of its small numbers: a darker one, where the mark's own is too light to read.
_MARKS = (
    ("circle", BLUE, BLUE),
    ("diamond-open", VERMILLION, "#b34700"),
    ("square-open", GREEN, "#00724f"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One measured number: its interval is absent where none can be given, its value where nothing was measured."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    words: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Scores of one kind, one a row of the picture; rows of equal label share a line."""

    name: str
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a curve: abscissa, value (None: there is none) and the words of each point."""

    name: str
    points: tuple[tuple[float, float | None, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One host × profile: how many episodes were tested there, and the score if one was measured."""

    host_id: str
    profile: str
    n_episodes: int
    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Windows by truth (rows) and decision (columns), over the union of labels; means over seeds, so maybe fractions."""

    labels: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One window of a ribbon: its middle since the first window's start, truth, decision, and p of each phase."""

    t_s: float
    truth: int
    decided: int
    p: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What became of the bundles at one stage."""

    stage: str
    counts: tuple[tuple[str, int], ...]


def whiskers(series: Sequence[Series], *, title: str, origin: str, is_gap: bool = False) -> Figure:
    """Draw scores from 0 to 1, or gaps around 0, as marks with their intervals, one line a label, first label on top."""
    labels = list(dict.fromkeys(s.label for one in series for s in one.scores))
    place = {label: i for i, label in enumerate(labels)}
    spread = 0.24 if len(series) > 1 else 0.0
    data: list[Figure] = []
    for k, one in enumerate(series):
        shift = spread * (k / (len(series) - 1) - 0.5) if len(series) > 1 else 0.0
        symbol, colour, ink = _MARKS[k % len(_MARKS)]
        known = [(s, s.value) for s in one.scores if s.value is not None]
        is_lowest = 0 < k == len(series) - 1  # above its mark a number would stand on the upper mark's whisker
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": safe(one.name),
                "x": [short(v) for _, v in known],
                "y": [place[s.label] + shift for s, _ in known],
                "text": [f"{v:+.2f}" if is_gap else f"{v:.2f}" for _, v in known],
                "textposition": "bottom center" if is_lowest else "top center",
                "textfont": {"size": 11, "color": ink},
                "cliponaxis": False,
                "marker": {"symbol": symbol, "size": 10, "color": colour, "line": {"width": 2, "color": colour}},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [NO_WHISKER if s.high is None else short(s.high - v) for s, v in known],
                    "arrayminus": [NO_WHISKER if s.low is None else short(v - s.low) for s, v in known],
                    "color": colour,
                    "thickness": 2,
                    "width": 5,
                },
                "customdata": [f"{safe(s.label)}: {v:.3f}{interval(s)}<br>{safe(s.words, 90)}" for s, v in known],
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )
    data += _nothing_known(series, place)
    layout = layout_of(height=112 + 50 * max(1, len(labels)), title=title, origin=origin)
    layout["xaxis"] |= {"range": [-0.02, 1.05], "showgrid": True, "dtick": 0.2}
    if is_gap:
        ends = [v for one in series for s in one.scores for v in (s.value, s.low, s.high) if v is not None]
        low, high = min(ends, default=-0.1), max(ends, default=0.1)
        edge = 0.1 * (max(high, 0) - min(low, 0)) + 0.01
        layout["xaxis"] |= {
            "range": [short(min(low, 0) - edge), short(max(high, 0) + edge)],
            "zeroline": True,
            "zerolinecolor": INK,
            "dtick": None,
        }
    layout["yaxis"] |= ticks(labels) | {"range": [len(labels) - 0.4, -0.6]}
    layout["showlegend"] = len(series) > 1
    layout["margin"]["t"] = 46 if len(series) > 1 else 22
    return {"data": data, "layout": layout}


def curve(lines: Sequence[Line], *, x: str, y: str, origin: str) -> Figure:
    """Draw lines over a logarithmic abscissa, each with a mark, a dash and a colour of its own."""
    data = []
    for k, line in enumerate(lines):
        colour, symbol, dash = LINES[k % len(LINES)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": safe(line.name),
                "x": [short(p) for p, _, _ in line.points],
                "y": [None if v is None else short(v) for _, v, _ in line.points],
                "line": {"color": colour, "dash": dash, "width": 2},
                "marker": {"symbol": symbol, "size": 9, "color": colour},
                "customdata": [safe(words, 90) for _, _, words in line.points],
                "hovertemplate": "%{customdata}<extra>" + safe(line.name) + "</extra>",
            }
        )
    layout = layout_of(height=380, title=x, origin=origin)
    layout["margin"]["t"] = 30 + 20 * -(-len(lines) // 2)  # on a phone the legend takes a line for two names
    at = sorted({p for line in lines for p, _, _ in line.points})
    layout["xaxis"] |= {"type": "log", "tickvals": at, "ticktext": [f"{p:g}" for p in at], "showgrid": True}
    layout["yaxis"] |= {"title": {"text": safe(y)}, "rangemode": "tozero", "showgrid": True}
    return {"data": data, "layout": layout}


def reliability(scores: Sequence[Score], at: Sequence[float], *, origin: str) -> Figure:
    """Draw how often windows of a confidence were right, beside the diagonal on which they would be as often as they say."""
    known = [(x, s, s.value) for x, s in zip(at, scores, strict=True) if s.value is not None]
    line: Figure = {"type": "scatter", "mode": "lines", "name": "as often as said", "x": [0, 1], "y": [0, 1]}
    line |= {"line": {"color": MUTED, "dash": "dash", "width": 1.5}, "hoverinfo": "skip"}
    marks: Figure = {"type": "scatter", "mode": "lines+markers", "name": "measured"}
    marks |= {"x": [short(x) for x, _, _ in known], "y": [short(v) for _, _, v in known]}
    marks |= {"line": {"color": BLUE, "width": 1.5}, "marker": {"color": BLUE, "size": 9}}
    marks["error_y"] = {"type": "data", "symmetric": False, "color": BLUE, "thickness": 2, "width": 5}
    marks["error_y"] |= {
        "array": [NO_WHISKER if s.high is None else short(s.high - v) for _, s, v in known],
        "arrayminus": [NO_WHISKER if s.low is None else short(v - s.low) for _, s, v in known],
    }
    marks |= {"customdata": [safe(s.words, 90) for _, s, _ in known], "hovertemplate": "%{customdata}<extra></extra>"}
    layout = layout_of(height=400, title="probability of the decided phase", origin=origin)
    layout["xaxis"] |= {"range": [0, 1.02], "showgrid": True, "dtick": 0.2}
    layout["yaxis"] |= {"range": [0, 1.02], "showgrid": True, "dtick": 0.2, "title": {"text": "share right"}}
    return {"data": [line, marks], "layout": layout}


def heat_map(
    cells: Sequence[Cell], *, hosts: Sequence[str], profiles: Sequence[str], title: str, origin: str
) -> Figure:
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
        z.append([None if c is None or not c.n_episodes else _shade(c, is_scored, most) for c in found])
        text.append([_cell_words(c, is_scored) for c in found])
        hover.append([_cell_hover(host, p, c) for p, c in zip(profiles, found, strict=True)])
        for j, c in enumerate(found):
            if c is None or not c.n_episodes:
                hatch_x += [x if x is None else j + x for x, _ in HATCH]
                hatch_y += [y if y is None else i + y for _, y in HATCH]
    hatch: Figure = {"type": "scatter", "mode": "lines", "x": hatch_x, "y": hatch_y, "hoverinfo": "skip"}
    hatch |= {"line": {"color": MUTED, "width": 1}, "name": "untested", "showlegend": bool(hatch_x)}
    layout = layout_of(height=160 + 46 * max(1, len(hosts)), title="profile", origin=origin)
    layout["legend"] |= {"x": 1, "xanchor": "right"}
    layout["xaxis"] |= ticks(profiles, slanted=True) | {"range": [-0.5, len(profiles) - 0.5]}
    layout["yaxis"] |= ticks(hosts) | {"range": [len(hosts) - 0.5, -0.5]}
    layout["plot_bgcolor"] = "#ffffff"
    shades = squares(z, hover, bar=title, most=1 if is_scored else most)
    return {"data": [shades, hatch, numbers(z, text)], "layout": layout}


def confusion(matrix: Confusion, *, origin: str) -> Figure:
    """Draw each true phase as a row: the share of its windows that were decided as each phase, with the counts."""
    z: list[list[float | None]] = []
    text, hover = [], []
    for truth, row in zip(matrix.labels, matrix.counts, strict=True):
        total = sum(row)
        z.append([short(n / total) if total else None for n in row])
        text.append([f"{n:.0f}" for n in row])
        hover.append(
            [
                f"truth {safe(truth)}, decided {safe(d)}: {n:.0f} of {total:.0f} windows"
                for d, n in zip(matrix.labels, row, strict=True)
            ]
        )
    layout = layout_of(height=180 + 46 * len(matrix.labels), title="decided", origin=origin)
    layout["xaxis"] |= ticks(matrix.labels, slanted=True)
    layout["yaxis"] |= ticks(matrix.labels) | {"title": {"text": "truth"}, "range": [len(matrix.labels) - 0.5, -0.5]}
    return {"data": [squares(z, hover, bar="share of the true phase"), numbers(z, text)], "layout": layout}


def ribbon(windows: Sequence[Window], *, stride_s: float, origin: str) -> Figure:
    """Draw one episode: truth above decision as coloured bands, below them the probability of each phase as shading."""
    layout = layout_of(height=330, title="seconds", origin=origin)
    layout["margin"]["t"] = 62  # on a phone the legend takes three lines
    data: list[Figure] = []
    for row, name in ((0, "truth"), (1, "decided")):
        for code, phase in enumerate(PHASES):
            chosen = [w for w in windows if (w.truth if row == 0 else w.decided) == code]
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "showlegend": False,
                    "base": [short(w.t_s - stride_s / 2) for w in chosen],
                    "x": [stride_s] * len(chosen),
                    "y": [row] * len(chosen),
                    "width": 0.86,
                    "marker": {
                        "color": PHASE_COLOURS[phase],
                        "opacity": [1.0 if row == 0 else short(0.3 + 0.7 * w.p[code]) for w in chosen],
                        "line": {"width": 0},
                    },
                    "customdata": [f"{w.t_s:.0f} s, {name}: {phase}, p = {w.p[code]:.2f}" for w in chosen],
                    "hovertemplate": "%{customdata}<extra></extra>",
                }
            )
    lanes: Figure = {
        "type": "heatmap",
        "x": [short(w.t_s) for w in windows],
        "y": [2.2 + i for i in range(len(PHASES))],
        "z": [[short(w.p[i]) for w in windows] for i in range(len(PHASES))],
        "zmin": 0,
        "zmax": 1,
        "colorscale": SHADES,
        "showscale": False,
        "hovertemplate": "%{x:.0f} s: p = %{z:.2f}<extra></extra>",
    }
    data += [lanes, *_truth_lines(windows, stride_s), *_phase_legend()]
    names = ["truth", "decided", *(f"p({phase})" for phase in PHASES)]
    end_s = max((w.t_s for w in windows), default=0.0) + stride_s
    layout["xaxis"] |= {"range": [0, short(end_s)]}
    layout["yaxis"] |= {"tickvals": [0, 1, *lanes["y"]], "ticktext": names, "range": [6.75, -0.55]}
    layout["barmode"], layout["bargap"] = "overlay", 0
    return {"data": data, "layout": layout}


def ledger(stages: Sequence[Tally], *, origin: str) -> Figure:
    """Draw what became of the bundles, one bar a stage, each status with its own colour and hatching."""
    statuses = list(dict.fromkeys(status for stage in stages for status, _ in stage.counts))
    data = []
    for status in statuses:
        colour, pattern = STATUS_STYLES.get(status, (PURPLE, "-"))
        counts = [dict(stage.counts).get(status, 0) for stage in stages]
        bar: Figure = {"type": "bar", "orientation": "h", "name": safe(status), "x": counts, "y": [*range(len(stages))]}
        bar |= {
            "marker": {
                "color": colour,
                "pattern": {"shape": pattern, "fgcolor": "#fff", "fillmode": "overlay", "solidity": 0.3},
            }
        }
        bar |= {"text": [f"{n:,}" if n and not pattern else "" for n in counts], "textposition": "inside"}
        bar |= {
            "width": 0.6,
            "hovertemplate": "%{x:,} " + safe(status) + "<extra></extra>",
            "textangle": 0,
            "insidetextanchor": "middle",
        }
        data.append(bar)
    layout = layout_of(height=130 + 56 * max(1, len(stages)), title="bundles", origin=origin)
    layout["xaxis"] |= {"showgrid": True, "rangemode": "tozero"}
    layout["yaxis"] |= ticks([s.stage for s in stages]) | {"range": [len(stages) - 0.5, -0.5]}
    layout["barmode"], layout["legend"]["traceorder"] = "stack", "normal"
    return {"data": data, "layout": layout}


def interval(score: Score) -> str:
    """Give ` [low, high]`, or nothing where there is no interval."""
    return "" if score.low is None or score.high is None else f" [{score.low:.2f}, {score.high:.2f}]"


def _nothing_known(series: Sequence[Series], place: dict[str, int]) -> list[Figure]:
    """Say "no number" on a line that has no mark at all, so that it does not look like a zero."""
    measured = {s.label for one in series for s in one.scores if s.value is not None}
    empty = [label for label in place if label not in measured]
    if not empty:
        return []
    trace: Figure = {"type": "scatter", "mode": "text", "x": [0.0] * len(empty), "y": [place[label] for label in empty]}
    trace |= {"text": ["no number"] * len(empty), "textposition": "middle right", "hoverinfo": "skip"}
    return [trace | {"textfont": {"color": MUTED, "size": 11}, "showlegend": False}]


def _shade(cell: Cell, is_scored: bool, most: int) -> float | None:
    if is_scored:
        return None if cell.value is None else short(cell.value)
    return short(cell.n_episodes / most)


def _cell_words(cell: Cell | None, is_scored: bool) -> str:
    if cell is None or not cell.n_episodes:
        return ""
    if not is_scored:
        return str(cell.n_episodes)
    return "–" if cell.value is None else f"{cell.value:.2f}"


def _cell_hover(host: str, profile: str, cell: Cell | None) -> str:
    where = f"{safe(profile)} on {safe(host)}: "
    if cell is None or not cell.n_episodes:
        return where + "untested"
    plural = "" if cell.n_episodes == 1 else "s"
    score = "no number" if cell.value is None else f"{cell.value:.2f}"
    return f"{where}{score} ({cell.n_episodes} episode{plural})"


def _truth_lines(windows: Sequence[Window], stride_s: float) -> list[Figure]:
    """Mark in the probability lanes where the truth was, dark on a white edge, so that colour is never the only carrier."""
    x: list[float | None] = []
    y: list[float | None] = []
    for w in windows:
        left, right, lane = short(w.t_s - stride_s / 2), short(w.t_s + stride_s / 2), 2.2 + w.truth
        if len(x) > 2 and x[-2] == left and y[-2] == lane:  # the line before goes on
            x[-2] = right
        else:
            x += [left, right, None]
            y += [lane, lane, None]
    line: Figure = {"type": "scatter", "mode": "lines", "name": "truth", "x": x, "y": y, "hoverinfo": "skip"}
    edge = line | {"line": {"color": "#ffffff", "width": 6}, "showlegend": False}
    return [edge, line | {"line": {"color": INK, "width": 2.5}}]


def _phase_legend() -> list[Figure]:
    """Name all five colours in every ribbon, also those of phases that this episode lacks."""
    mark: Figure = {"type": "scatter", "mode": "markers", "x": [None], "y": [None]}
    return [
        mark | {"name": str(p), "marker": {"symbol": "square", "size": 11, "color": colour}}
        for p, colour in PHASE_COLOURS.items()
    ]
