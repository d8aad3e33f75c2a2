"""The whole way, stage by stage: what is unchanged is kept, a kill costs the stage it hit, one writer at a time."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from phasewatch import atomic
from phasewatch._version import __version__
from phasewatch.artifacts import (
    ACCOUNTING_FILE,
    AUDIT_FILE,
    BINS_DIR,
    BINS_INDEX_PATH,
    BINS_PATHS,
    FEATURE_FILES,
    METRICS_FILE,
    PREDICTIONS_FILE,
    REPORT_FILE,
    RUN_LOG_FILE,
    SPLITS_DIR,
    VALIDATION_FILE,
)
from phasewatch.dataset.split_files import RecipeResult, read_split_index
from phasewatch.errors import SplitError, StoreError, UsageError
from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.evaluation.metric_table import render_headline
from phasewatch.pipeline import stages
from phasewatch.pipeline.stages import RunSettings, compute_digests
from phasewatch.splits import SetAsideEpisode
from phasewatch.store.base import StoreLocation, parse_store_location
from phasewatch.training.grids import HEADLINE_RECIPE
from phasewatch.training.train import FailedExperiment, TrainingError
from phasewatch.validate.sweep import SweepTally
from phasewatch.validate.verdict import BundleVerdict

TRAIN_STAGE = "train"
StageProgress = Callable[[str, int, int, str], None]  # stage, done, in all, words


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStage:
    """One step of the way.

    Attributes:
        inputs: What it depends on; unchanged inputs and outputs let it be kept.
        outputs: The files that it makes, known once it has run.
    """

    name: str
    inputs: Callable[[], dict[str, str]]
    outputs: Callable[[], Sequence[str]]
    work: Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineResult:
    """What a run came to.

    Attributes:
        stages: Name of each, whether it was made now or kept, and its result in words.
        failed: Cells that could not be trained; the same command tries them again.
        unbuilt_recipes: Recipes that were asked for, or that carry the headline, and that could not be built.
        set_aside: Episodes that some or all recipes do without.
    """

    run: Path
    report: Path
    headline: str
    stages: tuple[tuple[str, str, str], ...]
    failed: tuple[FailedExperiment, ...] = ()
    unbuilt_recipes: tuple[RecipeResult, ...] = ()
    set_aside: tuple[SetAsideEpisode, ...] = ()

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing had to be done."""
        return all(fate == "kept" for _, fate, _ in self.stages)


def run_pipeline(settings: RunSettings, *, tell: StageProgress | None = None) -> PipelineResult:
    """Take a store the whole way to a report.

    Raises:
        StoreError: If there is no store, or it is empty.
        UsageError: If a grid, recipe, model or mask is asked for that nobody knows, or the folder holds another store's run.
        SplitError: If no recipe can be built; the report is written all the same and says so.
        BusyError: If another process works on the run.
    """
    say = tell or (lambda stage, done, total, words: None)
    if isinstance(settings.store, Path) and not settings.store.is_dir():
        raise StoreError(
            f"{settings.store}: there is no such store; record one with `phasewatch record --plan smoke --out {settings.store}`"
        )
    stages.check_names(settings)  # before the sweep, which may take hours
    stages.check_folders(settings)
    atomic.make_folder(settings.run)
    with atomic.lock(settings.run):
        for folder in (settings.run, settings.run / BINS_DIR, settings.run / SPLITS_DIR):
            if folder.is_dir():
                atomic.sweep_temporaries(folder)
        log = _read_log(settings.run)
        _check_same_store(settings, log)
        log["configuration"] = build_configuration(settings)
        log["versions"], log["host"] = _collect_versions(), _describe_host()
        fates: list[tuple[str, str, str]] = []
        failed: list[FailedExperiment] = []
        for stage in build_stages(settings, say, failed.extend):
            try:
                fates.append(_run_stage(stage, settings.run, log, say))
            except SplitError:
                stages.build_report(settings)
                _write_log(settings.run, log)
                raise
        if failed:
            log["stages"].pop(TRAIN_STAGE, None)  # so that the next run tries them again
        _write_log(settings.run, log)
    words = render_headline(read_metrics(settings.run))
    index = read_split_index(settings.run)
    wanted = settings.recipes or (HEADLINE_RECIPE,)
    return PipelineResult(
        run=settings.run, report=settings.run / REPORT_FILE, headline=words, stages=tuple(fates),
        unbuilt_recipes=tuple(b for b in index.recipes if b.why and b.recipe in wanted), set_aside=index.set_aside,
        failed=tuple(failed),
    )  # fmt: skip


