"""The stages of a run, each alone: what it reads, what it writes, how it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from phasewatch import atomic
from phasewatch._version import __version__
from phasewatch.artifacts import (
    ACCOUNTING_FILE,
    BINS_DIR,
    BINS_PATHS,
    CHANNELS_FILE,
    FEATURE_FILES,
    SPLIT_INDEX_FILE,
    SPLITS_DIR,
    VALIDATION_FILE,
    file_sha256,
    list_split_names,
    list_split_paths,
)
from phasewatch.audit.checks import AuditReport
from phasewatch.audit.run import audit_run
from phasewatch.binning.storage import open_bins
from phasewatch.bundle.archive import unpack_manifest
from phasewatch.channels import CUSTOM_CHANNELS, build_channel_mask
from phasewatch.dataset.split_files import SplitIndex, read_all_folds, read_folds, read_recipe_results, write_all_splits
from phasewatch.errors import BundleError, RunError, SplitError, UsageError
from phasewatch.evaluation.evaluate import evaluate_run, read_metrics
from phasewatch.evaluation.importance import DecisionExplanation, explain_decision
from phasewatch.evaluation.metric_table import MetricTable, select_headline
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import schema_hash
from phasewatch.features.tables import FeatureCount, ParallelSettings, write_feature_tables
from phasewatch.models.registry import BASELINE_MODELS, find_model, find_source_file
from phasewatch.parallel.pool import map_ordered
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.report.html import write_report
from phasewatch.splits import SPLIT_RECIPES, Fold, SplitPart, find_recipe
from phasewatch.store.base import StoreItem, StoreLocation, check_store, has_bundle, open_store
from phasewatch.training.experiment import Experiment
from phasewatch.training.grids import (
    HEADLINE_RECIPE,
    MAIN_MODELS,
    build_channel_set_grid,
    build_full_grid,
    build_headline_grid,
    build_short_grid,
    build_user_model_grid,
)
from phasewatch.training.train import TrainReport, find_best_net, train_experiments
from phasewatch.validate.index import read_index, read_statuses, render_accounting
from phasewatch.validate.sweep import (
    BundleMapper,
    SweepSummary,
    render_item_path,
    sample_stratified,
    sweep,
)
from phasewatch.validate.verdict import USABLE_STATUSES

EXPERIMENT_GRIDS = ("short", "full")
SWEEP_ENGINES = ("local", "ray")
TrainingProgress = Callable[[Experiment, int, int], None]  # a cell is through, how many are, of how many


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run is asked for.

    Attributes:
        limit: Narrows the store to a stratified subset; 0 takes all.
        grid: ``short`` (DESIGN section 16) or ``full`` (every recipe and model; seeds, tables and masks of the best).
        models: Narrows the grid to these, or adds models that a user brings; empty takes all of it.
        recipes: Narrows the grid to these; empty takes all of it.
        threats: Masks to train in place of the grid's, for `gbt` on `deploy` unless models or recipes are named.
        trials: Settings to try for each cell on its own validation A; 0 takes the defaults.
        engine: What the bundles are swept with, ``local`` or ``ray``; the products are the same bytes.
        address: Of a running Ray cluster; empty starts one on this machine.
    """

    store: StoreLocation
    run: Path
    workers: int = 2
    limit: int = 0
    include_degraded: bool = True
    seed: int = 0
    grid: str = "short"
    models: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    threats: tuple[str, ...] = ()
    trials: int = 0
    engine: str = "local"
    address: str = ""


def code_version() -> str:
    """Name everything that changes what features mean: release, schema, behaviour."""
    return f"{__version__} {schema_hash()} {behaviour_fingerprint()}"


