"""Measure phasewatch beside its peers and write docs/performance.md: `python bench/run.py --run runs/demo`.

`--only PART,PART` measures those and keeps the others as they were, and so do sizes of whole corpora. Losses are shown as wins are.
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
KEPT = ROOT / "docs" / "results" / "performance.json"
SOAK = ROOT / "docs" / "soak.jsonl"
PICTURES = ROOT / "docs" / "results"
CORPUS = ROOT / "corpus"
PACKAGES = ("numpy", "scikit-learn", "scipy", "xgboost-cpu", "torch", "onnxruntime", "tsflex", "seglearn", "tsfresh", "aeon", "confidenceinterval", "polars", "pyarrow", "duckdb", "pandas", "orjson")  # fmt: skip

# Part → what measures it, in the page's order.
WORKS = {
    "passes": "passes.measure", "features": "peers.measure", "parsing": "parsing.measure", "tensors": "tensors.measure",
    "training": "nets.training", "models": "models.measure", "bootstrap": "bootstrap.measure", "live": "nets.live",
    "watching": "watching.measure", "interchange": "interchange.measure", "whole": "whole.measure",
}  # fmt: skip

# Figures that no bench but a soak's table holds: what, must, aim, the table, and how its rows become a number.
OF_SOAK: tuple[tuple[str, str, str, str, Callable[[list[dict[str, Any]]], float], str], ...] = (
    ("receiver: bundles lost, corrupt or left behind after cuts and kills", "≤0", "≤0", "Receiver storm",
     lambda rows: sum(r["lost"] + r["corrupt"] + r["left behind"] for r in rows), "of {bundles} bundles"),
    ("mutated bundles that crash, hang or are silently accepted", "≤0", "≤0", "Mutants of bundles",
     lambda rows: sum(r["wrong"] for r in rows), "of {mutants}"),
    ("README word by word in a clean place: `make demo`, cold", "≤360", "≤180", "A newcomer's walk",
     lambda rows: max(r["seconds"] for r in rows if r["command"] == "make demo"), "s"),
)  # fmt: skip


def measure(name: str, told: argparse.Namespace, before: Sequence[Point]) -> Part:
    """Measure one part, beside points of it that were measured before; what it needs is imported here alone."""
    module, _, work = WORKS[name].partition(".")
    whole = {
        "sizes": numbers(told.bundles),
        "workers": numbers(told.workers),
        "stores": told.stores,
        "before": before,
        "machine": machine(),
    }
    settings: dict[str, Any] = {"models": {"run": told.run}, "interchange": {"run": told.run}, "whole": whole, "parsing": {"corpus": CORPUS / "lab-v1"}, "watching": {"corpus": CORPUS}}.get(name, {})  # fmt: skip
    part: Part = getattr(importlib.import_module(module), work)(**settings)
    return part


def numbers(text: str) -> tuple[int, ...]:
    """Read numbers that commas part."""
    return tuple(map(int, text.split(",")))


def machine() -> str:
    """Name this one."""
    return f"{platform.machine()}, {read_processor_name(read_tsc_khz())}, {os.cpu_count()} cores"


def here() -> dict[str, str]:
    """Say on what it was measured."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": machine(), "python": platform.python_version(),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()), "load": f"{os.getloadavg()[0]:.1f}",
    }  # fmt: skip


