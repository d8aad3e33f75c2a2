"""What every model is: public methods that check shapes, columns, hashes and mask, over hooks that an author writes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.metrics import N_CLASSES, apply_temperature, confusion_counts, log_loss, macro_f1
from phasewatch.models import checkpoint
from phasewatch.models.alarm import AlarmRule, fit_alarm_rule
from phasewatch.models.checkpoint import CheckpointHeader
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE, LabelSequence, PhaseFilter, fit_filter
from phasewatch.types import PHASES, WINDOW_BINS

Persistence = Literal["exact", "none"]


class InputKind(StrEnum):
    """What a model is given: a table of features or a tensor of bins.

    Baselines get the window's elapsed time alone, the cumulative levels alone, or the number of its host.
    """

    TABLE = "table"
    TENSOR = "tensor"
    ELAPSED = "elapsed"
    LEVELS = "levels"
    HOST = "host"


class InputVariant(StrEnum):
    """What was made of the values before a model sees them (DESIGN section 8)."""

    RAW = "raw"
    CONTEXT = "context"
    COMMISSIONED = "commissioned"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What the columns of an input are, and by which code they were made.

    Attributes:
        mask: Name of the threat model that chose the columns.
        schema_hash, behaviour_fingerprint: Of the feature table (DESIGN section 4).
        table: What was made of the values.
        floors: Channel → its smallest scale, from train; only where they are measured from a clean day.
    """

    kind: InputKind
    names: tuple[str, ...]
    mask: str
    schema_hash: str
    behaviour_fingerprint: str
    table: InputVariant = InputVariant.RAW
    floors: tuple[tuple[str, float], ...] = ()

    def describe_mismatch(self, found: InputSpec) -> str:
        """Say in words where `found` is not what this asks for; empty when it fits."""
        words = [
            f"{what} {theirs[:16]}, the model needs {ours[:16]}"
            for what, ours, theirs in (
                ("input", self.kind, found.kind),
                ("threat model", self.mask, found.mask),
                ("table", self.table, found.table),
                ("feature schema", self.schema_hash, found.schema_hash),
                ("behaviour fingerprint", self.behaviour_fingerprint, found.behaviour_fingerprint),
            )
            if ours != theirs
        ]
        if dict(self.floors) != dict(found.floors) and self.table is found.table:  # a file keeps them sorted
            words.append("scales of a clean day: from another train set")
        if self.names != found.names:
            lacking = [n for n in self.names if n not in found.names]
            surplus = [n for n in found.names if n not in self.names]
            if lacking or surplus:
                words.append(f"columns: lacks {_summarise_names(lacking)}, has {_summarise_names(surplus)} too many")
            else:
                at = next(i for i, (a, b) in enumerate(zip(self.names, found.names, strict=True)) if a != b)
                words.append(f"columns: same names in another order, from column {at} on ({found.names[at]})")
        return "; ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelInputs:
    """Windows as a model sees them, float32 with NaN where nothing was known, and what the columns are.

    Attributes:
        x: ``(n, f)``; of a tensor ``(n, c, 20)``, channels by time.
    """

    x: NDArray[np.float32]
    spec: InputSpec

    def __post_init__(self) -> None:
        rest = (len(self.spec.names), *((WINDOW_BINS,) if self.spec.kind is InputKind.TENSOR else ()))
        if self.x.shape[1:] != rest or self.x.dtype != np.float32:
            words = ", ".join(map(str, rest))
            raise MismatchError(f"input: found {self.x.dtype} of shape {self.x.shape}, expected float32 (n, {words})")

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledExamples:
    """Windows with their phase codes, ``(n,)`` in 0..4."""

    inputs: ModelInputs
    y: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.y.shape != (len(self.inputs),):
            raise MismatchError(f"examples: {self.y.shape} labels for {len(self.inputs)} windows")
        if self.y.size and (self.y.min() < 0 or self.y.max() >= N_CLASSES):
            raise MismatchError(f"examples: labels {self.y.min()}..{self.y.max()}, expected 0..{N_CLASSES - 1}")

    def __len__(self) -> int:
        return len(self.y)

    def sha256(self) -> str:
        """Digest of columns, values and labels: what a model learnt from."""
        digest = hashlib.sha256(msgspec.json.encode(self.inputs.spec, order="sorted"))
        digest.update(np.ascontiguousarray(self.inputs.x, "<f4").data)
        digest.update(np.ascontiguousarray(self.y, "<i8").data)
        return digest.hexdigest()


