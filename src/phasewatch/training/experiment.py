"""Experiments: one model with one seed, trained on one fold with one channel set; and the record of a finished one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phasewatch._version import __version__
from phasewatch.artifacts import MODELS_DIR
from phasewatch.errors import RunError
from phasewatch.models.base import InputKind
from phasewatch.models.registry import find_model
from phasewatch.splits import Fold

__all__ = [
    "Experiment",
    "ExperimentRecord",
    "RunDigests",
    "parse_experiment",
    "plan_experiments",
    "render_experiment",
]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Experiment:
    """One experiment; experiments sort in the order of their rows in the merged predictions.

    Attributes:
        recipe, fold: Fold of a split.
        threat: Channel set.
        model: Key of the model.
        table: Transform of the values (`InputVariant`).
        seed: Random seed of the model.
    """

    recipe: str
    fold: str
    threat: str
    model: str
    table: str = "raw"
    seed: int = 0

    def keys(self) -> dict[str, str]:
        """Return the columns that identify the experiment, without the seed."""
        return {
            "recipe": self.recipe,
            "fold": self.fold,
            "threat": self.threat,
            "model": self.model,
            "table": self.table,
        }

    def folder(self, run: Path) -> Path:
        """Return the folder of its files in a run."""
        return run / MODELS_DIR / self.recipe / self.fold / self.threat / self.model / f"{self.table}-s{self.seed}"


class ExperimentRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of `cell.json`, which is written last.

    Attributes:
        cell: The experiment.
        inputs: Input → sha256.
        outputs: File of the experiment → sha256.
        trials: Settings that were tried on validation A; 0 for the defaults.
    """

    cell: Experiment
    inputs: dict[str, str]
    outputs: dict[str, str]
    trials: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDigests:
    """Digests of the run's files that experiments read; ``absent`` for a file that the run does not have."""

    features: str
    grids: str
    levels: str
    schema: str
    validation: str

    def select_inputs(self, experiment: Experiment, fold: Fold, kind: InputKind) -> dict[str, str]:
        """Return the digests that an experiment depends on; when one changes, it is trained again."""
        # The windows of every second, and the load history, come from the bins.
        reads_bins = kind in (InputKind.TABLE, InputKind.TENSOR, InputKind.DURATION)
        return {
            **({"grids": self.grids} if reads_bins else {}),
            **({"levels": self.levels} if kind is InputKind.LEVELS else {}),
            "features": self.features,
            "schema": self.schema,
            "validation": self.validation,
            f"split {experiment.recipe}-{experiment.fold}": fold.sha256,
            "phasewatch": __version__,
        }


def plan_experiments(
    folds: Sequence[Fold],
    *,
    models: Sequence[str],
    threats: Sequence[str] = ("realistic",),
    table: str | None = None,
    seeds: Sequence[int] = (0,),
) -> tuple[Experiment, ...]:
    """Return every combination of folds, channel sets, models and seeds, in the order of the merged predictions.

    Without a table, each model gets the input variant of its registry entry.
    """
    tables = {model: str(find_model(model).variant) if table is None else table for model in models}
    return tuple(
        sorted(
            Experiment(recipe=fold.recipe, fold=fold.fold, threat=threat, model=model, table=tables[model], seed=seed)
            for fold in folds
            for threat in threats
            for model in models
            for seed in seeds
        )
    )


def render_experiment(record: ExperimentRecord) -> bytes:
    """Render `cell.json`."""
    return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"


def parse_experiment(data: bytes, *, file: str) -> ExperimentRecord:
    """Parse `cell.json`.

    Raises:
        RunError: If it is not the record of an experiment.
    """
    try:
        return msgspec.json.decode(data, type=ExperimentRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RunError(f"{file}: not a finished experiment: {exc}; remove its folder and train again") from exc
