"""The models that there are: a lazy table of key, class and what the class is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from phasewatch.errors import MismatchError, UsageError, name_the_nearest
from phasewatch.models import checkpoint
from phasewatch.models.base import InputKind, InputSpec, Persist, PhaseModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model.

    Attributes:
        where: ``module:Class``, imported when the model is first asked for.
        persist: ``exact`` (a checkpoint gives the same bits) or ``none`` (scored in the process that fitted it).
        is_baseline: It stands beside every score to show what is to be beaten.
    """

    key: str
    where: str
    kind: InputKind
    about: str
    persist: Persist = "exact"
    is_baseline: bool = False


OWN = "phasewatch."
ENTRY_POINTS = "phasewatch.models"
MODELS: tuple[ModelRow, ...] = (
    ModelRow(
        key="gbt",
        where="phasewatch.models.gbt:GradientBoosting",
        kind=InputKind.TABLE,
        about="Gradient-boosted trees over the five stats of each channel.",
    ),
    ModelRow(
        key="mlp",
        where="phasewatch.models.nets:MlpNet",
        kind=InputKind.TABLE,
        about="A net of two hidden layers over the five stats of each channel.",
    ),
    ModelRow(
        key="cnn",
        where="phasewatch.models.nets:CnnNet",
        kind=InputKind.TENSOR,
        about="A 1-D residual convolutional net over the window's bins.",
    ),
    ModelRow(
        key="gru",
        where="phasewatch.models.nets:GruNet",
        kind=InputKind.TENSOR,
        about="A gated recurrent net over the window's bins.",
    ),
    ModelRow(
        key="lstm",
        where="phasewatch.models.nets:LstmNet",
        kind=InputKind.TENSOR,
        about="A long short-term memory over the window's bins.",
    ),
    ModelRow(
        key="transformer",
        where="phasewatch.models.nets:TransformerNet",
        kind=InputKind.TENSOR,
        about="Two layers of attention over the window's bins.",
    ),
    ModelRow(
        key="minirocket",
        where="phasewatch.models.minirocket:MiniRocket",
        kind=InputKind.TENSOR,
        about="Random convolutions and ridge: the cheap baseline that a net has to beat.",
        is_baseline=True,
    ),
    ModelRow(
        key="majority",
        where="phasewatch.models.baselines:Majority",
        kind=InputKind.TABLE,
        about="Always the phase that is most frequent in train.",
        is_baseline=True,
    ),
    ModelRow(
        key="stratified",
        where="phasewatch.models.baselines:Stratified",
        kind=InputKind.TABLE,
        about="A guess drawn with the frequencies of train.",
        is_baseline=True,
    ),
    ModelRow(
        key="elapsed_time",
        where="phasewatch.models.baselines:ElapsedTime",
        kind=InputKind.ELAPSED,
        about="The phase that is likeliest this long after the first label, no telemetry looked at.",
        is_baseline=True,
    ),
    ModelRow(
        key="levels_only",
        where="phasewatch.models.gbt:LevelsOnly",
        kind=InputKind.LEVELS,
        about="Gradient-boosted trees over cumulative totals alone, which tell how late it is.",
        is_baseline=True,
    ),
    ModelRow(
        key="host_only",
        where="phasewatch.models.baselines:HostOnly",
        kind=InputKind.HOST,
        about="The phase that is most frequent on this host.",
        is_baseline=True,
    ),
    ModelRow(
        key="best_channel",
        where="phasewatch.models.channel:BestChannel",
        kind=InputKind.TABLE,
        about="Gradient-boosted trees over the one channel that validation A likes best.",
        is_baseline=True,
    ),
)
BASELINES = tuple(row.key for row in MODELS if row.is_baseline)


def brought_rows() -> dict[str, ModelRow]:
    """Give the models that installed packages bring, by the entry points ``phasewatch.models`` (key = module:Class)."""
    return {
        point.name: _row_at(point.name, point.value)
        for point in metadata.entry_points(group=ENTRY_POINTS)
        if point.name not in {row.key for row in MODELS}
    }


def row_of(key: str) -> ModelRow:
    """Find a model's row: a registered one, one that a package brings, or the class that ``module:Class`` names.

    Raises:
        UsageError: If there is none; the message has the nearest keys.
    """
    known = {row.key: row for row in MODELS}
    if key in known:
        return known[key]
    if ":" in key:
        return _row_at(key, key)
    known |= brought_rows()
    if key not in known:
        raise UsageError(f"no model {key!r}; {name_the_nearest(key, known)}")
    return known[key]


def class_of(key: str) -> type[PhaseModel]:
    """Import a model's class."""
    return _import(row_of(key).where)


def code_of(key: str) -> Path | None:
    """Give the file of a model that is not phasewatch's own: when it changes, its cells are trained again."""
    if key in {row.key for row in MODELS}:
        return None
    file = getattr(import_module(row_of(key).where.partition(":")[0]), "__file__", None)
    return Path(file) if file else None


def _row_at(key: str, where: str) -> ModelRow:
    found = _import(where)
    about = (found.__doc__ or where).strip().splitlines()[0]
    return ModelRow(key=key, where=where, kind=found.kind, about=about, persist=found.persist)


def _import(where: str) -> type[PhaseModel]:
    module, _, name = where.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise UsageError(
            f"model {where!r} cannot be imported: {exc}; install its package, or put its folder on PYTHONPATH"
        ) from exc
    except Exception as exc:  # its module is the user's, and may do anything when it is imported
        if module.startswith(OWN):
            raise
        raise UsageError(f"model {where!r} cannot be imported: {type(exc).__name__}: {exc}; mend its module") from exc
    if not (isinstance(found, type) and issubclass(found, PhaseModel)):
        raise UsageError(f"model {where!r} is no PhaseModel; derive it from phasewatch.models.adapters.TableAdapter")
    return found


def create(key: str, *, seed: int = 0, settings: Mapping[str, Any] | None = None) -> PhaseModel:
    """Make a model that is not fitted yet.

    Raises:
        UsageError: If the key or a setting is not known.
    """
    return class_of(key)(seed=seed, settings=settings)


def load(folder: Path, *, expected: InputSpec | None = None) -> PhaseModel:
    """Load a checkpoint.

    Args:
        folder: Where it stands.
        expected: What it will be given; None leaves that check to the first prediction.

    Raises:
        RunError: If it is absent or not a checkpoint.
        MismatchError: If its bytes were changed, its format, classes or model are not known here, or it was made for
            another input, mask, schema or behaviour than expected.
    """
    header, files = checkpoint.read(folder)
    # Text of a checkpoint is never imported: what it names must be registered here or brought by an installed package.
    known = {row.key: row for row in MODELS}
    if header.model not in known:
        known |= brought_rows()
    if header.model not in known:
        raise MismatchError(
            f"{folder}: found model {header.model!r}, this version knows {', '.join(known)}; a model that was given as "
            "module:Class is loaded where its package names it in the entry points phasewatch.models"
        )
    if known[header.model].persist == "none":
        raise MismatchError(f"{folder}: {header.model} keeps no weights; it was scored by the process that fitted it")
    model = class_of(header.model).restore(header, files, where=str(folder))
    if expected is not None and model.spec is not None and (words := model.spec.difference(expected)):
        raise MismatchError(f"{folder}: made for something else: {words}; train it again on these features")
    return model
