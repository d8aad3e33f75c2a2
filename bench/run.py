"""Measure phasewatch beside its peers and write docs/performance.md: `python bench/run.py --run runs/demo`.

`--only PART,PART` measures those and keeps the others as they were. Losses are shown as wins are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
KEPT = ROOT / "docs" / "results" / "performance.json"
PICTURES = ROOT / "docs" / "results"
PACKAGES = ("numpy", "scikit-learn", "scipy", "xgboost-cpu", "torch", "onnxruntime", "aeon", "polars", "pyarrow", "duckdb", "pandas", "orjson")  # fmt: skip

# DESIGN's figures: what, must, aim, and the command that measures each.
FIGURES = (
    ("verify, decode, gate, grid and features of an episode, against reading without parsing", "≤ 9×", "≤ 2.5×", "make bench-features"),
    ("the same against stdlib json and a loop per window", "≥ 6×", "≥ 16×", "make bench-features"),
    ("76,660 simulated bundles on 2 cores, memory ≤ 1 GiB", "≤ 6 min", "≤ 90 s", "make bench-features"),
    ("unchanged re-sweep of them", "≤ 20 s", "≤ 5 s", "make bench-features"),
    ("features against tsflex, at its best, seglearn, tsfresh", "100× · 2.5× · 7× · 1000×", "400× · 10× · 30× · 2000×", "make bench-features"),
    ("tensor batches against a loader per item; disk against cut windows", "≥ 5×; ≤ 0.55×", "≥ 10×; ≤ 0.51×", "make bench-features"),
    ("10,000 paired resamples of 12 models, against one model's cost", "≤ 3×", "≤ 0.3 s CPU in all", "bootstrap:ratio to one model"),
    ("the same against a loop over scikit-learn", "≥ 100×", "≥ 100×", "bootstrap:faster than the loop"),
    ("live: window to event p99; start; RSS; CPU of one VM", "50 ms; 1 s; 150 MB; 3 %", "10 ms; 0.3 s; 80 MB; 1 %", "make soak (tests of live)"),
    ("receiver: bundles lost or half-visible after cuts and kills", "0", "0", "make soak (tests of store)"),
    ("mutated bundles that crash, hang or are silently accepted", "0 of 50,000", "0 of 1,000,000", "make soak (tests of episode)"),
)  # fmt: skip


def bootstrap_part() -> dict[str, Any]:
    """Give the ratios of the resampling as a part; its own file measures them."""
    import bootstrap
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        found = bootstrap.measure(10_000, 12, 20)
    rows = [
        {"what": "phasewatch, 12 models, all pairs and classes", "min_s": found["all models, CPU s"], "is_ours": True},
        {"what": "phasewatch, one model", "min_s": found["one model, CPU s"], "is_ours": True},
        {"what": "loop over scikit-learn's f1_score", "min_s": found["scikit-learn loop, CPU s"], "note": "timed on 20 resamples, multiplied up"},
    ]  # fmt: skip
    base = {"median_s": None, "repeats": 3, "per": "10,000 resamples", "is_ours": False, "score": None, "note": ""}
    about = f"180 sessions of 28 windows; largest difference to scikit-learn on shared resamples {found['largest difference']:.1g}."
    return {"title": "Bootstrap", "about": about, "rows": [base | r for r in rows], "command": "python bench/run.py --only bootstrap", "facts": found}  # fmt: skip


def parts(run: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """List what can be measured."""
    import interchange
    import models
    import nets
    import parsing

    return {
        "bootstrap": bootstrap_part,
        "parsing": lambda: asdict(parsing.measure(ROOT / "corpus" / "lab-v1")),
        "models": lambda: asdict(models.measure(run)),
        "training": lambda: asdict(nets.training()),
        "live": lambda: asdict(nets.live()),
        "interchange": lambda: asdict(interchange.measure(run)),
    }


def here() -> dict[str, str]:
    """Say on what it was measured."""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")  # fmt: skip
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{platform.machine()}, {cpu}, {len(os.sched_getaffinity(0))} cores", "python": platform.python_version(),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()), "load": f"{os.getloadavg()[0]:.1f}",
    }  # fmt: skip


def seconds(value: float | None) -> str:
    """Set a time in a unit that can be read."""
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def picture(part: Mapping[str, Any]) -> str:
    """Draw least times as bars on a logarithmic scale, ours dark."""
    import math

    rows = sorted(part["rows"], key=lambda r: r["min_s"])
    low = math.log10(rows[0]["min_s"]) - 0.3
    span = max(math.log10(rows[-1]["min_s"]) - low, 0.5)
    bars = []
    for i, row in enumerate(rows):
        width, y = 300 * (math.log10(row["min_s"]) - low) / span, 34 + 26 * i
        fill = "#1b4965" if row["is_ours"] else "#b8b8b8"
        bars.append(
            f'<text x="296" y="{y + 13}" text-anchor="end">{escape(row["what"])}</text>'
            f'<rect x="304" y="{y}" width="{width:.1f}" height="18" fill="{fill}"/>'
            f'<text x="{308 + width:.1f}" y="{y + 13}">{seconds(row["min_s"])}</text>'
        )
    height = 44 + 26 * len(rows)
    title = f"{part['title']}: CPU time per {rows[0]['per']}, logarithmic"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{height}" viewBox="0 0 700 {height}" role="img">'
        '<style>text{font:12px sans-serif;fill:#222}</style><rect width="700" height="100%" fill="#fff"/>'
        f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>{"".join(bars)}</svg>\n'
    )


def table(part: Mapping[str, Any]) -> str:
    """Set a part's rows; the factor is to the best of ours, above 1 where ours is faster."""
    ours = min((r["min_s"] for r in part["rows"] if r["is_ours"]), default=None)
    scored = any(r["score"] is not None for r in part["rows"])
    head = ["", "least", "median", "repeats", *(["of ours"] if ours else []), *(["macro-F1"] if scored else []), ""]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in part["rows"]:
        cells = [r["what"], seconds(r["min_s"]), seconds(r["median_s"]), str(r["repeats"])]
        cells += [f"{r['min_s'] / ours:.2f}×"] if ours else []
        cells += ["" if r["score"] is None else f"{r['score']:.3f}"] if scored else []
        lines.append("| " + " | ".join([*cells, r["note"]]) + " |")
    return "\n".join(lines)


