"""The command that imports telemetry of other programs: import."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phasewatch.cli import common
from phasewatch.cli.options import AsJson, CustomChannels, Workers
from phasewatch.cli.progress import show_progress
from phasewatch.errors import UsageError

if TYPE_CHECKING:
    from phasewatch.importing.inspection import FileKind, SourceReport

__all__ = ["Labels", "Layout", "import_"]

_SHIPPED_CIS490 = "cis490"
_MAX_REFUSALS = 20


class Layout(StrEnum):
    """What the source holds."""

    TABLE = "table"
    CIS490 = "cis490"


class Labels(StrEnum):
    """Which labels are kept."""

    PROVEN = "proven"
    TOLD = "told"


def import_(
    layout: Annotated[Layout, typer.Argument(help="`table`: CSV or JSON lines by a map; `cis490`: a CIS490 store.")],
    source: Annotated[Path, typer.Argument(help="Folder (or file) with the recordings.")],
    out: Annotated[Path | None, typer.Option(help="Store for the bundles and the log import_v1.jsonl.")] = None,
    mapping: Annotated[
        str, typer.Option("--map", metavar="TOML", help="Mapping file, or the name of a shipped one such as ransap.")
    ] = "",
    inspect: Annotated[bool, typer.Option("--inspect", help="Show what would be imported; write nothing.")] = False,
    labels: Annotated[
        Labels, typer.Option(help="`proven`: labels without evidence become unknown. `told`: keep all labels.")
    ] = Labels.PROVEN,
    workers: Workers = 2,
    custom_channels: CustomChannels = None,
    as_json: AsJson = False,
) -> None:
    """Import telemetry that other programs recorded.

    Each recording becomes a bundle of origin `imported`. Units, clocks and labels are those that the map states; none
    is guessed. Look with --inspect first. A recording that cannot be imported is refused with a code, file and line in
    the log, and the others are imported. The same input gives the same bundles; inputs that were imported before are
    skipped.

    Example: phasewatch import table recordings --map map.toml --out my-store
    """
    from phasewatch.importing import inspection, runner
    from phasewatch.importing import mapping as maps
    from phasewatch.importing.labels import LabelMode

    name = mapping or (_SHIPPED_CIS490 if layout is Layout.CIS490 else "")
    if not name and not inspect:
        raise UsageError(f"import table needs --map; shipped maps: {', '.join(maps.list_shipped_maps())}")
    if inspect:
        plan = maps.parse_map(maps.read_map(name), where=name) if name else None
        files, refused = runner.list_source(source)
        if layout is Layout.CIS490 and plan is not None:
            report = inspection.inspect_cis490(files, plan)
        else:
            report = inspection.inspect_tables(files, plan)
        problems = [f"refused {bad.file}: {bad.code}: {bad.words}" for bad in refused]
        common.print_result(
            report.to_dict() | {"refused": problems}, as_json=as_json, lines=[*_render_report(report), *problems]
        )
        return
    if out is None:
        raise UsageError("import needs --out STORE, or --inspect to look only")
    settings = runner.ImportSettings(
        layout=layout.value,
        source=source,
        out=out,
        map_text=maps.read_map(name),
        map_name=name,
        mode=LabelMode(labels.value),
        workers=workers,
    )
    with show_progress(quiet=as_json) as progress:
        summary = runner.run_import(settings, progress=progress)
    from phasewatch.importing.problems import ImportOutcome, count_records

    refusals = [r for r in summary.records if r.outcome is ImportOutcome.REFUSED]
    seconds: dict[str, float] = {}
    for record in summary.records:
        for phase, length in record.labels.items():
            seconds[phase] = round(seconds.get(phase, 0.0) + length, 3)
    result: dict[str, Any] = {
        "inputs": summary.inputs,
        "kept": summary.kept,
        "unmatched": len(summary.unmatched),
        "counts": count_records(summary.records),
        "seconds": seconds,
        "log": str(summary.log),
    }
    lines = common.render_table(
        [
            ("inputs", f"{summary.inputs:,}"),
            ("unchanged since the last import", f"{summary.kept:,}"),
            *((what, f"{n:,}") for what, n in result["counts"].items()),
            *((f"labelled {phase}", f"{length:,.0f} s") for phase, length in seconds.items()),
        ]
    )
    lines += [
        f"refused {r.file or r.input}{f':{r.line}' if r.line else ''}: {r.code}: {r.words}"
        for r in refusals[:_MAX_REFUSALS]
    ]
    if len(refusals) > _MAX_REFUSALS:
        lines.append(f"… and {len(refusals) - _MAX_REFUSALS:,} more; the log lists all")
    if summary.unmatched:
        lines.append(f"{len(summary.unmatched):,} files match no pattern, such as {summary.unmatched[0]}")
    lines.append(str(summary.log))
    common.print_result(result, as_json=as_json, lines=lines)
    if refusals:
        raise typer.Exit(1)


def _render_report(report: SourceReport) -> list[str]:
    lines = [f"{report.inputs:,} inputs"] if report.inputs else []
    for kind in report.kinds:
        lines += _render_kind(kind)
    if report.channels:
        lines += ["", f"{len(report.channels)} channels: {', '.join(report.channels)}"]
    if report.left_out:
        lines.append(f"left out, because no channels file declares them: {', '.join(report.left_out)}")
    if report.unmatched:
        lines.append(f"{len(report.unmatched):,} files match no pattern, such as {report.unmatched[0]}")
    return lines


def _render_kind(kind: FileKind) -> list[str]:
    rate = f", {kind.hz:g} rows/s" if kind.hz is not None else ""
    back = f", {kind.steps_back:,} rows earlier than the one before" if kind.steps_back else ""
    source = f" → {kind.source}" if kind.source else ""
    head = f"{kind.name}{source}: {kind.files:,} files, {kind.rows_read:,} rows of {kind.files_read:,} read{rate}{back}"
    rows = [("  column", "types", "minimum", "maximum", "falls", "becomes")]
    for column in kind.columns.values():
        low, high = ("" if v is None else f"{v:.10g}" for v in (column.minimum, column.maximum))
        types = " ".join(f"{name}:{n:,}" for name, n in column.types.items())
        rows.append((f"  {column.name}", types, low, high, f"{column.falls:,}", column.becomes or "-"))
    return ["", head, *common.render_table(rows), *(f"  problem: {c}: {w}" for c, w in kind.problems.items())]
