"""Audit a finished run: rebuild what can be rebuilt, check every promise, write `audit_v1.json`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from phasewatch import atomic
from phasewatch.artifacts import (
    AUDIT_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SPLIT_INDEX_FILE,
    list_split_names,
    list_split_paths,
)
from phasewatch.audit.checks import (
    REPORT_ONLY_SUFFIX,
    AuditCheck,
    AuditReport,
    CheckOutcome,
    build_check,
    build_untested_check,
    collect_refusals,
    parse_audit,
    render_audit,
)
from phasewatch.audit.counterfactuals import CounterfactualPredictor
from phasewatch.audit.leakage import LeakageResult, probe_leakage, read_leakage_windows
from phasewatch.audit.models import (
    MergedPredictions,
    check_permuted_labels,
    check_predictions,
    check_retrained,
    choose_experiments,
    read_headline_key,
)
from phasewatch.audit.omissions import check_answered, check_store_remainder, check_twins
from phasewatch.audit.shortcut_checks import check_shortcuts
from phasewatch.audit.splits import find_fold_faults, find_partition_faults, find_uninformative_digests
from phasewatch.dataset import file_sha256
from phasewatch.dataset.split_files import read_folds, read_split_episodes, read_split_index
from phasewatch.errors import RunError
from phasewatch.evaluation.evaluate import compute_metrics
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, HeadlineKey, has_metrics, read_metrics, render_metrics
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.splits import SetAsideEpisode, SplitEpisode, recipes
from phasewatch.types import EpisodeRole

__all__ = [
    "audit_run",
    "check_disjoint",
    "check_leakage",
    "check_metrics",
    "read_audit",
]

_REBUILD_CHECK = "remade-from-bundles"
_REBUILD_PROMISE = "Verdicts, grids, features and splits are what the bundles give, byte for byte."
_DISJOINT_CHECK = "disjoint"
_DISJOINT_PROMISE = "No host, sample, session, time, plan or near-duplicate that a recipe holds out was learnt from."
_RECIPES_WITHOUT_TEST = ("deploy",)


def _check_rebuild(run: Path, copy: Path, files: tuple[str, ...]) -> AuditCheck:
    """Compare the run's files with rebuilt ones.

    Args:
        run: The run.
        copy: The folder in which the stages before training were rebuilt from the same store.
        files: Their names, without the splits.
    """
    faults: list[str] = []
    with collect_refusals(faults):
        splits = {name for folder in (run, copy) for name in list_split_names(folder)}
        for name in (*files, *sorted(splits)):
            ours, theirs = ((f / name) for f in (run, copy))
            if not ours.is_file() or not theirs.is_file() or file_sha256(ours) != file_sha256(theirs):
                faults.append(f"{name} is not what the bundles give")
    return build_check(
        _REBUILD_CHECK, _REBUILD_PROMISE, faults, looked_at=f"{len(files) + len(splits)} files made again"
    )


def check_disjoint(run: Path, episodes_from: Path) -> AuditCheck:
    """Check the claims of each fold on the episodes in the bundles.

    Args:
        run: The run whose splits are checked.
        episodes_from: A run whose validation and features were built from the bundles.
    """
    faults: list[str] = []
    looked: list[str] = []
    with collect_refusals(faults):
        found = read_split_episodes(episodes_from)
        episodes = {e.episode_id: e for e in found}
        index = read_split_index(run)
        if index.recipes and (there := read_split_index(episodes_from)).recipes and there != index:
            faults.append(f"{SPLIT_INDEX_FILE} sets other episodes aside than the bundles give")
        # An id that another host keeps is set aside for this host alone.
        odd = [a for a in index.set_aside if a.episode_id in episodes and episodes[a.episode_id].host_id == a.host_id]
        crowded = _find_unusable_digests(found, odd)
        for recipe in recipes.SPLIT_RECIPES:
            if recipe.leaky or recipe.name in _RECIPES_WITHOUT_TEST or not list_split_paths(run, recipe.name):
                continue
            folds = read_folds(run, recipe.name)
            looked.append(f"{len(folds)} folds of {recipe.name}")
            aside = {a.episode_id for a in odd if not a.recipes or recipe.name in a.recipes}
            faults += find_partition_faults(folds, episodes, aside)
            for fold in folds:
                faults += find_fold_faults(fold, episodes, crowded)
    if not looked and not faults:
        return build_untested_check(_DISJOINT_CHECK, _DISJOINT_PROMISE, "the run has no split that holds something out")
    return build_check(_DISJOINT_CHECK, _DISJOINT_PROMISE, faults, looked_at=", ".join(looked))


def _find_unusable_digests(episodes: Sequence[SplitEpisode], aside: Sequence[SetAsideEpisode]) -> frozenset[int]:
    """Return the digests that are uninformative among the episodes that a split uses."""
    odd = {a.episode_id for a in aside if not a.recipes}
    return find_uninformative_digests(
        e for e in episodes if e.role is EpisodeRole.LAB and e.phases and e.episode_id not in odd
    )


_LEAKAGE_PREFIX = "leak-"
_METRICS_CHECK = "metrics"
_METRICS_PROMISE = "Each number is what the predictions give."


def audit_run(
    run: Path,
    *,
    remake: Callable[[Path], None] | None,
    files: tuple[str, ...],
    left_out: tuple[str, ...] | None = None,
    limit: int = 0,
    workers: int = 1,
    progress: Progress = NO_PROGRESS,
) -> AuditReport:
    """Check every promise of a run and write `audit_v1.json`.

    Args:
        run: A run with predictions and metrics, held by the caller's lock.
        remake: Rebuilds the stages before training from the run's store into a folder; None without the store.
        files: The files that these stages write, without the splits.
        left_out: Bundles of the store that the run does not list; None without the store.
        limit: Size of the sample of the store that the run was asked to take; 0 for all bundles.
        workers: Number of processes.
        progress: Progress of the task ``audit``; the detail is the name of the finished check.

    Raises:
        RunError: If there is nothing to audit.
    """
    if not (run / PREDICTIONS_FILE).is_file():
        raise RunError(f"{run / PREDICTIONS_FILE}: absent; there is nothing to audit before `phasewatch train {run}`")
    merged, key = MergedPredictions.read(run), _read_key(run)
    with tempfile.TemporaryDirectory(prefix="phasewatch-audit-") as folder:
        copy = Path(folder)
        steps: list[Callable[[], tuple[AuditCheck, ...]]] = [
            lambda: (*_check_against_bundles(run, copy, remake, files), check_store_remainder(left_out, limit=limit)),
            lambda: (check_twins(run),),
            lambda: (check_answered(run, merged.list_answered(), key),),
            lambda: (check_retrained(run, choose_experiments(run, key), merged, workers=workers),),
            lambda: (check_predictions(run, merged, workers=workers),),
            lambda: (check_metrics(run),),
            lambda: check_shortcuts(run, key, CounterfactualPredictor(run=run)),
            lambda: (check_permuted_labels(run),),
            lambda: check_leakage(run),
        ]
        checks: list[AuditCheck] = []
        for number, step in enumerate(steps, 1):
            checks += step()
            progress.update("audit", number, len(steps), checks[-1].name)
    names = [name for name in (PREDICTIONS_FILE, METRICS_FILE) if (run / name).is_file()]
    audit = AuditReport(inputs={name: file_sha256(run / name) for name in names}, checks=tuple(checks))
    atomic.write_atomic(run / AUDIT_FILE, render_audit(audit))
    return audit


def _read_key(run: Path) -> HeadlineKey:
    """Return the headline's key; the default where the metrics cannot be read, which the check of metrics reports."""
    try:
        return read_headline_key(run)
    except RunError:
        return DEFAULT_HEADLINE


