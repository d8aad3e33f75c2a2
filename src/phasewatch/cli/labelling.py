"""The command that labels saved bundles: label."""

from __future__ import annotations

import getpass
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phasewatch.cli import common
from phasewatch.cli.options import AsJson, CustomChannels, Workers
from phasewatch.cli.progress import show_progress
from phasewatch.errors import UsageError
from phasewatch.types import UNKNOWN_PROFILE, EpisodeRole, Phase

if TYPE_CHECKING:
    from phasewatch.bundle.model import LabellingMetadata, OperatorLabel
    from phasewatch.labelling.requests import LabelRequest
    from phasewatch.labelling.runner import BundleSelection, LabelledBundle, LabelPlan

__all__ = ["LabelPhase", "label"]


class LabelPhase(StrEnum):
    """The phases that a label can have."""

    CLEAN = "clean"
    ARMED = "armed"
    INFECTING = "infecting"
    ACTIVE = "active"
    DORMANT = "dormant"


def label(
    store: Annotated[str, typer.Argument(help="Store of `watch --save`; with --list and --undo the labelled one.")],
    out: Annotated[Path | None, typer.Option(help="Store for the labelled bundles; another folder.")] = None,
    phase: Annotated[LabelPhase | None, typer.Option(help="Phase of the bundles or of the time range.")] = None,
    bundle: Annotated[list[str] | None, typer.Option(help="Only this bundle: id or path; may be repeated.")] = None,
    host: Annotated[list[str] | None, typer.Option(help="Only bundles of this host; may be repeated.")] = None,
    start: Annotated[str, typer.Option(help="Seconds since the bundle's start, or UTC time; default: its start.")] = "",
    end: Annotated[str, typer.Option(help="Seconds since the bundle's start, or UTC time; default: its end.")] = "",
    csv: Annotated[Path | None, typer.Option(help="File of labels: bundle,start,end,phase,why[,who,when].")] = None,
    why: Annotated[str, typer.Option(help="How you know; kept in the bundle.")] = "",
    who: Annotated[str, typer.Option(help="Who labels; default: the name of this user.")] = "",
    when: Annotated[str, typer.Option(help="UTC time of the labelling; default: now.")] = "",
    profile: Annotated[str, typer.Option(help="Profile of bundles with a malicious phase.")] = UNKNOWN_PROFILE,
    role: Annotated[EpisodeRole, typer.Option(help="`soak`: only for the rate of false alarms.")] = EpisodeRole.LAB,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written or removed.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the labels of a labelled store.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Remove labelled bundles; originals are never removed.")] = False,
    workers: Workers = 2,
    custom_channels: CustomChannels = None,
    as_json: AsJson = False,
) -> None:
    """Label saved bundles as clean or as another phase.

    A label has who gave it, when and why. The original stays; the labelled bundle is a new one in another store, with
    the digest of the original. Time without a label stays unknown. A range of UTC times may cover many bundles. The
    same labels with the same --when give the same bytes.

    Example: phasewatch label saved --out labelled --phase clean --why "fresh install, nothing else ran"
    """
    from phasewatch.labelling import runner
    from phasewatch.store.base import parse_store_location

    selection = runner.BundleSelection(bundles=tuple(bundle or ()), hosts=tuple(host or ()))
    labels = {"--out": out, "--phase": phase, "--start": start, "--end": end, "--csv": csv, "--why": why}
    if show or undo:
        mode = "--undo" if undo else "--list"
        if wrong := next((name for name, value in labels.items() if value), "--list" if show and undo else ""):
            raise UsageError(f"{mode} takes no {wrong}; leave one of them out")
        location = parse_store_location(store)
        if undo:
            _undo(store, selection, dry_run=dry_run, as_json=as_json)
        else:
            found = tuple(runner.list_labelled(location, selection))
            common.print_result({"labelled": [_describe(b) for b in found]}, as_json=as_json, lines=_render(found))
        return
    if out is None:
        raise UsageError("label needs --out, a folder for the labelled bundles; the originals stay as they are")
    settings = runner.LabelSettings(
        source=parse_store_location(store),
        out=out,
        requests=_build_requests(phase, start, end, csv, why, who, when, selection),
        selection=selection,
        profile=profile,
        role=role,
        workers=workers,
    )
    plans = runner.plan_labels(settings)
    if dry_run:
        lines = [*_render_plans(plans), "nothing was written (--dry-run)"]
        common.print_result(
            {"dry_run": True, "bundles": [_describe_plan(p) for p in plans]}, as_json=as_json, lines=lines
        )
        return
    with show_progress(quiet=as_json) as progress:
        done = runner.write_labels(settings, plans, progress=progress)
    result = {
        "dry_run": False,
        "written": len(done.paths),
        "kept": done.kept,
        "bundles": [_describe_plan(p) for p in plans],
    }
    summary = f"bundles labelled: {len(done.paths)}" + (f"; labelled so before: {done.kept}" if done.kept else "")
    common.print_result(result, as_json=as_json, lines=[*_render_plans(plans), summary, str(out)])


