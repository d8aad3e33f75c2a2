"""The command that adapts a model to a site's known-clean hours: adapt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from phasewatch.cli import common
from phasewatch.cli.folders import find_bundled_corpus, find_bundled_model
from phasewatch.cli.options import AsJson, ModelPath, Workers
from phasewatch.cli.progress import show_progress
from phasewatch.cli.streams import escape_for_terminal
from phasewatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phasewatch.adaptation.claims import FalseAlarmClaim, MeasuredChange
    from phasewatch.pipeline.adapt import Adaptation, SiteAlarm

__all__ = ["adapt"]

_MAX_ALARMS = 20  # listed; all are in --json


def adapt(
    benign: Annotated[
        str, typer.Option(help="Store of recordings that are labelled clean; other time must be unlabelled.")
    ],
    out: Annotated[Path, typer.Option(help="Edge bundle to write, X.zip.")],
    model: ModelPath = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Store that the model was trained on; default: the bundled recordings, or the model's run."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for intermediate results, kept so that the next time is faster; default: none."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Learn clean hours in which the model raised alarms.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write the bundle even if unseen hosts are detected worse.")
    ] = False,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Adapt a model to the known-clean hours of your own VMs.

    Half of the hours join the training set. A quarter bounds the thresholds of the alarms, and the last quarter counts
    false alarms before and after. The change on unseen hosts of the corpus is measured; a model that detects them worse
    is refused. Exit code 1 if it is refused, or if clean hours hold alarms and --yes is not given.

    Example: phasewatch adapt --benign my-clean-hours --out site.zip
    """
    import msgspec

    from phasewatch.inference.model_selection import find_models
    from phasewatch.pipeline import adapt as pipeline
    from phasewatch.store.base import parse_store_location

    if out.suffix != ".zip":
        raise UsageError(f"--out {out}: an adapted model is an edge bundle; name it X.zip")
    source = model or find_bundled_model()
    is_run = source.is_dir() and (source / "splits").is_dir()
    candidates = find_models(source)
    with _open_work_folder(work) as folder, show_progress(quiet=as_json) as progress:
        site = pipeline.prepare_site(
            parse_store_location(benign), folder / "site", candidates, workers=workers, progress=progress
        )
        for line in site.left_out:
            typer.echo(escape_for_terminal(f"left out: {line}"), err=True)
        if site.alarms and not yes and not _ask_about_alarms(site.alarms, as_json=as_json):
            raise typer.Exit(1)
        run = source
        if corpus is not None or not is_run:
            store = parse_store_location(corpus) if corpus is not None else find_bundled_corpus()
            run = pipeline.prepare_corpus(store, folder / "corpus", workers=workers, progress=progress)
        request = pipeline.AdaptRequest(corpus=run, out=out, workers=workers, force=force)
        done = pipeline.adapt(site, request, progress=progress)
    path = None if done.path is None else str(done.path)
    result = {**msgspec.to_builtins(replace(done, path=None)), "path": path, "left_out": site.left_out}
    result["alarms"] = [msgspec.to_builtins(alarm) for alarm in site.alarms]
    common.print_result(result, as_json=as_json, lines=_render(done))
    if done.path is None:
        raise typer.Exit(1)


@contextmanager
def _open_work_folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        yield work
        return
    with TemporaryDirectory(prefix="phasewatch-adapt-") as folder:
        yield Path(folder)


def _ask_about_alarms(alarms: Sequence[SiteAlarm], *, as_json: bool) -> bool:
    """List the old model's alarms in the clean hours, and ask whether they are known to be false."""
    lines = [
        f"{a.host_id}/{a.episode_id}: {a.kind} alarm at {a.at_s:.0f} s, score {a.score:.2f}"
        for a in alarms[:_MAX_ALARMS]
    ]
    if len(alarms) > _MAX_ALARMS:
        lines.append(f"and {len(alarms) - _MAX_ALARMS} more")
    for line in lines:
        typer.echo(escape_for_terminal(line), err=True)
    words = f"{len(alarms)} alarms in hours that are labelled clean"
    if as_json or not sys.stdin.isatty():
        typer.echo(f"{words}; check them, correct the labels or repeat with --yes", err=True)
        return False
    return typer.confirm(f"{words}. Are these hours known to be clean?", default=False, err=True)


def _render(done: Adaptation) -> list[str]:
    thetas = [f"{theta:.3f}" if theta is not None else "none" for theta in (done.theta_before, done.theta_after)]
    lines = [
        f"learnt from {done.learn_hours:.2f} clean VM-hours, thresholds bounded on {done.threshold_hours:.2f}, "
        f"held back {done.after.hours:.2f}",
        f"infection alarms in the held-back hours ({done.channel_set}): {_render_claim(done.before)} before, "
        f"{_render_claim(done.after)} after; threshold {thetas[0]} before, {thetas[1]} after",
        *_render_remedy(done.after),
        *_render_change(done),
    ]
    if done.path is None:
        return [*lines, "refused: unseen hosts are detected worse; --force writes it all the same"]
    return [*lines, f"channel sets: {', '.join(done.channel_sets)}", str(done.path)]


def _render_claim(claim: FalseAlarmClaim) -> str:
    return f"{claim.count} (at most {claim.upper:.2f} per VM-hour)"


def _render_remedy(claim: FalseAlarmClaim) -> list[str]:
    from phasewatch.models.alarm import FALSE_ALARM_BUDGET

    if not claim.more_hours:
        return [f"the held-back hours claim at most {FALSE_ALARM_BUDGET} false alarms per VM-hour"]
    return [
        f"to claim {FALSE_ALARM_BUDGET} per VM-hour: {claim.more_hours:.1f} more clean VM-hours without an alarm, "
        "counted with `phasewatch predict`"
    ]


def _render_change(done: Adaptation) -> list[str]:
    change = done.change
    if change is None:
        return ["unseen hosts: unknown, the corpus has one host"]
    lines = [f"{change.n_hosts} unseen hosts, macro-F1 3 classes: {_render_measured(change.macro_f1_3class)}"]
    if change.recall_30s is not None:
        lines.append(f"infections alarmed within 30 s ({change.n_onsets}): {_render_measured(change.recall_30s)}")
    lines.append(
        f"false infection alarms in {change.quiet_hours:.1f} quiet VM-hours: {change.false_before} before, "
        f"{change.false_after} after"
    )
    return lines


def _render_measured(m: MeasuredChange) -> str:
    def span(low: float | None, high: float | None, sign: str = "") -> str:
        return "[no interval]" if low is None or high is None else f"[{low:{sign}.3f}, {high:{sign}.3f}]"

    return (
        f"{m.before:.3f} {span(m.before_low, m.before_high)} before, {m.after:.3f} after, difference "
        f"{m.difference:+.3f} {span(m.difference_low, m.difference_high, '+')}"
    )
