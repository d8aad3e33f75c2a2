"""The phase filter: what it believes, that it looks back only, and that step by step is the same bits as whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewatch.metrics import log_loss
from phasewatch.models.smoothing import KAPPAS, LabelSequence, PhaseFilter, fit_filter
from phasewatch.types import STRIDE_NS

RNG = np.random.default_rng(0)


def track(lengths: tuple[int, ...], seed: int = 0, stay: float = 0.8) -> LabelSequence:
    """Episodes of these many windows whose phase stays for a while."""
    rng = np.random.default_rng(seed)
    y = []
    for n in lengths:
        phase = int(rng.integers(5))
        for _ in range(n):
            phase = phase if rng.random() < stay else int(rng.integers(5))
            y.append(phase)
    of = np.repeat(np.arange(len(lengths)), lengths)
    t = np.concatenate([STRIDE_NS * (1 + np.arange(n)) + i * 10**12 for i, n in enumerate(lengths)]).astype(np.int64)
    return LabelSequence(y=np.array(y), episode_index=of, t_center_ns=t)


def guesses(truth: LabelSequence, right: float = 0.6, seed: int = 1) -> np.ndarray:
    """Probabilities of a model that puts `right` on the truth on average."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(5) * 0.5, len(truth.y)) * (1 - right)
    p[np.arange(len(p)), truth.y] += right
    return p / p.sum(axis=1, keepdims=True)


def fitted(kappa: float | None = None) -> PhaseFilter:
    train, val = track((30,) * 20), track((30,) * 8, seed=5)
    found = fit_filter(train, val, guesses(val))
    if kappa is None:
        return found
    return PhaseFilter(transitions=found.transitions, prior=found.prior, kappa=kappa)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    kappa=st.sampled_from((0.0, *KAPPAS)),
)
def test_stepwise_filter_has_the_bits_of_the_batch_filter(seed: int, lengths: list[int], kappa: float) -> None:
    filter_ = fitted(kappa)
    truth = track(tuple(lengths), seed=seed)
    keep = np.random.default_rng(seed).random(len(truth.y)) < 0.8  # with windows missing
    keep[np.r_[True, truth.episode_index[1:] != truth.episode_index[:-1]]] = True
    p, of, t = guesses(truth, seed=seed)[keep], truth.episode_index[keep], truth.t_center_ns[keep]
    belief = None
    told = []
    for i in range(len(p)):
        new = not i or of[i] != of[i - 1]
        strides = 1 if new else int((t[i] - t[i - 1]) // STRIDE_NS)
        belief = filter_.step(None if new else belief, p[i], strides=strides)
        told.append(belief)

    assert np.array(told).tobytes() == filter_.run(p, of, t).tobytes()


def test_belief_ignores_later_windows() -> None:
    truth = track((40,))
    p = guesses(truth)
    before = fitted().run(p, truth.episode_index, truth.t_center_ns)
    p[20:] = 0.2
    after = fitted().run(p, truth.episode_index, truth.t_center_ns)

    assert before[:20].tobytes() == after[:20].tobytes()
    assert not np.allclose(before[20:], after[20:])


def test_filter_is_the_forward_algorithm_of_a_hidden_markov_model() -> None:
    filter_, truth = fitted(1.0), track((25,))
    p = guesses(truth)
    moves, emission = np.array(filter_.transitions), p / np.array(filter_.prior)
    alpha = np.full(5, 0.2) * emission[0]
    expected = [alpha / alpha.sum()]
    for row in emission[1:]:
        alpha = (expected[-1] @ moves) * row
        expected.append(alpha / alpha.sum())

    assert filter_.run(p, truth.episode_index, truth.t_center_ns) == pytest.approx(np.array(expected), rel=1e-9)


def test_transitions_are_add_one_counts_of_consecutive_windows() -> None:
    y = np.array([0, 0, 1, 2, 2, 0])
    times = np.array([1, 2, 3, 5, 6, 1]) * STRIDE_NS  # 1 → 2 is not consecutive, and the last is another episode
    train = LabelSequence(y=y, episode_index=np.array([0, 0, 0, 0, 0, 1]), t_center_ns=times)
    moves = np.array(fit_filter(train, train, np.full((6, 5), 0.2)).transitions)

    assert moves[0].tolist() == [2 / 7, 2 / 7, 1 / 7, 1 / 7, 1 / 7]
    assert moves[2].tolist() == [1 / 6, 1 / 6, 2 / 6, 1 / 6, 1 / 6]
    assert moves[1].tolist() == [0.2] * 5


def test_kappa_has_the_smallest_log_loss_on_validation_b() -> None:
    train, val = track((30,) * 20), track((30,) * 8, seed=5)
    p = guesses(val)
    chosen = fit_filter(train, val, p)
    losses = {k: log_loss(fitted(k).run(p, val.episode_index, val.t_center_ns), val.y) for k in KAPPAS}

    assert chosen.kappa == min(losses, key=losses.__getitem__)


def test_filter_improves_a_noisy_model() -> None:
    truth = track((30,) * 30, seed=9, stay=0.95)
    train = track((30,) * 30, seed=8, stay=0.95)
    p = guesses(truth, right=0.3)
    filter_ = fit_filter(train, truth, p)
    told = filter_.run(p, truth.episode_index, truth.t_center_ns)

    assert (told.argmax(axis=1) == truth.y).mean() > (p.argmax(axis=1) == truth.y).mean() + 0.05


def test_filter_without_observations_ignores_the_probabilities() -> None:
    truth = track((20, 20))
    told = fitted().without_observations().run(guesses(truth), truth.episode_index, truth.t_center_ns)

    assert told[0].tolist() == [0.2] * 5
    assert told[:20].tobytes() == told[20:].tobytes()


def test_phase_with_prior_zero_has_belief_zero() -> None:
    truth = track((20,) * 4)
    p = guesses(truth)
    p[:, 3] = 0.0
    filter_ = fit_filter(track((30,) * 10), truth, p / p.sum(axis=1, keepdims=True))

    assert filter_.prior[3] == 0.0
    assert (filter_.run(p, truth.episode_index, truth.t_center_ns)[:, 3] == 0.0).all()


def test_filter_recovers_from_a_confident_wrong_window() -> None:
    told = fitted(1.0).run(np.eye(5)[[0, 0, 0, 2, 2, 2, 2, 2]], np.zeros(8, int), np.arange(8) * STRIDE_NS)

    assert np.isfinite(told).all()
    assert told[-1].argmax() == 2


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"kappa": 2.0}, id="kappa"),
        pytest.param({"prior": (0.0,) * 5}, id="no prior"),
        pytest.param({"prior": (float("nan"),) * 5}, id="prior not a number"),
        pytest.param({"transitions": ((0.5,) * 5,) * 5}, id="rows that do not sum to 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    right = {"transitions": ((0.2,) * 5,) * 5, "prior": (0.2,) * 5, "kappa": 0.5}

    with pytest.raises(ValueError, match=r"phase filter: "):
        PhaseFilter(**{**right, **wrong})  # type: ignore[arg-type]
