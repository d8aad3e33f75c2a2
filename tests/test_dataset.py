"""What a run's files become: windows in a fixed order, under a mask, in the sets of a fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.factories.synthetic_runs import World, edit_features, write_run

from phasewatch import profiles
from phasewatch.artifacts import FeatureSchema, RunEpisode, SchemaDigests
from phasewatch.binning.storage import open_bins
from phasewatch.channels import BASE_CHANNELS, CHANNELS, LEVEL_CHANNELS
from phasewatch.dataset import (
    load,
    read_fold,
    read_folds,
    read_recipe_results,
    read_split_episodes,
    read_windows,
    write_all_splits,
    write_splits,
)
from phasewatch.dataset.loader import build_input_spec, find_calibration_soak, read_baselines
from phasewatch.dataset.sets import EpisodeWindows
from phasewatch.dataset.split_files import compute_sample_group
from phasewatch.dataset.tensors import compute_episode_inputs
from phasewatch.errors import RunError, UsageError
from phasewatch.features.context import CONTEXT_FEATURES
from phasewatch.features.derived import DERIVED_FEATURES
from phasewatch.features.inputs import compute_inputs
from phasewatch.features.schema import list_column_channels
from phasewatch.features.tables import write_feature_tables
from phasewatch.models.base import InputKind, InputVariant
from phasewatch.splits import SPLIT_RECIPES, SplitPart
from phasewatch.types import PHASES, BundleStatus, EpisodeOrigin, EpisodeRole, SampleKind


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = write_run(tmp_path / "run", World(windows=8))
    write_splits(made, "held_out_host")
    return made


def test_the_sets_of_a_fold_are_those_of_its_split(run: Path) -> None:
    sets = load(run, "held_out_host", "host-0")

    for part, data in (
        (SplitPart.TRAIN, sets.train),
        (SplitPart.VAL_A, sets.val_a),
        (SplitPart.VAL_B, sets.val_b),
        (SplitPart.TEST, sets.test),
    ):
        assert {e.episode_id for e in data.windows.episodes} == set(sets.fold.ids(part))
        assert len(data) == 8 * len(sets.fold.ids(part)) == len(data.x) == len(data.y) == len(data.groups)
    assert {e.role for e in sets.soak.windows.episodes} == {EpisodeRole.SOAK}


def test_realistic_holds_the_host_side_channels_alone_and_oracle_all(run: Path) -> None:
    names = load(run, "held_out_host", "host-0", "realistic").train.names
    trusted = {c.full_name for c in BASE_CHANNELS if c.in_deployment}

    assert len(names) == 5 * len(trusted) + len(DERIVED_FEATURES)
    assert {channel for n in names for channel in list_column_channels(n)} == trusted
    assert load(run, "held_out_host", "host-0", "oracle").train.x.shape[1] == 5 * len(BASE_CHANNELS) + len(
        DERIVED_FEATURES
    )


def test_values_labels_and_gaps_are_those_of_the_file(run: Path) -> None:
    data = read_windows(run, "realistic", InputKind.TABLE)
    table = pq.read_table(run / "features_window_v2.parquet")

    assert data.x.dtype == np.float32
    assert data.x.tobytes() == np.column_stack([table[n].to_numpy() for n in data.names]).tobytes()
    assert data.y.tolist() == table["phase"].to_pylist()
    assert np.isnan(data.x).any()


def test_elapsed_time_is_one_column(run: Path) -> None:
    data = load(run, "held_out_host", "host-0", kind="elapsed").test

    assert data.names == ("t_center_s",)
    assert data.x[:8, 0].tolist() == [5, 10, 15, 20, 25, 30, 35, 40]


def test_groups_name_host_and_session(run: Path) -> None:
    assert set(load(run, "held_out_host", "host-1").test.groups) == {f"host-1/h1s{s}" for s in range(6)}


def test_the_order_of_the_file_changes_nothing(run: Path) -> None:
    before = load(run, "held_out_host", "host-0").train
    order = np.random.default_rng(0).permutation(pq.read_metadata(run / "features_window_v2.parquet").num_rows)
    edit_features(run, lambda t: t.take(pa.array(order)))
    after = load(run, "held_out_host", "host-0").train

    assert after.x.tobytes() == before.x.tobytes()
    assert after.windows.t_center_ns.tobytes() == before.windows.t_center_ns.tobytes()
    assert after.windows.episodes == before.windows.episodes


def test_windows_of_unknown_phase_are_in_no_set(run: Path) -> None:
    def hide(table: pa.Table) -> pa.Table:
        phase = table["phase"].to_numpy().copy()
        phase[:3] = -1
        return table.set_column(table.schema.get_field_index("phase"), "phase", pa.array(phase))

    n = len(read_windows(run, "realistic", InputKind.TABLE))
    edit_features(run, hide)

    assert len(read_windows(run, "realistic", InputKind.TABLE)) == n - 3


def test_splitting_again_removes_the_folds_of_hosts_that_are_gone(run: Path) -> None:
    edit_features(run, lambda t: t.filter(pa.compute.not_equal(t["host_id"], "host-3")))
    write_splits(run, "held_out_host")

    assert [f.fold for f in read_folds(run, "held_out_host")] == ["host-0", "host-1", "host-2"]


def test_an_episode_without_windows_is_in_no_split(run: Path) -> None:
    gone = read_split_episodes(run)[0].episode_id
    edit_features(run, lambda t: t.filter(pa.compute.not_equal(t["episode_id"], gone)))

    assert gone not in {e.episode_id for e in read_split_episodes(run)}


def test_a_sample_that_is_not_registered_has_a_group_all_the_same() -> None:
    assert compute_sample_group("cryptomine", profiles.find_profile("cryptomine").samples[1].name) == 1
    assert compute_sample_group("real-malware", "a") == compute_sample_group("real-malware", "a")
    assert {compute_sample_group("real-malware", str(i)) for i in range(40)} == {0, 1, 2, 3}


def test_an_absent_fold_is_answered_with_those_that_there_are(run: Path) -> None:
    with pytest.raises(RunError, match="the run has held_out_host-host-0, "):
        read_fold(run, "held_out_host", "host-9")
    with pytest.raises(RunError, match="absent"):
        read_fold(run, "held_out_host", "../../x")


def test_absent_files_and_columns_are_named_with_the_remedy(run: Path, tmp_path: Path) -> None:
    edit_features(run, lambda t: t.drop_columns(["purity"]))
    with pytest.raises(RunError, match=r"lacks column purity .* `phasewatch features`"):
        load(run, "held_out_host", "host-0")
    with pytest.raises(RunError, match=r"features_window_v2\.parquet: absent; make it with `phasewatch features`"):
        read_split_episodes(tmp_path)


def test_features_of_another_sweep_are_refused(run: Path) -> None:
    verdicts = pq.read_table(run / "validation_v1.parquet")
    pq.write_table(verdicts.slice(1), run / "validation_v1.parquet")

    with pytest.raises(RunError, match=r"e0000 has windows in .* different sweeps"):
        read_windows(run, "realistic", InputKind.TABLE)


@pytest.mark.parametrize(
    ("threat", "kind", "words"),
    [
        pytest.param("realistc", "table", "did you mean realistic", id="threat model"),
        pytest.param("realistic", "tables", "no input kind 'tables'", id="kind"),
    ],
)
def test_an_unknown_name_is_a_usage_error(run: Path, threat: str, kind: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(run, "held_out_host", "host-0", threat, kind)


def test_recipe_that_cannot_be_built_does_not_stop_the_others(tmp_path: Path) -> None:
    run = write_run(tmp_path / "two", World(hosts=2, windows=8))
    built = {b.recipe: b for b in write_all_splits(run, [row.name for row in SPLIT_RECIPES]).recipes}

    assert built["held_out_host"].folds == ("host-0", "host-1")
    assert "record on 3 hosts or more" in built["in_distribution"].why
    assert tuple(built.values()) == read_recipe_results(run)
    assert not list((run / "splits").glob("in_distribution-*"))


def test_cutting_one_recipe_cuts_those_that_are_there_anew(run: Path) -> None:
    edit_features(run, lambda t: t.filter(pa.compute.not_equal(t["host_id"], "host-3")))
    built = write_all_splits(run, ["deploy"]).recipes

    assert [(b.recipe, len(b.folds)) for b in built] == [("held_out_host", 3), ("deploy", 1)]


def test_random_windows_share_the_windows_of_one_episode_out_and_each_is_tested_once(run: Path) -> None:
    folds = write_splits(run, "random_windows")
    sets = [load(run, "random_windows", fold.fold) for fold in folds]
    tested = [
        (w.episodes[i].episode_id, int(t))
        for w in (s.test.windows for s in sets)
        for i, t in zip(w.episode_index, w.t_center_ns, strict=True)
    ]

    assert len(tested) == len(set(tested)) == sum(map(len, (sets[0].train, sets[0].val_a, sets[0].val_b, sets[0].test)))
    assert {e.episode_id for e in sets[0].train.windows.episodes} & {
        e.episode_id for e in sets[0].test.windows.episodes
    }
    assert {e.role for e in sets[0].train.windows.episodes} == {EpisodeRole.LAB}


def test_context_is_computed_from_the_bins_of_the_episode_up_to_each_window(run: Path) -> None:
    data = read_windows(run, "realistic", InputKind.TABLE, table=InputVariant.CONTEXT)
    bins = open_bins(run / "grids")
    rows = {row.episode_id: row for row in bins.rows}

    assert "netflow.in_bytes.max@120s" in data.names
    assert "burst.cpu_share@60s" in data.names
    for number in (0, len(data.windows.episodes) - 1):
        own = data.windows.episode_index == number
        row = rows[data.windows.episodes[number].episode_id]
        expected = compute_inputs(np.asarray(bins.episode_bins(row)), data.inputs.spec)
        assert np.array_equal(data.x[own], expected, equal_nan=True)


def test_context_of_a_real_table_has_the_same_bits_in_its_own_columns(tmp_path: Path) -> None:
    """The table's columns and those computed from the bins are one computation."""
    run = write_run(tmp_path / "run", World(windows=8, hosts=2))
    statuses = {(row.host_id, row.episode_id): BundleStatus.ACCEPTED for row in open_bins(run / "grids").rows}
    write_feature_tables(run, open_bins(run / "grids"), statuses)
    raw = read_windows(run, "realistic", InputKind.TABLE)
    data = read_windows(run, "realistic", InputKind.TABLE, table=InputVariant.CONTEXT)

    assert data.names[: len(raw.names)] == raw.names
    assert len(data.names) == len(raw.names) + len(CONTEXT_FEATURES)
    assert data.x[:, : len(raw.names)].tobytes() == raw.x.tobytes()
    assert np.array_equal(data.y, raw.y)


