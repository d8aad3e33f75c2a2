"""Compare models on recordings of others: `python -m tools.external_validity --own RUN --out PAGE.md NAME=TABLE...`.

Each TABLE is what `phasewatch predict IMPORTED_STORE --model M --channels C --out TABLE` writes. The score of a window
is how likely activity is, p(active) + p(infecting), and the positives are the windows of malicious programs. RUN is the
imported store after `validate` and `features`; a model trained on its other recordings says what could be known.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from phasewatch.artifacts import FEATURES_FILE
from phasewatch.lab.plan_checks import compute_auc
from phasewatch.types import BENIGN_PROFILE
from tools.results import table

__all__ = ["ExternalScores", "ScoredRecordings", "compare_recordings", "read_own", "read_predictions"]

N_RESAMPLES = 2_000
OWN = "trained on the other recordings of this source"
OWN_CHANNELS = ("qmp.blk_rd_bytes", "qmp.blk_wr_bytes")
_STATISTICS = ("mean", "std", "p50", "p95", "slope")


class ScoredRecordings(NamedTuple):
    """Windows of recordings and how likely activity is in each, arrays of length n.

    Attributes:
        recording: Id of the recording.
        program: The program that ran.
        is_malicious: Whether that program is malicious.
        score: float64.
    """

    recording: NDArray[np.str_]
    program: NDArray[np.str_]
    is_malicious: NDArray[np.bool_]
    score: NDArray[np.float64]


class ExternalScores(NamedTuple):
    """Areas under the ROC curve, each with the ends of its 95 % interval over resampled recordings."""

    window: tuple[float, float, float]
    recording: tuple[float, float, float]


def read_predictions(path: Path) -> ScoredRecordings:
    """Read a predictions table of labelled recordings."""
    columns = ["episode_id", "sample_name", "profile", "p_active", "p_infecting"]
    found = pq.read_table(path, columns=columns)
    episode, program, profile, active, infecting = (np.array(found[name].to_pylist()) for name in columns)
    return ScoredRecordings(episode, program, profile != BENIGN_PROFILE, active + infecting)


def read_own(run: Path) -> ScoredRecordings:
    """Read a run's features, and score each recording by boosted trees that were trained on the other ones."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import LeaveOneGroupOut

    names = [f"{channel}.{statistic}" for channel in OWN_CHANNELS for statistic in _STATISTICS]
    found = pq.read_table(run / FEATURES_FILE, columns=["episode_id", "sample_name", "profile", *names])
    episode, program, profile = (np.array(found[name].to_pylist()) for name in found.column_names[:3])
    x = np.stack([found[name].to_numpy().astype(np.float64) for name in names], axis=1)
    y = profile != BENIGN_PROFILE
    score = np.full(len(y), np.nan)
    for train, test in LeaveOneGroupOut().split(x, y, episode):
        model = HistGradientBoostingClassifier(random_state=0).fit(x[train], y[train])
        score[test] = model.predict_proba(x[test])[:, 1]
    return ScoredRecordings(episode, program, y, score)


def compare_recordings(scored: ScoredRecordings) -> ExternalScores:
    """Compute the areas per window and per recording (mean score), with intervals over resampled recordings.

    Recordings are resampled within malicious and benign ones, 2,000 times with a fixed seed.

    Raises:
        ValueError: If all recordings are malicious, or none is.
    """
    ids, first = np.unique(scored.recording, return_index=True)
    parts = [scored.score[scored.recording == name] for name in ids]
    is_malicious = scored.is_malicious[first]
    groups = [np.flatnonzero(is_malicious), np.flatnonzero(~is_malicious)]
    if not all(len(group) for group in groups):
        raise ValueError("the area needs malicious and benign recordings; label them in the map")
    rng = np.random.default_rng(0)
    draws = np.array([_compute_areas(parts, *(rng.choice(g, len(g)) for g in groups)) for _ in range(N_RESAMPLES)])
    values = _compute_areas(parts, *groups)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    window, recording = ((v, float(a), float(b)) for v, a, b in zip(values, low, high, strict=True))
    return ExternalScores(window=window, recording=recording)


def _compute_areas(
    parts: Sequence[NDArray[np.float64]], malicious: NDArray[np.int64], benign: NDArray[np.int64]
) -> tuple[float, float]:
    windows = [np.concatenate([parts[i] for i in group]) for group in (malicious, benign)]
    means = [np.array([parts[i].mean() for i in group]) for group in (malicious, benign)]
    found = [compute_auc(*windows), compute_auc(*means)]
    return tuple(float("nan") if area is None else area for area in found)  # type: ignore[return-value]


def render(rows: Sequence[tuple[str, ScoredRecordings]]) -> str:
    """Render the page: areas of each model, and the mean score of each program."""
    programs = sorted({str(name) for _, scored in rows for name in scored.program})
    body = []
    for name, scored in rows:
        areas = compare_recordings(scored)
        means = [f"{scored.score[scored.program == each].mean():.2f}" for each in programs]
        body.append([name, *(f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in areas), *means])
    first = rows[0][1]
    counts = [len(np.unique(first.recording[first.is_malicious == flag])) for flag in (True, False)]
    about = (
        f"{counts[0]} recordings of real ransomware and {counts[1]} of benign programs, made by others below real "
        "Windows machines (RanSAP; Hirano, Hodota, Kobayashi 2022, doi 10.1016/j.fsidi.2021.301314). No model of ours "
        "was trained or tuned on them. Area under the ROC curve of p(active) + p(infecting), malicious against benign; "
        "a perfect order gives 1, chance 0.5. Intervals are over resampled recordings. Then the mean of that score for "
        "each program."
    )
    head = ["model, channel set", "per window", "per recording", *programs]
    return f"# Real ransomware, recorded by others\n\n{about}\n\n{table([head, *body])}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Compare models on recordings of others.")
    parser.add_argument("predictions", nargs="+", metavar="NAME=PREDICTIONS.parquet")
    parser.add_argument("--own", type=Path, help="run of the imported store, with features")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    named = [text.rpartition("=") for text in given.predictions]
    rows = [(name, read_predictions(Path(path))) for name, _, path in named]
    if given.own is not None:
        rows.append((OWN, read_own(given.own)))
    given.out.write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
