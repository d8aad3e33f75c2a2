"""Model inputs from bins: one computation for training, recordings and live VMs."""

from __future__ import annotations

import numpy as np
import pytest
from tests.factories.bins import build_busy_bins, same_bits

from phasewatch.channels import CHANNEL_NAMES, CHANNELS, build_channel_mask
from phasewatch.errors import MismatchError, UsageError
from phasewatch.features.context import context_features, list_context_columns
from phasewatch.features.derived import DERIVED_FEATURES, derived_features
from phasewatch.features.inputs import compute_inputs, list_input_channels, list_table_columns
from phasewatch.features.normalise import build_scaling, measure_baseline
from phasewatch.features.schema import feature_names, stat_names
from phasewatch.features.stats import window_stats
from phasewatch.models.base import InputKind, InputSpec, InputVariant

REALISTIC = tuple(c.full_name for c, on in zip(CHANNELS, build_channel_mask("realistic"), strict=True) if on)
PROC = tuple(name for name in CHANNEL_NAMES if name.startswith("proc."))
KINDS = [(kind, table) for kind in ("table", "tensor") for table in ("raw", "context")]


def spec(kind: str, table: str = "raw", channels: tuple[str, ...] = REALISTIC) -> InputSpec:
    variant = InputVariant(table)
    names = channels if kind == "tensor" else list_table_columns(feature_names(), channels, variant)
    return InputSpec(
        kind=InputKind(kind), names=names, mask="m", schema_hash="s", behaviour_fingerprint="b", table=variant
    )


def test_a_table_has_the_columns_of_its_channel_set_and_their_values() -> None:
    bins = build_busy_bins(75, 1, gaps=0.1)
    own = spec("table", channels=PROC)
    every = np.concatenate([window_stats(bins).reshape(6, -1), derived_features(bins)], axis=1)

    assert "ratio.cpu_switches" in own.names
    assert "ratio.disk_write_size" not in own.names
    assert same_bits(compute_inputs(bins, own), every[:, [feature_names().index(name) for name in own.names]])


def test_context_of_a_table_adds_its_columns_and_keeps_the_others() -> None:
    bins = build_busy_bins(75, 2)
    raw, own = spec("table"), spec("table", "context")
    found = compute_inputs(bins, own)

    assert own.names == (*raw.names, *list_context_columns(REALISTIC))
    assert same_bits(np.ascontiguousarray(found[:, : len(raw.names)]), compute_inputs(bins, raw))
    assert same_bits(np.ascontiguousarray(found[:, len(raw.names) :]), context_features(bins))


def test_values_relative_to_a_baseline_are_statistics_alone() -> None:
    names = list_table_columns(feature_names(), PROC, InputVariant.COMMISSIONED)

    assert names == tuple(name for name in stat_names() if name.startswith("proc."))
    assert not {feature.name for feature in DERIVED_FEATURES} & set(names)


def test_columns_may_stand_in_any_order() -> None:
    bins = build_busy_bins(45, 3)
    own = spec("table", "context")
    order = np.random.default_rng(0).permutation(len(own.names))
    mixed = InputSpec(
        kind=own.kind, names=tuple(own.names[i] for i in order), mask="m", schema_hash="s",
        behaviour_fingerprint="b", table=own.table,
    )  # fmt: skip

    assert same_bits(compute_inputs(bins, mixed), compute_inputs(bins, own)[:, order])


def test_a_tensor_with_context_ends_with_the_window_and_repeats_the_earliest_bin() -> None:
    bins = build_busy_bins(300, 4)
    found = compute_inputs(bins, spec("tensor", "context", PROC))
    columns = [CHANNEL_NAMES.index(name) for name in PROC]

    assert found.shape == (29, len(PROC), 240)
    assert same_bits(found[28], np.ascontiguousarray(bins[60:300, columns].T))
    assert same_bits(found[0, :, 220:], np.ascontiguousarray(bins[:20, columns].T))
    assert (found[0, :, :220] == bins[0, columns][:, None]).all()


@pytest.mark.parametrize(("kind", "table"), KINDS)
@pytest.mark.parametrize("gaps", [0.0, 0.2])
def test_a_window_has_the_same_bits_at_both_strides_and_as_the_newest(kind: str, table: str, gaps: float) -> None:
    bins, own = build_busy_bins(290, 5, gaps=gaps), spec(kind, table)
    slow, fast = compute_inputs(bins, own), compute_inputs(bins, own, stride_bins=2)

    assert (len(slow), len(fast)) == (28, 136)
    assert slow.shape[1:] == own.shape
    assert same_bits(np.ascontiguousarray(fast[::5]), slow)
    for j in (0, 1, 7, 111, 135):
        end = 20 + 2 * j
        kept = bins[max(0, end - own.n_bins) : end]
        assert same_bits(compute_inputs(kept, own, newest_only=True), np.ascontiguousarray(fast[j : j + 1]))


@pytest.mark.parametrize(("kind", "table"), KINDS)
def test_too_few_bins_give_no_window(kind: str, table: str) -> None:
    own = spec(kind, table)

    assert compute_inputs(np.zeros((19, len(CHANNELS)), np.float32), own).shape == (0, *own.shape)


@pytest.mark.parametrize("kind", ["table", "tensor"])
def test_a_baseline_scales_what_is_computed(kind: str) -> None:
    bins = build_busy_bins(60, 6)
    names = PROC if kind == "tensor" else list_table_columns(feature_names(), PROC, InputVariant.COMMISSIONED)
    own = InputSpec(kind=InputKind(kind), names=names, mask="m", schema_hash="s", behaviour_fingerprint="b")
    day = measure_baseline("h", PROC, bins[:, [CHANNEL_NAMES.index(name) for name in PROC]])
    scaling = build_scaling(day, np.ones(len(PROC)))
    raw = compute_inputs(bins, own)

    found = compute_inputs(bins, own, scaling=scaling)

    assert same_bits(found, scaling.scale_bins(raw) if kind == "tensor" else scaling.scale_stats(raw))


def test_an_input_that_bins_do_not_give_is_refused() -> None:
    bins = build_busy_bins(20, 7)

    def other(kind: InputKind, name: str) -> InputSpec:
        return InputSpec(kind=kind, names=(name,), mask="m", schema_hash="s", behaviour_fingerprint="b")

    with pytest.raises(MismatchError, match=r"no column 'proc\.x\.mean'"):
        compute_inputs(bins, other(InputKind.TABLE, "proc.x.mean"))
    with pytest.raises(MismatchError, match="unknown"):
        compute_inputs(bins, other(InputKind.TENSOR, "proc.x"))
    with pytest.raises(UsageError, match="elapsed"):
        compute_inputs(bins, other(InputKind.ELAPSED, "t_center_s"))


def test_channels_of_columns_are_in_the_order_of_the_registry() -> None:
    names = ("burst.cpu_and_sending@60s", "proc.cpu_user.mean", "no.such")

    assert list_input_channels(InputKind.TABLE, names) == ("proc.cpu_user", "proc.vcpu_run", "netflow.out_pkts")
    tensor = ("netflow.in_bytes", "proc.cpu_sys")
    assert list_input_channels(InputKind.TENSOR, tensor) == ("proc.cpu_sys", "netflow.in_bytes")
