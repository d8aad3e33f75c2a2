"""Commands that show what is there: channels, inspect, explain."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phasewatch.cli import common
from phasewatch.cli.folders import check_run_folder, find_bundled_corpus
from phasewatch.cli.options import AsJson, CustomChannels, RunFolder
from phasewatch.errors import DataError
from phasewatch.types import SourceKind

if TYPE_CHECKING:
    from phasewatch.binning.storage import ChannelSummary
    from phasewatch.validate.verdict import BundleCheck

__all__ = ["channels", "explain", "inspect"]


def channels(
    corpus: Annotated[bool, typer.Option("--corpus", help="Also show the observed range of each channel.")] = False,
    store: Annotated[
        Path | None, typer.Option(help="With --corpus: store to read instead of the bundled recordings.")
    ] = None,
    custom_channels: CustomChannels = None,
    as_json: AsJson = False,
) -> None:
    """List the telemetry channels.

    A line has the kind, unit, trust and the counters that the channel is computed from.

    Example: phasewatch channels --corpus
    """
    from phasewatch.channels import CHANNELS

    common.check_option_pair("--store", "--corpus", is_partner_missing=store is not None and not corpus)
    listed: list[dict[str, object]] = [asdict(c) | {"in_deployment": c.in_deployment} for c in CHANNELS]
    if not corpus:
        rows = [
            (
                c.full_name,
                c.kind,
                c.unit,
                f"trust {c.trust}",
                c.accel if c.arch == "any" else f"{c.accel}, {c.arch}",
                c.about,
                c.reads,
            )
            for c in CHANNELS
        ]
        common.print_result({"channels": listed}, as_json=as_json, lines=common.render_table(rows))
        return
    source = store or find_bundled_corpus()
    summaries = _measure_observed_values(source)
    for row, summary in zip(listed, summaries, strict=True):
        row["observed"] = {
            "known": summary.known_share,
            "moving": summary.varying_share,
            **{name: getattr(summary, name) for name in ("low", "median", "p95", "high")},
        }
    table: list[tuple[str, ...]] = [("channel", "unit", "min", "median", "95 %", "max", "known", "varies in")]
    table += [
        (
            s.channel.full_name,
            s.channel.unit,
            *(f"{v:.4g}" for v in (s.low, s.median, s.p95, s.high)),
            f"{s.known_share:.0%}",
            f"{s.varying_share:.0%}",
        )
        for s in summaries
    ]
    result = {"channels": listed, "store": str(source)}
    common.print_result(result, as_json=as_json, lines=[*common.render_table(table), str(source)])


def _measure_observed_values(store: Path) -> tuple[ChannelSummary, ...]:
    """Validate a store into a temporary folder and summarise its bins, one row per channel."""
    from phasewatch.binning.storage import open_bins, summarise_channels
    from phasewatch.validate.sweep import sweep

    with tempfile.TemporaryDirectory(prefix="phasewatch-channels-") as folder:
        sweep(store, Path(folder), workers=2)
        bins = open_bins(Path(folder) / "grids")
        return summarise_channels([bins.episode_bins(row) for row in bins.rows])


def inspect(
    bundle: Annotated[str, typer.Argument(help="A .tar.zst file of a store, local or s3://.")],
    custom_channels: CustomChannels = None,
    as_json: AsJson = False,
) -> None:
    """Show one bundle: labels, rows, findings and sparklines.

    Exit code 1 if the bundle is rejected or errored.

    Example: phasewatch inspect my-store/pc/0190….tar.zst
    """
    from phasewatch.store.base import find_bundle, parse_store_location
    from phasewatch.validate.verdict import BundleLocation, validate_bundle

    location = find_bundle(parse_store_location(bundle))
    if location is None:
        raise DataError(f"{bundle}: there is no such bundle; name a file <host_id>/<episode_id>.tar.zst of a store")
    store, item = location
    place = BundleLocation(path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)
    check = validate_bundle(store.read(item), place, counts_nulls=True)
    common.print_result(_describe_bundle(check), as_json=as_json, lines=_render_bundle(check))
    if check.binned is None:
        raise typer.Exit(1)


def _describe_bundle(check: BundleCheck) -> dict[str, Any]:
    import msgspec

    v = check.verdict
    result: dict[str, Any] = {
        "path": v.path,
        "status": str(v.status),
        "reasons": list(v.reasons),
        "detail": v.detail,
        "rows": list(v.rows),
        "findings": [
            {"code": f.code, "severity": str(f.severity), "place": f.place, "words": f.words} for f in check.findings
        ],
        "nulls": [
            {
                "source": str(n.source),
                "field": n.field,
                "rows": n.rows,
                "nulls": n.nulls,
                "share": round(n.share, 4),
                "longest_s": n.longest_ns / 1e9,
            }
            for fields in check.nulls.values()
            for n in fields
            if n.nulls
        ],
        "vcpu_wait_cores": v.vcpu_wait,
    }
    if check.episode is not None:
        marks = check.episode.marks
        result["labels"] = [
            {"phase": str(m.phase) if m.phase else "end", "at_s": (m.t_wall_ns - marks[0].t_wall_ns) / 1e9}
            for m in marks
        ]
        result["manifest"] = msgspec.to_builtins(check.episode.manifest)
    return result


def _render_bundle(check: BundleCheck) -> list[str]:
    from phasewatch.cli.sparkline import render_sparklines

    v = check.verdict
    rows = [
        ("episode", v.episode_id or "unknown"),
        ("host", v.host_id or "unknown"),
        ("profile", f"{v.profile}/{v.sample_name}, {v.role}, {v.origin}" if v.profile else "unknown: no manifest"),
        ("status", f"{v.status} {' '.join(v.reasons)}".strip()),
        ("detail", v.detail or "none"),
        ("rows", " ".join(f"{name}={n}" for name, n in zip(SourceKind, v.rows, strict=True))),
        ("vCPU wait", "unknown" if isnan(v.vcpu_wait) else f"{v.vcpu_wait:.3f} cores"),
    ]
    lines = common.render_table(rows)
    lines += [f"{f.severity}: {f.code}: {f.words}" for f in check.findings]
    nulls = [n for fields in check.nulls.values() for n in fields if n.nulls]
    lines += common.render_table(
        [
            (
                f"null: {n.source}.{n.field}",
                f"{n.nulls} of {n.rows} rows ({n.share:.0%})",
                f"longest {n.longest_ns / 1e9:.1f} s",
            )
            for n in nulls
        ]
    )
    if check.episode is None or check.binned is None:
        return lines
    if (labelling := check.episode.manifest.labelling) is not None:
        lines += [f"labelled: {label.phase} by {label.by}: {label.why}" for label in labelling.labels]
        lines.append(f"original: {labelling.ancestor_id}, sha256 {labelling.ancestor_sha256}")
    marks = check.episode.marks
    lines += [f"{(m.t_wall_ns - marks[0].t_wall_ns) / 1e9:8.2f} s  {m.phase or 'end'}" for m in marks]
    return [*lines, "", *render_sparklines(check.episode, check.binned)]


def explain(
    run: RunFolder,
    episode: Annotated[str, typer.Argument(help="Id of a test episode.")],
    at: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Middle of the window, from the first label.")],
    as_json: AsJson = False,
) -> None:
    """Show which channels one prediction depends on.

    The last column is how much less probable the predicted phase is without the channel.

    Example: phasewatch explain runs/mine 0190…-host-1 --at 42.5
    """
    from phasewatch.pipeline import stages  # slow to import, and no other command here needs it

    explanation = stages.explain(check_run_folder(run), episode, at)
    rows = [["channel", "mean", "unit", "less probable by"]]
    rows += [
        [r.channel, "–" if r.value is None else f"{r.value:.4g}", r.unit, f"{r.drop:+.3f}"] for r in explanation.reasons
    ]
    summary = (
        f"window around {explanation.at_s:g} s: predicted {explanation.decided} (p = {explanation.probability:.2f}), "
        f"truth {explanation.truth}"
    )
    common.print_result(asdict(explanation), as_json=as_json, lines=[summary, *common.render_table(rows)])
