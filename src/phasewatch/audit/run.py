"""Audit a finished run: make again what can be made again, check what was claimed, write `audit_v1.json`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from phasewatch import atomic
from phasewatch.audit.checks import AUDIT, Audit, Check, collecting, judge, parse_audit, render_audit, untested
from phasewatch.audit.corpus import check_leaks
from phasewatch.audit.remake import DISJOINT, DISJOINT_PROMISE, REMADE, REMADE_PROMISE, check_disjoint, check_remade
from phasewatch.audit.shuffled import check_shuffled
from phasewatch.audit.trained import check_repeated, check_said, chosen_cells
from phasewatch.dataset import file_sha256
from phasewatch.errors import RunError
from phasewatch.evaluate.rows import METRICS, render_metrics
from phasewatch.evaluate.score import read_metrics, rescore
from phasewatch.train.predictions import PREDICTIONS

SCORED = "metrics"
SCORED_PROMISE = "Each number is what the predictions give."
Tell = Callable[[str, int, int], None]


def audit_run(
    run: Path, *, remake: Callable[[Path], None] | None, files: tuple[str, ...], tell: Tell | None = None
) -> Audit:
    """Check every promise of a run and write `audit_v1.json`.

    Args:
        run: A run with predictions and metrics, held by the caller's lock.
        remake: Does the stages before training from the run's store into a folder; None when the store is gone.
        files: What these stages write, the splits aside.
        tell: Called as (check, how many are done, of how many).

    Raises:
        RunError: If there is nothing to audit.
    """
    if not (run / PREDICTIONS).is_file():
        raise RunError(f"{run / PREDICTIONS}: absent; there is nothing to audit before `phasewatch train {run}`")
    with tempfile.TemporaryDirectory(prefix="phasewatch-audit-") as folder:
        copy = Path(folder)
        steps: list[Callable[[], tuple[Check, ...]]] = [
            lambda: _from_bundles(run, copy, remake, files),
            lambda: (check_repeated(run, chosen_cells(run)),),
            lambda: (check_said(run),),
            lambda: (check_scored(run),),
            lambda: (check_shuffled(run),),
            lambda: check_leaks(run),
        ]
        checks: list[Check] = []
        for number, step in enumerate(steps, 1):
            checks += step()
            if tell is not None:
                tell(checks[-1].name, number, len(steps))
    names = [name for name in (PREDICTIONS, METRICS) if (run / name).is_file()]
    audit = Audit(inputs={name: file_sha256(run / name) for name in names}, checks=tuple(checks))
    atomic.write_whole(run / AUDIT, render_audit(audit))
    return audit


def read_audit(run: Path) -> Audit | None:
    """Read the run's audit; None if there is none, or it was of other predictions or metrics.

    Raises:
        RunError: If the file is not an audit.
    """
    path = run / AUDIT
    if not path.is_file():
        return None
    audit = parse_audit(path.read_bytes(), file=str(path))
    fresh = all((run / name).is_file() and file_sha256(run / name) == digest for name, digest in audit.inputs.items())
    return audit if fresh else None


def check_scored(run: Path) -> Check:
    """Score the predictions again and hold the bytes against `metrics_v1.json`."""
    faults: list[str] = []
    with collecting(faults):
        ours = (run / METRICS).read_bytes() if (run / METRICS).is_file() else b""
        if not ours:
            return untested(SCORED, SCORED_PROMISE, "the run is not scored yet")
        if read_metrics(run).inputs.get(PREDICTIONS) != file_sha256(run / PREDICTIONS):
            faults.append(f"{METRICS} was made from other predictions")
        elif render_metrics(rescore(run)) != ours:
            faults.append(f"{METRICS} is not what {PREDICTIONS} gives")
    return judge(SCORED, SCORED_PROMISE, faults, looked_at="every number scored again")


def _from_bundles(
    run: Path, copy: Path, remake: Callable[[Path], None] | None, files: tuple[str, ...]
) -> tuple[Check, ...]:
    faults: list[str] = []
    if remake is not None:
        with collecting(faults):
            remake(copy)
    if faults:
        broken = judge(REMADE, REMADE_PROMISE, faults, looked_at="")
        return broken, untested(DISJOINT, DISJOINT_PROMISE, "the bundles could not be read again")
    if remake is None:
        why = "the run's store is not there"
        return untested(REMADE, REMADE_PROMISE, why), check_disjoint(run, run)
    return check_remade(run, copy, files), check_disjoint(run, copy)