def test_inputs_that_were_kept_are_those_of_the_bins_and_not_of_the_place(run: Path) -> None:
    spec = read_windows(run, "realistic", InputKind.TABLE, table=InputVariant.CONTEXT).inputs.spec
    bins = np.random.default_rng(0).random((60, len(CHANNELS))).astype(np.float32)
    first = compute_episode_inputs(bins, spec).copy()
    bins[3, :] += 1.0

    for _ in range(2):
        assert np.array_equal(compute_episode_inputs(bins, spec), compute_inputs(bins, spec))
        assert not compute_episode_inputs(bins, spec).flags.writeable
    assert not np.array_equal(compute_episode_inputs(bins, spec), first)
    assert len(compute_episode_inputs(bins, spec, 2)) == 21


def test_context_of_a_tensor_is_two_minutes_that_end_with_the_window(run: Path) -> None:
    raw = read_windows(run, "realistic", InputKind.TENSOR)
    data = read_windows(run, "realistic", InputKind.TENSOR, table=InputVariant.CONTEXT)

    assert data.x.shape == (len(raw), len(raw.names), 240)
    assert np.array_equal(data.x[:, :, -20:], raw.x, equal_nan=True)
    first = np.flatnonzero(np.diff(data.windows.episode_index, prepend=-1))
    assert np.array_equal(data.x[first][:, :, :220], np.repeat(raw.x[first][:, :, :1], 220, axis=2), equal_nan=True)


