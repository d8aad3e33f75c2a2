"""Commands from a run's features to its report: train, evaluate, report, run, demo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import typer

from phasewatch.artifacts import METRICS_FILE
from phasewatch.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from phasewatch.pipeline.stages import RunSettings
    from phasewatch.training.experiment import Experiment


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (train, evaluate, audit, report, run, demo):
        app.command(epilog=common.EXIT_CODES_HELP)(command)


class GridChoice(StrEnum):
    """Which cells are trained."""

    SHORT = "short"
    FULL = "full"


class ReportFormat(StrEnum):
    """As what a report is written."""

    HTML = "html"
    MD = "md"
    JSON = "json"


def train(
    run: Path = typer.Argument(..., help="A run with splits."),
    workers: int = typer.Option(2, min=1, help="Cells at a time, one thread each."),
    seed: int = typer.Option(0, help="Of the models."),
    grid: GridChoice = typer.Option(
        GridChoice.SHORT, help="short: what the demo trains; full: every recipe and model."
    ),
    recipes: str = typer.Option("", help="`all` is the full grid; or only these recipes, separated by commas."),
    models: str = typer.Option("", help="Only these models of the grid, separated by commas."),
    model: list[str] = typer.Option([], help="A model of yours, module:Class or a name that its package registers."),
    threats: str = typer.Option("", help="Train these masks instead, gbt on deploy unless told otherwise: proc+tap."),
    tune: int = typer.Option(0, min=0, help="Settings to try for each cell, judged on its validation A; 0 for none."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Train every cell of the grid (recipe, fold, threat model, model); what is finished stays.

    A cell that fails costs no other: all are tried, the failed ones are listed, and the exit code is that of the first.
    The same command tries them again.

    Example: phasewatch train runs/mine --recipes all
    """
    from phasewatch import atomic
    from phasewatch.pipeline import stages

    pass  # own

    everything = recipes == "all"
    settings = stages.RunSettings(
        store=run, run=run, workers=workers, seed=seed, grid=GridChoice.FULL if everything else grid,
        models=(*common.parse_names(models), *model), recipes=() if everything else common.parse_names(recipes),
        threats=common.parse_names(threats), trials=tune,
    )  # fmt: skip
    with atomic.lock(common.check_run_folder(run)), common.show_progress(quiet=as_json) as tell:
        done = stages.train(settings, progress=SimpleNamespace(update=tell))
    result = {
        "trained": len(done.trained), "kept": len(done.kept), "rows": done.rows, "predictions": str(done.path), "trials": tune,
        "failed": common.describe_failures(done.failed),
    }  # fmt: skip
    tried = f", each the best of {tune} trials on its validation A" if tune else ""
    words = f"{len(done.trained)} cells trained{tried}, {len(done.kept)} kept, {done.rows:,} predictions"
    common.print_result(result, as_json=as_json, lines=[*common.render_failures(done.failed), words, str(done.path)])
    if done.failed:
        raise typer.Exit(done.failed[0].failure.exit_code)


