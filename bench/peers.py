"""Measure the window features against tsflex, seglearn, tsfresh and pandas, each computing the same five numbers.

CPU time of one process. tsflex stands here twice: called for each episode with its own vectorised functions, and at its
best, with one function of five outputs over forty episodes end to end. Values agree to 1e-6 relative.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from seglearn.pipe import Pype
from seglearn.transform import FeatureRep, Segment
from timing import Figure, Part, in_turns, rows_of
from tsflex.features import FeatureCollection, FeatureDescriptor, FuncWrapper, MultipleFeatureDescriptors
from tsfresh import extract_features

from phasewatch.features.stats import window_stats

BINS, CHANNELS, WINDOW, STRIDE, EPISODES = 360, 46, 20, 10, 40
LEVER = 0.5 * (np.arange(WINDOW) - (WINDOW - 1) / 2)
STATS = ("mean", "std", "p50", "p95", "slope")


def slope(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Least squares per second, along the last axis."""
    return x @ LEVER / (LEVER @ LEVER)


def five(x: np.ndarray, axis: int = -1) -> tuple[np.ndarray, ...]:
    """Return all five statistics of ``(windows, 20)`` float64, sorting once."""
    ordered = np.sort(x, axis=-1)
    p50 = 0.5 * (ordered[:, 9] + ordered[:, 10])
    p95 = ordered[:, 18] + 0.05 * (ordered[:, 19] - ordered[:, 18])
    return x.mean(axis=-1), x.std(axis=-1), p50, p95, slope(x)


def tsflex_per_episode(episodes: list[np.ndarray]) -> np.ndarray:
    """Call tsflex once per episode, with one vectorised function per statistic."""
    functions = [
        FuncWrapper(np.mean, output_names="mean", vectorized=True, axis=-1),
        FuncWrapper(np.std, output_names="std", vectorized=True, axis=-1),
        FuncWrapper(np.median, output_names="p50", vectorized=True, axis=-1),
        FuncWrapper(np.percentile, output_names="p95", vectorized=True, axis=-1, q=95),
        FuncWrapper(slope, output_names="slope", vectorized=True, axis=-1),
    ]
    names = [f"c{i}" for i in range(CHANNELS)]
    collection = FeatureCollection(
        MultipleFeatureDescriptors(functions=functions, series_names=names, windows=WINDOW, strides=STRIDE)
    )
    made = []
    for bins in episodes:
        frame = pd.DataFrame(np.concatenate((bins, bins[:1])), columns=names)
        out = collection.calculate(frame, return_df=True, n_jobs=1, show_progress=False)
        made.append(_ordered(out, names))
    return np.concatenate(made)


def tsflex_at_its_best(episodes: list[np.ndarray]) -> np.ndarray:
    """Call tsflex once for all episodes, with one function of five outputs."""
    names = [f"c{i}" for i in range(CHANNELS)]
    function = FuncWrapper(five, output_names=list(STATS), vectorized=True, axis=-1)
    collection = FeatureCollection(
        [FeatureDescriptor(function=function, series_name=name, window=WINDOW, stride=STRIDE) for name in names]
    )
    frame = pd.DataFrame(
        np.concatenate((*episodes, episodes[0][:1])), columns=names
    )  # the last window needs a row after it
    out = _ordered(collection.calculate(frame, return_df=True, n_jobs=1, show_progress=False), names)
    per = BINS // STRIDE
    return np.concatenate([out[e * per : e * per + per - 1] for e in range(len(episodes))])  # none across a border


def _ordered(out: pd.DataFrame, names: list[str]) -> np.ndarray:
    columns = [f"{name}__{stat}__w={WINDOW}" for name in names for stat in STATS]
    return out[columns].to_numpy().reshape(len(out), CHANNELS, len(STATS))


def seglearn(episodes: list[np.ndarray]) -> np.ndarray:
    """Call seglearn once for all episodes, with vectorised functions."""
    functions = {
        "mean": lambda x: x.mean(axis=1),
        "std": lambda x: x.std(axis=1),
        "p50": lambda x: np.median(x, axis=1),
        "p95": lambda x: np.percentile(x, 95, axis=1),
        "slope": lambda x: np.einsum("wtc,t->wc", x, LEVER) / (LEVER @ LEVER),
    }
    pipe = Pype([("seg", Segment(width=WINDOW, overlap=0.5, order="C")), ("rep", FeatureRep(features=functions))])
    x, _ = pipe.fit_transform(episodes, np.zeros(len(episodes)))
    return x.reshape(len(x), len(STATS), CHANNELS).transpose(0, 2, 1)


