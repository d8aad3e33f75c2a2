"""The registry of models: built-in ones, entry points of installed packages, and ``module:Class`` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from phasewatch.errors import MismatchError, UsageError, suggest_names
from phasewatch.models import checkpoint
from phasewatch.models.base import InputKind, InputSpec, InputVariant, Persistence, PhaseModel

__all__ = [
    "BASELINE_MODELS",
    "BUILTIN_MODELS",
    "ENTRY_POINT_GROUP",
    "ModelEntry",
    "create",
    "find_model",
    "find_plugin_models",
    "find_source_file",
    "load",
    "load_model_class",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One entry of the registry.

    Attributes:
        where: ``module:Class``; the module is imported when the model is used.
        kind: Input that the model takes.
        about: One sentence for a list of models.
        persist: As `PhaseModel.persist`.
        is_baseline: Whether it is reported next to every score as a reference.
        variant: Transform of the input that the model is trained on if none is named.
    """

    key: str
    where: str
    kind: InputKind
    about: str
    persist: Persistence = "exact"
    is_baseline: bool = False
    variant: InputVariant = InputVariant.RAW


_OWN_PREFIX = "phasewatch."
ENTRY_POINT_GROUP = "phasewatch.models"
BUILTIN_MODELS: tuple[ModelEntry, ...] = (
    ModelEntry(
        key="gbt",
        where="phasewatch.models.gradient_boosting:GradientBoosting",
        kind=InputKind.TABLE,
        about="Gradient-boosted trees over the five stats of each channel.",
    ),
    ModelEntry(
        key="mlp",
        where="phasewatch.models.neural:MlpNet",
        kind=InputKind.TABLE,
        about="A network of two hidden layers over the five stats of each channel.",
    ),
    ModelEntry(
        key="cnn",
        where="phasewatch.models.neural:CnnNet",
        kind=InputKind.TENSOR,
        about="A 1-D residual convolutional network over the window's bins.",
    ),
    ModelEntry(
        key="gru",
        where="phasewatch.models.neural:GruNet",
        kind=InputKind.TENSOR,
        about="A gated recurrent network over the window's bins.",
    ),
    ModelEntry(
        key="lstm",
        where="phasewatch.models.neural:LstmNet",
        kind=InputKind.TENSOR,
        about="A long short-term memory over the window's bins.",
    ),
    ModelEntry(
        key="transformer",
        where="phasewatch.models.neural:TransformerNet",
        kind=InputKind.TENSOR,
        about="Two layers of attention over the window's bins.",
    ),
    ModelEntry(
        key="tcn",
        where="phasewatch.models.neural:TcnNet",
        kind=InputKind.TENSOR,
        about="A temporal convolutional network over the last two minutes of bins.",
        variant=InputVariant.CONTEXT,
    ),
    ModelEntry(
        key="minirocket",
        where="phasewatch.models.minirocket:MiniRocket",
        kind=InputKind.TENSOR,
        about="Random convolutions and ridge regression over the window's bins.",
    ),
    ModelEntry(
        key="multirocket",
        where="phasewatch.models.multirocket:MultiRocket",
        kind=InputKind.TENSOR,
        about="MultiRocket of the aeon library over the window's bins; needs the extra `rocket`.",
        persist="none",
    ),
    ModelEntry(
        key="majority",
        where="phasewatch.models.baselines:MajorityBaseline",
        kind=InputKind.TABLE,
        about="The most frequent phase of train.",
        is_baseline=True,
    ),
    ModelEntry(
        key="stratified",
        where="phasewatch.models.baselines:StratifiedBaseline",
        kind=InputKind.TABLE,
        about="A random phase, drawn with the frequencies of train.",
        is_baseline=True,
    ),
    ModelEntry(
        key="elapsed_time",
        where="phasewatch.models.baselines:ElapsedTimeBaseline",
        kind=InputKind.ELAPSED,
        about="The most probable phase at this time after the first label; uses no telemetry.",
        is_baseline=True,
    ),
    ModelEntry(
        key="load_only",
        where="phasewatch.models.baselines:LoadBaseline",
        kind=InputKind.LOAD,
        about="The most probable phase given whether a benign load runs in the episode; uses no telemetry.",
        is_baseline=True,
    ),
    ModelEntry(
        key="duration_only",
        where="phasewatch.models.baselines:DurationBaseline",
        kind=InputKind.DURATION,
        about="The most probable phase given for how long the CPU has been busy or idle.",
        is_baseline=True,
    ),
    ModelEntry(
        key="levels_only",
        where="phasewatch.models.gradient_boosting:LevelsBaseline",
        kind=InputKind.LEVELS,
        about="Gradient-boosted trees over cumulative totals, which reveal the elapsed time.",
        is_baseline=True,
    ),
    ModelEntry(
        key="host_only",
        where="phasewatch.models.baselines:HostFrequencyBaseline",
        kind=InputKind.HOST,
        about="The most frequent phase of this host.",
        is_baseline=True,
    ),
    ModelEntry(
        key="best_channel",
        where="phasewatch.models.gradient_boosting:BestChannel",
        kind=InputKind.TABLE,
        about="Gradient-boosted trees over the one channel with the best macro-F1 on validation A.",
        is_baseline=True,
    ),
)
BASELINE_MODELS = tuple(row.key for row in BUILTIN_MODELS if row.is_baseline)


