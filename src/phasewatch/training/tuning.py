"""Random search over a model's settings on validation A."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phasewatch.dataset import FoldData
from phasewatch.errors import UsageError
from phasewatch.models import registry

__all__ = ["TUNING_SPACES", "TuningRange", "TuningResult", "draw_settings", "find_tuning_space", "tune"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRange:
    """The range of one setting: one of `choices`, or a number between `low` and `high`, log-uniform if `is_log`."""

    name: str
    choices: tuple[int, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = True

    def build_distribution(self) -> Any:
        """Return a list or a scipy distribution, as `ParameterSampler` takes them."""
        from scipy.stats import loguniform, uniform

        if self.choices:
            return list(self.choices)
        return loguniform(self.low, self.high) if self.is_log else uniform(self.low, self.high - self.low)


_NET_SPACE = (
    TuningRange(name="width", choices=(32, 64, 96, 128)),
    TuningRange(name="dropout", low=0.0, high=0.5, is_log=False),
    TuningRange(name="learning_rate", low=5e-4, high=5e-3),
    TuningRange(name="weight_decay", low=1e-3, high=1e-1),
    TuningRange(name="hide", low=0.0, high=0.3, is_log=False),
)
TUNING_SPACES: Mapping[str, tuple[TuningRange, ...]] = {
    "gbt": (
        TuningRange(name="leaves", choices=(8, 15, 31)),
        TuningRange(name="rounds", choices=(100, 200, 400)),
        TuningRange(name="columns", low=0.1, high=0.5),
        TuningRange(name="min_leaf_windows", choices=(10, 20, 40)),
        TuningRange(name="l2", low=0.5, high=20.0),
    ),
    **dict.fromkeys(("mlp", "cnn", "gru", "lstm", "transformer", "tcn"), _NET_SPACE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningResult:
    """Settings (other than defaults), their macro-F1 on validation A, and the number of settings tried."""

    settings: dict[str, Any]
    val_a_macro_f1: float
    trials: int


def find_tuning_space(model: str) -> tuple[TuningRange, ...]:
    """Return the ranges of a model's settings.

    Raises:
        UsageError: If the model has no settings to tune.
    """
    if model not in TUNING_SPACES:
        raise UsageError(f"model {model!r} has no settings to tune; models that have: {', '.join(TUNING_SPACES)}")
    return TUNING_SPACES[model]


def draw_settings(model: str, *, n: int, seed: int, purpose: str) -> list[dict[str, int | float]]:
    """Draw `n` settings of a model with scikit-learn's `ParameterSampler`.

    The draws depend on `seed` and `purpose` (name of the experiment); a larger `n` keeps the earlier ones.
    """
    space = {row.name: row.build_distribution() for row in find_tuning_space(model)}
    if n < 1:
        return []
    from sklearn.model_selection import ParameterSampler

    state = int.from_bytes(hashlib.sha256(f"tune|{purpose}|{seed}".encode()).digest()[:4], "big")
    sampler = ParameterSampler(space, n_iter=n, random_state=state)
    return [{k: v if isinstance(v, int) else round(float(v), 6) for k, v in settings.items()} for settings in sampler]


def tune(sets: FoldData, model: str, *, trials: int, seed: int, purpose: str) -> TuningResult:
    """Fit the model with random settings and return the best by macro-F1 on validation A.

    The first trial uses the defaults, so that tuning is never worse than they are on validation A.

    Args:
        sets: Windows of a fold; only train and validation A are used.
        model: Key of a model with settings to tune.
        trials: Number of settings.
        seed, purpose: As in `draw_settings`; `seed` is the model's seed too.

    Raises:
        UsageError: If the model has no settings to tune, or `trials` is below 1.
    """
    if trials < 1:
        raise UsageError(f"{trials} trials: at least 1 is needed")
    results = []
    for settings in [{}, *draw_settings(model, n=trials - 1, seed=seed, purpose=purpose)]:
        fresh = registry.create(model, seed=seed, settings=settings)
        fitted = fresh.fit(sets.train.examples, sets.val_a.examples, extra=sets.extra)
        results.append(TuningResult(settings=settings, val_a_macro_f1=fitted.val_a_macro_f1, trials=trials))
    return max(results, key=lambda result: result.val_a_macro_f1)  # the first of equals