def _build_requests(
    phase: LabelPhase | None,
    start: str,
    end: str,
    csv: Path | None,
    why: str,
    who: str,
    when: str,
    selection: BundleSelection,
) -> tuple[LabelRequest, ...]:
    from phasewatch.labelling import requests

    place = "command line"
    when_ns = requests.parse_label_when(when, where=place) if when else time.time_ns() // 10**9 * 10**9
    by = requests.parse_label_text(who or _find_user(), "who", where=place)
    if csv is not None:
        given = {
            "--phase": phase,
            "--start": start,
            "--end": end,
            "--why": why,
            "--bundle": selection.bundles,
            "--host": selection.hosts,
        }
        if wrong := next((name for name, value in given.items() if value), ""):
            raise UsageError(f"--csv takes no {wrong}: the file has a column for it; leave one of them out")
        return requests.read_label_file(csv, requests.LabelDefaults(by=by, when_ns=when_ns))
    if phase is None or not why:
        missing = "--why" if phase else "--phase"
        raise UsageError(f"label needs --csv, or --phase and --why; add {missing}")
    times = {key: requests.parse_label_time(text, key, where=place) for key, text in (("start", start), ("end", end))}
    if len(selection.bundles) != 1 and any(t is not None and t.is_relative for t in times.values()):
        raise UsageError("seconds are counted from the start of one bundle; name it with --bundle, or give UTC times")
    return (
        requests.LabelRequest(
            bundle="",
            start=times["start"],
            end=times["end"],
            phase=Phase(phase),
            by=by,
            when_ns=when_ns,
            why=requests.parse_label_text(why, "why", where=place),
            where=place,
        ),
    )


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        raise UsageError("this user has no name; say who labels with --who") from None


def _undo(store: str, selection: BundleSelection, *, dry_run: bool, as_json: bool) -> None:
    from phasewatch.labelling import runner
    from phasewatch.store.base import parse_store_location

    if not (selection.bundles or selection.hosts):
        raise UsageError("--undo needs --bundle or --host, which say what to remove; --list shows the bundles")
    found = runner.undo_labels(parse_store_location(store), selection, is_dry=dry_run)
    end = "nothing was removed (--dry-run)" if dry_run else f"labelled bundles removed: {len(found)}"
    result = {"dry_run": dry_run, "removed": [_describe(b) for b in found]}
    common.print_result(result, as_json=as_json, lines=[*_render(found), end])


def _describe_labelling(labelling: LabellingMetadata) -> dict[str, Any]:
    from phasewatch.alarms.life import render_time

    def describe(each: OperatorLabel) -> dict[str, Any]:
        return {
            "start": render_time(each.start_wall_ns),
            "end": render_time(each.end_wall_ns),
            "seconds": round((each.end_wall_ns - each.start_wall_ns) / 1e9, 3),
            "phase": str(each.phase),
            "who": each.by,
            "when": render_time(each.when_wall_ns),
            "why": each.why,
        }

    return {
        "ancestor": labelling.ancestor_id,
        "ancestor_sha256": labelling.ancestor_sha256,
        "labels": [describe(each) for each in labelling.labels],
    }


def _describe(bundle: LabelledBundle) -> dict[str, Any]:
    facts = {"path": bundle.path, "profile": bundle.manifest.profile, "role": str(bundle.manifest.role)}
    return facts | _describe_labelling(bundle.labelling)


def _describe_plan(plan: LabelPlan) -> dict[str, Any]:
    facts = {"host_id": plan.host_id, "episode_id": plan.episode_id, "duration_s": plan.duration_s}
    return facts | {"is_written": plan.is_written} | _describe_labelling(plan.labelling)


def _render_labelling(labelling: LabellingMetadata) -> list[str]:
    from phasewatch.alarms.life import render_time

    rows = [
        (
            f"  {render_time(each.start_wall_ns)}",
            render_time(each.end_wall_ns),
            str(each.phase),
            f"{each.by}, {render_time(each.when_wall_ns)[:10]}: {each.why}",
        )
        for each in labelling.labels
    ]
    return common.render_table(rows)


def _render(found: Sequence[LabelledBundle]) -> list[str]:
    lines = [
        line for b in found for line in (f"{b.path} from {b.labelling.ancestor_id}", *_render_labelling(b.labelling))
    ]
    return lines or ["no labelled bundle"]


def _render_plans(plans: Sequence[LabelPlan]) -> list[str]:
    lines: list[str] = []
    for plan in plans[: common.MAX_LISTED]:
        seconds = sum(each.end_wall_ns - each.start_wall_ns for each in plan.labelling.labels) / 1e9
        lines.append(f"{plan.item.path}: {seconds:,.1f} of {plan.duration_s:,.1f} s labelled")
        lines += _render_labelling(plan.labelling)
    if len(plans) > common.MAX_LISTED:
        lines.append(f"… and {len(plans) - common.MAX_LISTED:,} more bundles; --json lists all")
    return lines