class PhaseModel(ABC):
    """A classifier of windows into the five phases.

    An author writes `Config`, `_fit`, `_predict_proba`, `_files`, `_restore`; everything public is final.

    Attributes:
        key: The registry's name of the class.
        persist: ``exact`` (a checkpoint gives the same bits) or ``none`` (scored in the process that fitted it).
        Config: Frozen dataclass of what can be set, with defaults.
        temperature: Set by `calibrate`; 1 until then.
        history: Name → one number per round, of the fit.
        val_a_macro_f1: What models are chosen by, before a test prediction is read.
        filter, alarm: Set by `fit_postprocessing`; none until then.
        where: Names the model in messages; the folder of its checkpoint where it came from one.
    """

    key: ClassVar[str]
    kind: ClassVar[InputKind] = InputKind.TABLE
    persist: ClassVar[Persistence] = "exact"
    Config: ClassVar[type]

    @final
    def __init__(self, *, seed: int = 0, settings: Mapping[str, Any] | None = None) -> None:
        try:
            self.config: Any = msgspec.convert(dict(settings or {}), self.Config)
        except msgspec.ValidationError as exc:
            raise UsageError(f"model {self.key}: {exc}") from exc
        known = [field.name for field in fields(self.Config)]
        if unknown := set(settings or {}) - set(known):
            can = ", ".join(known) or "nothing"
            raise UsageError(f"model {self.key} has no setting {min(unknown)!r}; it can set {can}")
        self.seed = seed
        self.temperature = 1.0
        self.history: dict[str, tuple[float, ...]] = {}
        self.spec: InputSpec | None = None
        self.seen: tuple[int, ...] = ()
        self.trained_on: dict[str, str] = {}
        self.trained_with: dict[str, int] = {}
        self.val_a_macro_f1 = 0.0
        self.filter: PhaseFilter | None = None
        self.alarm: dict[str, AlarmRule] = {}
        self.where = f"model {self.key}"

    @final
    def fit(self, train: LabelledExamples, val: LabelledExamples) -> Self:
        """Learn from `train`, stop by `val` (validation A).

        Raises:
            MismatchError: If the two differ in columns or schema, are of another kind, or one is empty.
        """
        if train.inputs.spec.kind is not self.kind:
            raise MismatchError(f"model {self.key} takes {self.kind} inputs, found {train.inputs.spec.kind}")
        if words := train.inputs.spec.describe_mismatch(val.inputs.spec):
            raise MismatchError(f"model {self.key}: train and validation differ: {words}")
        if not len(train) or not len(val):
            raise MismatchError(
                f"model {self.key}: {len(train)} train and {len(val)} validation windows; both are needed"
            )
        self.spec = train.inputs.spec
        self.seen = tuple(int(c) for c in np.unique(train.y))
        self.trained_on = {"train": train.sha256(), "val_a": val.sha256()}
        self.trained_with = {"train": len(train), "val_a": len(val)}
        self.temperature, self.history = 1.0, {}
        self.filter, self.alarm = None, {}
        self._fit(train, val)
        self.val_a_macro_f1 = round(float(macro_f1(confusion_counts(val.y, self.predict(val.inputs)))), 6)
        return self

    @final
    def calibrate(self, val: LabelledExamples) -> Self:
        """Set the temperature that makes `val` (validation B) likeliest."""
        self.temperature = 1.0
        raw = self.predict_proba(val.inputs)
        self.temperature = fit_temperature(raw, val.y)
        self.trained_on["val_b"] = val.sha256()
        self.trained_with["val_b"] = len(val)
        return self

    @final
    def fit_postprocessing(
        self, train: LabelSequence, val: tuple[ModelInputs, LabelSequence], soak: tuple[ModelInputs, LabelSequence]
    ) -> Self:
        """Fit the phase filter and the alarm's thresholds, after `calibrate`.

        Args:
            train: Truth of the train windows, in the order of time: where the schedule is learnt from.
            val: Validation B.
            soak: Benign hours of hosts and samples that the test set is not of.
        """
        for name, (inputs, track) in (("decide_val", val), ("decide_soak", soak)):
            self.trained_on[name] = LabelledExamples(inputs=inputs, y=np.asarray(track.y, np.int64)).sha256()
            self.trained_with[name] = len(inputs)
        said = [(self.predict_proba(inputs), track) for inputs, track in (val, soak)]
        self.filter = found = fit_filter(train, val[1], said[0][0])
        whole = LabelSequence.concatenate([track for _, track in said])
        heard = {
            SMOOTHING_NONE: np.concatenate([p for p, _ in said]),
            SMOOTHING_PHASE: np.concatenate(
                [found.run(p, track.episode_index, track.t_center_ns) for p, track in said]
            ),
        }
        self.alarm = {name: fit_alarm_rule(p, whole) for name, p in heard.items()}
        return self

    @final
    def predict_proba(self, inputs: ModelInputs) -> FloatArray:
        """Give the probability of each phase, ``(n, 5)`` in the order of PHASES; 0 for one never seen in train.

        Raises:
            MismatchError: If the model is not fitted, or was made for other columns, schema or mask.
            RunError: If its answers are no probabilities: another shape, negative, not finite, or nothing left for the
                phases that train showed.
        """
        if self.spec is None:
            raise MismatchError(f"model {self.key} is not fitted yet")
        if words := self.spec.describe_mismatch(inputs.spec):
            raise MismatchError(f"model {self.key}: {words}")
        if not len(inputs):
            return np.zeros((0, N_CLASSES))
        x = inputs.x.view()
        x.flags.writeable = False  # a hook that writes into its input fails loudly here, not in the next model's score
        raw = check_probabilities(self._predict_proba(x), len(inputs), where=self.where)
        kept = np.zeros_like(raw)
        kept[:, list(self.seen)] = raw[:, list(self.seen)]
        total = kept.sum(axis=1, keepdims=True)
        if not (total > 0.0).all():
            at = int(np.argmin(total[:, 0]))
            raise RunError(
                f"{self.where}: window {at} of {len(inputs)}: no probability is left for the "
                f"phases that train showed ({', '.join(str(PHASES[code]) for code in self.seen)})"
            )
        return apply_temperature(kept / total, self.temperature)

    @final
    def predict(self, inputs: ModelInputs) -> NDArray[np.int64]:
        """Give the likeliest phase's code of each window; of equals the first."""
        decided: NDArray[np.int64] = self.predict_proba(inputs).argmax(axis=1)
        return decided

    @final
    def save(self, folder: Path) -> None:
        """Write the checkpoint: the same model is the same bytes."""
        if self.spec is None:
            raise MismatchError(f"model {self.key} is not fitted yet")
        header = CheckpointHeader(
            format=checkpoint.CHECKPOINT_FORMAT,
            model=self.key,
            input_kind=self.spec.kind,
            mask=self.spec.mask,
            table=self.spec.table,
            floors=dict(self.spec.floors),
            columns=self.spec.names,
            schema_hash=self.spec.schema_hash,
            behaviour_fingerprint=self.spec.behaviour_fingerprint,
            classes=tuple(str(p) for p in PHASES),
            seen=self.seen,
            seed=self.seed,
            config=msgspec.to_builtins(self.config),
            temperature=self.temperature,
            history=self.history,
            trained_on=self.trained_on,
            trained_with=self.trained_with,
            val_a_macro_f1=self.val_a_macro_f1,
            filter=self.filter,
            alarm=self.alarm,
            versions=checkpoint.collect_versions(self._libraries()),
            files={},
        )
        checkpoint.write_checkpoint(folder, header, self._files())

    @classmethod
    @final
    def restore(cls, header: CheckpointHeader, files: Mapping[str, bytes], *, where: str = "") -> Self:
        """Create a model from a checkpoint whose digests were verified (`registry.load` does both).

        Raises:
            RunError: If its settings cannot be, or its files do not hold what they imply.
        """
        try:
            model = cls(seed=header.seed, settings=header.config)
        except UsageError as exc:
            raise RunError(f"{where or 'checkpoint'}: {exc}; the checkpoint was not made by phasewatch") from exc
        model.where = where or model.where
        model.spec = InputSpec(
            kind=InputKind(header.input_kind),
            names=header.columns,
            mask=header.mask,
            schema_hash=header.schema_hash,
            behaviour_fingerprint=header.behaviour_fingerprint,
            table=InputVariant(header.table),
            floors=tuple(header.floors.items()),
        )
        model.seen, model.temperature = header.seen, header.temperature
        model.history, model.trained_on = dict(header.history), dict(header.trained_on)
        model.filter, model.alarm, model.trained_with = header.filter, dict(header.alarm), dict(header.trained_with)
        model.val_a_macro_f1 = header.val_a_macro_f1
        model._restore(files)
        return model

    @abstractmethod
    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None: ...

    @abstractmethod
    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        """``(n, f)`` → ``(n, 5)``, not negative; columns of classes never seen in train are taken out afterwards."""

    @abstractmethod
    def _files(self) -> Mapping[str, bytes]:
        """What `_restore` needs, as file name → bytes."""

    @abstractmethod
    def _restore(self, files: Mapping[str, bytes]) -> None: ...

    def _libraries(self) -> tuple[str, ...]:
        """Distributions whose version the checkpoint should name."""
        return ("numpy",)


