"""Simulated stores: deterministic, in the format of recorded ones, with faults that the ground truth lists."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pytest

from phasewatch.bundle.archive import unpack_bundle
from phasewatch.bundle.container import decompress_frame
from phasewatch.bundle.model import Episode
from phasewatch.bundle.problems import FINDING_CODES, find_severity
from phasewatch.errors import BundleError, StoreError, UsageError
from phasewatch.profiles import PROFILES
from phasewatch.simulate import SimulationSettings, simulate
from phasewatch.simulate.episodes import SimulatedCampaign, draw_episode, draw_session_specs, iter_sessions
from phasewatch.simulate.faults import DUPLICATE_FAULT, FAULTS, FaultSpec, flip_bit
from phasewatch.simulate.generator import ACTIVE_BY_PROFILE, BUSY_LOADS, build_named_rng
from phasewatch.simulate.store import GroundTruthRow, pack_faulty_draft
from phasewatch.store.local import DiskStore
from phasewatch.types import BundleStatus, EpisodeOrigin, EpisodeRole, Phase, SampleKind, SourceKind
from phasewatch.validate.sweep import sweep

SHORT = (100.0, 104.0)


def episodes_of(store: Path) -> list[Episode]:
    disk = DiskStore(store)
    return [unpack_bundle(disk.read(item), file=item.path) for item in disk.walk()]


def files_of(store: Path) -> dict[str, str]:
    return {
        str(p.relative_to(store)): sha256(p.read_bytes()).hexdigest() for p in sorted(store.rglob("*")) if p.is_file()
    }


def truths_of(store: Path) -> list[GroundTruthRow]:
    lines = store.with_name(store.name + ".truth.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=GroundTruthRow) for line in lines]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("simulated") / "store", hosts=3, episodes=80, seed=1, between_s=SHORT).store


def test_every_bundle_is_readable_and_has_a_receipt(store: Path) -> None:
    disk = DiskStore(store)
    items = list(disk.walk())

    assert len(items) == 80
    for item in items:
        data = disk.read(item)
        manifest = unpack_bundle(data, file=item.path).manifest
        assert (manifest.host.host_id, manifest.episode_id) == (item.host_id, item.episode_id)
        assert item.receipt == sha256(data).hexdigest()


def test_simulated_episodes_are_marked_as_simulated(store: Path) -> None:
    assert {e.manifest.origin for e in episodes_of(store)} == {EpisodeOrigin.SIMULATED}


def test_equal_seeds_give_equal_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    one = simulate(tmp_path / "a", hosts=2, episodes=10, seed=5, faults=0.4, between_s=SHORT)
    two = simulate(tmp_path / "b", hosts=2, episodes=10, seed=5, faults=0.4, between_s=SHORT, workers=2)

    assert files_of(one.store) == files_of(two.store)
    assert one.truth.read_bytes() == two.truth.read_bytes()


def test_different_seeds_give_different_telemetry(tmp_path: Path) -> None:
    a = simulate(tmp_path / "a", hosts=1, episodes=2, seed=1, between_s=SHORT).store
    b = simulate(tmp_path / "b", hosts=1, episodes=2, seed=2, between_s=SHORT).store

    assert not set(files_of(a).values()) & set(files_of(b).values())


def test_telemetry_repeats_only_in_duplicate_faults(store: Path) -> None:
    digests = [sha256(e.rows[SourceKind.PROC].columns[0].tobytes()).hexdigest() for e in episodes_of(store)]

    assert len(set(digests)) == len(digests)


def test_simulated_campaign_has_roles_sessions_and_shares_of_a_recorded_one(store: Path) -> None:
    manifests = [e.manifest for e in episodes_of(store)]
    lab = [m for m in manifests if m.role is EpisodeRole.LAB]
    benign = sum(m.sample_kind is SampleKind.BENIGN for m in lab) / len(lab)

    assert {m.role for m in manifests} == set(EpisodeRole)
    assert all(m.profile == "benign" and not m.agent for m in manifests if m.role is not EpisodeRole.LAB)
    assert 0.15 < benign < 0.5
    assert 0.3 < sum(m.agent for m in lab) / len(lab) < 0.7
    assert {SourceKind.GUEST in e.rows for e in episodes_of(store) if not e.manifest.agent} == {False}


def test_episodes_of_a_session_are_neighbours_of_one_sample_group(store: Path) -> None:
    by_session: dict[str, list[object]] = {}
    places = {(p.name, s.name): i % 4 for p in PROFILES for i, s in enumerate(p.samples) if s.since == 1}
    for m in (e.manifest for e in episodes_of(store)):
        by_session.setdefault(m.session, []).append(m)
    for pair in by_session.values():
        a, b = pair if len(pair) == 2 else (pair[0], None)
        assert a.neighbours == ((b.episode_id,) if b else ())  # type: ignore[attr-defined]
        if b and a.role is EpisodeRole.LAB and b.role is EpisodeRole.LAB:  # type: ignore[attr-defined]
            assert places[a.profile, a.sample_name] == places[b.profile, b.sample_name]  # type: ignore[attr-defined]


def test_every_profile_and_sample_can_be_simulated() -> None:
    malicious = {p.name for p in PROFILES if p.kind is SampleKind.EMULATED}
    kinds = {s.name for p in PROFILES if p.kind is SampleKind.BENIGN for s in p.samples if s.since == 1}

    assert set(ACTIVE_BY_PROFILE) == malicious
    assert {name for name, _ in BUSY_LOADS} == kinds - {"idle"}


def test_active_cryptomining_uses_more_cpu_than_clean(store: Path) -> None:
    seen: dict[Phase, list[float]] = {phase: [] for phase in Phase}
    for episode in episodes_of(store):
        if episode.manifest.profile != "cryptomine":
            continue
        rows = episode.rows[SourceKind.PROC]
        cores = np.diff(rows.columns[rows.fields.index("vcpu_run_ns")]) / np.diff(rows.t_mono_ns)
        for a, b in zip(episode.marks, episode.marks[1:], strict=False):
            inside = (rows.t_wall_ns[1:] > a.t_wall_ns) & (rows.t_wall_ns[1:] <= b.t_wall_ns)
            seen[a.phase or Phase.UNKNOWN].append(float(cores[inside].mean()))

    assert np.median(seen[Phase.ACTIVE]) > 2 * np.median(seen[Phase.CLEAN])


def test_host_effect_and_drift_follow_the_settings() -> None:
    campaign = SimulatedCampaign(
        hosts=2, episodes=4, seed=0, settings=SimulationSettings(host_effect=0.0, drift_per_week=0.0)
    )
    plain = {slot.machine.factors for s in iter_sessions(campaign) for slot in draw_session_specs(campaign, s)}
    varied = SimulatedCampaign(hosts=2, episodes=4, seed=0)

    assert plain == {(1.0,) * len(next(iter(plain)))}
    assert len({slot.machine.factors for s in iter_sessions(varied) for slot in draw_session_specs(varied, s)}) == 2


def spoilt(fault: FaultSpec, seed: int = 3) -> tuple[bytes, str]:
    campaign = SimulatedCampaign(hosts=1, episodes=2, seed=seed, between_s=SHORT)
    slot = draw_session_specs(campaign, next(iter(iter_sessions(campaign))))[0]
    rng = build_named_rng("fault", fault.name, seed)
    return pack_faulty_draft(rng, draw_episode(build_named_rng("episode", seed), slot, campaign.settings), fault)[
        1
    ], slot.episode_id


@pytest.mark.parametrize("fault", [f for f in FAULTS if f is not DUPLICATE_FAULT], ids=lambda f: f.name)
def test_fault_is_detected_as_the_ground_truth_says(fault: FaultSpec) -> None:
    data, episode_id = spoilt(fault)
    by_reader = [reason for reason in fault.reasons if reason in FINDING_CODES]

    if by_reader:
        with pytest.raises(BundleError) as refused:
            unpack_bundle(data, file="x")
        assert refused.value.code == by_reader[0]
        assert find_severity(refused.value.code) is fault.status
    else:
        assert (unpack_bundle(data, file="x").manifest.episode_id == episode_id) is (fault.name != "foreign-identity")


def reads(data: bytes) -> bool:
    try:
        decompress_frame(data, file="x")
    except BundleError:
        return False
    return True


# A frame in which the decoder never looks at bit 5 of byte 74 (padding of its entropy coding).
PADDED = bytes.fromhex(
    "28b52ffd247835020002c70e0bb0b50d26dd420de78c59046c297b34696c3a4d45985b02e96e0eaa7c46"
    "53666129997149c739b3b7c41b883aa6099d0c9e15a0b8d7ad6acd450c020059034a210866ea6525a0"
)


def test_flipped_bit_is_detectable() -> None:
    assert reads(PADDED)
    assert reads(PADDED[:74] + bytes([PADDED[74] ^ 1 << 5]) + PADDED[75:])
    draws = [74, 5, 75, 0]

    class Scripted(np.random.Generator):
        def integers(self, *_: object, **__: object) -> int:  # type: ignore[override]
            return draws.pop(0)

    spoilt = flip_bit(Scripted(np.random.PCG64(0)), PADDED)

    assert not reads(spoilt)
    assert draws == []


def test_faulty_share_matches_and_the_ground_truth_lists_each(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", hosts=2, episodes=60, seed=2, faults=0.5, between_s=SHORT)
    truths = truths_of(made.store)
    there = {item.path for item in DiskStore(made.store).walk()}

    assert made.episodes == len(truths) == 60
    assert 15 < made.faulty == sum(bool(t.fault) for t in truths) < 45
    assert {t.path for t in truths} == there
    assert all((t.status is BundleStatus.ACCEPTED) == (not t.fault) == (not t.reasons) for t in truths)
    assert len(Counter(t.fault for t in truths)) > 10


# Further reasons that a fault causes: without proc, contention is unknown; the rows beside a gap may be mostly null.
FOLLOWS = {"rows:proc": ("contention-unknown",), "silence:qmp": ("nulls:qmp",)}


def test_validation_result_matches_the_ground_truth(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", hosts=2, episodes=120, seed=4, faults=0.8, between_s=SHORT)

    swept = sweep(made.store, tmp_path / "run", workers=1)

    said = {v.path: (v.status, set(v.reasons)) for v in swept.verdicts}
    truths = {t.path: (t.status, set(t.reasons)) for t in truths_of(made.store)}
    assert {path: status for path, (status, _) in said.items()} == {
        path: status for path, (status, _) in truths.items()
    }
    for path, (_, reasons) in said.items():
        planted = truths[path][1]
        assert planted <= reasons
        assert reasons - planted <= {code for cause in planted for code in FOLLOWS.get(cause, ())}


def test_large_host_effect_gives_valid_bundles(tmp_path: Path) -> None:
    far = SimulationSettings(host_effect=3.0, episode_effect=3.0)
    made = simulate(tmp_path / "s", hosts=4, episodes=16, seed=0, between_s=SHORT, settings=far)

    swept = sweep(made.store, tmp_path / "run", workers=1)

    assert {v.status for v in swept.verdicts} == {t.status for t in truths_of(made.store)} == {BundleStatus.ACCEPTED}


def test_only_chosen_kinds_of_fault_are_injected(tmp_path: Path) -> None:
    made = simulate(
        tmp_path / "s",
        hosts=2,
        episodes=40,
        seed=4,
        faults=0.8,
        between_s=SHORT,
        kinds=("duplicate", "missing-netflow"),
    )

    assert {truth.fault for truth in truths_of(made.store)} == {"", "duplicate", "missing-netflow"}


def test_no_duplicate_is_injected_without_an_earlier_episode(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", hosts=1, episodes=4, seed=4, faults=1.0, between_s=SHORT, kinds=("duplicate",))

    assert [truth.fault for truth in truths_of(made.store)] == ["", "duplicate"] * 2


def test_unknown_fault_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no fault 'gaps'; did you mean gap"):
        simulate(tmp_path / "s", hosts=1, episodes=2, seed=0, kinds=("gaps",))


def test_episode_effect_follows_the_settings(tmp_path: Path) -> None:
    def spread(effect: float) -> float:
        settings = SimulationSettings(host_effect=0.0, drift_per_week=0.0, episode_effect=effect)
        made = simulate(tmp_path / str(effect), hosts=1, episodes=16, seed=1, between_s=SHORT, settings=settings)
        idle = [e for e in episodes_of(made.store) if e.manifest.sample_name == "idle"]
        busy = [e.rows[SourceKind.PROC] for e in idle]
        ratio = [np.ptp(rows.columns[8]) / np.ptp(rows.t_mono_ns) for rows in busy]  # aux_run_ns
        return float(np.std(np.log(ratio)))

    assert spread(1.0) > 3 * spread(0.0)


@pytest.mark.soak
def test_five_thousand_bundles_are_distinct_and_validate_as_expected(
    tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    began_s = time.perf_counter()
    made = simulate(tmp_path / "s", hosts=10, episodes=5_000, seed=9, faults=0.3, workers=2, between_s=(180.0, 180.0))
    took_s = time.perf_counter() - began_s

    swept = sweep(made.store, tmp_path / "run", workers=2)

    # What is said of an accepted bundle is a note: an idle machine's card may stay silent for two minutes.
    said = {
        v.path: (v.status, set(v.reasons) if v.status is not BundleStatus.ACCEPTED else set()) for v in swept.verdicts
    }
    truths = truths_of(made.store)
    assert said == {t.path: (t.status, set(t.reasons)) for t in truths}
    soak_row(
        "Simulated bundles of 180 s, judged as the truth file says",
        bundles=len(said),
        **{
            "made, 1/s": round(len(said) / took_s),
            "with a fault": sum(bool(t.reasons) for t in truths),
            "judged otherwise": 0,
        },
    )


def test_existing_store_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").touch()

    with pytest.raises(StoreError, match="something is already there"):
        simulate(tmp_path / "s", hosts=1, episodes=1, seed=0)


def test_store_may_be_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s").mkdir()
    monkeypatch.chdir(tmp_path / "s")

    made = simulate(Path(), hosts=1, episodes=1, seed=0, between_s=(10.0, 10.0))

    assert made.truth == tmp_path / "s.truth.jsonl"
    assert made.truth.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"hosts": 0}, "--hosts 0"),
        ({"hosts": 5}, "--hosts 5 --episodes 2: at least one host"),
        ({"faults": 1.5}, "--faults 1.5: a share"),
        ({"between_s": (0.5, 2.0)}, "--seconds 0.5 2: the shortest"),
        ({"between_s": (59.0, 80.0), "faults": 0.5}, "--faults 0.5 --seconds 59 80: .* 60 s or more"),
        ({"days": math.nan}, "--days nan"),
        ({"days": 1e9}, r"--days 1e\+09: 0 to 36500"),
        ({"days": 3650.0}, "--drift 0.05 --days 3650: a host would drift by 26.1, at most 3"),
        ({"settings": SimulationSettings(tick_noise=math.inf)}, "--noise inf: 0 to 3"),
        ({"settings": SimulationSettings(malware_intensity=math.nan)}, "--malware-intensity nan: 0 to 100"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, numbers: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        simulate(tmp_path / "s", **{"hosts": 1, "episodes": 2, "seed": 0, **numbers})  # type: ignore[arg-type]
