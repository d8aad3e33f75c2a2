"""Draw lines, marks and text as SVG, with the colours of the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["LINE_HEIGHT", "MARKER_SHAPES", "SvgCanvas", "clip_text", "measure_text", "wrap_text"]

LINE_HEIGHT = 15.0  # pixels between the baselines of two lines of text
_CHAR_WIDTH = 0.58  # mean width of a character, as a share of the font size; no font is measured
_FONT_SIZE = 12.0
MARKER_SHAPES = ("circle", "square", "diamond", "triangle", "ring", "box", "wedge")
_POLYGONS = {
    "square": ((-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)),
    "box": ((-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)),
    "diamond": ((0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0)),
    "triangle": ((0.0, -5.0), (5.0, 4.0), (-5.0, 4.0)),
    "wedge": ((0.0, 5.0), (5.0, -4.0), (-5.0, -4.0)),
}
_HOLLOW_SHAPES = frozenset({"ring", "box"})


def clip_text(text: str, longest: int) -> str:
    """Shorten a text from data and replace characters that cannot be printed.

    >>> clip_text("beacon-c2", 6)
    'beaco…'
    """
    clipped = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c.isprintable() else "\ufffd" for c in clipped)


def measure_text(text: str, size: float = _FONT_SIZE) -> float:
    """Estimate the width of a text in pixels."""
    return _CHAR_WIDTH * size * len(text)


def wrap_text(text: str, width: float, size: float = _FONT_SIZE) -> list[str]:
    """Break a text at its spaces into lines of at most `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and measure_text(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


class SvgCanvas:
    """Collects the elements of one picture; coordinates are pixels from the upper left corner.

    Colours are class names of the style sheet, so that one picture serves the light and the dark theme.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._elements: list[str] = []

    def add_line(self, points: Sequence[tuple[float, float]], style: str, *, dash: str = "") -> None:
        """Draw a line through the points."""
        if len(points) > 1:
            path = " ".join(f"{_format(x)},{_format(y)}" for x, y in points)
            dashes = f' stroke-dasharray="{dash}"' if dash else ""
            self._elements.append(f'<polyline class="{style}" points="{path}"{dashes}/>')

    def add_rectangle(
        self, x: float, y: float, width: float, height: float, style: str, *, opacity: float = 1.0, title: str = ""
    ) -> None:
        """Draw a filled rectangle; browsers show its title on hover."""
        shade = "" if opacity >= 1 else f' fill-opacity="{opacity:.2f}"'
        place = f'x="{_format(x)}" y="{_format(y)}" width="{_format(width)}" height="{_format(height)}"'
        self._add_titled(f'rect class="{style}" {place}{shade}', title)

    def add_marker(self, x: float, y: float, shape: str, style: str, *, title: str = "") -> None:
        """Draw a marker of `MARKER_SHAPES` with its centre at the point."""
        classes = f"{style} hollow" if shape in _HOLLOW_SHAPES else style
        if shape in _POLYGONS:
            points = " ".join(f"{_format(x + dx)},{_format(y + dy)}" for dx, dy in _POLYGONS[shape])
            self._add_titled(f'polygon class="{classes}" points="{points}"', title)
        else:
            self._add_titled(f'circle class="{classes}" cx="{_format(x)}" cy="{_format(y)}" r="4.5"', title)

    def add_text(
        self, x: float, y: float, text: str, style: str = "ink", *, anchor: str = "start", turned: bool = False
    ) -> None:
        """Write a line of text with its baseline at `y`; a turned text rises to the right by 45 degrees."""
        at = f'x="{_format(x)}" y="{_format(y)}"'
        if anchor != "start":
            at += f' text-anchor="{anchor}"'
        if turned:
            at += f' transform="rotate(-45 {_format(x)} {_format(y)})"'
        self._elements.append(f'<text class="{style}" {at}>{escape(text)}</text>')

    def render(self, height: float, name: str) -> str:
        """Return the picture as an SVG element of the class `name`."""
        box = f'viewBox="0 0 {self.width} {_format(height)}" style="max-width: {self.width}px"'
        return f'<svg class="{name}" {box} aria-hidden="true">{"".join(self._elements)}</svg>'

    def _add_titled(self, element: str, title: str) -> None:
        tag = element.partition(" ")[0]
        self._elements.append(f"<{element}><title>{escape(title)}</title></{tag}>" if title else f"<{element}/>")


def _format(value: float) -> str:
    """Render a coordinate with one decimal, which is finer than a pixel of any screen shows."""
    return f"{value + 0.0:.1f}".removesuffix(".0")
