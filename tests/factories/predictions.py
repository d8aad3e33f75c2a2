"""Predictions that a test makes: hosts, sessions, and models of a known skill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from phasewatch import profiles
from phasewatch.artifacts import PREDICTIONS_FILE
from phasewatch.training.predictions import PROBABILITY_COLUMNS, build_predictions_schema, write_prediction_table
from phasewatch.types import SampleKind

MALICIOUS = tuple(p.name for p in profiles.PROFILES if p.kind != SampleKind.BENIGN)
SKILL = {"gbt": 0.8, "majority": 0.0, "elapsed_time": 0.3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What predictions a test makes."""

    hosts: int = 3
    sessions: int = 6
    per_session: int = 15
    skill: tuple[tuple[str, float], ...] = tuple(SKILL.items())
    seeds: tuple[int, ...] = (0,)
    agents: tuple[str, ...] = ("off", "on")
    origin: str = "recorded"
    phases: int = 5
    recipe: str = "held_out_host"
    threat: str = "realistic"
    table: str = "raw"
    filter: str = "none"


def write_predictions(run: Path, *shapes: Shape) -> pa.Table:
    """Write what models of some shapes said, one after the other; without any, of the plain one."""
    run.mkdir(exist_ok=True)
    tables = [table for shape in shapes or (Shape(),) for table in make_tables(shape)]
    write_prediction_table(run / PREDICTIONS_FILE, tables)
    return pa.concat_tables(tables)


def make_tables(shape: Shape) -> list[pa.Table]:
    tables = []
    for h in range(shape.hosts):
        truth = np.random.default_rng(h).integers(0, shape.phases, (shape.sessions, shape.per_session))
        for m, (model, skill) in enumerate(shape.skill):
            for seed in shape.seeds:
                rng = np.random.default_rng([h, m, seed])
                rows = []
                for s in range(shape.sessions):
                    for w in range(shape.per_session):
                        p = rng.dirichlet(np.ones(5))
                        if rng.random() < skill:
                            p = 0.2 * p + 0.8 * np.eye(5)[truth[s, w]]
                        p = p.astype(np.float32)
                        rows.append(
                            {
                                "recipe": shape.recipe,
                                "fold": f"host-{h}",
                                "threat": shape.threat,
                                "model": model,
                                "table": shape.table,
                                "filter": shape.filter,
                                "seed": seed,
                                "part": "test",
                                "role": "lab",
                                "agent": shape.agents[s % len(shape.agents)],
                                "episode_id": f"e{h}{s}",
                                "session": f"s{s}",
                                "host_id": f"host-{h}",
                                "profile": ("benign", *MALICIOUS[:2])[s % 3],
                                "sample_name": "x",
                                "sample_kind": "emulated",
                                "origin": shape.origin,
                                "t_center_ns": w,
                                "purity": 1.0,
                                "flags": 0,
                                "y_true": int(truth[s, w]),
                                "y_pred": int(p.argmax()),
                                **dict(zip(PROBABILITY_COLUMNS, p.tolist(), strict=True)),
                            }
                        )
                tables.append(pa.Table.from_pylist(rows, schema=build_predictions_schema()))
    return tables
