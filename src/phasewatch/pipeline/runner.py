"""The pipeline from a store to a report: unchanged stages are skipped, and an interrupted run is resumed.

A run is locked while it is written. ``run.json`` holds its settings and, for each finished stage, the digests of what
it read and wrote; a stage runs again if one of them has changed.
"""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from phasewatch import atomic
from phasewatch._version import __version__
from phasewatch.artifacts import (
    ACCOUNTING_FILE,
    AUDIT_FILE,
    BINS_INDEX_PATH,
    BINS_PATHS,
    FEATURE_FILES,
    METRICS_FILE,
    PREDICTIONS_FILE,
    REPORT_FILE,
    VALIDATION_FILE,
)
from phasewatch.dataset.split_files import RecipeResult, read_all_folds, read_split_index
from phasewatch.errors import RunError, SplitError, StoreError, UsageError
from phasewatch.evaluation.headline import render_headline
from phasewatch.pipeline import stages
from phasewatch.pipeline.stages import RunOptions, RunSettings, compute_digests
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.splits import SINGLE_HOST_RECIPE, SetAsideEpisode, has_single_host
from phasewatch.store.base import StoreLocation, parse_store_location
from phasewatch.training.grids import HEADLINE_RECIPE
from phasewatch.training.train import FailedExperiment, TrainingError

__all__ = [
    "RUN_FILE",
    "PipelineResult",
    "PipelineStage",
    "RunConfiguration",
    "StageOutcome",
    "StageResult",
    "build_configuration",
    "build_stages",
    "prepare_run",
    "read_settings",
    "run_pipeline",
]

RUN_FILE = "run.json"
_TRAIN_STAGE = "train"

logger = logging.getLogger(__name__)


class StageOutcome(StrEnum):
    """What became of a stage."""

    MADE = "made"
    KEPT = "kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStage:
    """One stage of the pipeline.

    Attributes:
        name: Name of the stage, and of its task in `Progress`.
        inputs: Returns what the stage depends on, as JSON values: digests of files, settings, the version of the code.
        outputs: Returns the files that it writes, known once it has run.
        work: Runs the stage and returns a summary for people.
    """

    name: str
    inputs: Callable[[], dict[str, Any]]
    outputs: Callable[[], Sequence[str]]
    work: Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """The result of a stage.

    Attributes:
        name: Name of the stage.
        outcome: Whether it ran or was kept.
        summary: One line for people.
    """

    name: str
    outcome: StageOutcome
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineResult:
    """The result of a run.

    Attributes:
        run: The run's folder.
        report: The report's file.
        headline: The headline metric as a line for people.
        stages: The stages in the order of the data.
        failed: Experiments that could not be trained; the same command tries them again.
        unbuilt_recipes: Requested recipes, or by default the headline's, that could not be built. The headline of a
            store of one host is that of its last episodes.
        set_aside: Episodes that some or all recipes leave out.
    """

    run: Path
    report: Path
    headline: str
    stages: tuple[StageResult, ...]
    failed: tuple[FailedExperiment, ...] = ()
    unbuilt_recipes: tuple[RecipeResult, ...] = ()
    set_aside: tuple[SetAsideEpisode, ...] = ()

    @property
    def is_unchanged(self) -> bool:
        """Whether no stage had to run."""
        return all(stage.outcome is StageOutcome.KEPT for stage in self.stages)


class RunConfiguration(RunOptions, frozen=True, kw_only=True):
    """The configuration in ``run.json``.

    Attributes:
        store: Where the bundles were; None in the published copy of a run.
    """

    store: str | None = None


def run_pipeline(settings: RunSettings, *, progress: Progress = NO_PROGRESS) -> PipelineResult:
    """Run all stages from a store to a report.

    Raises:
        StoreError: If there is no store, or it is empty.
        UsageError: If a grid, recipe, model or channel set is unknown, or the folder holds the run of another store.
        SplitError: If no recipe can be built; the report is still written and says so.
        BusyError: If another process works on the run.
    """
    if isinstance(settings.store, Path) and not settings.store.exists():
        raise StoreError(
            f"{settings.store}: there is no such store; record one with "
            f"`phasewatch record --plan smoke --out {settings.store}`"
        )
    stages.check_names(settings)  # before the sweep, which may take hours
    stages.check_folders(settings)
    atomic.make_folder(settings.run)
    with atomic.lock(settings.run):
        for folder in (settings.run, settings.run / "grids", settings.run / "splits"):
            if folder.is_dir():
                atomic.sweep_temporaries(folder)
        log = _read_log(settings.run)
        _check_same_store(settings, log)
        log["configuration"] = msgspec.to_builtins(build_configuration(settings))
        log["versions"], log["host"] = _collect_versions(), _describe_host()
        results: list[StageResult] = []
        failed: list[FailedExperiment] = []
        for stage in build_stages(settings, progress=progress, on_failed=failed.extend):
            try:
                results.append(_run_stage(stage, settings.run, log, progress))
            except SplitError:
                stages.build_report(settings)
                _write_log(settings.run, log)
                raise
        if failed:
            log["stages"].pop(_TRAIN_STAGE, None)  # so that the next run tries them again
        _write_log(settings.run, log)
    index = read_split_index(settings.run)
    is_single_host = has_single_host(read_all_folds(settings.run))
    wanted = settings.recipes or (SINGLE_HOST_RECIPE if is_single_host else HEADLINE_RECIPE,)
    return PipelineResult(
        run=settings.run,
        report=settings.run / REPORT_FILE,
        headline=render_headline(stages.read_run_headline(settings)),
        stages=tuple(results),
        unbuilt_recipes=tuple(b for b in index.recipes if b.why and b.recipe in wanted),
        set_aside=index.set_aside,
        failed=tuple(failed),
    )


