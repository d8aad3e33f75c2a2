"""Measure phasewatch against its peers and write docs/performance.md: `python bench/run.py --run runs/demo`.

`--only PART,PART` measures those parts and keeps the others; sizes of whole corpora are kept likewise. Results in which
phasewatch is slower are shown, too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import drawing
from drawing import seconds
from timing import Figure, Part, Point

from phasewatch.lab.host import read_processor_name
from phasewatch.lab.vm import read_tsc_khz

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
NUMBERS_PATH = ROOT / "docs" / "results" / "performance.json"
SOAK = ROOT / "docs" / "soak.jsonl"
PICTURES = ROOT / "docs" / "results"
CORPUS = ROOT / "corpus"
PACKAGES = (
    "numpy",
    "scikit-learn",
    "scipy",
    "xgboost-cpu",
    "torch",
    "onnxruntime",
    "tsflex",
    "seglearn",
    "tsfresh",
    "aeon",
    "confidenceinterval",
    "polars",
    "pyarrow",
    "duckdb",
    "pandas",
    "orjson",
)

# Part → function that measures it, in the order of the page.
MEASUREMENTS = {
    "passes": "passes.measure",
    "features": "peers.measure",
    "parsing": "parsing.measure",
    "tensors": "tensors.measure",
    "training": "nets.training",
    "models": "models.measure",
    "bootstrap": "bootstrap.measure",
    "live": "nets.live",
    "watching": "watching.measure",
    "fleet": "fleet.measure",
    "overhead": "overhead.measure",
    "interchange": "interchange.measure",
    "whole": "whole.measure",
}

# Figures from soak tables: what, must, aim, the table, how its rows become a number, and the unit.
SOAK_FIGURES: tuple[tuple[str, str, str, str, Callable[[list[dict[str, Any]]], float], str], ...] = (
    (
        "receiver: bundles lost, corrupt or left behind after cuts and kills",
        "≤0",
        "≤0",
        "Receiver storm",
        lambda rows: sum(r["lost"] + r["corrupt"] + r["left behind"] for r in rows),
        "of {bundles} bundles",
    ),
    (
        "mutated bundles that crash, hang or are silently accepted",
        "≤0",
        "≤0",
        "Mutants of bundles",
        lambda rows: sum(r["wrong"] for r in rows),
        "of {mutants}",
    ),
    (
        "`make demo` in a fresh clone",
        "≤360",
        "≤180",
        "README commands in a fresh clone",
        lambda rows: max(r["seconds"] for r in rows if r["command"] == "make demo"),
        "s",
    ),
)


def measure(name: str, given: argparse.Namespace, before: Sequence[Point]) -> Part:
    """Measure one part and keep its earlier points; its libraries are imported only here."""
    module, _, work = MEASUREMENTS[name].partition(".")
    whole = {
        "sizes": numbers(given.bundles),
        "workers": numbers(given.workers),
        "stores": given.stores,
        "before": before,
        "machine": machine(),
    }
    settings: dict[str, Any] = {
        "models": {"run": given.run},
        "interchange": {"run": given.run},
        "whole": whole,
        "parsing": {"corpus": CORPUS / "lab-v1"},
        "watching": {"corpus": CORPUS},
        "fleet": {"corpus": CORPUS},
        "overhead": {"corpus": CORPUS},
    }.get(name, {})
    part: Part = getattr(importlib.import_module(module), work)(**settings)
    return part


def numbers(text: str) -> tuple[int, ...]:
    """Parse numbers that are separated by commas."""
    return tuple(map(int, text.split(",")))


def machine() -> str:
    """Return the name of this machine."""
    return f"{platform.machine()}, {read_processor_name(read_tsc_khz())}, {os.cpu_count()} cores"


def here() -> dict[str, str]:
    """Return the machine, the versions and the load of this measurement."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def table(part: Mapping[str, Any]) -> str:
    """Render the rows of a part; a factor above 1 means slower than the fastest phasewatch row."""
    if part["points"]:
        several = len({p.get("machine") for p in part["points"]}) > 1
        head = [
            "step",
            "bundles",
            "workers",
            "wall",
            "CPU",
            "CPU per bundle",
            "memory",
            "load before",
            *(["machine"] if several else []),
        ]
        body = [
            [
                p["step"],
                f"{p['bundles']:,}",
                str(p["workers"]),
                f"{p['wall_s']:.1f} s",
                f"{p['cpu_s']:.1f} s",
                seconds(p["cpu_s"] / p["bundles"]),
                f"{p['peak_mib']:.0f} MiB",
                "" if p.get("load") is None else f"{p['load']:.1f}",
                *([p["machine"]] if several else []),
            ]
            for p in sorted(part["points"], key=lambda p: (p.get("machine", ""), p["bundles"], p["workers"]))
        ]
        return _markdown([head, *body])
    ours = min((r["min_s"] for r in part["rows"] if r["is_ours"]), default=None)
    scored = any(r["score"] is not None for r in part["rows"])
    head = [
        "",
        "minimum",
        "median",
        "repeats",
        *(["relative to phasewatch"] if ours else []),
        *(["macro-F1"] if scored else []),
        "",
    ]
    body = []
    for r in part["rows"]:
        cells = [r["what"], seconds(r["min_s"]), seconds(r["median_s"]), str(r["repeats"])]
        cells += [f"{r['min_s'] / ours:,.2f}×"] if ours else []
        cells += ["" if r["score"] is None else f"{r['score']:.3f}"] if scored else []
        body.append([*cells, r["note"]])
    return _markdown([head, *body])


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def figures(kept: Mapping[str, Any]) -> str:
    """Render every measured figure, and the figures of the soak tables."""
    rows = [["figure", "must", "aim", "measured", "reached", "section"]]
    for name, part in kept["parts"].items():
        for f in (Figure(**f) for f in part["figures"]):
            value = f"{f.measured:,.3g}" if f.measured < 1e3 else f"{f.measured:,.0f}"
            target = f.target() if f.must or f.aim else ""
            rows.append(
                [
                    f.what,
                    f.must,
                    f.aim,
                    " ".join(x for x in (f"{value} {f.unit}", f.note) if x),
                    target,
                    f"[{part['title']}](#{_anchor(part['title'])})" if name else "",
                ]
            )
    for what, must, aim, title, value_of, unit in SOAK_FIGURES:
        own = [row["row"] for row in kept["soak"] if row["table"] == title]
        if not own:
            rows.append([what, must, aim, "not measured yet", "", "`make soak`"])
            continue
        sums = {key: f"{sum(r[key] for r in own):,}" for key in own[0] if all(isinstance(r.get(key), int) for r in own)}
        f = Figure(what=what, must=must, aim=aim, measured=value_of(own), unit=unit.format_map(sums))
        rows.append([what, must, aim, f"{f.measured:,.3g} {f.unit}", f.target(), "[soak](soak.md)"])
    return _markdown(rows)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def render(kept: Mapping[str, Any]) -> str:
    """Render the page."""
    out = [
        "<!-- generated by bench/run.py: do not edit -->\n\n# Performance\n",
        "All implementations are measured in one run. Each peer is called as its documentation shows,",
        "and results that should be equal are checked. Times are CPU time of one process on one thread, measured in",
        "turns (minimum and median). Ratios matter; the times are of one machine.",
        "`make bench` measures everything in a separate environment (`bench/requirements.txt`).\n",
        "## Targets\n",
        "A figure without `must` and `aim` is for comparison. Missed targets are marked.\n",
        figures(kept),
        "",
    ]
    for name, part in kept["parts"].items():
        facts = part["measured_on"]
        out += [
            f"## {part['title']}\n",
            f"{part['about']} `python bench/run.py --only {name}`\n",
            table(part) if part["rows"] or part["points"] else "Its figures are in the first table.",
            f"\n![{part['title']}](results/performance-{name}.svg)\n" if part["rows"] or part["points"] else "",
            f"Measured on {facts['machine']}, Python {facts['python']}, load {facts['load']} at the start; "
            f"{facts['versions']}.\n",
        ]
    return "\n".join(out)


