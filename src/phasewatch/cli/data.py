"""Commands on bundles and stores: inspect, validate, features, split."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from phasewatch.cli import common

if TYPE_CHECKING:
    from phasewatch.validate.verdict import BundleCheck


MAX_LISTED = common.MAX_LISTED


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (inspect, validate, features, split):
        app.command(epilog=common.EXIT_CODES_HELP)(command)


def inspect(
    bundle: str = typer.Argument(..., help="An episode's .tar.zst, also in a store at s3://."),
    channels: Path = typer.Option(None, metavar="TOML", help=common.CHANNELS_HELP),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Show one bundle: who it is, its labels, its rows, what the gates find, and a picture of its channels.

    Example: phasewatch inspect corpus/lab-v1/pc/….tar.zst
    """
    from phasewatch.errors import DataError
    from phasewatch.store.base import find_bundle, parse_store_location
    from phasewatch.validate.verdict import BundleLocation, validate_bundle

    there = find_bundle(parse_store_location(bundle))
    if there is None:
        raise DataError(f"{bundle}: there is no such bundle; name a file <host_id>/<episode_id>.tar.zst of a store")
    store, item = there
    place = BundleLocation(path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)
    found = validate_bundle(store.read(item), place, counts_nulls=True)
    common.print_result(_describe_bundle(found), as_json=as_json, lines=_render_bundle(found))
    if found.binned is None:
        raise typer.Exit(1)


def _describe_bundle(found: BundleCheck) -> dict[str, Any]:
    import msgspec

    v = found.verdict
    result: dict[str, Any] = {
        "path": v.path, "status": str(v.status), "reasons": list(v.reasons), "detail": v.detail, "rows": list(v.rows),
        "findings": [
            {"code": f.code, "severity": str(f.severity), "place": f.place, "words": f.words} for f in found.findings
        ],
        "nulls": [
            {
                "source": str(n.source), "field": n.field, "rows": n.rows, "nulls": n.nulls, "share": round(n.share, 4),
                "longest_s": n.longest_ns / 1e9,
            }
            for fields in found.nulls.values() for n in fields if n.nulls
        ],
        "vcpu_wait_cores": v.vcpu_wait,
    }  # fmt: skip
    if found.episode is not None:
        marks = found.episode.marks
        result["labels"] = [
            {"phase": str(m.phase) if m.phase else "end", "at_s": (m.t_wall_ns - marks[0].t_wall_ns) / 1e9}
            for m in marks
        ]
        result["manifest"] = msgspec.to_builtins(found.episode.manifest)
    return result


def _render_bundle(found: BundleCheck) -> list[str]:
    pass  # own

    v = found.verdict
    rows = [
        ("episode", v.episode_id or "unknown"), ("host", v.host_id or "unknown"),
        ("what", f"{v.profile}/{v.sample_name}, {v.role}, {v.origin}" if v.profile else "unknown: no manifest was read"),
        ("status", f"{v.status} {' '.join(v.reasons)}".strip()), ("detail", v.detail or "nothing to say"),
        ("rows", " ".join(f"{name}={n}" for name, n in zip(("proc", "qmp", "netflow", "guest"), v.rows, strict=True))),
        ("waiting", "contention unknown" if isnan(v.vcpu_wait) else f"vCPUs waited for {v.vcpu_wait:.3f} cores"),
    ]  # fmt: skip
    lines = common.render_table(rows)
    lines += [f"{f.severity}: {f.code}: {f.words}" for f in found.findings]
    nulls = [n for fields in found.nulls.values() for n in fields if n.nulls]
    lines += common.render_table(
        [
            (f"null: {n.source}.{n.field}", f"{n.nulls} of {n.rows} rows ({n.share:.0%})", f"longest {n.longest_ns / 1e9:.1f} s")
            for n in nulls
        ]
    )  # fmt: skip
    if found.episode is None or found.binned is None:
        return lines
    marks = found.episode.marks
    lines += [f"{(m.t_wall_ns - marks[0].t_wall_ns) / 1e9:8.2f} s  {m.phase or 'end'}" for m in marks]
    from phasewatch.cli.sparkline import render_sparklines

    return [*lines, "", *render_sparklines(found.episode, found.binned)]