@pytest.mark.parametrize("kind", ["table", "tensor"])
def test_channels_are_scaled_by_the_baseline_of_their_host(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "days", World(windows=8, days=2))
    write_splits(run, "held_out_host")
    raw, seen = (load(run, "held_out_host", "host-0", kind=kind, table=table) for table in ("raw", "commissioned"))
    spec = seen.test.inputs.spec
    bins = open_bins(run / "grids")
    at = [c.full_name for c in CHANNELS].index("proc.cpu_user")
    day = np.concatenate(
        [bins.episode_bins(r)[:, at] for r in bins.rows if (r.host_id, r.role) == ("host-0", EpisodeRole.COMMISSION)]
    )
    low, median, high = np.nanpercentile(day.astype(float), [25, 50, 75])
    i = raw.test.names.index("proc.cpu_user" if kind == "tensor" else "proc.cpu_user.mean")

    assert spec.table is InputVariant.COMMISSIONED
    assert dict(spec.floors).keys() >= {"proc.cpu_user"}
    expected = (raw.test.x[:, i].astype(float) - median) / max(high - low, dict(spec.floors)["proc.cpu_user"])
    np.testing.assert_allclose(seen.test.x[:, i], expected, rtol=1e-5)
    assert not (seen.test.windows.flags & 8).any()


