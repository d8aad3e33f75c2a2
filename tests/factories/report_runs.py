"""Build small run folders with the file formats of a real run, without recording or training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phasewatch.evaluation.metric_table import MetricRow, MetricTable, NoteCode, render_metrics
from phasewatch.features.schema import render_schema
from phasewatch.splits import SplitEpisode, build_folds, render_fold
from phasewatch.training.predictions import PROBABILITY_COLUMNS, build_predictions_schema
from phasewatch.types import PHASES, EpisodeRole

MALICIOUS = ("cryptomine", "ransom-walk", "scan-and-dial", "beacon-c2", "exfil-drip", "dropper-persist")
PROFILES = ("benign", *MALICIOUS)
START_NS = 1_790_000_000 * 10**9
HOSTILE = "</script><img src=x onerror=alert(1)>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Properties of a fake run.

    Attributes:
        skill: Probability that the model predicts a window correctly.
        phases: Codes of the true phases.
        is_full: Whether to add metric rows that need bins, checkpoints or more splits.
    """

    hosts: Sequence[str] = ("aarch64-virt", "microvm", "pc-cores1", "q35-throttled")
    profiles: Sequence[str] = PROFILES[:6]
    per_cell: int = 2
    n_windows: int = 28
    skill: float = 0.72
    phases: Sequence[int] = (0, 1, 2, 3, 4)
    origin: str = "recorded"
    agents: Sequence[str] = ("off", "on")
    sample: str = "throttled-50"
    seed: int = 7
    is_full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeEpisode:
    """One episode of the fake run."""

    episode_id: str
    host_id: str
    profile: str
    session: str
    agent: str
    number: int


def episodes_of(recipe: Recipe) -> list[FakeEpisode]:
    made = []
    for host in recipe.hosts:
        for profile in recipe.profiles:
            for _ in range(recipe.per_cell):
                n = len(made)
                made.append(
                    FakeEpisode(
                        episode_id=f"0199a000-0000-7000-8000-{n:012x}",
                        host_id=host,
                        profile=profile,
                        session=f"s{n:04d}",
                        agent=recipe.agents[n % len(recipe.agents)],
                        number=n,
                    )
                )
    return made


