"""Commands from features to the report: train, evaluate, audit, report, and the whole pipeline: run, demo."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phasewatch.cli import common
from phasewatch.cli.folders import check_run_folder, find_bundled_corpus
from phasewatch.cli.options import (
    AsJson,
    CustomChannels,
    Engine,
    IncludeDegraded,
    Limit,
    OptionalStore,
    RayAddress,
    RunFolder,
    RunOut,
    Workers,
)
from phasewatch.cli.progress import show_progress

if TYPE_CHECKING:
    from phasewatch.pipeline.stages import RunSettings

__all__ = ["GridChoice", "ReportFormat", "audit", "demo", "evaluate", "report", "run", "train"]


class GridChoice(StrEnum):
    """The experiments that are trained."""

    SHORT = "short"
    FULL = "full"


class ReportFormat(StrEnum):
    """The format of a report."""

    HTML = "html"
    MD = "md"
    JSON = "json"


_Grid = Annotated[GridChoice, typer.Option(help="short: as in the demo; full: every recipe and model.")]
_Models = Annotated[str, typer.Option(help="Only these models of the grid, separated by commas.")]


def train(
    run: RunFolder,
    workers: Annotated[int, typer.Option(min=1, help="Experiments at a time, one thread each.")] = 2,
    seed: Annotated[int, typer.Option(help="Random seed of the models.")] = 0,
    grid: _Grid = GridChoice.SHORT,
    recipes: Annotated[str, typer.Option(help="Only these recipes, separated by commas; `all`: the full grid.")] = "",
    models: _Models = "",
    add_model: Annotated[
        list[str],
        typer.Option(
            metavar="MODULE:CLASS", help="Your own model, trained alone unless --models is given; repeatable."
        ),
    ] = [],  # noqa: B006  typer copies it
    channels: Annotated[
        str, typer.Option("--channels", help="Train these channel sets instead (gbt on deploy by default).")
    ] = "",
    trials: Annotated[int, typer.Option(min=0, help="Settings to try per experiment; 0 takes the defaults.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train the experiments of a run.

    An experiment is a recipe, fold, channel set and model. Finished ones are kept. If one fails, the others are still
    trained; the exit code is that of the first failure, and the same command tries the failed ones again.

    Example: phasewatch train runs/mine --recipes all
    """
    from phasewatch import atomic
    from phasewatch.pipeline import stages
    from phasewatch.pipeline.stages import RunSettings

    is_full = recipes == "all"
    settings = RunSettings(
        store=run,
        run=run,
        workers=workers,
        seed=seed,
        grid=GridChoice.FULL if is_full else grid,
        models=(*common.parse_names(models), *add_model),
        recipes=() if is_full else common.parse_names(recipes),
        channel_sets=common.parse_names(channels),
        trials=trials,
    )
    with atomic.lock(check_run_folder(run)), show_progress(quiet=as_json) as progress:
        done = stages.train(settings, progress=progress)
    result = {
        "trained": len(done.trained),
        "kept": len(done.kept),
        "rows": done.rows,
        "predictions": str(done.path),
        "trials": trials,
        "failed": common.describe_failures(done.failed),
    }
    tuned = f" (best of {trials} trials each)" if trials else ""
    summary = f"{len(done.trained)} experiments trained{tuned}, {len(done.kept)} kept, {done.rows:,} predictions"
    common.print_result(result, as_json=as_json, lines=[*common.render_failures(done.failed), summary, str(done.path)])
    if done.failed:
        raise typer.Exit(done.failed[0].failure.exit_code)


def evaluate(run: RunFolder, as_json: AsJson = False) -> None:
    """Compute metrics with confidence intervals and baselines.

    Example: phasewatch evaluate runs/mine
    """
    from phasewatch import atomic
    from phasewatch.artifacts import METRICS_FILE
    from phasewatch.evaluation.headline import render_headline
    from phasewatch.pipeline import runner, stages

    with atomic.lock(check_run_folder(run)):
        settings = runner.read_settings(run)
        metrics = stages.evaluate(settings)
        headline = render_headline(stages.read_run_headline(settings))
    path = str(run / METRICS_FILE)
    result = {"headline": headline, "numbers": len(metrics.metrics), "metrics": path}
    common.print_result(result, as_json=as_json, lines=[headline, path])


