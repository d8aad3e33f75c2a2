"""Commands from a store to folds: validate, features, split."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phasewatch.cli import common
from phasewatch.cli.folders import check_run_folder
from phasewatch.cli.options import (
    AsJson,
    CustomChannels,
    Engine,
    IncludeDegraded,
    Limit,
    RayAddress,
    RunFolder,
    Workers,
)
from phasewatch.cli.progress import show_progress
from phasewatch.errors import SplitError, UsageError
from phasewatch.types import BundleStatus

if TYPE_CHECKING:
    from phasewatch.validate.sweep import SweepSummary

__all__ = ["features", "split", "validate"]

_MAX_REASONS = 12  # printed; the index has all


def validate(
    store: Annotated[str | None, typer.Argument(help="Store: a folder or s3://bucket/prefix.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    workers: Workers = 2,
    limit: Limit = 0,
    force: Annotated[bool, typer.Option("--force", help="Read unchanged bundles again.")] = False,
    fail_on: Annotated[str, typer.Option(help="Exit 1 if a bundle has this status or a worse one.")] = "",
    budget_errored: Annotated[int, typer.Option(help="Exit 1 if more bundles are errored; -1 allows any number.")] = -1,
    engine: Engine = "local",
    ray_address: RayAddress = "",
    explain: Annotated[str, typer.Option(metavar="CODE", help="Print what a finding's code means, and exit.")] = "",
    custom_channels: CustomChannels = None,
    as_json: AsJson = False,
) -> None:
    """Check every bundle of a store.

    A bundle is accepted, degraded, rejected or errored, with the codes of its findings. Unchanged bundles are not
    read again.

    Example: phasewatch validate my-store --out runs/mine
    """
    from phasewatch import atomic
    from phasewatch.artifacts import VALIDATION_FILE
    from phasewatch.pipeline import stages
    from phasewatch.store.base import parse_store_location

    if explain:
        _print_code(explain, as_json=as_json)
        return
    if store is None or out is None:
        raise UsageError("validate needs a store and a run: phasewatch validate STORE --out RUN")
    if fail_on and fail_on not in list(BundleStatus):
        raise UsageError(f"--fail-on {fail_on}: expected one of {', '.join(BundleStatus)}")
    common.check_option_pair(
        "--ray-address", "--engine ray", is_partner_missing=bool(ray_address) and engine == "local"
    )
    settings = stages.RunSettings(
        store=parse_store_location(store), run=out, workers=workers, limit=limit, engine=engine, ray_address=ray_address
    )
    stages.check_folders(settings)
    atomic.make_folder(out)
    with atomic.lock(out), show_progress(quiet=as_json) as progress:
        summary = stages.validate(settings, force=force, progress=progress)
    index = str(out / VALIDATION_FILE)
    result: dict[str, Any] = dict(summary.stage) | {"kept": summary.kept, "index": index}
    common.print_result(result, as_json=as_json, lines=[*_render_sweep(summary), index])
    order = list(BundleStatus)
    worst = max((order.index(v.status) for v in summary.verdicts), default=0)
    is_over_budget = 0 <= budget_errored < result["errored"]
    if is_over_budget or (fail_on and worst >= order.index(BundleStatus(fail_on))):
        raise typer.Exit(1)


def _print_code(code: str, *, as_json: bool) -> None:
    from phasewatch.validate.checks import describe_code, list_codes

    spec = describe_code(code)
    if spec is None:
        raise UsageError(f"no code {code!r}; known: {', '.join(list_codes())}")
    result = {"code": spec.code, "severity": str(spec.severity), "about": spec.about}
    common.print_result(result, as_json=as_json, lines=[f"{spec.code} ({spec.severity}): {spec.about}"])


def _render_sweep(summary: SweepSummary) -> list[str]:
    """Return counts by status, reason and source, then the bundles that need attention."""
    from phasewatch.validate.copies import CONTESTED_CODE

    stage: dict[str, Any] = dict(summary.stage)
    reasons = sorted(stage["reasons"].items(), key=lambda pair: -pair[1])[:_MAX_REASONS]
    refused = [v for v in summary.verdicts if v.status in (BundleStatus.REJECTED, BundleStatus.ERRORED)]
    degraded = [v for v in summary.verdicts if v.status is BundleStatus.DEGRADED]
    refused.sort(key=lambda v: CONTESTED_CODE not in v.reasons)  # contested recordings are listed first
    contested = sum(CONTESTED_CODE in v.reasons for v in refused)
    lines = common.render_table([("bundles", str(stage["in"])), *((str(s), str(stage[str(s)])) for s in BundleStatus)])
    lines += common.render_table([(f"  {code}", str(n)) for code, n in reasons])
    lines += common.render_table(
        [
            (f"rows of {source}", f"in {n['in']:,}", f"used {n['used']:,}", f"lost {n['lost']:,}")
            for source, n in stage["rows_by_source"].items()
        ]
    )
    if contested:
        lines.append(f"WARNING: {contested:,} bundles hold telemetry that also has another host or other labels")
    for name, verdicts in (("refused", refused), ("degraded", degraded)):
        lines += [f"{v.status}: {v.detail} [{v.reasons[0]}]" for v in verdicts[: common.MAX_LISTED]]
        if len(verdicts) > common.MAX_LISTED:
            lines.append(f"… and {len(verdicts) - common.MAX_LISTED:,} more {name}; the index lists all")
    if reasons:
        lines.append("what a code means: phasewatch validate --explain CODE")
    lines.append(f"{summary.kept} unchanged bundles were not read again")
    if summary.slowest:
        lines.append(f"slowest: {summary.slowest[0]}, {summary.slowest[1]:.2f} s")
    return lines


def features(
    run: Annotated[Path | None, typer.Argument(help="Folder of a validated run.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Without a run: index of the bundles to use.")] = None,
    store: Annotated[str | None, typer.Option(help="Without a run: the store.")] = None,
    out_dir: Annotated[Path | None, typer.Option(help="Without a run: folder for the tables.")] = None,
    workers: Workers = 2,
    limit: Limit = 0,
    include_degraded: IncludeDegraded = True,
    custom_channels: CustomChannels = None,
    as_json: AsJson = False,
) -> None:
    """Compute the feature tables of a validated run.

    There is one table of windows and one of episodes; a schema file names their columns.

    Example: phasewatch features runs/mine
    """
    from phasewatch import atomic
    from phasewatch.artifacts import BINS_INDEX_PATH, FEATURES_FILE
    from phasewatch.pipeline import stages
    from phasewatch.store.base import parse_store_location
    from phasewatch.validate.index import read_statuses

    folder = out_dir if run is None else run
    if folder is None or (run is None and (validation is None or store is None)):
        raise UsageError("features needs a run, or all of --validation, --store and --out-dir")
    if run is not None:
        separate = {"--validation": validation, "--store": store, "--out-dir": out_dir, "--limit": limit}
        for option, value in separate.items():
            if value:
                raise UsageError(f"{option}: a run has its own; leave out {option}, or the run")
        check_run_folder(run)
    settings = stages.RunSettings(
        store=parse_store_location(store) if store else folder,
        run=folder,
        workers=workers,
        limit=limit,
        include_degraded=include_degraded,
    )
    if validation is not None:
        stages.check_folders(settings)
        read_statuses(validation)  # an unreadable index is reported before a folder is made
    atomic.make_folder(folder)
    with atomic.lock(folder), show_progress(quiet=as_json) as progress:
        if validation is not None and not (folder / BINS_INDEX_PATH).is_file():
            stages.sweep_usable(settings, validation, progress=progress)
        count = stages.build_features(settings)
    summary = f"{count.windows:,} windows of {count.episodes:,} episodes"
    path = str(folder / FEATURES_FILE)
    common.print_result(asdict(count) | {"features": path}, as_json=as_json, lines=[summary, path])


def split(
    run: RunFolder,
    recipes: Annotated[str, typer.Option(help="Split recipes, separated by commas, or `all`.")] = "all",
    as_json: AsJson = False,
) -> None:
    """Build the training, validation and test folds of a run.

    Disjointness is checked for each fold. An episode that would make a fold impossible is set aside and listed. Exit
    code 4 if a recipe of --recipes cannot be built; the others are still built.

    Example: phasewatch split runs/mine --recipes held_out_host,held_out_both
    """
    from phasewatch import atomic
    from phasewatch.artifacts import SPLITS_DIR
    from phasewatch.dataset import read_folds
    from phasewatch.pipeline import stages
    from phasewatch.splits import SplitPart

    wanted = () if recipes == "all" else common.parse_names(recipes)
    with atomic.lock(check_run_folder(run)):
        index = stages.split(stages.RunSettings(store=run, run=run), wanted)
    folds = [fold for result in index.recipes if result.folds for fold in read_folds(run, result.recipe)]
    unbuilt = [result for result in index.recipes if result.why]
    rows = [
        (
            fold.recipe,
            fold.fold,
            fold.sha256[:12],
            f"test {len(fold.ids(SplitPart.TEST))}",
            f"train {len(fold.ids(SplitPart.TRAIN))}",
            f"embargoed {len(fold.embargoed)}",
            f"untested: {', '.join(fold.untested_profiles) or 'none'}",
        )
        for fold in folds
    ]
    document = {
        "folds": [
            {"recipe": f.recipe, "fold": f.fold, "sha256": f.sha256, "untested_profiles": f.untested_profiles}
            for f in folds
        ],
        "cannot_be_built": {result.recipe: result.why for result in unbuilt},
        "set_aside": common.describe_set_aside(index.set_aside),
    }
    lines = [
        *common.render_table(rows),
        *common.render_set_aside(index.set_aside),
        *(f"cannot be built: {result.why}" for result in unbuilt),
        str(run / SPLITS_DIR),
    ]
    common.print_result(document, as_json=as_json, lines=lines)
    if any(result.recipe in wanted for result in unbuilt):
        raise typer.Exit(SplitError.exit_code)
