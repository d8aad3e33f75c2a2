"""The stages of a run, each alone: what it reads, what it writes, how it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from phasewatch import __version__, atomic
from phasewatch.audit.checks import Audit
from phasewatch.audit.run import audit_run
from phasewatch.channels import EXTRAS, mask_of
from phasewatch.dataset.run import file_sha256
from phasewatch.dataset.splits import SplitIndex, read_built, read_folds, write_all_splits
from phasewatch.episode.bundle import peek
from phasewatch.errors import BundleError, RunError, SplitError, UsageError
from phasewatch.evaluate.explain import Why, why
from phasewatch.evaluate.rows import Metrics, chosen
from phasewatch.evaluate.score import read_metrics, score
from phasewatch.extras import CHANNELS_FILE
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import schema_hash
from phasewatch.features.tables import FeatureCount, Spread, write_tables
from phasewatch.grid.files import open_grids
from phasewatch.models.registry import BASELINES, code_of, row_of
from phasewatch.report.page import write_report
from phasewatch.split import RECIPES, Fold, Part, parse_fold, recipe_of
from phasewatch.store.base import Place, StoreItem, check_store, has_bundle, open_store
from phasewatch.train.cell import Cell
from phasewatch.train.cells import TrainReport, best_net, train_cells
from phasewatch.train.grid import (
    HEADLINE,
    SIX,
    brought_grid,
    full_grid,
    headline_grid,
    masked_grid,
    short_grid,
)
from phasewatch.validate.index import INDEX, read_index, read_statuses
from phasewatch.validate.ledger import render_ledger
from phasewatch.validate.subset import pick
from phasewatch.validate.sweep import LEDGER, Mapper, SweepSummary, Tell, path_of, sweep
from phasewatch.validate.verdict import USABLE
from phasewatch.workers import map_ordered

GRIDS = ("short", "full")
ENGINES = ("local", "ray")
Tally = Callable[[Cell, int, int], None]  # a cell is through, how many are, of how many
GRID_INDEX = "grids/index.parquet"
GRID_FILES = ("grids/grids.npy", "grids/levels.npy", GRID_INDEX)
FEATURE_FILES = ("features_window_v1.parquet", "features_episode_v1.parquet", "feature_schema_v1.json")
INDEX_OF_SPLITS = "splits_v1.json"
PREDICTIONS, METRICS, REPORT = "predictions_v1.parquet", "metrics_v1.json", "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
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

    store: Place
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


def store_fingerprint(store: Place) -> str:
    """Digest what lies in a store by name, size, time and receipt, without reading a bundle."""
    digest = sha256()
    for item in open_store(store).walk():
        digest.update(f"{item.path} {item.bytes} {item.mtime_ns} {item.receipt}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def digests(run: Path, names: Sequence[str]) -> dict[str, str]:
    """Give the sha256 of some files of a run; an absent one is ``absent``."""
    found = {}
    for name in names:
        path = run / name
        found[name] = file_sha256(path) if path.is_file() else "absent"
    return found


def split_files(run: Path) -> tuple[str, ...]:
    """Give the names of the run's split files and of their index."""
    return (INDEX_OF_SPLITS, *(f"splits/{path.name}" for path in sorted((run / "splits").glob("*.json"))))


def brought_code(models: Sequence[str]) -> dict[str, str]:
    """Give the sha256 of the file of each model that is not phasewatch's own: when it changes, it is trained again."""
    files = {model: code_of(model) for model in models}
    return {f"code of {model}": file_sha256(path) for model, path in files.items() if path is not None}


def check_places(settings: Settings) -> None:
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


def validate(settings: Settings, *, full: bool = False, tell: Tell | None = None) -> SweepSummary:
    """Sweep the store into the run."""
    _keep_channels(settings.run)
    choose = None
    if settings.limit:
        choose = _chooser(settings)
    return sweep(
        settings.store, settings.run, workers=settings.workers, full=full, choose=choose, tell=tell,
        mapper=_mapper(settings),
    )  # fmt: skip


def _keep_channels(run: Path) -> None:
    """Put the user's own channels into the run, so that later stages and readers have them."""
    if EXTRAS.text:
        atomic.make_folder(run)
        atomic.write_whole(run / CHANNELS_FILE, EXTRAS.text)


def _mapper(settings: Settings) -> Mapper:
    """Give what the reading is spread with.

    Raises:
        UsageError: If there is no such engine.
    """
    if settings.engine not in ENGINES:
        raise UsageError(f"no engine {settings.engine!r}; it is one of {', '.join(ENGINES)}")
    if settings.engine == "local":
        return map_ordered
    from phasewatch.cluster import map_on_ray

    return partial(map_on_ray, address=settings.address)


