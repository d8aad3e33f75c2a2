"""One cell of the grid: which model, with which seed, learns from which fold under which threat model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from phasewatch._version import __version__
from phasewatch.artifacts import MODELS_DIR
from phasewatch.errors import RunError
from phasewatch.models.base import InputKind, InputVariant
from phasewatch.splits import Fold


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Experiment:
    """A row of the grid; the order of cells is that of their rows in the merged predictions."""

    recipe: str
    fold: str
    threat: str
    model: str
    table: str = "raw"
    seed: int = 0

    def keys(self) -> dict[str, str]:
        """Give the columns that name the cell, but for the seed."""
        return {
            "recipe": self.recipe, "fold": self.fold, "threat": self.threat, "model": self.model, "table": self.table,
        }  # fmt: skip

    def folder(self, run: Path) -> Path:
        """Where its files stand."""
        return run / MODELS_DIR / self.recipe / self.fold / self.threat / self.model / f"{self.table}-s{self.seed}"


class ExperimentRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`cell.json`, written last: what the cell was made from and what it made, each by sha256; settings tried first."""

    cell: Experiment
    inputs: dict[str, str]
    outputs: dict[str, str]
    trials: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDigests:
    """Digests of what the cells of a run read."""

    features: str
    grids: str
    levels: str
    schema: str
    validation: str

    def select_inputs(self, cell: Experiment, fold: Fold, kind: InputKind) -> dict[str, str]:
        """Say what a cell's files depend on; when one changes, the cell is trained again."""
        return {
            **({"grids": self.grids} if kind is InputKind.TENSOR or cell.table == InputVariant.COMMISSIONED else {}),
            **({"levels": self.levels} if kind is InputKind.LEVELS else {}),
            "features": self.features,
            "schema": self.schema,
            "validation": self.validation,
            f"split {cell.recipe}-{cell.fold}": fold.sha256,
            "phasewatch": __version__,
        }


def plan_experiments(
    folds: Sequence[Fold],
    *,
    models: Sequence[str],
    threats: Sequence[str] = ("realistic",),
    table: str = "raw",
    seeds: Sequence[int] = (0,),
) -> tuple[Experiment, ...]:
    """Cross folds, threat models, models and seeds, in the order of the merged predictions."""
    return tuple(
        sorted(
            Experiment(recipe=fold.recipe, fold=fold.fold, threat=threat, model=model, table=table, seed=seed)
            for fold in folds
            for threat in threats
            for model in models
            for seed in seeds
        )
    )


def render_experiment(done: ExperimentRecord) -> bytes:
    """Give the bytes of `cell.json`."""
    return msgspec.json.format(msgspec.json.encode(done, order="sorted"), indent=1) + b"\n"


def parse_experiment(data: bytes, *, file: str) -> ExperimentRecord:
    """Read `cell.json`.

    Raises:
        RunError: If it is none.
    """
    try:
        found: Any = msgspec.json.decode(data, type=ExperimentRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RunError(f"{file}: not a finished cell: {exc}; remove its folder and train again") from exc
    done: ExperimentRecord = found
    return done
