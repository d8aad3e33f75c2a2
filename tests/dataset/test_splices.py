"""Spliced episodes: what is put together, from which episodes, and how its windows are labelled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.factories.synthetic_runs import World, write_run

from phasewatch.artifacts import RunEpisode
from phasewatch.binning.storage import BinIndexRow, open_bins, write_bins
from phasewatch.channels import CHANNELS, LEVEL_CHANNELS
from phasewatch.dataset import SplicedEpisode, SpliceKind, build_spliced_examples, build_splices, load, write_splits
from phasewatch.features.inputs import compute_inputs
from phasewatch.features.tables import write_feature_tables
from phasewatch.features.windows import compute_window_starts, label_windows
from phasewatch.models.base import InputKind, InputSpec, InputVariant
from phasewatch.splits import SplitPart
from phasewatch.types import BIN_NS, PHASES, BundleStatus, EpisodeOrigin, EpisodeRole, Phase, SampleKind

T0 = 1_700_000_000_000_000_000
# Each episode's bins hold its own number, so that a splice shows where every bin comes from.
EPISODES = {
    1: ("h1", "benign", "compile", EpisodeRole.LAB, 240, [("clean", 0, 240)]),
    2: ("h1", "benign", "idle", EpisodeRole.LAB, 240, [("clean", 0, 240)]),
    3: ("h1", "cryptomine", "s", EpisodeRole.LAB, 240, [("clean", 0, 60), ("active", 60, 130), ("dormant", 130, 240)]),
    4: ("h1", "cryptomine", "s", EpisodeRole.LAB, 240, [("clean", 0, 100), ("active", 100, 125), ("clean", 125, 240)]),
    5: ("h2", "exfil-drip", "s", EpisodeRole.LAB, 240, [("clean", 0, 60), ("active", 60, 200), ("clean", 200, 240)]),
    6: ("h2", "benign", "backup", EpisodeRole.LAB, 240, [("clean", 0, 240)]),
    7: ("h1", "benign", "idle", EpisodeRole.COMMISSION, 240, [("clean", 0, 240)]),
    8: ("h1", "benign", "idle", EpisodeRole.COMMISSION, 240, [("clean", 0, 240)]),
    9: ("h1", "benign", "idle", EpisodeRole.COMMISSION, 240, [("clean", 0, 240)]),
}
LEFT_OUT = 9  # its bins are there, the feature table has it not


def episode(number: int) -> RunEpisode:
    host, profile, sample, role, *_ = EPISODES[number]
    return RunEpisode(
        episode_id=f"e{number}", host_id=host, profile=profile, sample_name=sample, sample_kind=SampleKind.EMULATED,
        origin=EpisodeOrigin.SIMULATED, role=role, session=f"s{number}", agent=False, plan_seed=0, proc_sketch=(),
        started_wall_ns=T0, duration_s=120.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with write_bins(folder / "grids") as writer:
        for number in sorted(EPISODES, key=lambda number: (EPISODES[number][0], number)):
            host, profile, sample, role, n, spans = EPISODES[number]
            row = BinIndexRow(
                episode_id=f"e{number}", host_id=host, offset=0, n_bins=n, t0_ns=T0 + number, profile=profile,
                sample_name=sample, sample_kind=SampleKind.EMULATED, origin=EpisodeOrigin.SIMULATED, role=role,
                session=f"s{number}", agent=False, arch="x86_64", accel="tcg", flagged=(),
                spans=tuple((Phase(p), T0 + number + a * BIN_NS, T0 + number + b * BIN_NS) for p, a, b in spans),
            )  # fmt: skip
            steps = np.arange(n, dtype=np.float32)[:, None] / 1024
            writer.add(
                row,
                np.float32(number) + steps + np.zeros((n, len(CHANNELS)), np.float32),
                np.zeros((n, len(LEVEL_CHANNELS)), np.float32),
            )
    statuses = {
        (of[0], f"e{number}"): BundleStatus.REJECTED if number == LEFT_OUT else BundleStatus.ACCEPTED
        for number, of in EPISODES.items()
    }
    write_feature_tables(folder, open_bins(folder / "grids"), statuses)
    return folder


def sources_of(splice: SplicedEpisode) -> np.ndarray:
    """Return the episode number and place of each bin, ``(n, 2)``."""
    number = np.floor(splice.bins[:, 0]).astype(int)
    return np.stack([number, np.rint((splice.bins[:, 0] - number) * 1024).astype(int)], axis=1)


def find(splices: tuple[SplicedEpisode, ...], kind: SpliceKind, number: int) -> SplicedEpisode:
    return next(s for s in splices if s.kind is kind and s.source.episode_id == f"e{number}")


def test_each_episode_gives_the_splices_that_it_can(run: Path) -> None:
    made = build_splices(run, [episode(number) for number in EPISODES])

    assert [(str(s.kind), s.source.episode_id) for s in made] == [
        ("short_load", "e1"),
        ("long_activity", "e3"),  # e2 has no load, the active phase of e4 is too short
        ("short_activity", "e3"),
        ("long_activity", "e5"),  # h2 has no baseline, and so no idle time
    ]


def test_a_short_load_is_20_to_45_s_of_the_load_between_idle_time_of_its_host(run: Path) -> None:
    splice = find(build_splices(run, [episode(1)]), SpliceKind.SHORT_LOAD, 1)
    number, place = sources_of(splice).T

    load = np.flatnonzero(number == 1)
    assert 40 <= len(load) <= 90
    assert np.array_equal(load, np.arange(load[0], load[-1] + 1))
    assert (np.diff(place[load]) == 1).all()
    assert 50 <= load[0] <= 100
    assert 30 <= len(number) - load[-1] - 1 <= 60
    assert set(number.tolist()) - {1} <= {7, 8}  # baselines of the same host that the feature table has
    assert {span.phase for span in splice.spans} == {Phase.CLEAN}


def test_long_activity_repeats_one_active_phase_for_two_minutes(run: Path) -> None:
    splice = find(build_splices(run, [episode(3)]), SpliceKind.LONG_ACTIVITY, 3)
    number, place = sources_of(splice).T

    assert len(splice.bins) == 240
    assert set(number.tolist()) == {3}
    assert place[:68].tolist() == list(range(62, 130))  # without the first second
    assert np.array_equal(place[68:136], place[:68])
    assert [(span.phase, span.start_ns, span.end_ns) for span in splice.spans] == [(Phase.ACTIVE, 0, 240 * BIN_NS)]


def test_short_activity_has_clean_time_on_both_sides_and_windows_labelled_by_majority(run: Path) -> None:
    splice = find(build_splices(run, [episode(3)]), SpliceKind.SHORT_ACTIVITY, 3)
    number, place = sources_of(splice).T
    active = np.flatnonzero(number == 3)
    labels = label_windows(splice.spans, compute_window_starts(0, (len(number) - 20) // 10 + 1)).phase

    assert place[active].tolist() == list(range(62, 130))
    assert [span.phase for span in splice.spans] == [Phase.CLEAN, Phase.ACTIVE, Phase.CLEAN]
    held = [np.count_nonzero(number[10 * j : 10 * j + 20] == 3) for j in range(len(labels))]
    sure = [(h, label) for h, label in zip(held, labels.tolist(), strict=True) if h != 10]
    assert all((PHASES[label] is Phase.ACTIVE) == (h > 10) for h, label in sure)


def test_splices_depend_on_the_episode_alone(run: Path) -> None:
    every = build_splices(run, [episode(number) for number in EPISODES])
    alone = build_splices(run, [episode(3)])

    assert [s.bins.tobytes() for s in alone] == [s.bins.tobytes() for s in every if s.source.episode_id == "e3"]


@pytest.mark.parametrize(("kind", "table"), [("table", "raw"), ("table", "context"), ("tensor", "context")])
def test_examples_are_the_inputs_and_labels_of_every_window(run: Path, kind: str, table: str) -> None:
    names = ("proc.vcpu_run.mean", "ratio.net_out_size") if kind == "table" else ("proc.vcpu_run",)
    spec = InputSpec(
        kind=InputKind(kind),
        names=names,
        mask="m",
        schema_hash="s",
        behaviour_fingerprint="b",
        table=InputVariant(table),
    )
    splices = build_splices(run, [episode(3)])
    found = build_spliced_examples(splices, spec)

    assert np.array_equal(found.inputs.x, np.concatenate([compute_inputs(s.bins, spec) for s in splices]))
    assert len(found) == len(found.y)
    assert set(found.y.tolist()) == {Phase.CLEAN.code, Phase.ACTIVE.code}
    assert found.inputs.spec == spec
    assert len(build_spliced_examples((), spec)) == 0


@pytest.mark.parametrize("kind", ["table", "tensor"])
def test_training_with_context_gets_the_splices_of_its_train_episodes_alone(tmp_path: Path, kind: str) -> None:
    made = write_run(tmp_path / "run", World(windows=8, days=1))
    write_splits(made, "held_out_host")
    sets = load(made, "held_out_host", "host-0", kind=kind, table="context")
    own = build_splices(made, sets.train.windows.episodes)

    assert own
    assert sets.extra is not None
    expected = build_spliced_examples(own, sets.train.inputs.spec)
    assert sets.extra.sha256() == expected.sha256()
    assert {s.source.episode_id for s in own} <= set(sets.fold.ids(SplitPart.TRAIN))
    assert load(made, "held_out_host", "host-0", kind=kind).extra is None


def test_windows_dealt_at_random_get_no_splices(tmp_path: Path) -> None:
    made = write_run(tmp_path / "run", World(windows=8, days=1))
    write_splits(made, "random_windows")

    assert load(made, "random_windows", "fold-0", table="context").extra is None