def measured(command: str, kept: Mapping[str, Any]) -> str:
    """Give a figure's measured value where this bench has it, else where it is measured."""
    name, _, fact = command.partition(":")
    part = kept["parts"].get(name)
    if fact and part:
        return f"{part['facts'][fact]:.3g}×, {part['facts']['all models, CPU s']:.2g} s CPU"
    return f"`{command}`" if not fact else "not measured here"


def render(kept: Mapping[str, Any]) -> str:
    """Set the page."""
    out = [
        "<!-- generated by bench/run.py: do not edit -->\n\n# Performance\n",
        "Side by side in one run, each peer called as its own documents do it, and its results checked equal where they should be.",
        "CPU time of one process on one thread, in turns, least and median; ratios matter, milliseconds are of one machine.",
        "`make bench` measures all of it in an environment of its own (`bench/requirements.txt`).\n",
        "## Figures to reach\n",
        "| what | must | aim | measured |\n|---|---|---|---|",
        *(f"| {what} | {must} | {aim} | {measured(command, kept)} |" for what, must, aim, command in FIGURES),
        "",
        "`make bench-features` writes [performance-features.md](performance-features.md).\n",
    ]
    for name, part in kept["parts"].items():
        facts = part["measured_on"]
        out += [
            f"## {part['title']}\n", part["about"], f"Peers that are faster or score higher than ours stand here as they are. `{part['command']}`\n",
            table(part), f"\n![{part['title']}](results/performance-{name}.svg)\n",
            f"Measured on {facts['machine']}, Python {facts['python']}, load {facts['load']} when it began; {facts['versions']}.\n",
        ]  # fmt: skip
    return "\n".join(out)


def main() -> int:
    """Measure, keep, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="a run of the bundled corpus")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--check", action="store_true", help="only say whether the page shows what is kept")
    told = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_bytes()) if KEPT.is_file() else {"parts": {}}
    if told.check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render(kept)
        return 0 if fresh else 1
    can = parts(told.run)
    wanted = told.only.split(",") if told.only else list(can)
    if unknown := set(wanted) - set(can):
        raise SystemExit(f"no part {min(unknown)!r}; there are {', '.join(can)}")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        facts = here()
        print(f"{name} …", file=sys.stderr)
        kept["parts"][name] = can[name]() | {"measured_on": facts}
        kept["parts"] = {key: kept["parts"][key] for key in can if key in kept["parts"]}
        KEPT.write_text(json.dumps(kept, indent=1, sort_keys=False) + "\n", encoding="utf-8")
        (PICTURES / f"performance-{name}.svg").write_text(picture(kept["parts"][name]), encoding="utf-8")
        PAGE.write_text(render(kept), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