def check_probabilities(answers: Any, n: int, *, where: str) -> FloatArray:
    """Return a model's answers as ``(n, 5)`` float64, not negative and finite; rows need not sum to 1.

    Raises:
        RunError: If they are anything else; `where` names the model.
    """
    try:
        shares: FloatArray = np.asarray(answers, np.float64)
    except (TypeError, ValueError) as exc:
        raise RunError(f"{where}: its answers are no numbers: {exc}") from exc
    if shares.shape != (n, N_CLASSES):
        raise RunError(f"{where}: answers of shape {shares.shape} for {n} windows, expected ({n}, {N_CLASSES})")
    bad = ~((shares >= 0.0) & (shares <= 1e30)).all(axis=1)  # NaN is neither
    if bad.any():
        at = int(np.argmax(bad))
        raise RunError(
            f"{where}: window {at} of {n}: answers {', '.join(f'{v:g}' for v in shares[at])}, expected probabilities: "
            "finite and not below 0"
        )
    return shares


def fit_temperature(probabilities: FloatArray, y: NDArray[np.int64]) -> float:
    """Find the temperature in 1/4..4 of the least log loss, by golden section over its logarithm; 1 without windows.

    The bounds are a choice: a few hundred windows that happen to be all right would ask for certainty.
    """
    if not len(y):
        return 1.0
    low, high = float(np.log(0.25)), float(np.log(4.0))
    ratio = (5**0.5 - 1) / 2

    def loss(log_t: float) -> float:
        return log_loss(apply_temperature(probabilities, float(np.exp(log_t))), y)

    a, b = high - ratio * (high - low), low + ratio * (high - low)
    loss_a, loss_b = loss(a), loss(b)
    for _ in range(40):  # 0.618^40 of the span: far below what a score can show
        if loss_a <= loss_b:
            high, b, loss_b = b, a, loss_a
            a = high - ratio * (high - low)
            loss_a = loss(a)
        else:
            low, a, loss_a = a, b, loss_b
            b = low + ratio * (high - low)
            loss_b = loss(b)
    best = float(np.exp((low + high) / 2))
    # A flat or twisted loss (all windows of one class) can end worse than doing nothing.
    return best if loss(np.log(best)) < loss(0.0) else 1.0


def compute_class_weights(y: NDArray[np.int64]) -> FloatArray:
    """Weigh each class so that all that occur count alike, ``(5,)``; 0 for a class that does not occur."""
    counts = np.bincount(y, minlength=N_CLASSES).astype(np.float64)
    present = counts > 0
    weights: FloatArray = np.divide(len(y), counts * present.sum(), out=np.zeros(N_CLASSES), where=present)
    return weights


def _summarise_names(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', …' if len(names) > 3 else ''})" if names else "none"