def _chooser(settings: Settings) -> Callable[[Sequence[StoreItem]], Sequence[StoreItem]]:
    store = open_store(settings.store)

    def stratum(item: StoreItem) -> str:
        try:
            manifest = peek(store.read(item), file=item.path)
            return f"{manifest.host.host_id}/{manifest.profile}"
        except BundleError:
            return f"{item.host_id}/"

    def choose(items: Sequence[StoreItem]) -> Sequence[StoreItem]:
        places = pick([stratum(i) for i in items], [i.path for i in items], settings.limit, seed=settings.seed)
        return [items[place] for place in places]

    return choose


def sweep_listed(settings: Settings, index: Path, *, tell: Tell | None = None) -> SweepSummary:
    """Sweep into the run only those bundles that an index calls usable."""
    usable = {v.path for v in read_index(index) if v.status in USABLE}
    narrow = _chooser(settings) if settings.limit else None

    def choose(items: Sequence[StoreItem]) -> Sequence[StoreItem]:
        listed = [item for item in items if path_of(item) in usable]
        return narrow(listed) if narrow else listed

    return sweep(
        settings.store, settings.run, workers=settings.workers, choose=choose, tell=tell, mapper=_mapper(settings),
        prior=index,
    )  # fmt: skip


def features(settings: Settings) -> FeatureCount:
    """Make the feature tables of a swept run, and enter them into its ledger."""
    run = settings.run
    atomic.sweep_temporaries(run)
    statuses = read_statuses(run / INDEX)
    count = write_tables(
        run,
        open_grids(run / "grids"),
        statuses,
        include_degraded=settings.include_degraded,
        inputs=digests(run, [INDEX]),
        spread=Spread(workers=settings.workers),
    )
    stages = _read_ledger(run)
    stages["features"] = {
        "in": len(statuses),
        "used": count.episodes,
        "left_out": dict(count.left_out),
        "windows": count.windows,
        "episodes_without_a_window": count.without_windows,
        "windows_of_unknown_phase": count.unknown_windows,
    }
    atomic.write_whole(run / LEDGER, render_ledger(stages))
    return count


def _read_ledger(run: Path) -> dict[str, dict[str, object]]:
    path = run / LEDGER
    with suppress(OSError, ValueError, KeyError):
        return dict(json.loads(path.read_bytes())["stages"])
    raise RunError(f"{path}: no readable ledger; make it with `phasewatch validate STORE --out {run}`")


def split(settings: Settings, recipes: Sequence[str] = ()) -> SplitIndex:
    """Cut the run's episodes by every recipe, or by some; return what became of each and what was set aside.

    Raises:
        SplitError: If no recipe that tests something can be built.
    """
    index = write_all_splits(settings.run, recipes or [row.name for row in RECIPES])
    tests = {row.name for row in RECIPES if row.tests}
    if (of := [b for b in index.recipes if b.recipe in tests]) and not any(b.folds for b in of):
        raise SplitError(
            f"no recipe can be built; {of[0].why}; {settings.run / INDEX_OF_SPLITS} has the reason of each"
        )
    return index


def read_all_folds(run: Path) -> dict[str, tuple[Fold, ...]]:
    """Read the folds of every recipe that the run has.

    Raises:
        RunError: If it has none.
    """
    there = [row.name for row in RECIPES if any((run / "splits").glob(f"{row.name}-*.json"))]
    if not there:
        raise RunError(f"{run / 'splits'}: no split; make them with `phasewatch split {run}`")
    return {recipe: read_folds(run, recipe) for recipe in there}


def check_names(settings: Settings) -> None:
    """Look at every name that the training is narrowed by; needs nothing of the run.

    Raises:
        UsageError: If the grid, a recipe, a model or a mask is not known.
    """
    if settings.grid not in GRIDS:
        raise UsageError(f"no grid {settings.grid!r}; it is one of {', '.join(GRIDS)}")
    for recipe in settings.recipes:
        recipe_of(recipe)
    for model in settings.models:
        row_of(model)
    for threat in settings.threats:
        mask_of(threat)


