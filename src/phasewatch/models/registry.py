"""The models that there are: a lazy table of key, class and what the class is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from phasewatch.errors import MismatchError, UsageError, suggest_names
from phasewatch.models import checkpoint
from phasewatch.models.base import InputKind, InputSpec, Persistence, PhaseModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
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
    persist: Persistence = "exact"
    is_baseline: bool = False


OWN_PREFIX = "phasewatch."
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
        about="A net of two hidden layers over the five stats of each channel.",
    ),
    ModelEntry(
        key="cnn",
        where="phasewatch.models.neural:CnnNet",
        kind=InputKind.TENSOR,
        about="A 1-D residual convolutional net over the window's bins.",
    ),
    ModelEntry(
        key="gru",
        where="phasewatch.models.neural:GruNet",
        kind=InputKind.TENSOR,
        about="A gated recurrent net over the window's bins.",
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
        key="minirocket",
        where="phasewatch.models.minirocket:MiniRocket",
        kind=InputKind.TENSOR,
        about="Random convolutions and ridge: the cheap baseline that a net has to beat.",
        is_baseline=True,
    ),
    ModelEntry(
        key="majority",
        where="phasewatch.models.baselines:MajorityBaseline",
        kind=InputKind.TABLE,
        about="Always the phase that is most frequent in train.",
        is_baseline=True,
    ),
    ModelEntry(
        key="stratified",
        where="phasewatch.models.baselines:StratifiedBaseline",
        kind=InputKind.TABLE,
        about="A guess drawn with the frequencies of train.",
        is_baseline=True,
    ),
    ModelEntry(
        key="elapsed_time",
        where="phasewatch.models.baselines:ElapsedTimeBaseline",
        kind=InputKind.ELAPSED,
        about="The phase that is likeliest this long after the first label, no telemetry looked at.",
        is_baseline=True,
    ),
    ModelEntry(
        key="levels_only",
        where="phasewatch.models.gradient_boosting:LevelsBaseline",
        kind=InputKind.LEVELS,
        about="Gradient-boosted trees over cumulative totals alone, which tell how late it is.",
        is_baseline=True,
    ),
    ModelEntry(
        key="host_only",
        where="phasewatch.models.baselines:HostFrequencyBaseline",
        kind=InputKind.HOST,
        about="The phase that is most frequent on this host.",
        is_baseline=True,
    ),
    ModelEntry(
        key="best_channel",
        where="phasewatch.models.gradient_boosting:BestChannel",
        kind=InputKind.TABLE,
        about="Gradient-boosted trees over the one channel that validation A likes best.",
        is_baseline=True,
    ),
)
BASELINE_MODELS = tuple(row.key for row in BUILTIN_MODELS if row.is_baseline)


def find_plugin_models() -> dict[str, ModelEntry]:
    """Give the models that installed packages bring, by the entry points ``phasewatch.models`` (key = module:Class)."""
    return {
        point.name: _build_entry(point.name, point.value)
        for point in metadata.entry_points(group=ENTRY_POINT_GROUP)
        if point.name not in {row.key for row in BUILTIN_MODELS}
    }


def find_model(key: str) -> ModelEntry:
    """Find a model's row: a registered one, one that a package brings, or the class that ``module:Class`` names.

    Raises:
        UsageError: If there is none; the message has the nearest keys.
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
    """Import a model's class."""
    return _import_class(find_model(key).where)


def find_source_file(key: str) -> Path | None:
    """Give the file of a model that is not phasewatch's own: when it changes, its cells are trained again."""
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
        if module.startswith(OWN_PREFIX):
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
    return load_model_class(key)(seed=seed, settings=settings)


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
        raise MismatchError(f"{folder}: {header.model} keeps no weights; it was scored by the process that fitted it")
    model = load_model_class(header.model).restore(header, files, where=str(folder))
    if expected is not None and model.spec is not None and (words := model.spec.describe_mismatch(expected)):
        raise MismatchError(f"{folder}: made for something else: {words}; train it again on these features")
    return model