def validate(
    store: str = typer.Argument(None, help="The store: a folder, or s3://bucket/prefix."),
    out: Path = typer.Option(None, help="The run's folder."),
    workers: int = typer.Option(2, min=1, help="Processes."),
    limit: int = typer.Option(0, min=0, help="A stratified, seeded subset of so many bundles; 0 for all."),
    full: bool = typer.Option(False, help="Read unchanged bundles again, too."),
    fail_on: str = typer.Option("", help="Exit 1 if a bundle has this status or a worse one."),
    budget_errored: int = typer.Option(-1, help="Exit 1 if more than so many bundles are errored; -1 for any number."),
    engine: str = typer.Option("local", help="What reads the bundles: `local` processes, or `ray`."),
    address: str = typer.Option("", help="With --engine ray: a running cluster; one is started here if left out."),
    explain: str = typer.Option("", metavar="CODE", help="Say what a code means, and leave."),
    channels: Path = typer.Option(None, metavar="TOML", help=common.CHANNELS_HELP),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Judge every bundle of a store: accepted, degraded, rejected or errored, each with its reasons.

    Example: phasewatch validate my-store --out runs/mine
    """
    from phasewatch import atomic
    from phasewatch.artifacts import VALIDATION_FILE
    from phasewatch.errors import UsageError
    from phasewatch.pipeline import stages
    from phasewatch.store.base import parse_store_location
    from phasewatch.types import BundleStatus
    from phasewatch.validate.checks import describe_code as look_up
    from phasewatch.validate.checks import list_codes
    from phasewatch.validate.copies import CONTESTED_CODE

    if explain:
        spec = look_up(explain)
        if spec is None:
            raise UsageError(f"no code {explain!r}; known: {', '.join(list_codes())}")
        result = {"code": spec.code, "severity": str(spec.severity), "about": spec.about}
        common.print_result(result, as_json=as_json, lines=[f"{spec.code} ({spec.severity}): {spec.about}"])
        return
    if store is None or out is None:
        raise UsageError("validate needs a store and a run: phasewatch validate STORE --out RUN")
    if fail_on and fail_on not in list(BundleStatus):
        raise UsageError(f"--fail-on {fail_on}: one of {', '.join(BundleStatus)}")
    common.check_option_pair("--address", "--engine ray", alone=bool(address) and engine == "local")
    settings = stages.RunSettings(
        store=parse_store_location(store), run=out, workers=workers, limit=limit, engine=engine, address=address
    )
    stages.check_folders(settings)
    atomic.make_folder(out)
    with atomic.lock(out), common.show_progress(quiet=as_json) as tell:
        summary = stages.validate(settings, full=full, progress=stages.CallbackProgress(tell))
    stage: dict[str, Any] = dict(summary.stage)
    counts = [(str(status), str(stage[str(status)])) for status in BundleStatus]
    reasons = sorted(stage["reasons"].items(), key=lambda pair: -pair[1])[:12]
    refused = [v for v in summary.verdicts if v.status in (BundleStatus.REJECTED, BundleStatus.ERRORED)]
    degraded = [v for v in summary.verdicts if v.status is BundleStatus.DEGRADED]
    contested = [v for v in refused if CONTESTED_CODE in v.reasons]
    refused.sort(key=lambda v: CONTESTED_CODE not in v.reasons)  # who claims another's recording is named first
    lines = [
        *common.render_table([("bundles", str(stage["in"])), *counts]),
        *common.render_table([(f"  {code}", str(n)) for code, n in reasons]),
        *common.render_table([(f"rows of {s}", f"in {e['in']:,}", f"used {e['used']:,}", f"lost {e['lost']:,}") for s, e in stage["rows_by_source"].items()]),
        *([f"WARNING: {len(contested):,} bundles hold telemetry that stands under another host or other labels, too"] if contested else []),
        *(f"{v.status}: {v.detail} [{v.reasons[0]}]" for some in (refused, degraded) for v in some[:MAX_LISTED]),
        *(
            f"… and {len(some) - MAX_LISTED:,} more {name}; the index has a row for each"
            for name, some in (("refused", refused), ("degraded", degraded)) if len(some) > MAX_LISTED
        ),
        *(["what a code means: phasewatch validate --explain CODE"] if reasons else []),
        f"{summary.kept} unchanged bundles were not read again",
        *([f"slowest: {summary.slowest[0]}, {summary.slowest[1]:.2f} s"] if summary.slowest else []),
        str(out / VALIDATION_FILE),
    ]  # fmt: skip
    common.print_result(
        stage | {"kept": summary.kept, "index": str(out / VALIDATION_FILE)}, as_json=as_json, lines=lines
    )
    order = list(BundleStatus)
    worst = max((order.index(v.status) for v in summary.verdicts), default=0)
    over_budget = 0 <= budget_errored < stage["errored"]
    if over_budget or (fail_on and worst >= order.index(BundleStatus(fail_on))):
        raise typer.Exit(1)


def features(
    run: Path = typer.Argument(None, help="A validated run."),
    validation: Path = typer.Option(None, help="Spelled out: the index that says which bundles are usable."),
    store: str = typer.Option(None, help="Spelled out: the store."),
    out_dir: Path = typer.Option(None, help="Spelled out: where the tables go."),
    workers: int = typer.Option(2, min=1, help="Processes."),
    limit: int = typer.Option(0, min=0, help="A stratified, seeded subset of so many bundles; 0 for all."),
    include_degraded: bool = typer.Option(True, help="Use episodes with something missing or repaired, too."),
    channels: Path = typer.Option(None, metavar="TOML", help=common.CHANNELS_HELP),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Make the window and episode tables of a run, and the schema that names their columns.

    Example: phasewatch features runs/mine
    """
    from dataclasses import asdict

    from phasewatch import atomic
    from phasewatch.artifacts import BINS_INDEX_PATH, FEATURES_FILE
    from phasewatch.errors import UsageError
    from phasewatch.pipeline import stages
    from phasewatch.store.base import parse_store_location
    from phasewatch.validate.index import read_statuses

    if run is None and (validation is None or store is None or out_dir is None):
        raise UsageError("features needs a run, or all of --validation, --store and --out-dir")
    if run is not None:
        told = {"--validation": validation, "--store": store, "--out-dir": out_dir, "--limit": limit}
        for option, value in told.items():
            if value:
                raise UsageError(f"{option}: a run was made of its own; leave out {option}, or the run")
        common.check_run_folder(run)
    folder: Path = out_dir if run is None else run
    settings = stages.RunSettings(
        store=parse_store_location(store) if store else folder,
        run=folder,
        workers=workers,
        limit=limit,
        include_degraded=include_degraded,
    )
    if run is None:
        stages.check_folders(settings)
        read_statuses(validation)  # an index that cannot be read is told before a folder is made
    atomic.make_folder(folder)
    with atomic.lock(folder):
        if run is None and not (folder / BINS_INDEX_PATH).is_file():
            with common.show_progress(quiet=as_json) as tell:
                stages.sweep_usable(settings, validation, progress=stages.CallbackProgress(tell))
        count = stages.build_features(settings)
    words = f"{count.windows:,} windows of {count.episodes:,} episodes"
    path = folder / FEATURES_FILE
    common.print_result(asdict(count) | {"features": str(path)}, as_json=as_json, lines=[words, str(path)])


def split(
    run: Path = typer.Argument(..., help="A run with features."),
    recipes: str = typer.Option("all", help="How to hold out, separated by commas; `all` for every recipe."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Cut the run's episodes into train, validation and test, recipe by recipe, and prove that nothing overlaps.

    An episode that would cost others a fold (a profile of a single episode, a name that cannot be a file, a copy of
    another host's) is set aside and named.

    A recipe that cannot be built says what is missing; the others are built all the same, and one asked for by name
    ends with exit code 4.

    Example: phasewatch split runs/mine --recipes held_out_host,held_out_both
    """
    from phasewatch import atomic
    from phasewatch.artifacts import SPLITS_DIR
    from phasewatch.dataset import read_folds
    from phasewatch.pipeline import stages
    from phasewatch.splits import SplitPart

    asked = () if recipes == "all" else common.parse_names(recipes)
    with atomic.lock(common.check_run_folder(run)):
        index = stages.split(stages.RunSettings(store=run, run=run), asked)
    folds = [fold for b in index.recipes if b.folds for fold in read_folds(run, b.recipe)]
    lacking = [b for b in index.recipes if b.why]
    rows = [
        (
            f.recipe,
            f.fold,
            f.sha256[:12],
            f"test {len(f.ids(SplitPart.TEST))}",
            f"train {len(f.ids(SplitPart.TRAIN))}",
            f"embargoed {len(f.embargoed)}",
            f"untested: {', '.join(f.untested_profiles) or 'none'}",
        )
        for f in folds
    ]
    result = {
        "folds": [
            {"recipe": f.recipe, "fold": f.fold, "sha256": f.sha256, "untested_profiles": f.untested_profiles} for f in folds
        ],
        "cannot_be_built": {b.recipe: b.why for b in lacking},
        "set_aside": common.describe_set_aside(index.set_aside),
    }  # fmt: skip
    common.print_result(
        result, as_json=as_json,
        lines=[
            *common.render_table(rows), *common.render_set_aside(index.set_aside), *(f"cannot be built: {b.why}" for b in lacking),
            str(run / SPLITS_DIR),
        ],
    )  # fmt: skip
    if any(b.recipe in asked for b in lacking):
        raise typer.Exit(4)