def _check_same_store(settings: RunSettings, log: dict[str, Any]) -> None:
    """Keep a run from being overwritten by another store's; one whose store has moved may go on with it."""
    told = log.get("configuration", {}).get("store", "")
    before = parse_store_location(told) if told else settings.store
    if not isinstance(before, Path) or not isinstance(settings.store, Path):
        return
    if before.is_dir() and before.resolve() != settings.store.resolve():
        raise UsageError(
            f"{settings.run}: holds a run of {told}, not of {settings.store}; give this one a folder of its own with "
            "--out, or remove that one"
        )


def read_settings(run: Path, *, store: StoreLocation | None = None) -> RunSettings:
    """Give what a run was asked for, as its `run_pipeline.json` says; a run made stage by stage names no store.

    Args:
        run: The run's folder.
        store: Where its bundles are now, if not where they were.
    """
    told = _read_log(run).get("configuration", {})
    return RunSettings(
        store=store or parse_store_location(told.get("store", str(run))),
        run=run,
        limit=int(told.get("limit", 0)),
        include_degraded=told.get("include_degraded", True) in (True, "True"),  # 0.2 and before wrote text
        seed=int(told.get("seed", 0)),
        grid=told.get("grid", "short"),
    )


def build_configuration(settings: RunSettings) -> dict[str, Any]:
    """Return what a run was asked for as JSON; its folder is where `run_pipeline.json` lies."""
    told = {key: value for key, value in asdict(settings).items() if key != "run"}
    return {key: str(value) if isinstance(value, Path) else value for key, value in told.items()}