def test_host_without_a_baseline_is_flagged_and_keeps_its_zero(run: Path) -> None:
    seen = load(run, "held_out_host", "host-0", table="commissioned")
    raw = load(run, "held_out_host", "host-0")
    floors = np.repeat([v for _, v in seen.test.inputs.spec.floors], 5)

    assert (seen.test.windows.flags & 8).all()
    assert seen.test.names == raw.test.names[: len(floors)]  # a ratio of channels has no baseline
    np.testing.assert_allclose(seen.test.x, raw.test.x[:, : len(floors)] / floors, rtol=1e-5)


def test_baseline_episode_outside_the_feature_table_is_ignored(tmp_path: Path) -> None:
    """As `features --no-include-degraded` leaves it: the grids have a degraded day, the feature table has not."""
    run = write_run(tmp_path / "days", World(windows=8, days=2))
    days = sorted(
        r.episode_id for r in open_bins(run / "grids").rows if (r.host_id, r.role) == ("host-0", "commission")
    )
    both = read_baselines(run, ("proc.cpu_user",))["host-0"]
    edit_features(run, lambda t: t.filter(pc.not_equal(t["episode_id"], days[1])))

    one = read_baselines(run, ("proc.cpu_user",))["host-0"]

    assert len(days) == 2
    assert one.bins == both.bins / 2


def test_poisoning_the_test_host_changes_no_scale(tmp_path: Path) -> None:
    run = write_run(tmp_path / "days", World(windows=8, days=1))
    write_splits(run, "held_out_host")
    before = load(run, "held_out_host", "host-0", table="commissioned")
    bins = np.load(run / "grids" / "grids.npy")
    for row in open_bins(run / "grids").rows:
        if row.host_id == "host-0":
            bins[row.offset : row.offset + row.n_bins] = 1e9
    np.save(run / "grids" / "grids.npy", bins)
    after = load(run, "held_out_host", "host-0", table="commissioned")

    assert after.train.inputs.spec == before.train.inputs.spec
    assert after.train.x.tobytes() == before.train.x.tobytes()


