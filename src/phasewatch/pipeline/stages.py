"""The stages of a run, one function each: validate, features, split, train, evaluate, audit, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import msgspec

from phasewatch import atomic
from phasewatch._version import __version__
from phasewatch.artifacts import (
    ACCOUNTING_FILE,
    BINS_PATHS,
    CHANNELS_FILE,
    FEATURE_FILES,
    HEADLINE_FILE,
    SPLIT_INDEX_FILE,
    VALIDATION_FILE,
    file_sha256,
)
from phasewatch.audit.checks import AuditReport
from phasewatch.audit.run import audit_run
from phasewatch.binning.storage import open_bins
from phasewatch.bundle.archive import unpack_manifest
from phasewatch.channels import CUSTOM_CHANNELS, build_channel_mask
from phasewatch.dataset.split_files import SplitIndex, read_folds, read_recipe_results, write_all_splits
from phasewatch.errors import BundleError, RunError, SplitError, UsageError
from phasewatch.evaluation.evaluate import evaluate_run, read_metrics
from phasewatch.evaluation.headline import Headline, build_headline, read_headline, write_headline
from phasewatch.evaluation.importance import DecisionExplanation, explain_decision
from phasewatch.evaluation.metric_table import MetricTable, select_headline
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import schema_hash
from phasewatch.features.tables import FeatureCount, ParallelSettings, write_feature_tables
from phasewatch.models.registry import find_model, find_source_file
from phasewatch.parallel.pool import map_ordered
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.report.html import write_report
from phasewatch.splits import SPLIT_RECIPES, Fold, SplitPart, find_recipe, parse_fold
from phasewatch.store.base import StoreItem, StoreLocation, check_store, has_bundle, open_store
from phasewatch.training.experiment import Experiment
from phasewatch.training.grids import (
    GRID_MODELS,
    HEADLINE_RECIPE,
    build_channel_set_grid,
    build_full_grid,
    build_headline_grid,
    build_short_grid,
    build_user_model_grid,
)
from phasewatch.training.train import TrainReport, find_best_models, train_experiments
from phasewatch.validate.index import read_index, read_statuses, render_accounting
from phasewatch.validate.sweep import (
    BundleMapper,
    SweepSummary,
    render_item_path,
    sample_stratified,
    sweep,
)
from phasewatch.validate.verdict import USABLE_STATUSES

__all__ = [
    "EXPERIMENT_GRIDS",
    "SWEEP_ENGINES",
    "RunOptions",
    "RunSettings",
    "audit",
    "build_experiments",
    "build_features",
    "build_report",
    "check_folders",
    "check_names",
    "code_version",
    "compute_digests",
    "compute_model_digests",
    "compute_store_fingerprint",
    "evaluate",
    "explain",
    "list_split_files",
    "split",
    "sweep_usable",
    "train",
    "validate",
]

EXPERIMENT_GRIDS = ("short", "full")
SWEEP_ENGINES = ("local", "ray")


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is made with, whatever its store and folder; ``run.json`` keeps it.

    Attributes:
        workers: Number of processes.
        limit: Size of a stratified sample of the store; 0 takes all bundles.
        include_degraded: Whether episodes with missing or repaired data are used.
        seed: Random seed of samples and models.
        grid: ``short`` or ``full`` (every recipe and model; seeds, tables and channel sets of the
            best model).
        models: Models of the grid to train, or models that a user adds; empty takes all of the grid.
        recipes: Recipes of the grid to train; empty takes all of the grid.
        channel_sets: Channel sets to train instead of the grid's, for `gbt` on `deploy` unless models or recipes are
            named.
        trials: Settings to try for each experiment on its early-stopping part; 0 takes the defaults.
        engine: How bundles are processed, ``local`` or ``ray``; the results are the same bytes.
        ray_address: Address of a running Ray cluster; empty starts one on this machine.
    """

    workers: int = 2
    limit: int = 0
    include_degraded: bool = True
    seed: int = 0
    grid: str = "short"
    models: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    channel_sets: tuple[str, ...] = ()
    trials: int = 0
    engine: str = "local"
    ray_address: str = ""


class RunSettings(RunOptions, frozen=True, kw_only=True):
    """The settings of a run.

    Attributes:
        store: Store of the bundles.
        run: Folder of the run.
    """

    store: StoreLocation
    run: Path


def code_version() -> str:
    """Return the versions on which feature values depend: release, schema hash and behaviour fingerprint."""
    return f"{__version__} {schema_hash()} {behaviour_fingerprint()}"