def audit(
    run: RunFolder,
    store: Annotated[
        str | None, typer.Option(help="Store of the run's bundles; default: where the run found them.")
    ] = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Check a run: rebuild, retrain, rescore, look for shortcuts.

    Exit code 1 if a check fails.

    Example: phasewatch audit runs/mine
    """
    import msgspec

    from phasewatch import atomic
    from phasewatch.artifacts import AUDIT_FILE
    from phasewatch.pipeline import runner, stages
    from phasewatch.store.base import parse_store_location

    stored = runner.read_settings(check_run_folder(run), store=parse_store_location(store) if store else None)
    settings = msgspec.structs.replace(stored, workers=workers)
    with atomic.lock(run), show_progress(quiet=as_json) as progress:
        done = stages.audit(settings, progress=progress)
    path = str(run / AUDIT_FILE)
    rows = common.render_table([[c.outcome_label, c.name, c.words] for c in done.checks])
    result = {
        "passes": done.passes,
        "withdraws_five_phases": done.withdraws_five_phases,
        "checks": [msgspec.to_builtins(c) for c in done.checks],
        "audit": path,
    }
    common.print_result(result, as_json=as_json, lines=[*rows, done.summary, path])
    if not done.passes:
        raise typer.Exit(1)


def report(
    run: RunFolder,
    report_format: Annotated[
        ReportFormat, typer.Option("--format", help="html with charts, or md or json without.")
    ] = ReportFormat.HTML,
    out: Annotated[Path | None, typer.Option(help="File to write; default: RUN/report.FORMAT.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run as HTML, Markdown or JSON.

    Example: phasewatch report runs/mine --format md
    """
    from phasewatch import atomic
    from phasewatch.pipeline import stages
    from phasewatch.pipeline.stages import RunSettings

    check_run_folder(run)
    is_outside = out is not None and not out.resolve().is_relative_to(run.resolve())  # for a run on read-only media
    with nullcontext() if is_outside else atomic.lock(run):
        path = stages.build_report(RunSettings(store=run, run=run), report_format, out)
    common.print_result({"report": str(path)}, as_json=as_json, lines=[str(path)])


def run(
    out: RunOut,
    store: OptionalStore = None,
    workers: Workers = 2,
    limit: Limit = 0,
    include_degraded: IncludeDegraded = True,
    grid: _Grid = GridChoice.SHORT,
    recipes: Annotated[str, typer.Option(help="Only these recipes of the grid, separated by commas.")] = "",
    models: _Models = "",
    engine: Engine = "local",
    ray_address: RayAddress = "",
    publish: Annotated[
        str, typer.Option(metavar="URI", help="Copy the finished run to a folder or s3://bucket/prefix.")
    ] = "",
    custom_channels: CustomChannels = None,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline, from validation to the report.

    The same command resumes an interrupted run and skips unchanged stages. Exit code 1 if a recipe of --recipes, or by
    default held_out_host, cannot be built from the store. A store of one host is tested on its last episodes instead
    (held_out_time), and the report says that nothing is known about other hosts.

    Example: phasewatch run my-store --out runs/mine
    """
    from phasewatch.pipeline.stages import RunSettings
    from phasewatch.store.base import parse_store_location

    common.check_option_pair(
        "--ray-address", "--engine ray", is_partner_missing=bool(ray_address) and engine == "local"
    )
    settings = RunSettings(
        store=parse_store_location(store) if store else find_bundled_corpus(),
        run=out,
        workers=workers,
        limit=limit,
        include_degraded=include_degraded,
        grid=grid,
        models=common.parse_names(models),
        recipes=common.parse_names(recipes),
        engine=engine,
        ray_address=ray_address,
    )
    _run_pipeline(settings, as_json=as_json, publish=publish)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    workers: Workers = 2,
    live: Annotated[bool, typer.Option("--live", help="Open the dashboard with recorded episodes instead.")] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="With --live: port; default 8765, 0 takes a free one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline on the bundled recordings.

    Example: phasewatch demo
    """
    from phasewatch.pipeline.stages import RunSettings

    common.check_option_pair("--port", "--live", is_partner_missing=port is not None and not live)
    if live:
        from phasewatch.cli.dashboard import DEFAULT_PORT, show_demo  # needs the extra `serve`

        show_demo(out, port=DEFAULT_PORT if port is None else port, as_json=as_json)
        return
    _run_pipeline(RunSettings(store=find_bundled_corpus(), run=out, workers=workers), as_json=as_json)


def _run_pipeline(settings: RunSettings, *, as_json: bool, publish: str = "") -> None:
    from phasewatch.pipeline import runner
    from phasewatch.pipeline.publish import publish_run

    with show_progress(quiet=as_json) as progress:
        done = runner.run_pipeline(settings, progress=progress)
        if publish:
            publish_run(settings.run, publish)
    result = {
        "headline": done.headline,
        "report": str(done.report),
        "unchanged": done.is_unchanged,
        "stages": [{"stage": stage.name, "fate": stage.outcome, "words": stage.summary} for stage in done.stages],
        "set_aside": common.describe_set_aside(done.set_aside),
        "cannot_be_built": {recipe.recipe: recipe.why for recipe in done.unbuilt_recipes},
        "failed": common.describe_failures(done.failed),
    }
    lines = [
        *(["nothing to do: the run is up to date"] if done.is_unchanged else []),
        *common.render_failures(done.failed),
        *common.render_set_aside(done.set_aside),
        *(f"cannot be built: {recipe.why}" for recipe in done.unbuilt_recipes),
        done.headline,
        str(done.report),
    ]
    common.print_result(result, as_json=as_json, lines=lines)
    if done.failed:
        raise typer.Exit(done.failed[0].failure.exit_code)
    if done.unbuilt_recipes:
        raise typer.Exit(1)