def make_run(folder: Path, recipe: Recipe = Recipe()) -> Path:
    """Write a complete run and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    episodes = episodes_of(recipe)
    table = predictions(recipe, episodes)
    pq.write_table(table, folder / "predictions_v1.parquet")
    write_validation(folder, recipe, episodes)
    write_ledger(folder, len(episodes))
    write_schema(folder)
    write_splits(folder, recipe, episodes)
    write_metrics(folder, is_full=recipe.is_full)
    (folder / "run.json").write_text(json.dumps({"started": "2026-11-24T08:00:00Z", "host": "elsewhere"}))
    return folder


def predictions(recipe: Recipe, episodes: Sequence[FakeEpisode]) -> Any:
    rng = np.random.default_rng(recipe.seed)
    rows: list[dict[str, Any]] = []
    for e in episodes:
        walk = rng.choice(recipe.phases, size=1 + recipe.n_windows // 6)
        truth = np.repeat(walk, 6)[: recipe.n_windows] if e.profile != "benign" else np.zeros(recipe.n_windows, int)
        right = recipe.skill + 0.25 * (rng.random() - 0.5)
        for model in ("gbt", "majority", "elapsed_time"):
            for j, y in enumerate(truth):
                p = probabilities(rng, model, int(y), j, recipe.n_windows, right)
                rows.append(row_of(e, recipe, model, int(y), p, j))
    return pa.Table.from_pylist(rows, schema=build_predictions_schema())


def probabilities(rng: np.random.Generator, model: str, y: int, j: int, n: int, right: float) -> np.ndarray:
    if model == "majority":
        return np.array([0.4, 0.15, 0.1, 0.2, 0.15])
    weights = rng.random(5) * 0.4 + 0.05
    if model == "gbt":
        near = {1: 0, 4: 0, 0: 4}.get(y, int(rng.integers(5)))  # armed and dormant resemble clean
        weights[y if rng.random() < right else near] += 1.2
    else:
        weights[min(4, 5 * j // n)] += 0.3
    return weights / weights.sum()


def row_of(e: FakeEpisode, recipe: Recipe, model: str, y: int, p: np.ndarray, j: int) -> dict[str, Any]:
    p = p.astype(np.float32)
    return {
        "recipe": "held_out_host",
        "fold": e.host_id,
        "threat": "realistic",
        "model": model,
        "table": "raw",
        "filter": "none",
        "seed": 0,
        "part": "test",
        "role": "lab",
        "agent": e.agent,
        "episode_id": e.episode_id,
        "session": e.session,
        "host_id": e.host_id,
        "profile": e.profile,
        "sample_name": recipe.sample,
        "sample_kind": "benign" if e.profile == "benign" else "emulated",
        "origin": recipe.origin,
        "t_center_ns": START_NS + e.number * 10**12 + (5 + 5 * j) * 10**9,
        "purity": 1.0,
        "flags": 0,
        "y_true": y,
        "y_pred": int(p.argmax()),
        **dict(zip(PROBABILITY_COLUMNS, p.tolist(), strict=True)),
    }


def write_metrics(folder: Path, *, is_full: bool, resamples: int = 200) -> None:
    """Compute the metrics of the predictions; a full run gets made-up rows of further metrics too."""
    from phasewatch.evaluation.evaluate import compute_metrics

    metrics = compute_metrics(folder, resamples=resamples)
    rows = (*metrics.metrics, *(made_up_rows() if is_full else ()))
    (folder / "metrics_v3.json").write_bytes(render_metrics(MetricTable(inputs=metrics.inputs, metrics=rows)))


def made_up_rows() -> Iterator[MetricRow]:
    """Yield plausible rows of metrics that need bins, checkpoints or more splits, so that every figure is drawn."""
    place = {
        "recipe": "held_out_host",
        "fold": "pooled",
        "channel_set": "realistic",
        "model": "gbt",
        "input": "raw",
        "smoothing": "none",
        "agent": "off",
        "seed": "mean",
        "n_windows": 300,
        "n_episodes": 12,
        "n_sessions": 12,
        "n_hosts": 4,
    }

    def row(metric: str, value: float | None, **more: object) -> MetricRow:
        return MetricRow(**(place | {"metric": metric, "value": value} | more))  # type: ignore[arg-type]

    for recipe, value in (("random_windows", 0.9), ("in_distribution", 0.7), ("held_out_both", 0.4)):
        for metric in ("macro_f1", "macro_f1_3class"):
            yield row(metric, value, recipe=recipe, low=value - 0.05, high=value + 0.05)
    for kind in ("infection", "activity"):
        for budget in (0.25, 1.0, 6.0):
            yield row(f"{kind}_recall_30s_at_budget", 0.7 + budget / 20, bin=budget, low=0.5, high=1.0)
            yield row(f"{kind}_delay_s_at_budget", None if budget < 1 else 30 / budget, bin=budget, unit="s")
            yield row(f"{kind}_miss_rate_at_budget", 0.2 / (1 + budget), bin=budget)
        yield row(f"{kind}_recall_30s", 0.8, low=0.6, high=0.9)
        yield row(f"{kind}_chance_30s", 0.02, low=0.0, high=0.05)
        yield row(f"{kind}_n_cut_short_30s", 2.0, unit="episodes", note="a count", code=NoteCode.COUNT)
        yield row(f"{kind}_delay_s", 14.0, low=9.0, high=30.0, unit="s")
        yield row(f"{kind}_miss_rate", 0.2, low=0.1, high=0.4)
        for profile in MALICIOUS[:4]:
            yield row(f"{kind}_recall_30s", 0.75, profile=profile, low=0.2, high=1.0)
        yield row(f"{kind}_recall_30s", 0.9, phase="clean", low=0.6, high=1.0)
        yield row(
            f"{kind}_false_alarms_per_vm_hour",
            18.3,
            low=8.0,
            high=31.0,
            unit="1/h",
            note="13 in 0.71 VM-hours",
            code=NoteCode.FALSE_ALARM_COUNT,
        )
        yield row(f"{kind}_time_in_alarm", 0.03, low=0.01, high=0.05)
        for days in (30.0, 1.0):
            yield row(f"{kind}_precision_at_base_rate", 0.001 * 30 / days, low=0.0, high=0.1, bin=days)
    yield row("infection_impact_bytes_written", 1.2e6, low=1e5, high=3e6, unit="B")
    yield row("idle_called_clean", 0.86, low=0.7, high=0.95)
    yield row("macro_f1_with_load", 0.4, low=0.3, high=0.5)
    for i, channel in enumerate(("proc.vcpu_run", "netflow.out_bytes", "qmp.blk_wr_ops")):
        yield row("macro_f1_permuted_gap", 0.1 / (i + 1), compared_to=channel, low=-0.01, high=0.2)
    for threat, value in (("proc", 0.3), ("proc+qmp", 0.4), ("proc+qmp+netflow+guest", 0.6)):
        yield row("macro_f1", value, channel_set=threat, agent="on", low=value - 0.1, high=value + 0.1)
    yield row(
        "macro_f1_threat_gap",
        0.05,
        channel_set="oracle",
        compared_to="realistic",
        agent="on",
        low=-0.02,
        high=0.1,
        p=0.1,
    )


def write_validation(folder: Path, recipe: Recipe, episodes: Sequence[FakeEpisode]) -> None:
    bad = [("rejected", ["member-sha256"]), ("errored", ["zstd-truncated"])]
    rows = [
        validation_row(e, recipe, "degraded" if e.number % 9 == 4 else "accepted", ["rate:qmp"] * (e.number % 9 == 4))
        for e in episodes
    ]
    rows += [validation_row(episodes[0], recipe, status, reasons) for status, reasons in bad]
    pq.write_table(pa.Table.from_pylist(rows), folder / "validation_v1.parquet")


def validation_row(e: FakeEpisode, recipe: Recipe, status: str, reasons: list[str]) -> dict[str, Any]:
    return {
        "path": f"{e.host_id}/{e.episode_id}.tar.zst",
        "episode_id": e.episode_id,
        "host_id": e.host_id,
        "profile": e.profile,
        "sample_name": recipe.sample,
        "sample_kind": "emulated",
        "origin": recipe.origin,
        "role": "lab",
        "session": e.session,
        "plan_seed": e.number,
        "agent": e.agent == "on",
        "status": status,
        "reasons": reasons,
        "detail": "",
        "sha256": "0" * 64,
        "bytes": 100_000,
        "duplicate_of": None,
        "started_wall_ns": START_NS + e.number * 10**12,
        "duration_s": 145.0,
        "vcpu_wait": 0.01,
        "flags": 0,
    }


def write_ledger(folder: Path, n: int) -> None:
    degraded = sum(1 for i in range(n) if i % 9 == 4)
    validate = {"in": n + 2, "accepted": n - degraded, "degraded": degraded, "rejected": 1, "errored": 1}
    rows = {"rows_in": n * 1300, "rows_used": n * 1296, "rows_lost": {"rejected": n * 3, "silence:qmp": n}}
    features = {
        "in": n,
        "used": n,
        "rows_in": n * 290,
        "rows_used": n * 280,
        "rows_lost": {"shorter than a window": n * 10},
    }
    (folder / "ledger.json").write_text(json.dumps({"stages": {"validate": validate | rows, "features": features}}))


def write_schema(folder: Path) -> None:
    (folder / "feature_schema_v2.json").write_text(render_schema("cd" * 32, "ce" * 32))


def write_splits(folder: Path, recipe: Recipe, episodes: Sequence[FakeEpisode]) -> None:
    if len(recipe.hosts) < 3 or recipe.per_cell < 2:
        return  # the split cannot be built; a real run has no split files then
    (folder / "splits").mkdir(exist_ok=True)
    spelled = {name: "odd" if name == HOSTILE else name for name in (*recipe.profiles, recipe.sample)}
    known = [
        SplitEpisode(
            # Split files refuse unsafe names, but the other files of a run may have them.
            episode_id=e.episode_id,
            host_id=e.host_id,
            profile=spelled[e.profile],
            sample_name=spelled[recipe.sample],
            sample_group=0,
            session=e.session,
            role=EpisodeRole.LAB,
            agent=e.agent == "on",
            plan_seed=e.number,
            proc_sketch=(),
            started_wall_ns=START_NS,
            phases=PHASES,
        )
        for e in episodes
    ]
    for fold in build_folds("held_out_host", known, profiles=PROFILES):
        name = f"{fold.recipe}-{fold.fold}.json".replace("/", "_")
        (folder / "splits" / name).write_bytes(render_fold(fold))
