"""Measure validation, features and unchanged re-validation of whole simulated corpora, by size and workers.

Each step is a `phasewatch` command, as a user would start it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spent import spend
from timing import Figure, Part, Point

WHOLE = 76_660
SWEEP, FEATURES, AGAIN = "validate", "features", "validate again, nothing changed"


def measure(
    *,
    sizes: Sequence[int],
    machine: str,
    stores: Path | None = None,
    workers: Sequence[int] = (1, 2),
    before: Sequence[Point] = (),
) -> Part:
    """Measure each size once per number of workers; stores are generated, or reused from `stores`.

    Args:
        machine: Name of this machine.
        before: Earlier points; those of other sizes, workers or machines are kept.
    """
    points = [p for p in before if p.machine != machine or p.bundles not in sizes or p.workers not in workers]
    for bundles in sizes:
        with tempfile.TemporaryDirectory() as folder:
            store = (stores or Path(folder)) / str(bundles)
            if not store.exists():
                spend(
                    "simulate", "--hosts", "10", "--episodes", str(bundles), "--seconds", "180", "180", "--out", store
                )
            for n in workers:
                run = Path(folder) / f"run-{n}"
                for name, arguments in (
                    (SWEEP, ("validate", store, "--out", run, "--workers", str(n))),
                    (FEATURES, ("features", run, "--workers", str(n))),
                    (AGAIN, ("validate", store, "--out", run, "--workers", str(n))),
                ):
                    load = round(os.getloadavg()[0], 1)
                    points.append(
                        Point(
                            step=name,
                            bundles=bundles,
                            workers=n,
                            load=load,
                            machine=machine,
                            **asdict(spend(*arguments)),
                        )
                    )
    return Part(
        title="Whole corpora",
        about=(
            "Simulated stores of 180 s episodes on ten hosts, page cache warm, each step in its own process; "
            "memory is that of the largest process."
        ),
        points=tuple(points),
        figures=figures(points),
    )


def figures(points: Sequence[Point]) -> tuple[Figure, ...]:
    """Return the figures of each machine's largest size; times of a smaller corpus are extrapolated and marked."""
    machines = sorted({p.machine for p in points})
    found = [f for machine in machines for f in _of_one([p for p in points if p.machine == machine], len(machines) > 1)]
    most = max(p.peak_mib for p in points)
    return (
        *found,
        Figure(what="peak memory of a process in all sizes", must="≤1024", aim="", unit="MiB", measured=most),
    )


def _of_one(points: Sequence[Point], is_named: bool) -> tuple[Figure, ...]:
    most = max(p.bundles for p in points)
    at = {p.step: p for p in points if p.bundles == most and p.workers == max(q.workers for q in points)}
    notes = [*([] if most == WHOLE else [f"from {most:,} bundles"]), *([f"on {points[0].machine}"] if is_named else [])]
    up, note = WHOLE / most, ", ".join(notes)
    return (
        Figure(
            what=f"{WHOLE:,} bundles validated, binned and featured on 2 cores, wall",
            must="≤360",
            aim="≤90",
            unit="s",
            note=note,
            measured=(at[SWEEP].wall_s + at[FEATURES].wall_s) * up,
        ),
        Figure(
            what="CPU of that, over two cores",
            must="≤360",
            aim="≤90",
            unit="s",
            note=note,
            measured=(at[SWEEP].cpu_s + at[FEATURES].cpu_s) * up / 2,
        ),
        Figure(
            what="validating them again, nothing changed, wall",
            must="≤20",
            aim="≤5",
            unit="s",
            note=note,
            measured=at[AGAIN].wall_s * up,
        ),
    )