def tsfresh(bins: np.ndarray) -> np.ndarray:
    """Call tsfresh for one episode's windows."""
    windows = sliding_window_view(bins, WINDOW, axis=0)[::STRIDE].transpose(0, 2, 1)
    w = len(windows)
    frame = pd.DataFrame(windows.reshape(-1, CHANNELS), columns=[f"c{i}" for i in range(CHANNELS)])
    frame["id"], frame["time"] = np.repeat(np.arange(w), WINDOW), np.tile(np.arange(WINDOW), w)
    wanted = {
        "mean": None,
        "standard_deviation": None,
        "median": None,
        "quantile": [{"q": 0.95}],
        "linear_trend": [{"attr": "slope"}],
    }
    out = extract_features(
        frame, column_id="id", column_sort="time", default_fc_parameters=wanted, n_jobs=0, disable_progressbar=True
    )
    of = ("mean", "standard_deviation", "median", "quantile__q_0.95", 'linear_trend__attr_"slope"')
    columns = [f"c{i}__{name}" for i in range(CHANNELS) for name in of]
    values = out[columns].to_numpy(copy=True).reshape(w, CHANNELS, len(STATS))
    values[:, :, 4] *= 2  # per bin → per second
    return values


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Stop if two results are not the same numbers."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.allclose(ours, theirs, rtol=1e-6, atol=1e-6), np.abs(ours - theirs).max()


def pandas_rolling(bins: np.ndarray) -> np.ndarray:
    """Compute one episode with pandas rolling: its own mean, std, median and quantile, and a function for the slope."""
    rolled = pd.DataFrame(bins).rolling(WINDOW)
    slopes = rolled.apply(lambda x: x @ LEVER / (LEVER @ LEVER), raw=True)
    made = (rolled.mean(), rolled.std(ddof=0), rolled.median(), rolled.quantile(0.95), slopes)
    return np.stack([m.to_numpy()[WINDOW - 1 :: STRIDE] for m in made], axis=2)


def measure(*, repeats: int = 3) -> Part:
    """Measure the same five statistics of each channel and window with every library."""
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    exact = [rng.normal(10, 3, (BINS, CHANNELS)).astype(np.float32) for _ in range(EPISODES)]
    wide = [e.astype(np.float64) for e in exact]
    ours = np.concatenate([window_stats(e) for e in exact])
    per_call: dict[str, tuple[int, Callable[[], np.ndarray]]] = {
        "phasewatch": (EPISODES, lambda: np.concatenate([window_stats(e) for e in exact])),
        "tsflex, one call per episode": (2, lambda: tsflex_per_episode(wide[:2])),
        "tsflex, 40 episodes per call": (EPISODES, lambda: tsflex_at_its_best(wide)),
        "seglearn, 40 episodes per call": (EPISODES, lambda: seglearn(wide)),
        "tsfresh": (1, lambda: tsfresh(wide[0])),
        "pandas rolling": (1, lambda: pandas_rolling(wide[0])),
    }
    for _, work in per_call.values():
        theirs = work()
        agree(ours[: len(theirs)], theirs)
    times = in_turns({name: work for name, (_, work) in per_call.items()}, repeats=repeats)
    rows = rows_of(times, repeats=repeats, per="episode", over={name: n for name, (n, _) in per_call.items()})
    least = {row.what.partition(",")[0]: row.min_s for row in rows}
    bounds = (
        ("tsflex", "tsflex called per episode", "≥100", "≥400"),
        ("tsflex at its best", "tsflex at its best", "≥2.5", "≥10"),
        ("seglearn", "seglearn", "≥7", "≥30"),
        ("tsfresh", "tsfresh", "≥1000", "≥2000"),
        ("pandas rolling", "pandas rolling", "", ""),
    )
    return Part(
        title="Windows and features",
        about=(
            f"Mean, deviation, two quantiles and slope of {CHANNELS} channels in windows of {WINDOW} bins, one "
            f"every {STRIDE}, over episodes of {BINS} bins without a gap; values equal to 1e-6. Only phasewatch "
            "also supports gaps."
        ),
        rows=rows,
        figures=tuple(
            Figure(
                what=f"window features, against {words}", must=must, aim=aim, measured=least[name] / least["phasewatch"]
            )
            for name, words, must, aim in bounds
        ),
    )