@pytest.mark.parametrize(
    ("threat", "kind", "table", "words"),
    [
        pytest.param("oracle", "table", "commissioned", "which the guest reports", id="the guest may lie"),
        pytest.param("realistic", "elapsed", "context", "has no table context", id="no past of time"),
        pytest.param("realistic", "table", "contexts", "no table 'contexts'", id="unknown"),
    ],
)
def test_input_variant_that_a_model_cannot_use_is_a_usage_error(
    run: Path, threat: str, kind: str, table: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        load(run, "held_out_host", "host-0", threat, kind, table)


def test_baselines_see_levels_or_the_host_alone(run: Path) -> None:
    levels = load(run, "held_out_host", "host-0", kind="levels").test
    hosts = load(run, "held_out_host", "host-0", kind="host")

    assert levels.names == tuple(c.full_name for c in LEVEL_CHANNELS)
    assert (levels.x == 0).all()  # the made-up run's levels
    assert len(np.unique(hosts.train.x)) == 2
    assert not set(np.unique(hosts.train.x)) & set(np.unique(hosts.test.x))


def test_load_baseline_sees_whether_a_load_runs_and_unknown_where_the_index_does_not_say(run: Path) -> None:
    path = run / "validation_v1.parquet"
    index = pq.read_table(path)
    unknown = load(run, "held_out_host", "host-0", kind="load").train
    names = index.column_names
    table = index if "background" not in names else index.drop_columns(["background"])
    loads = ["compile" if i % 2 else "" for i in range(len(index))]
    pq.write_table(table.append_column("background", pa.array(loads)), path)
    known = load(run, "held_out_host", "host-0", kind="load").train

    is_malicious = np.array([e.profile != "benign" for e in known.windows.episodes])[known.windows.episode_index]
    assert set(unknown.x[is_malicious, 0].tolist()) == {2.0}
    assert set(known.x[is_malicious, 0].tolist()) == {0.0, 1.0}
    codes = np.array([float(bool(e.has_load)) for e in known.windows.episodes])[known.windows.episode_index]
    assert known.x[:, 0].tolist() == codes.tolist()


def test_duration_baseline_sees_the_cpu_use_of_the_episode_so_far(run: Path) -> None:
    data = load(run, "held_out_host", "host-0", kind="duration").test
    bins = read_windows(run, "realistic", InputKind.TENSOR, only={e.episode_id for e in data.windows.episodes})
    lab = bins.take(bins.windows.mark_episodes(lambda e: e.role is EpisodeRole.LAB))
    cpu = np.nanmean(lab.x[:, lab.names.index("proc.vcpu_run")], axis=1)

    for first in np.flatnonzero(np.r_[True, np.diff(data.windows.episode_index) != 0]):
        for j in range(8):
            np.testing.assert_allclose(data.x[first + j, : j + 1], cpu[first : first + j + 1][::-1], rtol=1e-5)
            assert np.isnan(data.x[first + j, j + 1 :]).all()


def test_idle_windows_are_baseline_episodes_of_the_hosts_that_only_the_test_set_has(tmp_path: Path) -> None:
    run = write_run(tmp_path / "days", World(windows=8, days=2))
    write_splits(run, "held_out_host")
    held_out = load(run, "held_out_host", "host-0").idle

    assert held_out is not None
    assert {(e.role, e.host_id) for e in held_out.windows.episodes} == {(EpisodeRole.COMMISSION, "host-0")}
    write_splits(run, "in_distribution")
    fold = read_folds(run, "in_distribution")[0].fold
    assert load(run, "in_distribution", fold).idle is None
    assert load(run, "held_out_host", "host-0", kind="elapsed").idle is None
    assert load(run, "held_out_host", "host-0", table="commissioned").idle is None


def test_deploy_has_no_test_window(run: Path) -> None:
    write_splits(run, "deploy")
    sets = load(run, "deploy", "all")

    assert len(sets.test) == 0
    assert len(sets.train) > 0
    assert len(sets.soak) > 0


def one_window_each(*who: tuple[str, int]) -> EpisodeWindows:
    """Windows of benign episodes, each of a host and of a sample group."""
    samples = profiles.find_profile("benign").samples
    n = len(who)
    return EpisodeWindows(
        episodes=tuple(
            RunEpisode(
                episode_id=f"e{i}",
                host_id=host,
                profile="benign",
                sample_name=samples[group].name,
                sample_kind=SampleKind.BENIGN,
                origin=EpisodeOrigin.SIMULATED,
                role=EpisodeRole.SOAK,
                session=f"s{i}",
                agent=False,
                plan_seed=i,
                proc_sketch=(),
                started_wall_ns=i,
                duration_s=10.0,
            )
            for i, (host, group) in enumerate(who)
        ),
        episode_index=np.arange(n, dtype=np.int32),
        t_center_ns=np.zeros(n, np.int64),
        t_center_s=np.zeros(n, np.float32),
        purity=np.ones(n, np.float32),
        flags=np.zeros(n, np.uint8),
        y=np.zeros(n, np.int64),
    )


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("held_out_host", [False, False, True, True]),
        ("held_out_sample", [False, True, False, True]),
        ("held_out_both", [False, False, False, True]),
        ("in_distribution", [True, True, True, True]),
    ],
)
def test_the_soak_that_sets_a_threshold_is_of_nothing_that_the_recipe_holds_out(
    recipe: str, expected: list[bool]
) -> None:
    soak = one_window_each(("pc", 0), ("pc", 1), ("q35", 0), ("q35", 1))

    assert find_calibration_soak(recipe, one_window_each(("pc", 0)), soak).tolist() == expected


def test_a_run_of_a_version_without_extended_channels_has_its_base_sets_alone() -> None:
    old = FeatureSchema(
        phases=PHASES,
        feature_names=tuple(f"{c.full_name}.mean" for c in BASE_CHANNELS),
        schema_hash="s",
        behaviour_fingerprint="b",
    )

    spec = build_input_spec(old, "realistic", InputKind.TABLE)

    assert (len(spec.names), spec.schema_hash, spec.behaviour_fingerprint) == (35, "s", "b")
    with pytest.raises(UsageError, match="an earlier version made it"):
        build_input_spec(old, "extended", InputKind.TABLE)


def test_an_input_has_the_digests_of_the_groups_of_its_channel_set() -> None:
    base = SchemaDigests(schema_hash="base s", behaviour_fingerprint="base b")
    names = tuple(f"{c.full_name}.mean" for c in CHANNELS)
    schema = FeatureSchema(phases=PHASES, feature_names=names, schema_hash="s", behaviour_fingerprint="b", base=base)

    digests = {name: build_input_spec(schema, name, InputKind.TABLE).schema_hash for name in ("oracle", "extended")}

    assert digests == {"oracle": "base s", "extended": "s"}
