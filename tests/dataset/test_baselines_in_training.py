"""Baseline episodes join the training set: of which hosts, with which weight, and never of a held-out host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from tests.factories.synthetic_runs import World, write_run

from phasewatch.dataset import load, write_splits
from phasewatch.models.base import BASELINE_WEIGHT, InputKind, InputSpec, LabelledExamples, ModelInputs

SPEC = InputSpec(kind=InputKind.TABLE, names=("a.mean",), mask="realistic", schema_hash="s", behaviour_fingerprint="b")


def examples(y: list[int], *, is_baseline: bool = False) -> LabelledExamples:
    n = len(y)
    return LabelledExamples(
        inputs=ModelInputs(x=np.zeros((n, 1), np.float32), spec=SPEC),
        y=np.array(y, np.int64),
        is_baseline=np.ones(n, np.bool_) if is_baseline else None,
    )


def test_each_phase_has_the_same_weight_and_all_baseline_windows_together_a_share_of_it() -> None:
    both = LabelledExamples.concatenate([examples([0, 0, 0, 1, 2, 2]), examples([0, 0, 0, 0], is_baseline=True)])
    weights = both.compute_weights()
    of_a_phase = 6 / 3

    for phase, rows in ((0, [0, 1, 2]), (1, [3]), (2, [4, 5])):
        assert_allclose(weights[rows].sum(), of_a_phase, err_msg=str(phase))
    assert_allclose(weights[6:].sum(), BASELINE_WEIGHT * of_a_phase)


def test_the_number_of_baseline_windows_does_not_change_their_weight() -> None:
    few, many = (
        LabelledExamples.concatenate([examples([0, 1, 2]), examples([0] * n, is_baseline=True)]).compute_weights()
        for n in (2, 200)
    )

    assert_allclose(few[3:].sum(), many[3:].sum())
    assert_allclose(few[:3], many[:3])


def test_the_digest_of_a_training_set_tells_baseline_windows_from_labelled_ones() -> None:
    assert examples([0, 1]).sha256() != examples([0, 1], is_baseline=True).sha256()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_run(tmp_path_factory.mktemp("baselines") / "run", World(days=1))
    write_splits(made, "held_out_host")
    write_splits(made, "deploy")
    return made


def test_baselines_of_a_held_out_host_are_never_learnt_from(run: Path) -> None:
    sets = load(run, "held_out_host", "host-0")
    assert sets.baseline is not None
    assert sets.idle is not None
    hosts = {e.host_id for part in (sets.train, sets.val_a, sets.val_b) for e in part.windows.episodes}

    assert {e.host_id for e in sets.baseline.windows.episodes} == hosts
    assert {e.host_id for e in sets.idle.windows.episodes} == {"host-0"}


def test_the_selection_model_sees_baselines_of_the_train_hosts_alone(run: Path) -> None:
    sets = load(run, "held_out_host", "host-0")
    first, final = sets.build_extra(sets.train), sets.build_extra(sets.train, sets.val_a, sets.val_b)
    assert first is not None
    assert final is not None
    assert sets.baseline is not None
    train_hosts = {e.host_id for e in sets.train.windows.episodes}
    own = sets.baseline.windows.mark_episodes(lambda e: e.host_id in train_hosts)

    assert 0 < len(first) == own.sum() < len(final) == len(sets.baseline)
    assert first.is_baseline is not None
    assert first.is_baseline.all()
    assert (first.y == 0).all()


def test_a_deployed_model_learns_from_the_baselines_of_every_host(run: Path) -> None:
    sets = load(run, "deploy", "all")
    assert sets.baseline is not None

    assert sets.idle is None
    assert {e.host_id for e in sets.baseline.windows.episodes} == {f"host-{i}" for i in range(4)}
