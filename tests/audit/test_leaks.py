"""What a corpus must not give away: each leak, planted, is found; a corpus without one is not accused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tools.datasheet_tables import compute_separations

from phasewatch.audit.checks import CheckOutcome
from phasewatch.audit.leakage import LeakageResult, LeakageWindows, probe_leakage, render_leakage
from phasewatch.audit.run import check_leakage
from phasewatch.simulate import simulate
from phasewatch.types import Phase
from phasewatch.validate.sweep import sweep

EPISODES, LONG, HOSTS = 24, 20, 3
NAMES = ("proc.vcpu_wait.mean", "proc.vcpu_wait.std", "a", "b", "c")


def corpus(seed: int = 0) -> LeakageWindows:
    """Return 24 episodes of 20 windows in sessions of two on three hosts, whose features say nothing at all."""
    rng = np.random.default_rng(seed)
    n = EPISODES * LONG
    of = np.repeat(np.arange(EPISODES), LONG)
    session = np.arange(EPISODES) // 2
    t_s = np.tile(5.0 * np.arange(LONG) + 5.0, EPISODES)
    is_idle = np.arange(EPISODES) % 4 == 0
    return LeakageWindows(
        x=rng.standard_normal((n, len(NAMES))).astype(np.float32),
        levels=rng.standard_normal((n, 3)).astype(np.float32),
        y=np.where(is_idle[of], 0, rng.integers(0, 5, n)),
        t_s=t_s,
        t_ns=(session[of] * 10**12 + t_s * 1e9).astype(np.int64),
        episode_index=of,
        names=NAMES,
        host=np.array([f"host-{s % HOSTS}" for s in session]),
        session=np.array([f"s{s:02d}" for s in session]),
        profile=np.where(is_idle, "benign", np.where(np.arange(EPISODES) % 4 == 1, "miner", "worm")),
        role=np.full(EPISODES, "lab"),
        is_idle=is_idle,
        length_s=rng.uniform(100, 180, EPISODES),
    )


def leak_of(windows: LeakageWindows, name: str) -> LeakageResult:
    (leak,) = probe_leakage(windows, only=(name,))
    assert leak.name == name
    return leak


def with_feature(windows: LeakageWindows, place: int, values: np.ndarray) -> LeakageWindows:
    x = windows.x.copy()
    x[:, place] = values
    return replace(windows, x=x)


def test_a_corpus_that_gives_nothing_away_is_not_accused() -> None:
    leaks = {leak.name: leak for leak in probe_leakage(corpus())}

    assert not [leak.name for leak in leaks.values() if leak.exceeds_limit]
    assert leaks["phase-from-elapsed-time"].value < 0.30
    assert abs(leaks["elapsed-time-from-idle"].value) < 0.2
    assert abs(leaks["neighbour-from-wait"].value - leaks["neighbour-from-wait"].chance) < 0.1  # type: ignore[operator]
    assert "suspects" not in leaks["elapsed-time-from-idle"].words


def test_how_late_it_is_does_not_hang_on_the_order_of_the_episodes() -> None:
    windows = corpus(1)
    aging = with_feature(windows, 2, windows.t_s + 40 * windows.x[:, 3])
    values = []
    for seed in range(4):
        renamed = np.random.default_rng(seed).permutation(EPISODES)
        back = np.argsort(renamed)
        order = np.argsort(renamed[aging.episode_index], kind="stable")
        rows = {name: getattr(aging, name)[order] for name in ("x", "levels", "y", "t_s", "t_ns")}
        episodes = {
            name: getattr(aging, name)[back] for name in ("host", "session", "profile", "role", "is_idle", "length_s")
        }
        values.append(
            leak_of(
                replace(aging, **rows, **episodes, episode_index=renamed[aging.episode_index][order]),
                "elapsed-time-from-idle",
            ).value
        )

    assert values[0] > 0.3
    assert max(values) - min(values) < 0.005


def test_what_is_later_than_any_lab_episode_hides_no_leak() -> None:
    windows = corpus()
    aging = with_feature(windows, 2, windows.t_s)
    is_soak = aging.episode_index == 0
    soak = replace(
        aging,
        t_s=np.where(is_soak, 30 * aging.t_s, aging.t_s),
        role=np.where(np.arange(EPISODES) == 0, "soak", aging.role),
        length_s=np.where(np.arange(EPISODES) == 0, 3000.0, aging.length_s),
    )

    leak = leak_of(soak, "elapsed-time-from-idle")

    assert leak.words.startswith("101 windows of 6 idle episodes")
    assert leak.value > 0.85


def test_a_fixed_order_of_phases_is_told_by_the_clock() -> None:
    windows = corpus()
    scripted = replace(windows, y=np.minimum(windows.t_s // 25, 4).astype(np.int64))

    leak = leak_of(scripted, "phase-from-elapsed-time")

    assert leak.value > 0.9
    assert leak.exceeds_limit


def test_a_total_that_grows_with_the_phase_is_found_among_the_levels() -> None:
    windows = corpus()
    levels = windows.levels.copy()
    levels[:, 1] += 10 * windows.y

    assert leak_of(replace(windows, levels=levels), "phase-from-levels").value > 0.9
    assert leak_of(windows, "phase-from-levels").value < 0.35


def test_a_feature_that_decays_while_nothing_happens_names_itself() -> None:
    windows = corpus()
    aging = with_feature(windows, 3, -windows.t_s / 10 + windows.x[:, 3])

    leak = leak_of(aging, "elapsed-time-from-idle")

    assert leak.value > 0.8
    assert "suspects, by rank correlation within episodes: b -0.9" in leak.words


def test_what_only_the_first_step_gives_away_is_gone_from_the_later_windows() -> None:
    windows = corpus()
    first = with_feature(windows, 3, np.where(windows.t_s <= 10, 50.0, windows.x[:, 3]))

    assert leak_of(first, "elapsed-time-from-idle").value > 0.25
    assert abs(leak_of(first, "elapsed-time-from-idle-later").value) < 0.2


def test_one_feature_that_is_a_clock_or_a_name_tag_breaks_the_limit() -> None:
    windows = corpus()
    tag = np.unique(windows.host, return_inverse=True)[1][windows.episode_index].astype(np.float32)
    clock, named = with_feature(windows, 2, windows.t_s), with_feature(windows, 4, tag)

    assert leak_of(clock, "elapsed-time-from-one-feature").exceeds_limit
    assert "the strongest of 5 is a" in leak_of(clock, "elapsed-time-from-one-feature").words
    assert leak_of(named, "host-from-one-feature").exceeds_limit
    assert leak_of(named, "host-from-features").value > 0.95
    assert "the strongest of 5 is c" in leak_of(named, "host-from-one-feature").words


def test_a_value_that_one_host_lacks_is_a_name_tag_too() -> None:
    windows = corpus()
    lacks = with_feature(windows, 4, np.where(windows.host[windows.episode_index] == "host-1", np.nan, windows.x[:, 4]))

    assert 0.55 < leak_of(lacks, "host-from-one-feature").value < 0.95


def test_lengths_that_go_with_the_profile_are_seen() -> None:
    windows = corpus()
    tied = replace(windows, length_s=windows.length_s + 100 * (windows.profile == "worm"))

    assert leak_of(tied, "length-against-profile").exceeds_limit


def test_a_wait_that_shows_the_neighbour_s_work_is_seen() -> None:
    windows = corpus()
    other = windows.episode_index ^ 1
    beside = windows.y.reshape(EPISODES, LONG)[other, np.tile(np.arange(LONG), EPISODES)]

    leak = leak_of(with_feature(windows, 0, 3.0 * beside + windows.x[:, 0] / 10), "neighbour-from-wait")

    assert leak.value > 0.9
    assert leak.chance is not None
    assert leak.chance < 0.35


def test_the_area_against_clean_is_scikit_learn_s() -> None:
    from sklearn.metrics import roc_auc_score

    windows = corpus()
    shifted = with_feature(windows, 0, windows.x[:, 0] + 0.5 * (windows.y == 3))
    found = {each.phase: each for each in compute_separations(shifted)}
    rows = np.isin(shifted.y, (0, 3))

    name, area = found[Phase.ACTIVE].best[0]

    assert name == "proc.vcpu_wait"
    assert area == pytest.approx(roc_auc_score(shifted.y[rows] == 3, shifted.x[rows, 0]))
    assert found[Phase.ACTIVE].windows == int((shifted.y == 3).sum())


def test_too_small_a_corpus_is_said_to_be_too_small() -> None:
    windows = corpus()
    few = windows.episode_index < 2
    small = replace(
        windows, x=windows.x[few], levels=windows.levels[few], y=windows.y[few], t_s=windows.t_s[few],
        t_ns=windows.t_ns[few], episode_index=windows.episode_index[few],
        **{name: getattr(windows, name)[:2] for name in ("host", "session", "profile", "role", "is_idle", "length_s")},
    )  # fmt: skip
    leaks = probe_leakage(small)

    assert all(np.isnan(leak.value) and leak.words.startswith("not asked: ") for leak in leaks)
    assert not any(leak.exceeds_limit for leak in leaks)
    assert {row[1] for row in render_leakage(leaks)} == {"—"}


@pytest.mark.slow
def test_an_audit_asks_a_swept_run_and_keeps_the_figures(tmp_path: Path) -> None:
    store = simulate(tmp_path / "s", hosts=3, episodes=36, seed=2, between_s=(100.0, 110.0)).store
    sweep(store, tmp_path / "run", workers=1)

    checks = {check.name: check for check in check_leakage(tmp_path / "run")}

    assert checks["leak-phase-from-elapsed-time"].fate is CheckOutcome.KEPT
    assert "macro-F1" in checks["leak-phase-from-elapsed-time"].words
    assert {check.fate for check in checks.values()} <= {CheckOutcome.KEPT, CheckOutcome.UNTESTED}


def test_a_run_without_grids_is_untested(tmp_path: Path) -> None:
    (check,) = check_leakage(tmp_path)

    assert check.fate is CheckOutcome.UNTESTED
