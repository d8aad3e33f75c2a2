"""Small tuning, honestly: settings drawn at random, each judged on validation A of its own cell, the trials counted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from phasewatch.dataset import FoldData
from phasewatch.errors import UsageError
from phasewatch.models import registry


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRange:
    """One setting's range: a choice among `choices`, or a number between, log-uniform where `is_log`."""

    name: str
    choices: tuple[int, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = True

    def draw(self, rng: np.random.Generator) -> int | float:
        """Draw a value."""
        if self.choices:
            return int(rng.choice(self.choices))
        if self.is_log:
            return round(float(np.exp(rng.uniform(np.log(self.low), np.log(self.high)))), 6)
        return round(float(rng.uniform(self.low, self.high)), 6)


_NET_SPACE = (
    TuningRange(name="width", choices=(32, 64, 96, 128)),
    TuningRange(name="dropout", low=0.0, high=0.5, is_log=False),
    TuningRange(name="learning_rate", low=5e-4, high=5e-3),
    TuningRange(name="weight_decay", low=1e-3, high=1e-1),
    TuningRange(name="hide", low=0.0, high=0.3, is_log=False),
)
TUNING_SPACES: Mapping[str, tuple[TuningRange, ...]] = {
    "gbt": (
        TuningRange(name="depth", choices=(3, 4, 5, 6)),
        TuningRange(name="learning_rate", low=0.03, high=0.3),
        TuningRange(name="min_child_weight", low=1.0, high=10.0),
        TuningRange(name="l2", low=0.3, high=10.0),
    ),
    **dict.fromkeys(("mlp", "cnn", "gru", "lstm", "transformer"), _NET_SPACE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningResult:
    """The settings that validation A liked best, its macro-F1 with them, and after how many trials."""

    settings: dict[str, Any]
    val_a_macro_f1: float
    trials: int


def find_tuning_space(model: str) -> tuple[TuningRange, ...]:
    """Give what can be tuned of a model.

    Raises:
        UsageError: If nothing can.
    """
    if model not in TUNING_SPACES:
        raise UsageError(f"model {model!r} has nothing to tune; {', '.join(TUNING_SPACES)} have")
    return TUNING_SPACES[model]


def tune(sets: FoldData, model: str, *, trials: int, seed: int, purpose: str) -> TuningResult:
    """Try settings on train and validation A alone; the first trial is the defaults, so tuning never starts worse.

    Args:
        sets: Of the cell's fold; only train and validation A are looked at.
        model: A registry key with a space.
        trials: How many, at least 1.
        seed: Of the model.
        purpose: The cell's name; each trial draws by seed, purpose and number, so more trials change no earlier one.
    """
    best: TuningResult | None = None
    for number in range(trials):
        digest = hashlib.sha256(f"tune|{purpose}|{number}".encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
        settings = {knob.name: knob.draw(rng) for knob in find_tuning_space(model)} if number else {}
        fitted = registry.create(model, seed=seed, settings=settings).fit(sets.train.examples, sets.val_a.examples)
        if best is None or fitted.val_a_macro_f1 > best.val_a_macro_f1:
            best = TuningResult(settings=settings, val_a_macro_f1=fitted.val_a_macro_f1, trials=trials)
    if best is None:
        raise UsageError(f"{trials} trials try nothing; ask for 1 or more")
    return best