def build_stages(
    settings: RunSettings, say: StageProgress, on_failed: Callable[[Sequence[FailedExperiment]], None] | None = None
) -> tuple[PipelineStage, ...]:
    """List the stages in the data's order; `on_failed` is called with the cells that could not be trained."""
    folder, code = settings.run, stages.code_version()

    def files(*names: str) -> Callable[[], Sequence[str]]:
        return lambda: names

    def validate() -> str:
        tally = SweepTally(time.monotonic())

        def heard(done: int, total: int, verdict: BundleVerdict) -> None:
            tally.add(verdict)
            say("validate", done, total, tally.render_status(total, time.monotonic()))

        summary = stages.validate(settings, tell=heard)
        s = summary.stage
        return ", ".join(f"{s[name]} {name}" for name in ("accepted", "degraded", "rejected", "errored"))

    def features() -> str:
        count = stages.build_features(settings)
        return f"{count.windows:,} windows of {count.episodes:,} episodes"

    def split() -> str:
        index = stages.split(settings)
        lacking = [b for b in index.recipes if b.why]
        words = f"; {len({a.episode_id for a in index.set_aside})} episodes set aside" if index.set_aside else ""
        words += f"; cannot be built: {', '.join(b.recipe for b in lacking)}. {lacking[0].why}" if lacking else ""
        folds, recipes = sum(len(b.folds) for b in index.recipes), sum(bool(b.folds) for b in index.recipes)
        return f"{folds} folds of {recipes} recipes{words}"

    def train() -> str:
        done = stages.train(settings, progress=SimpleNamespace(update=say))
        if done.failed and not done.merged:
            raise TrainingError(done.failed)
        if on_failed is not None:
            on_failed(done.failed)
        words = f", {len(done.failed)} failed" if done.failed else ""
        return f"{len(done.trained)} cells trained, {len(done.kept)} kept{words}"

    return (
        PipelineStage(
            name="validate",
            inputs=lambda: {
                "store": stages.compute_store_fingerprint(settings.store), "code": code,
                "limit": f"{settings.limit} {settings.seed}",
            },
            outputs=files(VALIDATION_FILE, *BINS_PATHS), work=validate,
        ),
        PipelineStage(
            name="features",
            inputs=lambda: compute_digests(folder, [VALIDATION_FILE, *BINS_PATHS]) | {"code": code, "degraded": str(settings.include_degraded)},
            outputs=files(*FEATURE_FILES, ACCOUNTING_FILE), work=features,
        ),
        PipelineStage(
            name="split",
            inputs=lambda: compute_digests(folder, [VALIDATION_FILE, *FEATURE_FILES]) | {"code": code},
            outputs=lambda: stages.list_split_files(folder), work=split,
        ),
        PipelineStage(
            name=TRAIN_STAGE,
            inputs=lambda: compute_digests(folder, [*FEATURE_FILES, VALIDATION_FILE, *stages.list_split_files(folder)])
            | stages.compute_model_digests(settings.models)
            | {
                "code": code, "seed": str(settings.seed), "grid": settings.grid, "models": ",".join(settings.models),
                "recipes": ",".join(settings.recipes), "threats": ",".join(settings.threats), "trials": str(settings.trials),
            },
            outputs=files(PREDICTIONS_FILE), work=train,
        ),
        PipelineStage(
            name="evaluate",
            inputs=lambda: compute_digests(folder, [PREDICTIONS_FILE, BINS_INDEX_PATH, *stages.list_split_files(folder)]) | {"code": code},
            outputs=files(METRICS_FILE), work=lambda: f"{len(stages.evaluate(settings).metrics):,} numbers",
        ),
        PipelineStage(
            name="report",
            inputs=lambda: compute_digests(folder, [METRICS_FILE, PREDICTIONS_FILE, AUDIT_FILE, ACCOUNTING_FILE, VALIDATION_FILE, *stages.list_split_files(folder)]) | {"code": code},
            outputs=files(REPORT_FILE), work=lambda: stages.build_report(settings).name,
        ),
    )  # fmt: skip


def _run_stage(stage: PipelineStage, folder: Path, log: dict[str, Any], say: StageProgress) -> tuple[str, str, str]:
    """Do a stage, or keep it where what it read and what it wrote are unchanged."""
    known: Mapping[str, Any] = log["stages"].get(stage.name, {})
    inputs = stage.inputs()
    if known.get("inputs") == inputs and known.get("outputs") == compute_digests(
        folder, list(known.get("outputs", {}))
    ):
        say(stage.name, 1, 1, "unchanged")
        return stage.name, "kept", str(known.get("words", ""))
    log["stages"].pop(stage.name, None)
    _write_log(folder, log)
    began = time.monotonic()
    say(stage.name, 0, 1, "")
    words = stage.work()
    say(stage.name, 1, 1, words)
    seconds = round(time.monotonic() - began, 3)
    log["stages"][stage.name] = {
        "inputs": inputs, "outputs": compute_digests(folder, list(stage.outputs())), "words": words, "seconds": seconds,
    }  # fmt: skip
    _write_log(folder, log)
    return stage.name, "made", words


def _read_log(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError):
        found = json.loads((folder / RUN_LOG_FILE).read_bytes())
        if isinstance(found.get("stages"), dict):
            return dict(found)
    return {"stages": {}}


def _write_log(folder: Path, log: Mapping[str, Any]) -> None:
    atomic.write_atomic(folder / RUN_LOG_FILE, (json.dumps(log, indent=1, sort_keys=True) + "\n").encode())


def _collect_versions() -> dict[str, str]:
    found = {"phasewatch": __version__, "python": platform.python_version()}
    for package in ("numpy", "pyarrow", "xgboost-cpu", "scikit-learn", "plotly"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return found  # an installed package; a repository further up is the user's own
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(checkout), "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        found["git"] = done.stdout.strip()
    return found


def _describe_host() -> dict[str, str]:
    """Return what the numbers were computed on; no host name, because `--publish` carries it to others."""
    return {"machine": platform.machine(), "system": platform.platform()}