def compute_store_fingerprint(store: StoreLocation) -> str:
    """Return a digest of the names, sizes, times and receipts in a store; no bundle is read."""
    digest = sha256()
    for item in open_store(store).walk():
        digest.update(f"{item.path} {item.bytes} {item.mtime_ns} {item.receipt}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def compute_digests(run: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of some files of a run; ``absent`` for one that does not exist."""
    return {name: file_sha256(run / name) if (run / name).is_file() else "absent" for name in names}


def list_split_files(run: Path) -> tuple[str, ...]:
    """Return the names of the run's split files and of their index, relative to the run."""
    return (SPLIT_INDEX_FILE, *(f"splits/{path.name}" for path in sorted((run / "splits").glob("*.json"))))


def compute_model_digests(models: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of the source file of each user model; when it changes, the model is trained again."""
    files = {model: find_source_file(model) for model in models}
    return {f"code of {model}": file_sha256(path) for model, path in files.items() if path is not None}


def check_folders(settings: RunSettings) -> None:
    """Check the store and the run's folder before anything is written.

    Raises:
        StoreError: If the store does not exist or holds no bundle.
        UsageError: If the run's folder is a store or inside one.
    """
    check_store(settings.store)
    run, store = settings.run.resolve(), settings.store
    if isinstance(store, str) and store.startswith("file://"):
        store = Path(store.removeprefix("file://"))
    if isinstance(store, Path) and (run == store.resolve() or store.resolve() in run.parents):
        raise UsageError(f"--out {settings.run}: inside the store {store}; name a folder outside it")
    if run.is_dir() and has_bundle(run):
        raise UsageError(f"--out {settings.run}: holds bundles, so it is a store; name another folder")


def validate(settings: RunSettings, *, force: bool = False, progress: Progress = NO_PROGRESS) -> SweepSummary:
    """Validate the store's bundles and write their bins and the index into the run.

    Args:
        settings: The run's settings.
        force: Whether unchanged bundles are read again.
        progress: Progress of the task ``validate``.
    """
    _copy_custom_channels(settings.run)
    return sweep(
        settings.store,
        settings.run,
        workers=settings.workers,
        full=force,
        choose=_build_chooser(settings) if settings.limit else None,
        progress=progress,
        mapper=_choose_mapper(settings),
    )


def _copy_custom_channels(run: Path) -> None:
    """Copy the custom channels into the run, for later stages and for readers."""
    if CUSTOM_CHANNELS.text:
        atomic.make_folder(run)
        atomic.write_atomic(run / CHANNELS_FILE, CUSTOM_CHANNELS.text)


def _choose_mapper(settings: RunSettings) -> BundleMapper:
    """Return the function that distributes the reading of bundles.

    Raises:
        UsageError: If there is no such engine.
    """
    if settings.engine not in SWEEP_ENGINES:
        raise UsageError(f"no engine {settings.engine!r}; it is one of {', '.join(SWEEP_ENGINES)}")
    if settings.engine == "local":
        return map_ordered
    from phasewatch.parallel.ray import map_on_ray

    return partial(map_on_ray, address=settings.ray_address)


def _build_chooser(settings: RunSettings) -> Callable[[Sequence[StoreItem]], Sequence[StoreItem]]:
    store = open_store(settings.store)

    def stratum(item: StoreItem) -> str:
        try:
            manifest = unpack_manifest(store.read(item), file=item.path)
            return f"{manifest.host.host_id}/{manifest.profile}"
        except BundleError:
            return f"{item.host_id}/"

    def choose(items: Sequence[StoreItem]) -> Sequence[StoreItem]:
        places = sample_stratified(
            [stratum(i) for i in items], [i.path for i in items], settings.limit, seed=settings.seed
        )
        return [items[place] for place in places]

    return choose


def sweep_usable(settings: RunSettings, index: Path, *, progress: Progress = NO_PROGRESS) -> SweepSummary:
    """Validate only the bundles that an index calls usable, and write their bins into the run.

    Args:
        settings: The run's settings.
        index: A validation index, ``validation_v1.parquet``.
        progress: Progress of the task ``bins``.
    """
    usable = {v.path for v in read_index(index) if v.status in USABLE_STATUSES}
    sample = _build_chooser(settings) if settings.limit else None

    def choose(items: Sequence[StoreItem]) -> Sequence[StoreItem]:
        listed = [item for item in items if render_item_path(item) in usable]
        return sample(listed) if sample else listed

    return sweep(
        settings.store,
        settings.run,
        workers=settings.workers,
        choose=choose,
        progress=progress,
        task="bins",
        mapper=_choose_mapper(settings),
        prior=index,
    )


def build_features(settings: RunSettings) -> FeatureCount:
    """Compute the feature tables of a validated run, and add them to its data accounting."""
    run = settings.run
    atomic.sweep_temporaries(run)
    statuses = read_statuses(run / VALIDATION_FILE)
    count = write_feature_tables(
        run,
        open_bins(run / "grids"),
        statuses,
        include_degraded=settings.include_degraded,
        inputs=compute_digests(run, [VALIDATION_FILE]),
        spread=ParallelSettings(workers=settings.workers),
    )
    stages = _read_accounting(run)
    stages["features"] = {
        "in": len(statuses),
        "used": count.episodes,
        "left_out": dict(count.left_out),
        "windows": count.windows,
        "episodes_without_a_window": count.without_windows,
        "windows_of_unknown_phase": count.unknown_windows,
    }
    atomic.write_atomic(run / ACCOUNTING_FILE, render_accounting(stages))
    return count


def _read_accounting(run: Path) -> dict[str, dict[str, object]]:
    path = run / ACCOUNTING_FILE
    with suppress(OSError, ValueError, KeyError):
        return dict(json.loads(path.read_bytes())["stages"])
    raise RunError(f"{path}: not readable; make it with `phasewatch validate STORE --out {run}`")


def split(settings: RunSettings, recipes: Sequence[str] = ()) -> SplitIndex:
    """Build the folds of every recipe, or of some; return the result of each and the episodes that were set aside.

    Raises:
        SplitError: If no recipe can be built.
    """
    index = write_all_splits(settings.run, recipes or [row.name for row in SPLIT_RECIPES])
    if index.recipes and not any(result.folds for result in index.recipes):
        raise SplitError(
            f"no recipe can be built; {index.recipes[0].why}; {settings.run / SPLIT_INDEX_FILE} has the reason of each"
        )
    return index


def _read_all_folds(run: Path) -> dict[str, tuple[Fold, ...]]:
    """Read the folds of every recipe that the run has.

    Raises:
        RunError: If it has none.
    """
    built = [row.name for row in SPLIT_RECIPES if any((run / "splits").glob(f"{row.name}-*.json"))]
    if not built:
        raise RunError(f"{run / 'splits'}: no split; make them with `phasewatch split {run}`")
    return {recipe: read_folds(run, recipe) for recipe in built}


def check_names(settings: RunSettings) -> None:
    """Check the names of grid, recipes, models and channel sets; nothing of the run is read.

    Raises:
        UsageError: If one of them is unknown.
    """
    if settings.grid not in EXPERIMENT_GRIDS:
        raise UsageError(f"no grid {settings.grid!r}; it is one of {', '.join(EXPERIMENT_GRIDS)}")
    for recipe in settings.recipes:
        find_recipe(recipe)
    for model in settings.models:
        find_model(model)
    for channel_set in settings.channel_sets:
        build_channel_mask(channel_set)


def build_experiments(settings: RunSettings) -> tuple[Experiment, ...]:
    """Return the experiments of a grid (of the full grid, the first pass) that the settings select.

    Raises:
        UsageError: If the grid, a model or a recipe is unknown, or no experiment is left.
        SplitError: If no experiment is left because the selected recipes, or the headline's, could not be built.
    """
    check_names(settings)
    folds = _read_all_folds(settings.run)
    if settings.channel_sets:
        return build_channel_set_grid(
            folds, settings.channel_sets, models=settings.models, recipes=settings.recipes, seed=settings.seed
        )
    added = [model for model in settings.models if find_model(model).key not in GRID_MODELS]
    experiments = (build_full_grid if settings.grid == "full" else build_short_grid)(folds, seed=settings.seed)
    chosen = _filter_experiments(
        settings, (*experiments, *build_user_model_grid(folds, added, recipes=settings.recipes, seed=settings.seed))
    )
    if not chosen:
        wanted = settings.recipes or (HEADLINE_RECIPE,)
        if unbuilt := [r for r in read_recipe_results(settings.run) if r.why and r.recipe in wanted]:
            raise SplitError(f"nothing can be trained: {unbuilt[0].why}")
        raise UsageError(
            f"the {settings.grid} grid has no experiment of {', '.join((*settings.models, *settings.recipes))}; "
            "use --recipes all, or name other models"
        )
    return chosen


def _filter_experiments(settings: RunSettings, experiments: Sequence[Experiment]) -> tuple[Experiment, ...]:
    return tuple(
        e
        for e in experiments
        if (not settings.models or e.model in settings.models)
        and (not settings.recipes or e.recipe in settings.recipes)
    )


def train(settings: RunSettings, *, progress: Progress = NO_PROGRESS) -> TrainReport:
    """Train the experiments of the grid that are not finished.

    Of the full grid, the second pass trains more seeds, variants and channel sets of the best two models of the first.

    Args:
        settings: The run's settings.
        progress: Progress of the task ``train``.
    """

    def train_all(experiments: Sequence[Experiment]) -> TrainReport:
        return train_experiments(
            settings.run, experiments, workers=settings.workers, trials=settings.trials, progress=progress
        )

    experiments = build_experiments(settings)
    first = train_all(experiments)
    failed = {f.cell for f in first.failed}
    usable = [e for e in experiments if e not in failed]
    best = find_best_models(settings.run, usable) if settings.grid == "full" else ()
    if not best:
        return first
    more = build_headline_grid(_read_all_folds(settings.run), best=best, seed=settings.seed)
    if not (added := set(_filter_experiments(settings, more)) - set(experiments)):
        return first
    second = train_all((*usable, *sorted(added)))
    trained = set(first.trained)
    return replace(
        second,
        trained=(*first.trained, *second.trained),
        kept=tuple(e for e in second.kept if e not in trained),
        failed=(*first.failed, *second.failed),
    )


def evaluate(settings: RunSettings) -> MetricTable:
    """Compute the metrics of the predictions and write them and the headline into the run."""
    return evaluate_run(settings.run, corpus=_name_store(settings))


def read_run_headline(settings: RunSettings) -> Headline:
    """Read the headline of an evaluated run; build it from the metrics if its file is absent."""
    if not (settings.run / HEADLINE_FILE).is_file():
        write_headline(settings.run, build_headline(read_metrics(settings.run), corpus=_name_store(settings)))
    return read_headline(settings.run)


def _name_store(settings: RunSettings) -> str | None:
    """Return the last part of the store's place; None for a run that was made without its store."""
    if settings.store == settings.run:
        return None
    return str(settings.store).rstrip("/").rpartition("/")[2]


def explain(run: Path, episode_id: str, at_s: float) -> DecisionExplanation:
    """Return the channels on which the headline model's prediction of one window depends.

    Args:
        run: The run's folder.
        episode_id: A test episode.
        at_s: Middle of the window, in seconds from the first label.

    Raises:
        RunError: If no fold of the headline's recipe tests that episode.
    """
    place = select_headline(read_metrics(run).metrics)
    for fold in read_folds(run, place.recipe):
        if episode_id in fold.ids(SplitPart.TEST):
            cell = Experiment(
                recipe=place.recipe, fold=fold.fold, threat=place.channel_set, model=place.model, table=place.input
            )
            return explain_decision(run, cell, episode_id, at_s)
    raise RunError(
        f"{run}: no fold of {place.recipe} tests episode {episode_id!r}; {run / 'splits'} names those that are tested"
    )


def audit(settings: RunSettings, *, progress: Progress = NO_PROGRESS) -> AuditReport:
    """Check a run, and write the verdict into its headline; without its store, only what needs no bundles.

    Args:
        settings: The run's settings.
        progress: Progress of the task ``audit``.
    """

    def rebuild(folder: Path) -> None:
        # Bundles that came to the store later are not of this run.
        listed = {v.path for v in read_index(settings.run / VALIDATION_FILE)}
        sweep(
            settings.store,
            folder,
            workers=settings.workers,
            choose=lambda items: [item for item in items if render_item_path(item) in listed],
            prior=settings.run / VALIDATION_FILE,
        )
        build_features(msgspec.structs.replace(settings, run=folder))
        recipes = {result.recipe for result in read_recipe_results(settings.run)}
        write_all_splits(folder, recipes | {fold.recipe for fold in _read_fold_files(settings.run)})

    has_store = isinstance(settings.store, str) or (settings.store.is_dir() and settings.store != settings.run)
    report = audit_run(
        settings.run,
        remake=rebuild if has_store else None,
        files=(VALIDATION_FILE, *BINS_PATHS, *FEATURE_FILES),
        left_out=_list_left_out(settings) if has_store else None,
        limit=settings.limit,
        workers=settings.workers,
        progress=progress,
    )
    with suppress(RunError):  # a run that is not scored has no headline; the audit reports broken metrics
        headline = msgspec.structs.replace(read_run_headline(settings), audit=report.build_verdict())
        write_headline(settings.run, headline)
    return report


def _list_left_out(settings: RunSettings) -> tuple[str, ...]:
    """Return the paths of the store's bundles that the run does not list; no bundle is read."""
    listed = {v.path for v in read_index(settings.run / VALIDATION_FILE)}
    paths = (render_item_path(item) for item in open_store(settings.store).walk())
    return tuple(path for path in paths if path not in listed)


def _read_fold_files(run: Path) -> list[Fold]:
    return [parse_fold(path.read_bytes(), file=str(path)) for path in sorted((run / "splits").glob("*.json"))]


def build_report(settings: RunSettings, form: str = "html", out: Path | None = None) -> Path:
    """Write the report and return its path.

    Args:
        settings: The run's settings.
        form: ``html``, or ``md`` or ``json`` without charts.
        out: The file; ``report.FORMAT`` in the run if None.
    """
    return write_report(settings.run, form, out)