def prepare_run(settings: RunSettings, *, progress: Progress = NO_PROGRESS) -> None:
    """Run the stages from a store to its splits; what is unchanged is kept.

    Raises:
        StoreError: If there is no store, or it is empty.
        UsageError: If the folder holds the run of another store.
        SplitError: If no recipe can be built.
        BusyError: If another process works on the run.
    """
    stages.check_folders(settings)
    atomic.make_folder(settings.run)
    with atomic.lock(settings.run):
        log = _read_log(settings.run)
        _check_same_store(settings, log)
        log["configuration"] = msgspec.to_builtins(build_configuration(settings))
        for stage in build_stages(settings, progress=progress):
            if stage.name == _TRAIN_STAGE:
                break
            _run_stage(stage, settings.run, log, progress)


def _check_same_store(settings: RunSettings, log: dict[str, Any]) -> None:
    """Raise if the folder holds the run of another store; a store that has moved may continue its run."""
    recorded = log.get("configuration", {}).get("store") or ""
    before = parse_store_location(recorded) if recorded else settings.store
    if not isinstance(before, Path) or not isinstance(settings.store, Path):
        return
    if before.is_dir() and before.resolve() != settings.store.resolve():
        raise UsageError(
            f"{settings.run}: holds a run of {recorded}, not of {settings.store}; name another folder with --out, or "
            "remove that one"
        )


def read_settings(run: Path, *, store: StoreLocation | None = None) -> RunSettings:
    """Return the settings of a run, from its ``run.json``.

    Args:
        run: The run's folder. If it was made stage by stage, it has no settings and the defaults are returned.
        store: Where its bundles are now, if not where they were.

    Raises:
        RunError: If a setting has the wrong type.
    """
    try:
        c = msgspec.convert(_read_log(run).get("configuration", {}), RunConfiguration)
    except msgspec.ValidationError as exc:
        raise RunError(f"{run / RUN_FILE}: configuration: {exc}; make the run again with `phasewatch run`") from exc
    return RunSettings(
        store=store or parse_store_location(c.store or str(run)),
        run=run,
        limit=c.limit,
        include_degraded=c.include_degraded,
        seed=c.seed,
        grid=c.grid,
    )


def build_configuration(settings: RunSettings) -> RunConfiguration:
    """Return the settings as they are written to ``run.json``; without the run's folder, where that file is."""
    return RunConfiguration(
        store=str(settings.store),
        **{name: getattr(settings, name) for name in RunOptions.__struct_fields__},
    )


def build_stages(
    settings: RunSettings,
    *,
    progress: Progress = NO_PROGRESS,
    on_failed: Callable[[Sequence[FailedExperiment]], None] | None = None,
) -> tuple[PipelineStage, ...]:
    """Return the stages in the order of the data.

    Args:
        settings: The run's settings.
        progress: Progress of the stages' work.
        on_failed: Called with the experiments that could not be trained.
    """
    folder, code = settings.run, stages.code_version()

    def digests(*names: str, with_splits: bool = True) -> dict[str, Any]:
        files = [*names, *(stages.list_split_files(folder) if with_splits else ())]
        return {**compute_digests(folder, files), "code": code}

    def validate_inputs() -> dict[str, Any]:
        store = stages.compute_store_fingerprint(settings.store)
        return {"store": store, "code": code, "limit": settings.limit, "seed": settings.seed}

    def train_inputs() -> dict[str, Any]:
        return {
            **digests(*FEATURE_FILES, VALIDATION_FILE),
            **stages.compute_model_digests(settings.models),
            "seed": settings.seed,
            "grid": str(settings.grid),
            "models": list(settings.models),
            "recipes": list(settings.recipes),
            "channel_sets": list(settings.channel_sets),
            "trials": settings.trials,
        }

    def stage(
        name: str, inputs: Callable[[], dict[str, Any]], outputs: Callable[[], Sequence[str]], work: Callable[[], str]
    ) -> PipelineStage:
        return PipelineStage(name=name, inputs=inputs, outputs=outputs, work=work)

    return (
        stage(
            "validate",
            validate_inputs,
            lambda: (VALIDATION_FILE, *BINS_PATHS),
            lambda: _validate(settings, progress),
        ),
        stage(
            "features",
            lambda: {
                **digests(VALIDATION_FILE, *BINS_PATHS, with_splits=False),
                "include_degraded": settings.include_degraded,
            },
            lambda: (*FEATURE_FILES, ACCOUNTING_FILE),
            lambda: _build_features(settings),
        ),
        stage(
            "split",
            lambda: digests(VALIDATION_FILE, *FEATURE_FILES, with_splits=False),
            lambda: stages.list_split_files(folder),
            lambda: _split(settings),
        ),
        stage(
            _TRAIN_STAGE,
            train_inputs,
            lambda: (PREDICTIONS_FILE,),
            lambda: _train(settings, progress, on_failed),
        ),
        stage(
            "evaluate",
            lambda: digests(PREDICTIONS_FILE, BINS_INDEX_PATH, VALIDATION_FILE),
            lambda: (METRICS_FILE,),
            lambda: f"{len(stages.evaluate(settings).metrics):,} metrics",
        ),
        stage(
            "report",
            lambda: digests(METRICS_FILE, PREDICTIONS_FILE, AUDIT_FILE, ACCOUNTING_FILE, VALIDATION_FILE),
            lambda: (REPORT_FILE,),
            lambda: stages.build_report(settings).name,
        ),
    )


