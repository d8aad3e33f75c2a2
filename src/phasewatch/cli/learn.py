"""Commands from a run's features to its report: train, evaluate, report, run, demo."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from phasewatch.cli import base

if TYPE_CHECKING:
    from phasewatch.stages import Settings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (train, evaluate, audit, report, run, demo):
        app.command(epilog=base.CODES)(command)


class Grid(StrEnum):
    """Which cells are trained."""

    SHORT = "short"
    FULL = "full"


def train(
    run: Path = typer.Argument(..., help="A run with splits."),
    workers: int = typer.Option(2, min=1, help="Cells at a time, one thread each."),
    seed: int = typer.Option(0, help="Of the models."),
    grid: Grid = typer.Option(Grid.SHORT, help="Which threat models and how many seeds."),
    models: str = typer.Option("", help="Only these models of the grid, separated by commas."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Train every model on every fold; what is finished stays.

    Example: phasewatch train runs/mine
    """
    from phasewatch import atomic, stages

    settings = stages.Settings(store=run, run=run, workers=workers, seed=seed, grid=grid, models=base.names(models))
    with atomic.lock(base.need_run(run)), base.progress(quiet=as_json) as tell:
        done = stages.train(settings, tell=lambda cell, n, m: tell("train", n, m, f"{cell.model} {cell.fold}"))
    result = {"trained": len(done.trained), "kept": len(done.kept), "rows": done.rows, "predictions": str(done.path)}
    words = f"{len(done.trained)} cells trained, {len(done.kept)} kept, {done.rows:,} predictions"
    base.answer(result, as_json=as_json, lines=[words, str(done.path)])


def evaluate(
    run: Path = typer.Argument(..., help="A run with predictions."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Score the predictions, with intervals over sessions and the baselines beside them.

    Example: phasewatch evaluate runs/mine
    """
    from phasewatch import atomic, stages
    from phasewatch.evaluate.rows import headline

    with atomic.lock(base.need_run(run)):
        metrics = stages.evaluate(stages.Settings(store=run, run=run))
    path = run / stages.METRICS
    result = {"headline": headline(metrics), "numbers": len(metrics.metrics), "metrics": str(path)}
    base.answer(result, as_json=as_json, lines=[headline(metrics), str(path)])


def audit(
    run: Path = typer.Argument(..., help="A run with predictions and scores."),
    store: Path = typer.Option(None, help="Where its bundles are; what the run says itself if left out."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Check what a run promises: make it again from the bundles, train again, shuffle labels, score again.

    Example: phasewatch audit runs/mine
    """
    from phasewatch import atomic, pipeline, stages
    from phasewatch.audit.checks import AUDIT

    settings = pipeline.settings_of(base.need_run(run), store=store)
    with atomic.lock(run), base.progress(quiet=as_json) as tell:
        done = stages.audit(settings, tell=lambda name, n, m: tell("audit", n, m, name))
    rows = base.table([[str(check.fate), check.name, check.words] for check in done.checks])
    words = "the run keeps its promises" if done.passes else f"the run breaks {len(done.broken)} of its promises"
    result = {
        "passes": done.passes,
        "checks": [{f: str(getattr(c, f)) for f in c.__struct_fields__} for c in done.checks],
        "audit": str(run / AUDIT),
    }
    base.answer(result, as_json=as_json, lines=[*rows, words, str(run / AUDIT)])
    if not done.passes:
        raise typer.Exit(1)


def report(
    run: Path = typer.Argument(..., help="A run with scores."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Write the run's page: the claim, how sure, where it fails, what it rests on, how to repeat it.

    Example: phasewatch report runs/mine
    """
    from phasewatch import atomic, stages

    with atomic.lock(base.need_run(run)):
        path = stages.report(stages.Settings(store=run, run=run))
    base.answer({"report": str(path)}, as_json=as_json, lines=[str(path)])


def run(
    store: Path = typer.Argument(None, help="A store of episodes; the bundled corpus if left out."),
    out: Path = typer.Option(..., help="The run's folder."),
    workers: int = typer.Option(2, min=1, help="Processes."),
    limit: int = typer.Option(0, min=0, help="A stratified, seeded subset of so many bundles; 0 for all."),
    include_degraded: bool = typer.Option(True, help="Use episodes with something missing or repaired, too."),
    grid: Grid = typer.Option(Grid.SHORT, help="Which threat models and how many seeds."),
    models: str = typer.Option("", help="Only these models of the grid, separated by commas."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Take a store the whole way: validate, features, split, train, evaluate, report. Run again, it resumes.

    Example: phasewatch run my-store --out runs/mine
    """
    from phasewatch.stages import Settings

    chosen = base.bundled_corpus() if store is None else store
    settings = Settings(
        store=chosen, run=out, workers=workers, limit=limit, include_degraded=include_degraded, grid=grid,
        models=base.names(models),
    )  # fmt: skip
    _go(settings, as_json=as_json)


def demo(
    out: Path = typer.Option(Path("runs/demo"), help="The run's folder."),
    workers: int = typer.Option(2, min=1, help="Processes."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Take the bundled recordings the whole way, from bundles to the report.

    Example: phasewatch demo
    """
    from phasewatch.stages import Settings

    _go(Settings(store=base.bundled_corpus(), run=out, workers=workers), as_json=as_json)


def _go(settings: Settings, *, as_json: bool) -> None:
    from phasewatch import pipeline

    with base.progress(quiet=as_json) as tell:
        done = pipeline.run(settings, tell=tell)
    words = ["nothing to do: the run is up to date"] if done.is_unchanged else []
    result = {
        "headline": done.headline, "report": str(done.report), "unchanged": done.is_unchanged,
        "stages": [{"stage": name, "fate": fate, "words": said} for name, fate, said in done.stages],
    }  # fmt: skip
    base.answer(result, as_json=as_json, lines=[*words, done.headline, str(done.report)])
