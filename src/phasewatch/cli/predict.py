"""Commands that apply trained models to recordings or hand them out: export, predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phasewatch.cli import common
from phasewatch.cli.folders import check_run_folder, find_bundled_model
from phasewatch.cli.options import AsJson, ChannelSets, ModelPath, RunFolder, Smoothing, SmoothingOption
from phasewatch.cli.progress import show_progress
from phasewatch.cli.streams import escape_for_terminal
from phasewatch.types import BIN_NS

if TYPE_CHECKING:
    from phasewatch.evaluation.metric_table import MetricTable

__all__ = ["export", "predict"]


class Stride(StrEnum):
    """Seconds from one window's start to the next."""

    LIVE = "1"
    TRAINING = "5"


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="X.zip: edge bundle of all channel sets; X.onnx: one model.")],
    model: Annotated[str, typer.Option(help="Model key.")] = "gbt",
    recipe: Annotated[str, typer.Option(help="Split recipe that the model was trained on.")] = "deploy",
    fold: Annotated[str, typer.Option(help="Fold, if the recipe has several.")] = "",
    channels: ChannelSets = "",
    seed: Annotated[int, typer.Option(help="Random seed of the model.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Export a trained model as an edge bundle or an ONNX file.

    The exported model is compared with the trained one on test windows. The run is not changed.

    Example: phasewatch export runs/mine --out edge.zip
    """
    from phasewatch.artifacts import METRICS_FILE
    from phasewatch.evaluation.headline import build_headline, read_verdict, render_headline
    from phasewatch.evaluation.metric_table import HeadlineKey, parse_metrics
    from phasewatch.inference.export import ExportRequest, export_run  # needs the extra `train`; `predict` does not

    check_run_folder(run)
    path = run / METRICS_FILE
    metrics = parse_metrics(path.read_bytes(), file=str(path)) if path.is_file() else None
    verdict = read_verdict(run)

    def quote(name: str) -> str:
        if metrics is None:
            return ""
        key = HeadlineKey(channel_set=name, model=model)
        return render_headline(build_headline(metrics, key), verdict)

    request = ExportRequest(model=model, recipe=recipe, fold=fold, threats=common.parse_names(channels), seed=seed)
    done = export_run(run, out, request, quote=quote)
    summary = (
        f"{model}, {', '.join(done.threats)}: {done.bytes:,} bytes; probabilities differ by at most {done.parity:.1g} "
        f"from the trained model on {done.windows} windows"
    )
    common.print_result(asdict(done), as_json=as_json, lines=[summary, str(out)])


def predict(
    source: Annotated[str, typer.Argument(help="Store or one bundle: a path or s3://bucket/prefix.")],
    out: Annotated[Path, typer.Option(help="Table to write, X.parquet.")],
    model: ModelPath = None,
    channels: Annotated[str, typer.Option("--channels", help="Channel set of the model; default: the largest.")] = "",
    stride: Annotated[Stride, typer.Option(help="Seconds from one window's start to the next.")] = Stride.LIVE,
    smoothing: SmoothingOption = Smoothing.NONE,
    metrics: Annotated[
        Path | None, typer.Option(help="Score labelled episodes of unseen hosts; metrics to write, X.json.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict phases and alarms for recorded episodes.

    Labels are not needed. The decisions are those of `watch`, one each second; `--stride 5` decides as a run's
    predictions do. `--metrics` tests the model on another store: hosts, episodes and near-duplicates of its training
    are not scored. Exit code 1 if some bundles could not be read, 3 if none could.

    Example: phasewatch predict my-store --model runs/mine --out predictions.parquet
    """
    from phasewatch.inference.model_selection import find_models
    from phasewatch.inference.offline import choose_offline_model
    from phasewatch.inference.offline import predict as predict_store
    from phasewatch.store.base import parse_store_location

    predictor = choose_offline_model(find_models(model or find_bundled_model()), channels, smoothing=smoothing)
    location, stride_bins = parse_store_location(source), int(stride) * 10**9 // BIN_NS
    scores: dict[str, object] = {}
    with show_progress(quiet=as_json) as progress:
        if metrics is None:
            done = predict_store(location, predictor, out, stride_bins=stride_bins, progress=progress)
        else:
            from phasewatch.pipeline.other_store import predict_and_score  # loads scipy

            done, table = predict_and_score(
                location, predictor, out, metrics, stride_bins=stride_bins, progress=progress
            )
            scores = {"metrics": str(metrics), "scores": _select_scores(table)}
    for path, reason in done.failed:
        typer.echo(escape_for_terminal(f"{path}: no predictions: {reason}"), err=True)
    summary = (
        f"{done.windows:,} windows of {done.episodes} episodes by {done.model}, {done.threat}: {done.alarms} infection "
        f"and {done.activity_alarms} activity alarms; {done.silent} windows unknown, "
        f"{len(done.failed)} bundles without predictions"
    )
    lines = [summary, *_render_scores(scores), str(out)]
    common.print_result({**asdict(done), **scores}, as_json=as_json, lines=lines)
    if done.failed:
        raise typer.Exit(1 if done.episodes else 3)


# Metric → words of the summary on another store.
_SCORES = {
    "macro_f1_3class": "macro-F1 3 classes",
    "macro_f1": "5 phases",
    "infecting_auroc": "AUC of infecting",
    "infection_recall_30s": "infections alarmed within 30 s",
    "infection_soak_false_alarms_per_vm_hour": "false alarms per VM-hour of soak",
    "idle_called_clean": "idle called clean",
}


def _select_scores(table: MetricTable) -> dict[str, dict[str, float | str | None]]:
    found: dict[str, dict[str, float | str | None]] = {}
    for name in _SCORES:
        for row in table.select(name, overall=True, seed="mean", compared_to=None, bin=None):
            found[name] = {"value": row.value, "low": row.low, "high": row.high, "note": row.note}
    return found


def _render_scores(scores: Mapping[str, Any]) -> list[str]:
    if not scores:
        return []
    parts = []
    for name, words in _SCORES.items():
        row = scores["scores"].get(name)
        if row is not None and row["value"] is not None:
            has_ends = row["low"] is not None and row["high"] is not None
            ends = f"[{row['low']:.2f}, {row['high']:.2f}]" if has_ends else "[no interval]"
            parts.append(f"{words} {row['value']:.2f} {ends}")
    return ["on hosts that training never saw: " + "; ".join(parts), scores["metrics"]]