def _validate(settings: RunSettings, progress: Progress) -> str:
    counts = stages.validate(settings, progress=progress).stage
    return ", ".join(f"{counts[name]} {name}" for name in ("accepted", "degraded", "rejected", "errored"))


def _build_features(settings: RunSettings) -> str:
    count = stages.build_features(settings)
    return f"{count.windows:,} windows of {count.episodes:,} episodes"


def _split(settings: RunSettings) -> str:
    index = stages.split(settings)
    folds, recipes = sum(len(r.folds) for r in index.recipes), sum(bool(r.folds) for r in index.recipes)
    summary = f"{folds} folds of {recipes} recipes"
    if index.set_aside:
        summary += f"; {len({e.episode_id for e in index.set_aside})} episodes set aside"
    if unbuilt := [r for r in index.recipes if r.why]:
        summary += f"; cannot be built: {', '.join(r.recipe for r in unbuilt)}. {unbuilt[0].why}"
    return summary


def _train(
    settings: RunSettings, progress: Progress, on_failed: Callable[[Sequence[FailedExperiment]], None] | None
) -> str:
    done = stages.train(settings, progress=progress)
    if done.failed and not done.merged:
        raise TrainingError(done.failed)
    if on_failed is not None:
        on_failed(done.failed)
    failed = f", {len(done.failed)} failed" if done.failed else ""
    return f"{len(done.trained)} experiments trained, {len(done.kept)} kept{failed}"


def _run_stage(stage: PipelineStage, folder: Path, log: dict[str, Any], progress: Progress) -> StageResult:
    """Run a stage, or keep it if what it read and what it wrote are unchanged."""
    known: Mapping[str, Any] = log["stages"].get(stage.name, {})
    inputs = stage.inputs()
    outputs = compute_digests(folder, list(known.get("outputs", {})))
    if known.get("inputs") == inputs and known.get("outputs") == outputs:
        logger.info("%-9s unchanged", stage.name)
        return StageResult(name=stage.name, outcome=StageOutcome.KEPT, summary=str(known.get("words", "")))
    log["stages"].pop(stage.name, None)
    _write_log(folder, log)
    began = time.monotonic()
    progress.update(stage.name, 0, 1)
    summary = stage.work()
    progress.update(stage.name, 1, 1)
    logger.info("%-9s %s", stage.name, summary)
    log["stages"][stage.name] = {
        "inputs": inputs,
        "outputs": compute_digests(folder, list(stage.outputs())),
        "words": summary,
        "seconds": round(time.monotonic() - began, 3),
    }
    _write_log(folder, log)
    return StageResult(name=stage.name, outcome=StageOutcome.MADE, summary=summary)


def _read_log(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError):
        log = json.loads((folder / RUN_FILE).read_bytes())
        if isinstance(log.get("stages"), dict) and isinstance(log.get("configuration", {}), dict):
            return dict(log)
    return {"stages": {}}


def _write_log(folder: Path, log: Mapping[str, Any]) -> None:
    atomic.write_atomic(folder / RUN_FILE, (json.dumps(log, indent=1, sort_keys=True) + "\n").encode())


def _collect_versions() -> dict[str, str]:
    versions = {"phasewatch": __version__, "python": platform.python_version()}
    for package in ("numpy", "pyarrow", "lightgbm", "scikit-learn", "jinja2"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return versions  # an installed package; a repository further up is the user's own
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(checkout), "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        versions["git"] = done.stdout.strip()
    return versions


def _describe_host() -> dict[str, str]:
    """Return what the numbers were computed on; no host name, because `--publish` copies it to others."""
    return {"machine": platform.machine(), "system": platform.platform()}
