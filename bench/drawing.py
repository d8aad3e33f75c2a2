"""Draw the pictures of docs/performance.md as SVG: bars of times, and curves of whole corpora."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

OURS, THEIRS = "#1b4965", "#b8b8b8"
LINES = ("#1b4965", "#ca6702", "#5fa8d3")  # one per step; one worker is dashed
STYLE = '<style>text{font:12px sans-serif;fill:#222}</style><rect width="100%" height="100%" fill="#fff"/>'


def seconds(value: float) -> str:
    """Render a time with a readable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def picture(part: Mapping[str, Any]) -> str:
    """Draw a part: curves where it has points, else bars."""
    return curves(part) if part["points"] else bars(part)


def _svg(width: int, height: int, title: str, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}</title>{STYLE}'
        f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>{body}</svg>\n'
    )


def bars(part: Mapping[str, Any]) -> str:
    """Draw minimum times as bars on a logarithmic scale; phasewatch is dark."""
    rows = sorted(part["rows"], key=lambda r: r["min_s"])
    low = math.log10(rows[0]["min_s"]) - 0.3
    span = max(math.log10(rows[-1]["min_s"]) - low, 0.5)
    drawn = []
    for i, row in enumerate(rows):
        width, y = 300 * (math.log10(row["min_s"]) - low) / span, 34 + 26 * i
        drawn.append(
            f'<text x="296" y="{y + 13}" text-anchor="end">{escape(row["what"])}</text>'
            f'<rect x="304" y="{y}" width="{width:.1f}" height="18" fill="{OURS if row["is_ours"] else THEIRS}"/>'
            f'<text x="{308 + width:.1f}" y="{y + 13}">{seconds(row["min_s"])}</text>'
        )
    title = f"{part['title']}: CPU time per {rows[0]['per']}, logarithmic"
    return _svg(700, 44 + 26 * len(rows), title, "".join(drawn))


def curves(part: Mapping[str, Any]) -> str:
    """Draw wall time and memory of each step against the number of bundles, both axes logarithmic."""
    points = part["points"]
    steps = list(dict.fromkeys(p["step"] for p in points))
    drawn = _panel(points, steps, "wall_s", "wall time", lambda v: f"{v:g} s", 50)
    drawn += _panel(points, steps, "peak_mib", "memory of the largest process", lambda v: f"{v:g} MiB", 420)
    for i, step in enumerate(steps):
        drawn += f'<rect x="{50 + 240 * i}" y="292" width="14" height="4" fill="{LINES[i]}"/>'
        drawn += f'<text x="{70 + 240 * i}" y="299">{escape(step)}</text>'
    drawn += '<text x="50" y="319">solid: 2 workers, dashed: 1; one line per machine</text>'
    return _svg(760, 330, f"{part['title']}: by number of bundles, logarithmic", drawn)


def _panel(
    points: list[Mapping[str, Any]],
    steps: list[str],
    key: str,
    title: str,
    format_tick: Callable[[float], str],
    left: int,
) -> str:
    sizes = sorted({p["bundles"] for p in points})
    low, high = (
        math.floor(math.log10(min(p[key] for p in points))),
        math.ceil(math.log10(max(p[key] for p in points))),
    )

    def x(n: int) -> float:
        return left + 20 + 240 * math.log(n / sizes[0]) / (math.log(sizes[-1] / sizes[0]) or 1)

    def y(v: float) -> float:
        return 255 - 190 * (math.log10(v) - low) / max(high - low, 1)

    out = f'<text x="{left}" y="46">{title}</text>'
    for power in range(low, high + 1):
        at = y(10.0**power)
        out += f'<path d="M{left} {at:.1f}H{left + 290}" stroke="#ddd"/>'
        out += f'<text x="{left - 4}" y="{at + 4:.1f}" text-anchor="end">{format_tick(10.0**power)}</text>'
    for n in sizes:
        out += f'<text x="{x(n):.1f}" y="274" text-anchor="middle">{n:,}</text>'
    for i, step in enumerate(steps):
        for machine, workers in sorted({(p.get("machine", ""), p["workers"]) for p in points if p["step"] == step}):
            of = (step, workers, machine)
            own = sorted(
                (p["bundles"], p[key]) for p in points if (p["step"], p["workers"], p.get("machine", "")) == of
            )
            path = "L".join(f"{x(n):.1f} {y(v):.1f}" for n, v in own)
            dash = ' stroke-dasharray="4 3"' if workers == 1 else ""
            out += f'<path d="M{path}" fill="none" stroke="{LINES[i]}" stroke-width="2"{dash}/>'
            out += "".join(f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3" fill="{LINES[i]}"/>' for n, v in own)
    return out