def evaluate(
    run: Path = typer.Argument(..., help="A run with predictions."),
    why: str = typer.Option("", metavar="EPISODE", help="Explain one window of this test episode instead of scoring."),
    at: float = typer.Option(0.0, min=0, metavar="SECONDS", help="Of the window's middle, since the first label."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Score the predictions, with intervals over sessions and the baselines beside them.

    Example: phasewatch evaluate runs/mine
    """
    from phasewatch import atomic
    from phasewatch.evaluation.metric_table import render_headline
    from phasewatch.pipeline import stages

    common.check_option_pair("--at", "--why", alone=at > 0 and not why)
    if why:
        _print_explanation(common.check_run_folder(run), why, at, as_json=as_json)
        return
    with atomic.lock(common.check_run_folder(run)):
        metrics = stages.evaluate(stages.RunSettings(store=run, run=run))
    path = run / METRICS_FILE
    result = {"headline": render_headline(metrics), "numbers": len(metrics.metrics), "metrics": str(path)}
    common.print_result(result, as_json=as_json, lines=[render_headline(metrics), str(path)])


def _print_explanation(run: Path, episode_id: str, at_s: float, *, as_json: bool) -> None:
    """Print the channels that the headline's model hangs on in one window."""
    from dataclasses import asdict

    from phasewatch.pipeline import stages

    told = stages.explain(run, episode_id, at_s)
    rows = [["channel", "mean", "unit", "less likely by"]]
    rows += [[r.channel, "–" if r.value is None else f"{r.value:.4g}", r.unit, f"{r.drop:+.3f}"] for r in told.reasons]
    words = f"window around {told.at_s:g} s: decided {told.decided} (p = {told.probability:.2f}), truth {told.truth}; without a channel's word it is less likely by so much:"
    common.print_result(asdict(told), as_json=as_json, lines=[words, *common.render_table(rows)])


def audit(
    run: Path = typer.Argument(..., help="A run with predictions and scores."),
    store: str = typer.Option(
        None, help="Where its bundles are, a folder or s3://bucket/prefix; what the run says itself if left out."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Check what a run promises: make it again from the bundles, train again, shuffle labels, score again.

    Example: phasewatch audit runs/mine
    """
    from phasewatch import atomic
    from phasewatch.artifacts import AUDIT_FILE
    from phasewatch.pipeline import runner, stages
    from phasewatch.store.base import parse_store_location

    settings = runner.read_settings(common.check_run_folder(run), store=parse_store_location(store) if store else None)
    with atomic.lock(run), common.show_progress(quiet=as_json) as tell:
        done = stages.audit(settings, tell=lambda name, n, m: tell("audit", n, m, name))
    rows = common.render_table([[c.outcome_label, c.name, c.words] for c in done.checks])
    result = {
        "passes": done.passes,
        "checks": [{f: str(getattr(c, f)) for f in c.__struct_fields__} for c in done.checks],
        "audit": str(run / AUDIT_FILE),
    }
    common.print_result(result, as_json=as_json, lines=[*rows, done.summary, str(run / AUDIT_FILE)])
    if not done.passes:
        raise typer.Exit(1)


def report(
    run: Path = typer.Argument(..., help="A run with scores."),
    form: ReportFormat = typer.Option(
        ReportFormat.HTML, "--format", help="The page, or its words and numbers without pictures."
    ),
    out: Path = typer.Option(None, help="The file; RUN/report.FORMAT if left out."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Write the run's page: the claim, how sure, where it fails, what it rests on, how to repeat it.

    Example: phasewatch report runs/mine --format md
    """
    from phasewatch import atomic
    from phasewatch.pipeline import stages

    common.check_run_folder(run)
    only_reads = out is not None and not out.resolve().is_relative_to(run.resolve())  # a run on read-only media
    with nullcontext() if only_reads else atomic.lock(run):
        path = stages.build_report(stages.RunSettings(store=run, run=run), form, out)
    common.print_result({"report": str(path)}, as_json=as_json, lines=[str(path)])


def run(
    store: str = typer.Argument(
        None, help="A store of episodes, a folder or s3://bucket/prefix; the bundled corpus if left out."
    ),
    out: Path = typer.Option(..., help="The run's folder."),
    workers: int = typer.Option(2, min=1, help="Processes."),
    limit: int = typer.Option(0, min=0, help="A stratified, seeded subset of so many bundles; 0 for all."),
    include_degraded: bool = typer.Option(True, help="Use episodes with something missing or repaired, too."),
    grid: GridChoice = typer.Option(
        GridChoice.SHORT, help="short: what the demo trains; full: every recipe and model."
    ),
    recipes: str = typer.Option("", help="Only these recipes of the grid, separated by commas."),
    models: str = typer.Option("", help="Only these models of the grid, separated by commas."),
    engine: str = typer.Option("local", help="What reads the bundles: `local` processes, or `ray`."),
    address: str = typer.Option("", help="With --engine ray: a running cluster; one is started here if left out."),
    publish: str = typer.Option("", metavar="URI", help="Copy the finished run to a folder or to s3://bucket/prefix."),
    channels: Path = typer.Option(None, metavar="TOML", help=common.CHANNELS_HELP),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Take a store the whole way: validate, features, split, train, evaluate, report. Run again, it resumes.

    Exit code 4 if a recipe that was asked for, or else the headline's (held_out_host), cannot be built from the store;
    everything else is done all the same. Odd episodes are set aside by name.

    Example: phasewatch run my-store --out runs/mine
    """
    from phasewatch.pipeline.stages import RunSettings
    from phasewatch.store.base import parse_store_location

    common.check_option_pair("--address", "--engine ray", alone=bool(address) and engine == "local")
    settings = RunSettings(
        store=parse_store_location(store) if store else common.find_bundled_corpus(), run=out, workers=workers, limit=limit,
        include_degraded=include_degraded, grid=grid, models=common.parse_names(models), recipes=common.parse_names(recipes),
        engine=engine, address=address,
    )  # fmt: skip
    _run_pipeline(settings, as_json=as_json, publish=publish)


def demo(
    out: Path = typer.Option(Path("runs/demo"), help="The run's folder."),
    workers: int = typer.Option(2, min=1, help="Processes."),
    live: bool = typer.Option(False, "--live", help="Instead, replay bundled episodes on a dashboard at once."),
    port: int = typer.Option(
        None, min=0, max=65535, help="With --live: of that dashboard; 8765 if absent, 0 takes a free one."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Take the bundled recordings the whole way, from bundles to the report.

    Example: phasewatch demo
    """
    common.check_option_pair("--port", "--live", alone=port is not None and not live)
    if live:
        from phasewatch.cli.dashboard import DEFAULT_PORT, show_demo

        show_demo(out, port=DEFAULT_PORT if port is None else port, as_json=as_json)
        return
    from phasewatch.pipeline.stages import RunSettings

    _run_pipeline(RunSettings(store=common.find_bundled_corpus(), run=out, workers=workers), as_json=as_json)


def _run_pipeline(settings: RunSettings, *, as_json: bool, publish: str = "") -> None:
    from phasewatch.errors import SplitError
    from phasewatch.pipeline import runner
    from phasewatch.pipeline.publish import publish_run

    with common.show_progress(quiet=as_json) as tell:
        done = runner.run_pipeline(settings, tell=tell)
        if publish:
            copied = publish_run(settings.run, publish)
            tell("publish", 1, 1, f"{copied} files to {publish}")
    words = ["nothing to do: the run is up to date"] if done.is_unchanged else []
    result = {
        "headline": done.headline, "report": str(done.report), "unchanged": done.is_unchanged,
        "stages": [{"stage": name, "fate": fate, "words": said} for name, fate, said in done.stages],
        "set_aside": common.describe_set_aside(done.set_aside), "cannot_be_built": {b.recipe: b.why for b in done.unbuilt_recipes},
    }  # fmt: skip
    result["failed"] = common.describe_failures(done.failed)
    lines = [
        *words,
        *common.render_failures(done.failed),
        *common.render_set_aside(done.set_aside),
        *(f"cannot be built: {b.why}" for b in done.unbuilt_recipes),
    ]
    common.print_result(result, as_json=as_json, lines=[*lines, done.headline, str(done.report)])
    if done.failed:
        raise typer.Exit(done.failed[0].failure.exit_code)
    if done.unbuilt_recipes:
        raise typer.Exit(SplitError.exit_code)


ExperimentCounts = dict[tuple[str, str], int]  # (recipe, model) → cells that are through


@contextmanager
def show_training_progress(*, quiet: bool = False) -> Iterator[Callable[[Experiment, int, int], None]]:
    """Show the grid on stderr: a live table where that is a terminal, else one line for each recipe as it ends."""
    if quiet:
        yield lambda cell, done, total: None
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, markup=False, highlight=False)
    through: ExperimentCounts = {}
    said: dict[str, int] = {}
    with Live(console=console, transient=True, refresh_per_second=4, auto_refresh=console.is_terminal) as live:

        def tell(cell: Experiment, done: int, total: int) -> None:
            through[cell.recipe, cell.model] = through.get((cell.recipe, cell.model), 0) + 1
            said[cell.recipe] = said.get(cell.recipe, 0) + 1
            if console.is_terminal:
                live.update(_render_counts(through, done, total))
            elif done == total:
                for recipe, n in sorted(said.items()):
                    console.print(f"train     {recipe}: {n} cells", soft_wrap=True)

        yield tell


def _render_counts(through: ExperimentCounts, done: int, total: int) -> Table:
    """Set the counts as recipes by models."""
    from rich.table import Table

    models = list(dict.fromkeys(model for _, model in sorted(through)))
    table = Table(title=f"{done} of {total} cells", box=None, pad_edge=False)
    table.add_column("recipe")
    for model in models:
        table.add_column(model, justify="right")
    for recipe in sorted({recipe for recipe, _ in through}):
        counts = [through.get((recipe, model), 0) for model in models]
        table.add_row(recipe, *(str(n) if n else "" for n in counts))
    return table