def find_plugin_models() -> dict[str, ModelEntry]:
    """Return the models of installed packages, from the entry points ``phasewatch.models`` (key = module:Class)."""
    return {
        point.name: _build_entry(point.name, point.value)
        for point in metadata.entry_points(group=ENTRY_POINT_GROUP)
        if point.name not in {row.key for row in BUILTIN_MODELS}
    }


def find_model(key: str) -> ModelEntry:
    """Find a model by its key: a built-in one, an entry point, or the class that ``module:Class`` names.

    Raises:
        UsageError: If there is none; the message suggests the nearest keys.
    """
    known = {row.key: row for row in BUILTIN_MODELS}
    if key in known:
        return known[key]
    if ":" in key:
        return _build_entry(key, key)
    known |= find_plugin_models()
    if key not in known:
        raise UsageError(f"no model {key!r}; {suggest_names(key, known)}")
    return known[key]


def load_model_class(key: str) -> type[PhaseModel]:
    """Import the class of a model.

    Raises:
        UsageError: If the key is unknown, the module cannot be imported, or the class is not a PhaseModel.
    """
    return _import_class(find_model(key).where)


def find_source_file(key: str) -> Path | None:
    """Return the source file of a user's model, whose experiments are trained again when it changes; else None."""
    if key in {row.key for row in BUILTIN_MODELS}:
        return None
    file = getattr(import_module(find_model(key).where.partition(":")[0]), "__file__", None)
    return Path(file) if file else None


def _build_entry(key: str, where: str) -> ModelEntry:
    found = _import_class(where)
    about = (found.__doc__ or where).strip().splitlines()[0]
    return ModelEntry(key=key, where=where, kind=found.kind, about=about, persist=found.persist)


def _import_class(where: str) -> type[PhaseModel]:
    module, _, name = where.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise UsageError(
            f"model {where!r} cannot be imported: {exc}; install its package, or put its folder on PYTHONPATH"
        ) from exc
    except Exception as exc:  # its module is the user's, and may do anything when it is imported
        if module.startswith(_OWN_PREFIX):
            raise
        raise UsageError(f"model {where!r} cannot be imported: {type(exc).__name__}: {exc}; fix its module") from exc
    if not (isinstance(found, type) and issubclass(found, PhaseModel)):
        raise UsageError(f"model {where!r} is not a PhaseModel; derive it from phasewatch.models.adapters.TableAdapter")
    return found


def create(key: str, *, seed: int = 0, settings: Mapping[str, Any] | None = None) -> PhaseModel:
    """Create a model that is not fitted.

    Raises:
        UsageError: If the key or a setting is unknown.
    """
    return load_model_class(key)(seed=seed, settings=settings)


def load(folder: Path, *, expected: InputSpec | None = None) -> PhaseModel:
    """Load a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        expected: Input that it will be given; None leaves that check to the first prediction.

    Raises:
        RunError: If the checkpoint is absent or invalid.
        MismatchError: If its bytes were changed, its format, classes or model are unknown here, or it was trained on
            another input than expected.
    """
    header, files = checkpoint.read_checkpoint(folder)
    # Text of a checkpoint is never imported: what it names must be registered here or brought by an installed package.
    known = {row.key: row for row in BUILTIN_MODELS}
    if header.model not in known:
        known |= find_plugin_models()
    if header.model not in known:
        raise MismatchError(
            f"{folder}: found model {header.model!r}, this version knows {', '.join(known)}; a model that was given as "
            "module:Class is loaded where its package names it in the entry points phasewatch.models"
        )
    if known[header.model].persist == "none":
        raise MismatchError(
            f"{folder}: model {header.model} stores no weights; export it with "
            "`phasewatch export RUN --model MODEL --out X.zip` and use that file"
        )
    model = load_model_class(header.model).restore(header, files, where=str(folder))
    if expected is not None and model.spec is not None:
        model.spec.require_match(expected, where=str(folder), remedy="train it again on these features")
    return model
