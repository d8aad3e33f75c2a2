"""The one channel that tells most alone: a model of many channels has to beat it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import RunError
from phasewatch.measures import confusion_counts, macro_f1
from phasewatch.models.base import Examples, Floats, Inputs, PhaseModel
from phasewatch.models.gbt import GbtConfig, GradientBoosting

CHOICE = "channel.json"
TRIAL_ROUNDS = 15  # enough to rank channels, a tenth of the cost


class BestChannel(PhaseModel):
    """Gradient-boosted trees over the stats of one channel, chosen by macro-F1 on validation A."""

    key = "best_channel"
    Config = GbtConfig

    def _fit(self, train: Examples, val: Examples) -> None:
        names = train.inputs.spec.names
        channels = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
        scores = []
        for channel in channels:
            own, other = (_only(part, _columns(names, channel)) for part in (train, val))
            trial = GradientBoosting(seed=self.seed, settings={"rounds": TRIAL_ROUNDS, "patience": TRIAL_ROUNDS})
            scores.append(_score(trial.fit(own, other), other))
        self._channel = channels[int(np.argmax(scores))]
        own, other = (_only(part, _columns(names, self._channel)) for part in (train, val))
        settings = msgspec.to_builtins(self.config)
        self._model = GradientBoosting(seed=self.seed, settings=settings).fit(own, other)
        self.history = {**self._model.history, "trial_val_a_macro_f1": tuple(round(s, 6) for s in scores)}

    def _predict_proba(self, x: NDArray[np.float32]) -> Floats:
        names = self.spec.names if self.spec else ()
        return self._model._predict_proba(np.ascontiguousarray(x[:, _columns(names, self._channel)]))

    def _files(self) -> Mapping[str, bytes]:
        return {CHOICE: msgspec.json.encode(self._channel), **self._model._files()}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        names = self.spec.names if self.spec else ()
        try:
            channel = msgspec.json.decode(files.get(CHOICE, b""), type=str)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise RunError(f"checkpoint of {self.key}: {CHOICE} is absent or no name: {exc}") from exc
        if not _columns(names, channel):
            raise RunError(f"checkpoint of {self.key}: {CHOICE} names {channel!r}, which is none of its columns")
        self._channel = channel
        self._model = GradientBoosting(seed=self.seed, settings=msgspec.to_builtins(self.config))
        self._model.spec = (
            replace(self.spec, names=tuple(names[i] for i in _columns(names, channel))) if self.spec else None
        )
        self._model._restore(files)

    def _libraries(self) -> tuple[str, ...]:
        return ("numpy", "xgboost", "xgboost-cpu")


def _columns(names: tuple[str, ...], channel: str) -> list[int]:
    return [i for i, name in enumerate(names) if name.rpartition(".")[0] == channel]


def _only(part: Examples, columns: list[int]) -> Examples:
    spec = part.inputs.spec
    names = tuple(spec.names[i] for i in columns)
    x = np.ascontiguousarray(part.inputs.x[:, columns])
    return Examples(inputs=Inputs(x=x, spec=replace(spec, names=names)), y=part.y)


def _score(model: PhaseModel, val: Examples) -> float:
    return float(macro_f1(confusion_counts(val.y, model.predict(val.inputs))))