def read_audit(run: Path) -> AuditReport | None:
    """Read the run's audit; None without one, or if it is of other predictions or metrics.

    Raises:
        RunError: If the file is not an audit.
    """
    path = run / AUDIT_FILE
    if not path.is_file():
        return None
    audit = parse_audit(path.read_bytes(), file=str(path))
    fresh = all((run / name).is_file() and file_sha256(run / name) == digest for name, digest in audit.inputs.items())
    return audit if fresh else None


def check_metrics(run: Path) -> AuditCheck:
    """Score the predictions again and compare the bytes with `metrics_v3.json`."""
    faults: list[str] = []
    with collect_refusals(faults):
        if not has_metrics(run):
            return build_untested_check(_METRICS_CHECK, _METRICS_PROMISE, "the run is not scored yet")
        if read_metrics(run).inputs.get(PREDICTIONS_FILE) != file_sha256(run / PREDICTIONS_FILE):
            faults.append(f"{METRICS_FILE} was made from other predictions")
        elif render_metrics(compute_metrics(run)) != (run / METRICS_FILE).read_bytes():
            faults.append(f"{METRICS_FILE} is not what {PREDICTIONS_FILE} gives")
    return build_check(_METRICS_CHECK, _METRICS_PROMISE, faults, looked_at="every number scored again")


def check_leakage(run: Path) -> tuple[AuditCheck, ...]:
    """Check every leakage probe; a probe without a limit is kept whatever its figure."""
    try:
        leaks = probe_leakage(read_leakage_windows(run))
    except RunError as exc:
        return (
            build_untested_check(f"{_LEAKAGE_PREFIX}checks", "Nothing but the telemetry tells the phase.", str(exc)),
        )
    return tuple(_build_leakage_check(leak) for leak in leaks)


def _build_leakage_check(leak: LeakageResult) -> AuditCheck:
    name, asked = _LEAKAGE_PREFIX + leak.name, leak.question
    if math.isnan(leak.value):
        return build_untested_check(name, asked, leak.words)
    chance = f", chance {leak.chance:.2f}" if leak.chance is not None else ""
    found = f"{leak.value:.2f} {leak.unit}{chance}; {leak.words}"
    if leak.limit is None:
        return AuditCheck(name=name, promise=f"{asked} {REPORT_ONLY_SUFFIX}", fate=CheckOutcome.KEPT, words=found)
    promise = f"{asked} At most {leak.limit:.2f}."
    return build_check(name, promise, [found] if leak.exceeds_limit else [], looked_at=found)


def _check_against_bundles(
    run: Path, copy: Path, remake: Callable[[Path], None] | None, files: tuple[str, ...]
) -> tuple[AuditCheck, ...]:
    faults: list[str] = []
    if remake is not None:
        with collect_refusals(faults):
            remake(copy)
    if faults:
        broken = build_check(_REBUILD_CHECK, _REBUILD_PROMISE, faults, looked_at="")
        return broken, build_untested_check(_DISJOINT_CHECK, _DISJOINT_PROMISE, "the bundles could not be read again")
    if remake is None:
        why = "the run's store is not there"
        return build_untested_check(_REBUILD_CHECK, _REBUILD_PROMISE, why), check_disjoint(run, run)
    return _check_rebuild(run, copy, files), check_disjoint(run, copy)