def main() -> int:
    """Measure, save the numbers and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="a run of the bundled corpus")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--bundles", default="1000,10000", help="sizes of simulated corpora; 76660 is the whole one")
    parser.add_argument("--workers", default="1,2", help="numbers of processes")
    parser.add_argument("--stores", type=Path, help="keep the simulated corpora in this folder, and reuse them")
    parser.add_argument("--check", action="store_true", help="only check that the page shows the saved numbers")
    parser.add_argument("--render", action="store_true", help="measure nothing; read the soak rows and write the page")
    given = parser.parse_args()
    kept: dict[str, Any] = json.loads(NUMBERS_PATH.read_bytes()) if NUMBERS_PATH.is_file() else {"parts": {}}
    if given.check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render(kept)
        return 0 if fresh else 1
    kept["soak"] = [
        row
        for row in map(json.loads, SOAK.read_text(encoding="utf-8").splitlines())
        if row["table"] in {of[3] for of in SOAK_FIGURES}
    ]
    if given.render:
        write(kept)
        return 0
    wanted = given.only.split(",") if given.only else list(MEASUREMENTS)
    if unknown := set(wanted) - set(MEASUREMENTS):
        raise SystemExit(f"no part {min(unknown)!r}; there are {', '.join(MEASUREMENTS)}")
    if len(wanted) > 1:
        for name in wanted:  # each in a process of its own, with a memory that nothing else has touched
            same = ["--run", given.run, "--bundles", given.bundles, "--workers", given.workers]
            same += ["--stores", given.stores] if given.stores else []
            subprocess.run([sys.executable, __file__, *same, "--only", name], check=True)
        return 0
    name, facts = wanted[0], here()
    print(f"{name} …", file=sys.stderr, flush=True)
    known = kept["parts"].get(name, {"points": ()})
    before = [Point(**{"machine": known["measured_on"]["machine"], **p}) for p in known["points"]]
    part = json.loads(json.dumps(asdict(measure(name, given, before)))) | {"measured_on": facts}
    kept["parts"] = {
        key: part if key == name else kept["parts"][key] for key in MEASUREMENTS if key == name or key in kept["parts"]
    }
    if part["rows"] or part["points"]:
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / f"performance-{name}.svg").write_text(drawing.picture(part), encoding="utf-8")
    write(kept)
    for f in (Figure(**f) for f in part["figures"]):
        print(f"{f.what}: {f.measured:,.3g} {f.unit} {f.note}".rstrip(), f"(must {f.must or '–'}, aim {f.aim or '–'})")
    return 0


def write(kept: Mapping[str, Any]) -> None:
    """Save the numbers and write the page."""
    NUMBERS_PATH.write_text(json.dumps(kept, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    PAGE.write_text(render(kept), encoding="utf-8")
    print(PAGE.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