def compute_store_fingerprint(store: StoreLocation) -> str:
    """Digest what lies in a store by name, size, time and receipt, without reading a bundle."""
    digest = sha256()
    for item in open_store(store).walk():
        digest.update(f"{item.path} {item.bytes} {item.mtime_ns} {item.receipt}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def compute_digests(run: Path, names: Sequence[str]) -> dict[str, str]:
    """Give the sha256 of some files of a run; an absent one is ``absent``."""
    found = {}
    for name in names:
        path = run / name
        found[name] = file_sha256(path) if path.is_file() else "absent"
    return found


def list_split_files(run: Path) -> tuple[str, ...]:
    """Give the names of the run's split files and of their index."""
    return (SPLIT_INDEX_FILE, *list_split_names(run))


def compute_model_digests(models: Sequence[str]) -> dict[str, str]:
    """Give the sha256 of the file of each model that is not phasewatch's own: when it changes, it is trained again."""
    files = {model: find_source_file(model) for model in models}
    return {f"code of {model}": file_sha256(path) for model, path in files.items() if path is not None}


def check_folders(settings: RunSettings) -> None:
    """Raise before anything is written if the store is none, or the run's folder is a store or lies inside one.

    Raises:
        StoreError: If the store is absent or holds no bundle.
        UsageError: If the run would be written into a store.
    """
    check_store(settings.store)
    run, store = settings.run.resolve(), settings.store
    if isinstance(store, str) and store.startswith("file://"):
        store = Path(store.removeprefix("file://"))
    if isinstance(store, Path) and (run == store.resolve() or store.resolve() in run.parents):
        raise UsageError(
            f"--out {settings.run}: lies in the store {store}; a run has a folder of its own, name another"
        )
    if run.is_dir() and has_bundle(run):
        raise UsageError(f"--out {settings.run}: holds bundles, so it is a store; a run has a folder of its own")


class CallbackProgress:
    """Progress that is passed on to a function of (task, done, total, detail)."""

    def __init__(self, tell: Callable[[str, int, int, str], None]) -> None:
        self._tell = tell

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Pass the update on."""
        self._tell(task, done, total, detail)


def validate(settings: RunSettings, *, full: bool = False, progress: Progress = NO_PROGRESS) -> SweepSummary:
    """Sweep the store into the run."""
    _copy_custom_channels(settings.run)
    choose = None
    if settings.limit:
        choose = _build_chooser(settings)
    return sweep(
        settings.store, settings.run, workers=settings.workers, full=full, choose=choose, progress=progress,
        mapper=_choose_mapper(settings),
    )  # fmt: skip


def _copy_custom_channels(run: Path) -> None:
    """Put the user's own channels into the run, so that later stages and readers have them."""
    if CUSTOM_CHANNELS.text:
        atomic.make_folder(run)
        atomic.write_atomic(run / CHANNELS_FILE, CUSTOM_CHANNELS.text)


def _choose_mapper(settings: RunSettings) -> BundleMapper:
    """Give what the reading is spread with.

    Raises:
        UsageError: If there is no such engine.
    """
    if settings.engine not in SWEEP_ENGINES:
        raise UsageError(f"no engine {settings.engine!r}; it is one of {', '.join(SWEEP_ENGINES)}")
    if settings.engine == "local":
        return map_ordered
    from phasewatch.parallel.ray import map_on_ray

    return partial(map_on_ray, address=settings.address)


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
    """Sweep into the run only those bundles that an index calls usable."""
    usable = {v.path for v in read_index(index) if v.status in USABLE_STATUSES}
    narrow = _build_chooser(settings) if settings.limit else None

    def choose(items: Sequence[StoreItem]) -> Sequence[StoreItem]:
        listed = [item for item in items if render_item_path(item) in usable]
        return narrow(listed) if narrow else listed

    return sweep(
        settings.store, settings.run, workers=settings.workers, choose=choose, progress=progress, task="bins", mapper=_choose_mapper(settings),
        prior=index,
    )  # fmt: skip


def build_features(settings: RunSettings) -> FeatureCount:
    """Make the feature tables of a swept run, and enter them into its ledger."""
    run = settings.run
    atomic.sweep_temporaries(run)
    statuses = read_statuses(run / VALIDATION_FILE)
    count = write_feature_tables(
        run,
        open_bins(run / BINS_DIR),
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
    raise RunError(f"{path}: no readable ledger; make it with `phasewatch validate STORE --out {run}`")


def split(settings: RunSettings, recipes: Sequence[str] = ()) -> SplitIndex:
    """Cut the run's episodes by every recipe, or by some; return what became of each and what was set aside.

    Raises:
        SplitError: If no recipe that tests something can be built.
    """
    index = write_all_splits(settings.run, recipes or [row.name for row in SPLIT_RECIPES])
    tests = {row.name for row in SPLIT_RECIPES if row.tests}
    if (of := [b for b in index.recipes if b.recipe in tests]) and not any(b.folds for b in of):
        raise SplitError(
            f"no recipe can be built; {of[0].why}; {settings.run / SPLIT_INDEX_FILE} has the reason of each"
        )
    return index


def _read_all_folds(run: Path) -> dict[str, tuple[Fold, ...]]:
    """Read the folds of every recipe that the run has.

    Raises:
        RunError: If it has none.
    """
    there = [row.name for row in SPLIT_RECIPES if list_split_paths(run, row.name)]
    if not there:
        raise RunError(f"{run / SPLITS_DIR}: no split; make them with `phasewatch split {run}`")
    return {recipe: read_folds(run, recipe) for recipe in there}


def check_names(settings: RunSettings) -> None:
    """Look at every name that the training is narrowed by; needs nothing of the run.

    Raises:
        UsageError: If the grid, a recipe, a model or a mask is not known.
    """
    if settings.grid not in EXPERIMENT_GRIDS:
        raise UsageError(f"no grid {settings.grid!r}; it is one of {', '.join(EXPERIMENT_GRIDS)}")
    for recipe in settings.recipes:
        find_recipe(recipe)
    for model in settings.models:
        find_model(model)
    for threat in settings.threats:
        build_channel_mask(threat)


def build_experiments(settings: RunSettings) -> tuple[Experiment, ...]:
    """Give a grid's cells, of the full one the first pass, narrowed to what was asked for.

    Raises:
        UsageError: If the grid, a model or a recipe is not known, or no cell is left.
        SplitError: If no cell is left because the recipes that were asked for, or the headline's, could not be built.
    """
    check_names(settings)
    folds = _read_all_folds(settings.run)
    if settings.threats:
        return build_channel_set_grid(
            folds, settings.threats, models=settings.models, recipes=settings.recipes, seed=settings.seed
        )
    own = (*MAIN_MODELS, *BASELINE_MODELS)
    brought = [model for model in settings.models if find_model(model).key not in own]
    cells = (build_full_grid if settings.grid == "full" else build_short_grid)(folds, seed=settings.seed)
    chosen = _filter_experiments(
        settings, (*cells, *build_user_model_grid(folds, brought, recipes=settings.recipes, seed=settings.seed))
    )
    if not chosen:
        wanted = settings.recipes or (HEADLINE_RECIPE,)
        if lacking := [b for b in read_recipe_results(settings.run) if b.why and b.recipe in wanted]:
            raise SplitError(f"nothing can be trained: {lacking[0].why}")
        raise UsageError(
            f"the {settings.grid} grid has no cell of {', '.join((*settings.models, *settings.recipes))}; "
            "ask for --recipes all, or for other models"
        )
    return chosen


def _filter_experiments(settings: RunSettings, cells: Sequence[Experiment]) -> tuple[Experiment, ...]:
    return tuple(
        cell
        for cell in cells
        if (not settings.models or cell.model in settings.models)
        and (not settings.recipes or cell.recipe in settings.recipes)
    )


def train(settings: RunSettings, *, tell: TrainingProgress | None = None) -> TrainReport:
    """Train what is not finished of the grid; of the full one, first what shows which net is best, then more of that."""
    cells = build_experiments(settings)
    report = train_experiments(settings.run, cells, workers=settings.workers, trials=settings.trials, tell=tell)
    lost = {failed.cell for failed in report.failed}
    net = find_best_net(settings.run, [cell for cell in cells if cell not in lost]) if settings.grid == "full" else None
    if net is None:
        return report
    more = _filter_experiments(
        settings, build_headline_grid(_read_all_folds(settings.run), net=net, seed=settings.seed)
    )
    if not (todo := set(more) - set(cells)):
        return report
    both = (*(cell for cell in cells if cell not in lost), *sorted(todo))
    again = train_experiments(settings.run, both, workers=settings.workers, trials=settings.trials, tell=tell)
    first = set(report.trained)
    kept = tuple(cell for cell in again.kept if cell not in first)
    return replace(again, trained=(*report.trained, *again.trained), kept=kept, failed=(*report.failed, *again.failed))


def evaluate(settings: RunSettings) -> MetricTable:
    """Score the predictions."""
    return evaluate_run(settings.run)


def explain(run: Path, episode_id: str, at_s: float) -> DecisionExplanation:
    """Say which channels the headline's model hangs on in one window of a test episode.

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
        f"{run}: no fold of {place.recipe} tests episode {episode_id!r}; {run / SPLITS_DIR} names those that are tested"
    )


def audit(settings: RunSettings, *, tell: Callable[[str, int, int], None] | None = None) -> AuditReport:
    """Check what the run promises; without its store, what needs no bundles."""

    def remake(folder: Path) -> None:
        listed = {
            v.path for v in read_index(settings.run / VALIDATION_FILE)
        }  # what came to the store since is not the run's
        sweep(
            settings.store,
            folder,
            workers=settings.workers,
            choose=lambda items: [item for item in items if render_item_path(item) in listed],
            prior=settings.run / VALIDATION_FILE,
        )
        build_features(replace(settings, run=folder))
        built = {b.recipe for b in read_recipe_results(settings.run)} | {
            fold.recipe for fold in read_all_folds(settings.run)
        }
        write_all_splits(folder, built)

    there = isinstance(settings.store, str) or (settings.store.is_dir() and settings.store != settings.run)
    return audit_run(
        settings.run, remake=remake if there else None, files=(VALIDATION_FILE, *BINS_PATHS, *FEATURE_FILES), tell=tell
    )


def build_report(settings: RunSettings, form: str = "html", out: Path | None = None) -> Path:
    """Write the page, or its words and numbers without pictures."""
    return write_report(settings.run, form, out)
