"""The stages of a run, each alone: what it reads, what it writes, how it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from phasewatch import __version__, atomic
from phasewatch.audit.checks import Audit
from phasewatch.audit.run import audit_run
from phasewatch.dataset.run import file_sha256
from phasewatch.dataset.splits import read_folds, write_splits
from phasewatch.episode.bundle import peek
from phasewatch.errors import BundleError, RunError, UsageError
from phasewatch.evaluate.rows import Metrics
from phasewatch.evaluate.score import score
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import schema_hash
from phasewatch.features.tables import FeatureCount, write_tables
from phasewatch.grid.files import open_grids
from phasewatch.report.page import write_report
from phasewatch.split import Fold, parse_fold
from phasewatch.store.disk import DiskStore, StoreItem
from phasewatch.train.cell import Cell, plan_cells
from phasewatch.train.cells import TrainReport, train_cells
from phasewatch.validate.index import INDEX, read_index
from phasewatch.validate.ledger import render_ledger
from phasewatch.validate.subset import pick
from phasewatch.validate.sweep import LEDGER, SweepSummary, Tell, path_of, sweep
from phasewatch.validate.verdict import USABLE

RECIPES = ("held_out_host",)
MODELS = ("gbt", "minirocket", "majority", "elapsed_time")
SIX = ("gbt", "mlp", "cnn", "gru", "lstm", "transformer")
SIX_THREATS = ("realistic", "oracle")
GRIDS = ("short", "full")
FULL_THREATS = ("realistic", "oracle", "portable")
FULL_SEEDS = 3
GRID_FILES = ("grids/grids.npy", "grids/levels.npy", "grids/index.parquet")
FEATURE_FILES = ("features_window_v1.parquet", "features_episode_v1.parquet", "feature_schema_v1.json")
PREDICTIONS, METRICS, REPORT = "predictions_v1.parquet", "metrics_v1.json", "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run is asked for.

    Attributes:
        limit: Narrows the store to a stratified subset; 0 takes all.
        grid: ``short`` (one seed, realistic) or ``full`` (every threat model, three seeds from `seed` on).
        models: Narrows the grid to these; empty takes all of it.
    """

    store: Path
    run: Path
    workers: int = 2
    limit: int = 0
    include_degraded: bool = True
    seed: int = 0
    grid: str = "short"
    models: tuple[str, ...] = ()


def code_version() -> str:
    """Name everything that changes what features mean: release, schema, behaviour."""
    return f"{__version__} {schema_hash()} {behaviour_fingerprint()}"


def store_fingerprint(store: Path) -> str:
    """Digest what lies in a store by name, size, time and receipt, without reading a bundle."""
    digest = sha256()
    for item in DiskStore(store).walk():
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
    """Give the names of the run's split files, in order."""
    return tuple(f"splits/{path.name}" for path in sorted((run / "splits").glob("*.json")))


def validate(settings: Settings, *, full: bool = False, tell: Tell | None = None) -> SweepSummary:
    """Sweep the store into the run."""
    choose = None
    if settings.limit:
        choose = _chooser(settings)
    return sweep(settings.store, settings.run, workers=settings.workers, full=full, choose=choose, tell=tell)


def _chooser(settings: Settings) -> Callable[[Sequence[StoreItem]], Sequence[StoreItem]]:
    store = DiskStore(settings.store)

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

    return sweep(settings.store, settings.run, workers=settings.workers, choose=choose, tell=tell)


def features(settings: Settings) -> FeatureCount:
    """Make the feature tables of a swept run, and enter them into its ledger."""
    run = settings.run
    atomic.sweep_temporaries(run)
    verdicts = read_index(run / INDEX)
    statuses = {(v.host_id, v.episode_id): v.status for v in verdicts if v.status in USABLE}
    count = write_tables(
        run,
        open_grids(run / "grids"),
        statuses,
        include_degraded=settings.include_degraded,
        inputs=digests(run, [INDEX]),
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


def split(settings: Settings) -> int:
    """Cut the run's episodes by every recipe; gives the number of folds."""
    return sum(len(write_splits(settings.run, recipe)) for recipe in RECIPES)


def grid_cells(run: Path, *, grid: str = "short", seed: int = 0, models: Sequence[str] = ()) -> tuple[Cell, ...]:
    """Give a grid's cells: each model over all folds of each recipe.

    Raises:
        UsageError: If the grid is not known, or has none of the models.
    """
    if unknown := set(models) - {*MODELS, *SIX}:
        raise UsageError(f"the grid has no model {min(unknown)!r}; it has {', '.join(dict.fromkeys((*SIX, *MODELS)))}")
    if grid not in GRIDS:
        raise UsageError(f"no grid {grid!r}; it is one of {', '.join(GRIDS)}")
    threats = FULL_THREATS if grid == "full" else FULL_THREATS[:1]
    seeds = range(seed, seed + (FULL_SEEDS if grid == "full" else 1))
    every = tuple(
        cell
        for recipe in RECIPES
        for cell in plan_cells(read_folds(run, recipe), models=MODELS, threats=threats, seeds=seeds)
    )
    cells = (*every, *_six_models(run, seed))
    return tuple(cell for cell in cells if not models or cell.model in models)


def _six_models(run: Path, seed: int) -> tuple[Cell, ...]:
    """Give the six models under both threat models on one fold: the host with most profiles, then by name."""
    folds = read_folds(run, "held_out_host")
    tested = {fold.fold: len({row.profile for row in fold.coverage if row.test}) for fold in folds}
    widest = min(folds, key=lambda fold: (-tested[fold.fold], fold.fold))
    return plan_cells([widest], models=SIX, threats=SIX_THREATS, seeds=(seed,))


def train(settings: Settings, *, tell: Callable[[Cell, int, int], None] | None = None) -> TrainReport:
    """Train what is not finished of the short grid."""
    cells = grid_cells(settings.run, grid=settings.grid, seed=settings.seed, models=settings.models)
    return train_cells(settings.run, cells, workers=settings.workers, tell=tell)


def evaluate(settings: Settings) -> Metrics:
    """Score the predictions."""
    return score(settings.run)


def audit(settings: Settings, *, tell: Callable[[str, int, int], None] | None = None) -> Audit:
    """Check what the run promises; without its store, what needs no bundles."""

    def remake(folder: Path) -> None:
        listed = {v.path for v in read_index(settings.run / INDEX)}  # what came to the store since is not the run's
        sweep(
            settings.store,
            folder,
            workers=settings.workers,
            choose=lambda items: [item for item in items if path_of(item) in listed],
        )
        features(replace(settings, run=folder))
        for recipe in sorted({fold.recipe for fold in _folds(settings.run)}):
            write_splits(folder, recipe)

    there = settings.store.is_dir() and settings.store != settings.run
    return audit_run(
        settings.run, remake=remake if there else None, files=(INDEX, *GRID_FILES, *FEATURE_FILES), tell=tell
    )


def _folds(run: Path) -> list[Fold]:
    return [parse_fold(path.read_bytes(), file=str(path)) for path in sorted((run / "splits").glob("*.json"))]


def report(settings: Settings) -> Path:
    """Write the page."""
    return write_report(settings.run)