def table(part: Mapping[str, Any]) -> str:
    """Set a part's rows; the factor is to the best of ours, above 1 where ours is faster."""
    if part["points"]:
        several = len({p.get("machine") for p in part["points"]}) > 1
        head = [
            "step",
            "bundles",
            "workers",
            "wall",
            "CPU",
            "CPU a bundle",
            "memory",
            "load before",
            *(["machine"] if several else []),
        ]
        body = [
            [p["step"], f"{p['bundles']:,}", str(p["workers"]), f"{p['wall_s']:.1f} s", f"{p['cpu_s']:.1f} s", seconds(p["cpu_s"] / p["bundles"]), f"{p['peak_mib']:.0f} MiB", "" if p.get("load") is None else f"{p['load']:.1f}", *([p["machine"]] if several else [])]
            for p in sorted(part["points"], key=lambda p: (p.get("machine", ""), p["bundles"], p["workers"]))
        ]  # fmt: skip
        return _markdown([head, *body])
    ours = min((r["min_s"] for r in part["rows"] if r["is_ours"]), default=None)
    scored = any(r["score"] is not None for r in part["rows"])
    head = ["", "least", "median", "repeats", *(["of ours"] if ours else []), *(["macro-F1"] if scored else []), ""]
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
    """Set every figure that is measured, and of the soak's what its tables hold."""
    rows = [["what", "must", "aim", "measured", "reaches", "where"]]
    for name, part in kept["parts"].items():
        for f in (Figure(**f) for f in part["figures"]):
            value = f"{f.measured:,.3g}" if f.measured < 1e3 else f"{f.measured:,.0f}"
            fate = f.fate() if f.must or f.aim else ""
            rows.append([f.what, f.must, f.aim, " ".join(x for x in (f"{value} {f.unit}", f.note) if x), fate, f"[{part['title']}](#{_anchor(part['title'])})" if name else ""])  # fmt: skip
    for what, must, aim, title, value_of, unit in OF_SOAK:
        own = [row["row"] for row in kept["soak"] if row["table"] == title]
        if not own:
            rows.append([what, must, aim, "not measured yet", "", "`make soak`"])
            continue
        sums = {key: f"{sum(r[key] for r in own):,}" for key in own[0] if all(isinstance(r.get(key), int) for r in own)}
        f = Figure(what=what, must=must, aim=aim, measured=value_of(own), unit=unit.format_map(sums))
        rows.append([what, must, aim, f"{f.measured:,.3g} {f.unit}", f.fate(), "[soak](soak.md)"])
    return _markdown(rows)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def render(kept: Mapping[str, Any]) -> str:
    """Set the page."""
    out = [
        "<!-- generated by bench/run.py: do not edit -->\n\n# Performance\n",
        "Side by side in one run, each peer called as its own documents do it, and its results checked equal where they should be.",
        "CPU time of one process on one thread, in turns, least and median; ratios matter, milliseconds are of one machine.",
        "`make bench` measures all of it in an environment of its own (`bench/requirements.txt`).\n",
        "## Figures to reach\n",
        "A figure without `must` and `aim` is there to compare. What is missed is said so.\n",
        figures(kept),
        "",
    ]
    for name, part in kept["parts"].items():
        facts = part["measured_on"]
        out += [
            f"## {part['title']}\n", f"{part['about']} `python bench/run.py --only {name}`\n", table(part) if part["rows"] or part["points"] else "Its figures stand in the first table.",
            f"\n![{part['title']}](results/performance-{name}.svg)\n" if part["rows"] or part["points"] else "",
            f"Measured on {facts['machine']}, Python {facts['python']}, load {facts['load']} when it began; {facts['versions']}.\n",
        ]  # fmt: skip
    return "\n".join(out)


def main() -> int:
    """Measure, keep, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="a run of the bundled corpus")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--bundles", default="1000,10000", help="sizes of simulated corpora; 76660 is the whole one")
    parser.add_argument("--workers", default="1,2", help="in how many processes each is taken through")
    parser.add_argument("--stores", type=Path, help="keep the simulated corpora in this folder, and take them up again")
    parser.add_argument("--check", action="store_true", help="only say whether the page shows what is kept")
    parser.add_argument(
        "--render", action="store_true", help="measure nothing; take in what the soak found, and set the page"
    )
    told = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_bytes()) if KEPT.is_file() else {"parts": {}}
    if told.check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render(kept)
        return 0 if fresh else 1
    kept["soak"] = [
        row
        for row in map(json.loads, SOAK.read_text(encoding="utf-8").splitlines())
        if row["table"] in {of[3] for of in OF_SOAK}
    ]
    if told.render:
        write(kept)
        return 0
    wanted = told.only.split(",") if told.only else list(WORKS)
    if unknown := set(wanted) - set(WORKS):
        raise SystemExit(f"no part {min(unknown)!r}; there are {', '.join(WORKS)}")
    if len(wanted) > 1:
        for name in wanted:  # each in a process of its own, with a memory that nothing else has touched
            same = ["--run", told.run, "--bundles", told.bundles, "--workers", told.workers]
            same += ["--stores", told.stores] if told.stores else []
            subprocess.run([sys.executable, __file__, *same, "--only", name], check=True)
        return 0
    name, facts = wanted[0], here()
    print(f"{name} …", file=sys.stderr, flush=True)
    known = kept["parts"].get(name, {"points": ()})
    before = [Point(**{"machine": known["measured_on"]["machine"], **p}) for p in known["points"]]
    part = json.loads(json.dumps(asdict(measure(name, told, before)))) | {"measured_on": facts}
    kept["parts"] = {
        key: part if key == name else kept["parts"][key] for key in WORKS if key == name or key in kept["parts"]
    }
    if part["rows"] or part["points"]:
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / f"performance-{name}.svg").write_text(drawing.picture(part), encoding="utf-8")
    write(kept)
    for f in (Figure(**f) for f in part["figures"]):
        print(f"{f.what}: {f.measured:,.3g} {f.unit} {f.note}".rstrip(), f"(must {f.must or '–'}, aim {f.aim or '–'})")
    return 0


def write(kept: Mapping[str, Any]) -> None:
    """Keep the numbers, set the page."""
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    PAGE.write_text(render(kept), encoding="utf-8")
    print(PAGE.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
