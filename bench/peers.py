"""Measure the window features against tsflex, seglearn and tsfresh, each computing the same five numbers.

    PYTHONPATH=src python bench/peers.py        (in the environment of bench/features-peers.txt)

CPU time of one process. tsflex stands here twice: called for each episode with its own vectorised functions, and at its
best, with one function of five outputs over forty episodes end to end. Values agree to 1e-6 relative.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from figures import Figure, best_of, say
from numpy.lib.stride_tricks import sliding_window_view
from seglearn.pipe import Pype
from seglearn.transform import FeatureRep, Segment
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
    """Give all five of ``(windows, 20)``, sorting once: what an expert would write."""
    ordered = np.sort(x, axis=-1)
    p50 = 0.5 * (ordered[:, 9] + ordered[:, 10])
    p95 = ordered[:, 18] + 0.05 * (ordered[:, 19] - ordered[:, 18])
    return x.mean(axis=-1), x.std(axis=-1), p50, p95, slope(x)


def tsflex_per_episode(episodes: list[np.ndarray]) -> np.ndarray:
    """Call tsflex for each episode, a vectorised function a number."""
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
        "mean": lambda x: x.mean(axis=1), "std": lambda x: x.std(axis=1), "p50": lambda x: np.median(x, axis=1),
        "p95": lambda x: np.percentile(x, 95, axis=1), "slope": lambda x: np.einsum("wtc,t->wc", x, LEVER) / (LEVER @ LEVER),
    }  # fmt: skip
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
        "mean": None, "standard_deviation": None, "median": None, "quantile": [{"q": 0.95}],
        "linear_trend": [{"attr": "slope"}],
    }  # fmt: skip
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


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    exact = [rng.normal(10, 3, (BINS, CHANNELS)).astype(np.float32) for _ in range(EPISODES)]
    wide = [e.astype(np.float64) for e in exact]
    ours = np.concatenate([window_stats(e) for e in exact])
    agree(ours, tsflex_at_its_best(wide))
    agree(ours, seglearn(wide))
    agree(ours[:70], tsflex_per_episode(wide[:2]))
    agree(ours[:35], tsfresh(wide[0]))
    least = best_of(
        {
            "ours": lambda: [window_stats(e) for e in exact],
            "best": lambda: tsflex_at_its_best(wide),
            "seglearn": lambda: seglearn(wide),
            "episode": lambda: tsflex_per_episode(wide[:2]),
            "tsfresh": lambda: tsfresh(wide[0]),
        },
        rounds=5,
    )
    per = {
        "ours": least["ours"] / EPISODES, "best": least["best"] / EPISODES, "seglearn": least["seglearn"] / EPISODES,
        "episode": least["episode"] / 2, "tsfresh": least["tsfresh"],
    }  # fmt: skip
    for name, what, must, aim in (
        ("episode", "tsflex called per episode, against the window features", "≥100", "≥400"),
        ("best", "tsflex at its best (one function, 40 episodes a call)", "≥2.5", "≥10"),
        ("seglearn", "seglearn (40 episodes a call)", "≥7", "≥30"),
        ("tsfresh", "tsfresh (the same five numbers)", "≥1000", "≥2000"),
    ):
        note = f"({per[name] * 1e3:.2f} ms an episode; ours {per['ours'] * 1e3:.3f} ms)"
        say(Figure(what=what, must=must, aim=aim, measured=per[name] / per["ours"], note=note))


if __name__ == "__main__":
    main()
