"""The base class of all models: checked public methods over hooks that a model's author writes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.metrics import N_CLASSES, apply_temperature, confusion_counts, macro_f1
from phasewatch.models import checkpoint
from phasewatch.models.alarm import LIVE_STRIDE_S, RULE_STRIDE_S, AlarmKind, AlarmRule, fit_alarm_rule
from phasewatch.models.checkpoint import CheckpointHeader
from phasewatch.models.probabilities import check_probabilities, compute_class_weights, fit_temperature
from phasewatch.models.smoothing import LabelSequence, PhaseFilter, fit_filter
from phasewatch.types import CONTEXT_BINS, PHASES, WINDOW_BINS

__all__ = [
    "BASELINE_WEIGHT",
    "InputKind",
    "InputSpec",
    "InputVariant",
    "LabelledExamples",
    "ModelInputs",
    "Persistence",
    "PhaseModel",
    "PostprocessingData",
    "ScoredWindows",
]

BASELINE_WEIGHT = 0.5  # of a phase: idle clean machines are called clean at no cost in three states (ADR 82)
Persistence = Literal["exact", "none"]


class InputKind(StrEnum):
    """The input of a model: a table of features or a tensor of bins.

    Baselines take the window's elapsed time, the cumulative levels, the number of its host, whether a load runs in its
    episode, or the CPU use of its episode so far instead.
    """

    TABLE = "table"
    TENSOR = "tensor"
    ELAPSED = "elapsed"
    LEVELS = "levels"
    HOST = "host"
    LOAD = "load"
    DURATION = "duration"


class InputVariant(StrEnum):
    """What a model sees of a window."""

    RAW = "raw"  # the window's own ten seconds
    CONTEXT = "context"  # also up to two minutes before; never the time since the start
    COMMISSIONED = "commissioned"  # values relative to the host's baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """The columns of an input and the version of the code that computed them.

    Attributes:
        names: Column names of a table, or channel names of a tensor, in order.
        mask: Name of the channel set that chose the columns.
        schema_hash, behaviour_fingerprint: Digests of the feature table's code.
        table: Transform of the values.
        floors: Channel → its smallest scale, from train; only for values relative to a host's baseline.
    """

    kind: InputKind
    names: tuple[str, ...]
    mask: str
    schema_hash: str
    behaviour_fingerprint: str
    table: InputVariant = InputVariant.RAW
    floors: tuple[tuple[str, float], ...] = ()

    @classmethod
    def from_header(cls, header: CheckpointHeader) -> InputSpec:
        """Return the input that a checkpoint states."""
        return cls(
            kind=InputKind(header.input_kind),
            names=header.columns,
            mask=header.mask,
            schema_hash=header.schema_hash,
            behaviour_fingerprint=header.behaviour_fingerprint,
            table=InputVariant(header.table),
            floors=tuple(header.floors.items()),
        )

    @property
    def n_bins(self) -> int:
        """Number of bins, the newest last, that one window of the input needs: 20, or 240 with context."""
        return CONTEXT_BINS if self.table is InputVariant.CONTEXT else WINDOW_BINS

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one window: ``(f,)`` of a table, ``(c, n_bins)`` of a tensor."""
        return (len(self.names), self.n_bins) if self.kind is InputKind.TENSOR else (len(self.names),)

    def require_match(self, found: InputSpec, *, where: str, remedy: str = "") -> None:
        """Raise MismatchError unless `found` has the columns, transform and code versions of this input.

        Args:
            found: The input that is offered.
            where: Names the model, for the message.
            remedy: What to do, for the end of the message.

        Raises:
            MismatchError: Listing every difference.
        """
        if found == self:
            return
        differences = [
            f"{what} {theirs[:16]}, the model needs {ours[:16]}"
            for what, ours, theirs in (
                ("input", self.kind, found.kind),
                ("channel set", self.mask, found.mask),
                ("table", self.table, found.table),
                ("feature schema", self.schema_hash, found.schema_hash),
                ("behaviour fingerprint", self.behaviour_fingerprint, found.behaviour_fingerprint),
            )
            if ours != theirs
        ]
        if dict(self.floors) != dict(found.floors) and self.table is found.table:  # a file keeps them sorted
            differences.append("baseline scales: from another train set")
        if self.names != found.names:
            missing = [n for n in self.names if n not in found.names]
            surplus = [n for n in found.names if n not in self.names]
            if missing or surplus:
                differences.append(
                    f"columns: {_summarise_names(missing)} missing, {_summarise_names(surplus)} not expected"
                )
            else:
                at = next(i for i, (a, b) in enumerate(zip(self.names, found.names, strict=True)) if a != b)
                differences.append(f"columns: same names in another order, from column {at} on ({found.names[at]})")
        if differences:
            raise MismatchError(f"{where}: {'; '.join(differences)}{f'; {remedy}' if remedy else ''}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelInputs:
    """The windows that a model sees, with their columns.

    Attributes:
        x: ``(n, f)`` float32, or ``(n, c, spec.n_bins)`` float32 of a tensor (channels by time); NaN where unknown.
        spec: The columns of `x`.

    Raises:
        MismatchError: If `x` has another shape or dtype than `spec` implies.
    """

    x: NDArray[np.float32]
    spec: InputSpec

    def __post_init__(self) -> None:
        if self.x.shape[1:] != self.spec.shape or self.x.dtype != np.float32:
            expected = ", ".join(map(str, self.spec.shape))
            raise MismatchError(
                f"input: found {self.x.dtype} of shape {self.x.shape}, expected float32 (n, {expected})"
            )

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledExamples:
    """Windows with their labels.

    Attributes:
        inputs: The windows.
        y: ``(n,)`` int64 phase codes, 0 to 4.
        is_baseline: ``(n,)`` bool: windows of baseline episodes, in which the machine is known clean and idle; None if
            there are none.

    Raises:
        MismatchError: If `y` or `is_baseline` has another length than the inputs, or a code is outside 0 to 4.
    """

    inputs: ModelInputs
    y: NDArray[np.int64]
    is_baseline: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.y.shape != (len(self.inputs),):
            raise MismatchError(f"examples: {self.y.shape} labels for {len(self.inputs)} windows")
        if self.is_baseline is not None and self.is_baseline.shape != self.y.shape:
            raise MismatchError(f"examples: {self.is_baseline.shape} baseline marks for {len(self.inputs)} windows")
        if self.y.size and (self.y.min() < 0 or self.y.max() >= N_CLASSES):
            raise MismatchError(f"examples: labels {self.y.min()}..{self.y.max()}, expected 0..{N_CLASSES - 1}")

    def __len__(self) -> int:
        return len(self.y)

    def sha256(self) -> str:
        """Return the digest of columns, values and labels, which identifies a training set."""
        digest = hashlib.sha256(msgspec.json.encode(self.inputs.spec, order="sorted"))
        digest.update(np.ascontiguousarray(self.inputs.x, "<f4").data)
        digest.update(np.ascontiguousarray(self.y, "<i8").data)
        if self.is_baseline is not None:
            digest.update(np.ascontiguousarray(self.is_baseline).data)
        return digest.hexdigest()

    @classmethod
    def concatenate(cls, parts: Sequence[LabelledExamples]) -> LabelledExamples:
        """Return the windows of several sets with the same columns, one set after the other.

        Raises:
            MismatchError: If the columns differ.
        """
        first = parts[0].inputs.spec
        for part in parts[1:]:
            first.require_match(part.inputs.spec, where="examples: sets differ")
        x = np.concatenate([part.inputs.x for part in parts])
        marks = None
        if any(part.is_baseline is not None for part in parts):
            marks = np.concatenate(
                [np.zeros(len(part), np.bool_) if part.is_baseline is None else part.is_baseline for part in parts]
            )
        y = np.concatenate([part.y for part in parts])
        return cls(inputs=ModelInputs(x=x, spec=first), y=y, is_baseline=marks)

    def compute_weights(self) -> FloatArray:
        """Compute the training weight of each window, ``(n,)`` float64.

        The labelled windows of each phase have the same total weight (`compute_class_weights`). The baseline windows
        together have `BASELINE_WEIGHT` of that: an idle clean machine is a case of its own, however many were recorded.
        """
        labelled = np.ones(len(self), np.bool_) if self.is_baseline is None else ~self.is_baseline
        if not labelled.any():
            return np.ones(len(self))
        by_phase = compute_class_weights(self.y[labelled])
        weights = by_phase[self.y]
        if not labelled.all():
            of_a_phase = labelled.sum() / np.count_nonzero(by_phase)
            weights[~labelled] = BASELINE_WEIGHT * of_a_phase / np.count_nonzero(~labelled)
        return weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredWindows:
    """Labelled windows with the probabilities of a model that was not trained on them.

    Attributes:
        labels: Labels, episodes and times of ``n`` windows, in the order (episode, time).
        p: ``(n, 5)`` float64 calibrated probabilities.
        sha256: Digest of the windows, for `PhaseModel.trained_on`.

    Raises:
        MismatchError: If the lengths differ.
    """

    labels: LabelSequence
    p: FloatArray
    sha256: str

    def __post_init__(self) -> None:
        if self.p.shape != (len(self.labels.y), N_CLASSES):
            raise MismatchError(f"scored windows: {len(self.labels.y)} labels, probabilities of shape {self.p.shape}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PostprocessingData:
    """What the phase filter and the alarms are fitted to.

    Attributes:
        train: Labels of the train windows in time order; the filter's transitions are counted in them.
        val_b, soak: Windows every five seconds of validation B, and of benign recordings whose hosts and samples are
            not in the test set.
        val_b_live, soak_live: The windows of every second of the same episodes; None fits no alarm at that stride.
    """

    train: LabelSequence
    val_b: ScoredWindows
    soak: ScoredWindows
    val_b_live: ScoredWindows | None = None
    soak_live: ScoredWindows | None = None

    def list_parts(self) -> dict[str, ScoredWindows]:
        """Return the windows by their names in `PhaseModel.trained_on`."""
        parts = {
            "decide_val": self.val_b,
            "decide_soak": self.soak,
            "decide_val_1s": self.val_b_live,
            "decide_soak_1s": self.soak_live,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def list_strides(self) -> dict[int, tuple[ScoredWindows, ScoredWindows]]:
        """Return validation B and soak by their stride in seconds."""
        strides = {RULE_STRIDE_S: (self.val_b, self.soak)}
        if self.val_b_live is not None and self.soak_live is not None:
            strides[LIVE_STRIDE_S] = (self.val_b_live, self.soak_live)
        return strides


class PhaseModel(ABC):
    """A classifier of windows into the five phases.

    It is fitted twice. `fit` trains on train and may choose settings on validation A; this *selection model* answers
    for validation A and B, windows that it never saw, and so sets the temperature and the alarms. `refit` then trains
    the *final model* on all three sets with what was chosen; it predicts the test windows and is saved (ADR 74).

    An author writes `Config`, `_fit`, `_predict_proba`, `_files` and `_restore`, and `_refit` if `_fit` chooses
    something on validation A; every public method is final.

    Attributes:
        key: Name of the class in the registry.
        kind: Input that the model takes.
        persist: ``exact`` if a restored checkpoint returns the same bits, ``none`` if the model has no checkpoint
            and is scored by the process that fitted it.
        Config: Frozen dataclass of the settings, with defaults.
        spec: Columns of the input; None before `fit`.
        seen: Codes of the phases in the training set.
        temperature: Set by `calibrate`; 1 before.
        history: Name → one number per training round of the selection model.
        val_a_macro_f1: Macro-F1 of the selection model on validation A, by which models are selected before any test
            prediction is read.
        filter, alarms: Set by `fit_postprocessing`; None and empty before.
        where: Name of the model in messages: its checkpoint's folder, if it has one.
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
        self.alarms: tuple[AlarmRule, ...] = ()
        self.where = f"model {self.key}"

    @final
    def fit(self, train: LabelledExamples, val: LabelledExamples, *, extra: LabelledExamples | None = None) -> Self:
        """Fit the selection model to `train`; what it chooses, it chooses on `val` (validation A).

        Args:
            train: Train windows.
            val: Windows of validation A.
            extra: More train windows, made from those of train, such as spliced counterfactuals.

        Raises:
            MismatchError: If a set is empty, is of another input kind, or the sets differ in columns or schema.
        """
        if train.inputs.spec.kind is not self.kind:
            raise MismatchError(f"model {self.key} takes {self.kind} inputs, found {train.inputs.spec.kind}")
        train.inputs.spec.require_match(val.inputs.spec, where=f"model {self.key}: train and validation differ")
        if not len(train) or not len(val):
            raise MismatchError(
                f"model {self.key}: {len(train)} train and {len(val)} validation windows; both are needed"
            )
        parts = {"train": train, **({} if extra is None else {"extra": extra})}
        examples = LabelledExamples.concatenate(tuple(parts.values())) if extra is not None else train
        self.trained_on, self.trained_with = {}, {}
        for name, part in {**parts, "val_a": val}.items():
            self.record_training(name, part)
        self.temperature, self.history = 1.0, {}
        self.filter, self.alarms = None, ()
        self._start(examples)
        self._fit(examples, val)
        self.val_a_macro_f1 = round(float(macro_f1(confusion_counts(val.y, self.predict(val.inputs)))), 6)
        return self

    @final
    def refit(self, parts: Sequence[LabelledExamples]) -> Self:
        """Fit the final model to all parts together, with what `fit` chose; the temperature stays.

        Args:
            parts: Train, further train windows, validation A and B.

        Raises:
            MismatchError: If the model is not fitted, or the parts differ in columns from what it was fitted to.
        """
        if self.spec is None:
            raise MismatchError(f"model {self.key} is not fitted yet")
        everything = LabelledExamples.concatenate(parts)
        self.spec.require_match(everything.inputs.spec, where=f"model {self.key}: the sets differ")
        self.record_training("refit", everything)
        self._start(everything)
        self._refit(everything)
        return self

    @final
    def record_training(self, part: str, examples: LabelledExamples) -> None:
        """Record digest and number of the windows that something was fitted to, under the name of their part."""
        self.trained_on[part], self.trained_with[part] = examples.sha256(), len(examples)

    def _start(self, examples: LabelledExamples) -> None:
        self.spec = examples.inputs.spec
        self.seen = tuple(int(c) for c in np.unique(examples.y))

    @final
    def calibrate(self, val: LabelledExamples) -> Self:
        """Fit the temperature on `val` (validation B)."""
        self.temperature = 1.0
        raw = self.predict_proba(val.inputs)
        self.temperature = fit_temperature(raw, val.y)
        self.record_training("val_b", val)
        return self

    @final
    def fit_postprocessing(self, data: PostprocessingData) -> Self:
        """Fit the phase filter, and both alarms at each stride; call it after `calibrate`.

        The alarms use unsmoothed probabilities; the filter changes the displayed phase alone.
        """
        for name, part in data.list_parts().items():
            self.trained_on[name] = part.sha256
            self.trained_with[name] = len(part.p)
        self.filter = fit_filter(data.train, data.val_b.labels, data.val_b.p)
        rules: list[AlarmRule] = []
        for stride_s, parts in data.list_strides().items():
            p = np.concatenate([part.p for part in parts])
            labels = LabelSequence.concatenate([part.labels for part in parts])
            rules += [fit_alarm_rule(p, labels, kind=kind, stride_s=stride_s) for kind in AlarmKind]
        self.alarms = tuple(rules)
        return self

    @final
    def predict_proba(self, inputs: ModelInputs) -> FloatArray:
        """Return the calibrated probability of each phase.

        Returns:
            ``(n, 5)`` float64 in the order of PHASES; rows sum to 1; 0 for a phase that train did not have.

        Raises:
            MismatchError: If the model is not fitted, or was fitted to other columns, schema or channel set.
            RunError: If the model's output is not probabilities: wrong shape, negative, not finite, or all zero for
                the phases that train had.
        """
        if self.spec is None:
            raise MismatchError(f"model {self.key} is not fitted yet")
        self.spec.require_match(inputs.spec, where=f"model {self.key}")
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
        """Return the most probable phase of each window, ``(n,)`` int64 codes; ties go to the lower code."""
        decided: NDArray[np.int64] = self.predict_proba(inputs).argmax(axis=1)
        return decided

    @final
    def save(self, folder: Path) -> None:
        """Write the checkpoint; the same model gives the same bytes.

        Raises:
            MismatchError: If the model is not fitted.
        """
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
            alarms=self.alarms,
            versions=self.collect_versions(),
            files={},
        )
        checkpoint.write_checkpoint(folder, header, self._files())

    @final
    def collect_versions(self) -> dict[str, str]:
        """Return the versions of the libraries that the model depends on, as its checkpoint records them."""
        return checkpoint.collect_versions(self._libraries())

    @classmethod
    @final
    def restore(cls, header: CheckpointHeader, files: Mapping[str, bytes], *, where: str = "") -> Self:
        """Create a model from a checkpoint whose digests were verified (`registry.load` does both).

        Raises:
            RunError: If its settings are invalid, or its files do not match them.
        """
        try:
            model = cls(seed=header.seed, settings=header.config)
        except UsageError as exc:
            raise RunError(f"{where or 'checkpoint'}: {exc}; the checkpoint was not made by phasewatch") from exc
        model.where = where or model.where
        model.spec = InputSpec.from_header(header)
        model.seen, model.temperature = header.seen, header.temperature
        model.history, model.trained_on = dict(header.history), dict(header.trained_on)
        model.filter, model.alarms, model.trained_with = header.filter, header.alarms, dict(header.trained_with)
        model.val_a_macro_f1 = header.val_a_macro_f1
        model._restore(files)
        return model

    @abstractmethod
    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        """Fit to `train`; `val` (validation A) may choose settings, such as the number of epochs."""

    def _refit(self, everything: LabelledExamples) -> None:
        """Fit to train, validation A and B with the settings that `_fit` chose; no set is left to choose on.

        By default `_fit` is called with `everything` in both places. Override it if `_fit` chooses something.
        """
        self._fit(everything, everything)

    @abstractmethod
    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        """Return ``(n, 5)`` values ≥ 0 for ``(n, *spec.shape)`` float32; the caller normalises the rows.

        Columns of phases that train did not have are ignored.
        """

    @abstractmethod
    def _files(self) -> Mapping[str, bytes]:
        """Return what `_restore` needs, as file name → bytes."""

    @abstractmethod
    def _restore(self, files: Mapping[str, bytes]) -> None: ...

    def torch_module(self) -> Any:
        """Return the fitted model as a torch module, for `phasewatch export`; None if it is not one.

        Its input is float32 ``(n, f)`` or ``(n, c, t)`` with NaN where unknown, its output ``(n, 5)`` shares ≥ 0, as of
        `_predict_proba`.
        """
        return None

    def _libraries(self) -> tuple[str, ...]:
        """Return the distributions whose versions the checkpoint records."""
        return ("numpy",)


def _summarise_names(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', …' if len(names) > 3 else ''})" if names else "none"
