"""A small run folder made of numbers alone: features, schema and verdicts with host effects and session correlation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phasewatch import profiles
from phasewatch.artifacts import FEATURE_SCHEMA_FILE, FEATURES_FILE
from phasewatch.binning.storage import BinIndexRow, write_bins
from phasewatch.channels import LEVEL_CHANNELS
from phasewatch.features.derived import DERIVED_FEATURES, derive_history
from phasewatch.features.schema import stat_names
from phasewatch.types import BIN_NS, PHASES, STRIDE_BINS, Phase

NAMES = stat_names()
DERIVED_NAMES = tuple(feature.name for feature in DERIVED_FEATURES)
PROFILES = tuple((name, profiles.find_profile(name).samples[0].name) for name in ("benign", "cryptomine", "exfil-drip"))
WINDOW_NS = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """How large the run is, and how well its features tell the phase (0: not at all).

    With more than one sample of each profile, samples can be held out, too.
    """

    hosts: int = 4
    sessions: int = 6
    windows: int = 16
    soaks: int = 1
    days: int = 0
    signal: float = 2.0
    samples: int = 1
    seed: int = 0


def write_run(run: Path, world: World = World()) -> Path:
    """Write the files that a split needs; each session runs a benign machine beside a malicious one."""
    rng = np.random.default_rng(world.seed)
    means = rng.normal(size=(len(PHASES), len(NAMES)))
    verdicts: list[dict[str, object]] = []
    rows: dict[str, list[object]] = {n: [] for n in _columns()}
    blocks = []
    for h in range(world.hosts):
        host_shift = rng.normal(scale=0.5, size=len(NAMES))
        for s in range(world.sessions + world.soaks + world.days):
            is_soak = s >= world.sessions
            role = "lab" if not is_soak else "soak" if s < world.sessions + world.soaks else "commission"
            session_shift = rng.normal(scale=0.5, size=len(NAMES))
            pair = (PROFILES[0],) if is_soak else (PROFILES[0], PROFILES[1 + s % 2])
            for i, (profile, first) in enumerate(pair):
                number = len(verdicts)
                sample = first if role == "commission" else _choose_sample(profile, s // 2 % world.samples)
                verdict = {
                    "episode_id": f"e{number:04}", "host_id": f"host-{h}", "profile": profile, "sample_name": sample,
                    "sample_kind": "benign" if profile == "benign" else "emulated", "origin": "simulated",
                    "role": role, "status": "accepted", "session": f"h{h}s{s}",
                    "plan_seed": 1000 + number, "agent": (s + i) % 3 == 0 and not is_soak,
                    "proc_sketch": [10_000 * number + j for j in range(8)], "started_wall_ns": 10**18 + 10**12 * number,
                    "duration_s": 5.0 * world.windows + 5.0,
                }  # fmt: skip
                verdicts.append(verdict)
                walk = rng.integers(0, len(PHASES), world.windows // 4).repeat(4)
                phase = np.zeros(len(walk), int) if profile == "benign" else walk
                noise = rng.normal(size=(len(phase), len(NAMES)))
                x = world.signal * means[phase] + host_shift + session_shift + noise
                x[rng.random(x.shape) < 0.02] = np.nan
                blocks.append(x.astype(np.float32))
                for w, p in enumerate(phase):
                    for n in ("episode_id", "host_id", "profile", "sample_name", "sample_kind", "origin", "role"):
                        rows[n].append(verdict[n])
                    rows["t_center_s"].append(5.0 * w + 5)
                    rows["t_center_ns"].append(int(verdict["started_wall_ns"]) + WINDOW_NS * (w + 1))  # type: ignore[call-overload]
                    rows["phase"].append(int(p))
                    rows["purity"].append(1.0)
                    rows["flags"].append(0)
    run.mkdir(parents=True, exist_ok=True)
    x = np.concatenate(blocks)
    derived = _write_grids(run, verdicts, rows["episode_id"], rows["phase"], x)
    columns = {n: pa.array(rows[n], t) for n, t in _columns().items()}
    features = {n: pa.array(x[:, i]) for i, n in enumerate(NAMES)}
    features |= {n: pa.array(derived[:, i]) for i, n in enumerate(DERIVED_NAMES)}
    pq.write_table(pa.table({**columns, **features}), run / FEATURES_FILE, row_group_size=500)
    sketches = pa.array([v["proc_sketch"] for v in verdicts], pa.list_(pa.uint64()))
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "proc_sketch"} for row in verdicts])
    pq.write_table(table.append_column("proc_sketch", sketches), run / "validation_v1.parquet")
    schema = {
        "version": 2, "phases": [str(p) for p in PHASES], "feature_names": [*NAMES, *DERIVED_NAMES],
        "schema_hash": "5" * 64, "behaviour_fingerprint": "b" * 64,
    }  # fmt: skip
    (run / FEATURE_SCHEMA_FILE).write_text(json.dumps(schema))
    return run


def _choose_sample(profile: str, place: int) -> str:
    return profiles.find_profile(profile).samples[place].name


def _write_grids(
    run: Path, verdicts: list[dict[str, object]], ids: list[object], phases: list[object], x: np.ndarray
) -> np.ndarray:
    """Write bins of which each channel's level is about the window's mean of the table; return the derived columns."""
    means = x[:, [i for i, name in enumerate(NAMES) if name.endswith(".mean")]]
    derived = np.empty((len(x), len(DERIVED_NAMES)), np.float32)
    with write_bins(run / "grids") as grids:
        for verdict in sorted(verdicts, key=lambda v: (v["host_id"], v["episode_id"])):
            own = [i for i, e in enumerate(ids) if e == verdict["episode_id"]]
            of = means[own]
            bins = np.repeat(np.concatenate([of, of[-1:]]), STRIDE_BINS, axis=0).astype(np.float32)
            derived[own] = derive_history([bins])
            spans = _list_spans([phases[i] for i in own], verdict["started_wall_ns"], len(bins))  # type: ignore[arg-type]
            keys = (
                "episode_id",
                "host_id",
                "profile",
                "sample_name",
                "sample_kind",
                "origin",
                "role",
                "session",
                "agent",
            )
            row = BinIndexRow(
                **{key: verdict[key] for key in keys}, offset=0, n_bins=len(bins), t0_ns=verdict["started_wall_ns"],
                arch="x86_64", accel="tcg", spans=spans, flagged=(),
            )  # type: ignore[arg-type]  # fmt: skip
            grids.add(row, bins, np.zeros((len(bins), len(LEVEL_CHANNELS)), np.float32))
    return derived


def _list_spans(phases: list[int], t0_ns: int, n_bins: int) -> tuple[tuple[Phase, int, int], ...]:
    """Return spans in which each window's phase holds the five seconds around its centre."""
    cuts = [0, *(w * STRIDE_BINS + 5 for w in range(1, len(phases)) if phases[w] != phases[w - 1]), n_bins]
    names = [PHASES[phases[min(cut // STRIDE_BINS, len(phases) - 1)]] for cut in cuts[:-1]]
    edges = [t0_ns + cut * BIN_NS for cut in cuts]
    return tuple(zip(names, edges, edges[1:], strict=False))


def edit_features(run: Path, change: object) -> None:
    """Replace the feature table by what a function makes of it."""
    path = run / FEATURES_FILE
    pq.write_table(change(pq.read_table(path)), path, row_group_size=500)  # type: ignore[operator]


def _columns() -> dict[str, pa.DataType]:
    text = dict.fromkeys(
        ("episode_id", "host_id", "profile", "sample_name", "sample_kind", "origin", "role"), pa.string()
    )
    return {
        **text, "t_center_s": pa.float32(), "t_center_ns": pa.int64(), "phase": pa.int8(), "purity": pa.float32(),
        "flags": pa.uint8(),
    }  # fmt: skip
