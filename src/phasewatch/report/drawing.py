"""What all pictures share: colours, fonts, axes, and names from data made harmless for Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from phasewatch.vocab import PHASES

Figure = dict[str, Any]  # what Plotly.newPlot takes: {"data": […], "layout": {…}}

# Okabe & Ito 2008, told apart with any colour vision; the phases wear these five everywhere on the page.
INK, MUTED, RULE = "#1b1f24", "#5b6470", "#d9dde2"
BLUE, ORANGE, GREEN, SKY, VERMILLION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
PHASE_COLOURS = dict(zip(PHASES, (GREEN, ORANGE, VERMILLION, PURPLE, SKY), strict=True))
STATUS_STYLES = {
    "accepted": (GREEN, ""),
    "used": (BLUE, ""),
    "degraded": (ORANGE, "/"),
    "rejected": (VERMILLION, "x"),
    "errored": ("#000000", "."),
}
LINES = (
    (INK, "circle", "solid"),
    (BLUE, "square", "dash"),
    (VERMILLION, "diamond", "dot"),
    (GREEN, "triangle-up", "dashdot"),
    (PURPLE, "x", "longdash"),
    (ORANGE, "star", "solid"),
    (SKY, "cross", "dash"),
)
NO_WHISKER = "none"  # no number to Plotly; a zero would be drawn, as the two caps of a whisker without length
SHADES = [[0.0, "#f7fbff"], [0.5, "#8cb9da"], [1.0, "#08519c"]]  # light to dark: also readable in grey on paper
_DARK = 0.78  # of the scale: from here on white has more contrast than ink
_SANS = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
# A cell's outline and five strokes across it, each with the gap (None) that ends it.
HATCH: tuple[tuple[float | None, float | None], ...] = (
    *((-0.46, -0.46), (0.46, -0.46), (0.46, 0.46), (-0.46, 0.46), (-0.46, -0.46), (None, None)),
    *((-0.46, 0.0), (0.0, -0.46), (None, None), (-0.46, 0.46), (0.46, -0.46), (None, None)),
    *((0.0, 0.46), (0.46, 0.0), (None, None), (-0.46, 0.23), (0.23, -0.46), (None, None)),
    *((-0.23, 0.46), (0.46, -0.23), (None, None)),
)
_LONGEST = 44  # characters of a name in a picture; the table below it has the whole


def safe(text: str, longest: int = _LONGEST) -> str:
    """Make a name from data harmless for Plotly, which reads `<b>`, `<a href>` and entities in any text."""
    clipped = text if len(text) <= longest else text[: longest - 1] + "…"
    return escape("".join(c if c.isprintable() else "\ufffd" for c in clipped), quote=False)


def short(value: float) -> float:
    """Four decimals: finer than any picture, and the page stays small."""
    return round(float(value), 4) + 0.0


def ticks(labels: Sequence[str], *, slanted: bool = False) -> Figure:
    """Give an axis of names, each at a place of its own.

    Places instead of names: two that are clipped alike stay two lines, and no name is read as a date.
    """
    words = [safe(label, 24) if slanted else _two_lines(label) for label in labels]
    axis: Figure = {"tickvals": list(range(len(labels))), "ticktext": words}
    return axis | {"tickangle": -45} if slanted else axis


def _two_lines(label: str) -> str:
    """Break a long label at the space or hyphen nearest its middle: on a phone a picture has no room beside it."""
    breaks = [i + 1 for i, c in enumerate(label) if c in " -" and len(label) > 14]
    if not breaks:
        return safe(label)
    at = min(breaks, key=lambda i: abs(i - len(label) / 2))
    return f"{safe(label[:at].rstrip(), 22)}<br>{safe(label[at:], 22)}"


def squares(z: list[list[float | None]], hover: list[list[str]], *, bar: str, most: int = 1) -> Figure:
    """Give a heat map with its scale, 0 to `most`, above the cells."""
    return {
        "type": "heatmap",
        "z": z,
        "zmin": 0,
        "zmax": 1,
        "colorscale": SHADES,
        "customdata": hover,
        "hovertemplate": "%{customdata}<extra></extra>",
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 8, "len": 0.6, "x": 0, "xanchor": "left"}
        | {"title": {"text": safe(bar), "side": "top", "font": {"size": 11}}, "tickvals": [0, 1], "ticktext": ["0", str(most)], "tickfont": {"size": 10}},
    }  # fmt: skip


def numbers(z: list[list[float | None]], text: list[list[str]]) -> Figure:
    """Write into the cells of `squares`, light on dark and dark on all else: Plotly's own grey is lost on a middle blue."""
    at = [(i, j) for i, row in enumerate(text) for j, words in enumerate(row) if words]
    inks = ["#ffffff" if (z[i][j] or 0) > _DARK else INK for i, j in at]
    words: Figure = {"type": "scatter", "mode": "text", "x": [j for _, j in at], "y": [i for i, _ in at]}
    words |= {"text": [text[i][j] for i, j in at], "textfont": {"size": 12, "color": inks}}
    return words | {"hoverinfo": "skip", "showlegend": False}


def layout_of(*, height: int, title: str, origin: str) -> Figure:
    """Set what all pictures share; the origin stands under the axis, so that it goes wherever the picture is copied."""
    words = " · ".join(part for part in (safe(title, 60), safe(origin)) if part)
    axis = {"fixedrange": True, "automargin": True, "zeroline": False, "showgrid": False, "gridcolor": RULE}
    axis |= {"linecolor": RULE, "ticks": "", "tickfont": {"size": 12}}
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 8, "r": 12, "t": 46, "b": 8},
        "font": {"family": _SANS, "size": 12, "color": INK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "dragmode": False,
        "hoverlabel": {"font": {"family": _SANS}},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 11}},
        "xaxis": axis | {"title": {"text": words, "font": {"size": 12, "color": MUTED}, "standoff": 8}},
        "yaxis": dict(axis),
    }
