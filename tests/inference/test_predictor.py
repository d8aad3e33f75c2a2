"""Predictions from bins: offline windows at both strides, and the newest window as a watcher sees it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.factories.bins import build_busy_bins

from phasewatch.channels import CHANNELS, build_channel_mask
from phasewatch.errors import RunError
from phasewatch.features.inputs import list_table_columns
from phasewatch.features.schema import feature_names
from phasewatch.inference.edge_bundle import TrainingOrigin
from phasewatch.inference.predictor import PhasePredictor, check_columns
from phasewatch.models.base import InputKind, InputSpec, InputVariant, ModelInputs
from phasewatch.types import LIVE_STRIDE_BINS

CHANNEL_SET = "proc+tap"
CHOSEN = tuple(c.full_name for c, on in zip(CHANNELS, build_channel_mask(CHANNEL_SET), strict=True) if on)
KINDS = [
    pytest.param(kind, table, id=f"{kind}-{table}")
    for kind in (InputKind.TABLE, InputKind.TENSOR)
    for table in (InputVariant.RAW, InputVariant.CONTEXT)
]


class HashingEstimator:
    """Return probabilities that depend on every value of the input."""

    def predict_proba(self, inputs: ModelInputs) -> NDArray[np.float64]:
        digests = [np.frombuffer(row.tobytes(), np.uint32) for row in np.ascontiguousarray(inputs.x)]
        return np.array([[float(d.astype(np.uint64).sum() % (97 + k)) for k in range(5)] for d in digests])


def build_predictor(kind: InputKind, table: InputVariant) -> PhasePredictor:
    names = CHOSEN if kind is InputKind.TENSOR else list_table_columns(feature_names(), CHOSEN, table)
    spec = InputSpec(kind=kind, names=names, mask=CHANNEL_SET, schema_hash="s", behaviour_fingerprint="b", table=table)
    return PhasePredictor(
        model="fake", threat=CHANNEL_SET, seed=0, spec=spec, estimator=HashingEstimator(), filter=None, alarms=(),
        trained=TrainingOrigin(), where="test",
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "table"), KINDS)
def test_every_stride_and_the_newest_window_alone_give_the_same_probabilities(
    kind: InputKind, table: InputVariant
) -> None:
    predictor, bins = build_predictor(kind, table), build_busy_bins(300, 11, gaps=0.05)
    training, live = predictor.predict_windows(bins), predictor.predict_windows(bins, LIVE_STRIDE_BINS)

    assert (len(training), len(live)) == (29, 141)
    assert np.array_equal(live[::5], training)
    for j in range(0, 141, 7):
        end = 20 + 2 * j
        kept = bins[max(0, end - predictor.bins_needed) : end]
        assert np.array_equal(predictor.predict_newest(kept), live[j])


def test_a_model_with_context_needs_two_minutes_and_one_without_ten_seconds() -> None:
    assert build_predictor(InputKind.TABLE, InputVariant.RAW).bins_needed == 20
    assert build_predictor(InputKind.TABLE, InputVariant.CONTEXT).bins_needed == 240


def test_known_share_of_live_windows_is_that_of_their_own_bins() -> None:
    predictor, bins = build_predictor(InputKind.TENSOR, InputVariant.RAW), build_busy_bins(24, 12)
    bins[:2] = np.nan

    assert predictor.compute_known_share(bins, LIVE_STRIDE_BINS).tolist() == pytest.approx([0.9, 1.0, 1.0])


@pytest.mark.parametrize(("kind", "table"), [*KINDS, (InputKind.TABLE, InputVariant.COMMISSIONED)])
def test_columns_are_those_of_the_channel_set_in_order(kind: InputKind, table: InputVariant) -> None:
    spec = build_predictor(kind, table).spec
    if table is InputVariant.COMMISSIONED:
        spec = replace(spec, floors=tuple((name, 1.0) for name in CHOSEN))

    check_columns(spec, where="x")

    for names in (spec.names[::-1], (*spec.names, "ratio.disk_write_size"), (*spec.names, "proc.x@60s")):
        with pytest.raises(RunError, match="not those of the channel set"):
            check_columns(replace(spec, names=names), where="x")
