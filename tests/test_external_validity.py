"""Areas under the ROC curve on recordings of others agree with scikit-learn, and need both kinds of recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score
from tools.external_validity import ScoredRecordings, compare_recordings, main, read_predictions


def build_recordings(n_malicious: int, n_benign: int) -> ScoredRecordings:
    rng = np.random.default_rng(5)
    flags = [True] * n_malicious + [False] * n_benign
    lengths = rng.integers(20, 60, len(flags))
    names = np.repeat([f"r{i}" for i in range(len(flags))], lengths)
    y = np.repeat(flags, lengths)
    return ScoredRecordings(names, np.where(y, "TeslaCrypt", "Zip"), y, rng.normal(size=len(y)) + 0.5 * y)


def test_areas_per_window_and_per_recording_are_those_of_scikit_learn() -> None:
    scored = build_recordings(6, 9)
    ids = np.unique(scored.recording)
    means = [scored.score[scored.recording == name].mean() for name in ids]
    truth = [scored.is_malicious[scored.recording == name][0] for name in ids]

    found = compare_recordings(scored)

    assert found.window[0] == pytest.approx(roc_auc_score(scored.is_malicious, scored.score))
    assert found.recording[0] == pytest.approx(roc_auc_score(truth, means))
    for value, low, high in found:
        assert low <= value <= high


def test_recordings_of_one_kind_have_no_area() -> None:
    with pytest.raises(ValueError, match="malicious and benign"):
        compare_recordings(build_recordings(3, 0))


def test_page_shows_each_model_beside_each_program(tmp_path: Path) -> None:
    scored = build_recordings(3, 4)
    columns = {
        "episode_id": scored.recording,
        "sample_name": scored.program,
        "profile": np.where(scored.is_malicious, "ransomware", "benign"),
        "p_active": scored.score,
        "p_infecting": np.zeros(len(scored.score)),
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")

    main([f"disk=bytes={tmp_path / 'p.parquet'}", "--out", str(tmp_path / "page.md")])

    assert np.array_equal(read_predictions(tmp_path / "p.parquet").score, scored.score)
    page = (tmp_path / "page.md").read_text()
    assert "| disk=bytes | " in page
    assert "| TeslaCrypt | Zip |" in page