def grid_cells(settings: Settings) -> tuple[Cell, ...]:
    """Give a grid's cells, of the full one the first pass, narrowed to what was asked for.

    Raises:
        UsageError: If the grid, a model or a recipe is not known, or no cell is left.
        SplitError: If no cell is left because the recipes that were asked for, or the headline's, could not be built.
    """
    check_names(settings)
    folds = read_all_folds(settings.run)
    if settings.threats:
        return masked_grid(
            folds, settings.threats, models=settings.models, recipes=settings.recipes, seed=settings.seed
        )
    own = (*SIX, *BASELINES)
    brought = [model for model in settings.models if row_of(model).key not in own]
    cells = (full_grid if settings.grid == "full" else short_grid)(folds, seed=settings.seed)
    chosen = _narrowed(settings, (*cells, *brought_grid(folds, brought, recipes=settings.recipes, seed=settings.seed)))
    if not chosen:
        wanted = settings.recipes or (HEADLINE,)
        if lacking := [b for b in read_built(settings.run) if b.why and b.recipe in wanted]:
            raise SplitError(f"nothing can be trained: {lacking[0].why}")
        raise UsageError(
            f"the {settings.grid} grid has no cell of {', '.join((*settings.models, *settings.recipes))}; "
            "ask for --recipes all, or for other models"
        )
    return chosen


def _narrowed(settings: Settings, cells: Sequence[Cell]) -> tuple[Cell, ...]:
    return tuple(
        cell
        for cell in cells
        if (not settings.models or cell.model in settings.models)
        and (not settings.recipes or cell.recipe in settings.recipes)
    )


def train(settings: Settings, *, tell: Tally | None = None) -> TrainReport:
    """Train what is not finished of the grid; of the full one, first what shows which net is best, then more of that."""
    cells = grid_cells(settings)
    report = train_cells(settings.run, cells, workers=settings.workers, trials=settings.trials, tell=tell)
    lost = {failed.cell for failed in report.failed}
    net = best_net(settings.run, [cell for cell in cells if cell not in lost]) if settings.grid == "full" else None
    if net is None:
        return report
    more = _narrowed(settings, headline_grid(read_all_folds(settings.run), net=net, seed=settings.seed))
    if not (todo := set(more) - set(cells)):
        return report
    both = (*(cell for cell in cells if cell not in lost), *sorted(todo))
    again = train_cells(settings.run, both, workers=settings.workers, trials=settings.trials, tell=tell)
    first = set(report.trained)
    kept = tuple(cell for cell in again.kept if cell not in first)
    return replace(again, trained=(*report.trained, *again.trained), kept=kept, failed=(*report.failed, *again.failed))


def evaluate(settings: Settings) -> Metrics:
    """Score the predictions."""
    return score(settings.run)


def explain(run: Path, episode_id: str, at_s: float) -> Why:
    """Say which channels the headline's model hangs on in one window of a test episode.

    Raises:
        RunError: If no fold of the headline's recipe tests that episode.
    """
    place = chosen(read_metrics(run).metrics)
    for fold in read_folds(run, place.recipe):
        if episode_id in fold.ids(Part.TEST):
            cell = Cell(recipe=place.recipe, fold=fold.fold, threat=place.threat, model=place.model, table=place.table)
            return why(run, cell, episode_id, at_s)
    raise RunError(
        f"{run}: no fold of {place.recipe} tests episode {episode_id!r}; {run / 'splits'} names those that are tested"
    )


def audit(settings: Settings, *, tell: Callable[[str, int, int], None] | None = None) -> Audit:
    """Check what the run promises; without its store, what needs no bundles."""

    def remake(folder: Path) -> None:
        listed = {v.path for v in read_index(settings.run / INDEX)}  # what came to the store since is not the run's
        sweep(
            settings.store,
            folder,
            workers=settings.workers,
            choose=lambda items: [item for item in items if path_of(item) in listed],
            prior=settings.run / INDEX,
        )
        features(replace(settings, run=folder))
        built = {b.recipe for b in read_built(settings.run)} | {fold.recipe for fold in _folds(settings.run)}
        write_all_splits(folder, built)

    there = isinstance(settings.store, str) or (settings.store.is_dir() and settings.store != settings.run)
    return audit_run(
        settings.run, remake=remake if there else None, files=(INDEX, *GRID_FILES, *FEATURE_FILES), tell=tell
    )


def _folds(run: Path) -> list[Fold]:
    return [parse_fold(path.read_bytes(), file=str(path)) for path in sorted((run / "splits").glob("*.json"))]


def report(settings: Settings, form: str = "html", out: Path | None = None) -> Path:
    """Write the page, or its words and numbers without pictures."""
    return write_report(settings.run, form, out)
