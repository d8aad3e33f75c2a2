"""Recording plans: their sessions, balance and order, and the score of elapsed time alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from phasewatch.errors import PlanError
from phasewatch.lab.plan import (
    MALICIOUS_PROFILES,
    RecordingSession,
    RecordingSlot,
    build_sessions,
    compute_slot_seed,
    list_plan_hosts,
    parse_plan,
)
from phasewatch.lab.plan_checks import check_plan, compute_window_phases, estimate_elapsed_time_f1
from phasewatch.lab.plans import list_plans, read_plan
from phasewatch.lab.qemu_command import HOST_SHAPES, find_host_shape
from phasewatch.profiles import PROFILES, TRANSITION_PROBABILITIES, find_sample_group
from phasewatch.types import PHASES, EpisodeRole, Phase, SampleKind

SMALL = """
name = "small"
seed = 3
lab_per_host = 8
[[hosts]]
host_id = "pc"
[[hosts]]
host_id = "smp2"
"""


@cache
def campaign() -> tuple[RecordingSession, ...]:
    return build_sessions(read_plan("lab-v1"))


def slots(*roles: EpisodeRole, of: tuple[RecordingSession, ...] | None = None) -> list[RecordingSlot]:
    return [
        slot for session in of or campaign() for slot in session.slots if slot.role in (roles or tuple(EpisodeRole))
    ]


# ── The campaign of the bundled corpus ────────────────────────────────────────────────────────────────────────────


def test_equal_plans_give_equal_sessions() -> None:
    assert build_sessions(read_plan("lab-v1")) == campaign()


def test_lab_v1_has_216_lab_episodes_on_six_hosts() -> None:
    hosts = Counter(slot.host_id for slot in slots(EpisodeRole.LAB))

    assert sum(hosts.values()) >= 216
    assert set(hosts) == {shape.host_id for shape in HOST_SHAPES}
    assert set(hosts.values()) == {36}


def test_every_profile_runs_on_every_host_except_one_pair() -> None:
    seen = {(slot.host_id, slot.profile) for slot in slots(EpisodeRole.LAB)}

    missing = {(shape.host_id, name) for shape in HOST_SHAPES for name in (*MALICIOUS_PROFILES, "benign")} - seen
    assert missing == {("microvm", "scan-and-dial")}


def test_samples_of_a_profile_are_recorded_equally_often() -> None:
    counts = Counter((slot.profile, slot.sample_name) for slot in slots(EpisodeRole.LAB))

    assert set(counts) == {(row.name, one.name) for row in PROFILES for one in row.samples if one.since == 1}
    for name in MALICIOUS_PROFILES:
        of_profile = [n for (profile, _), n in counts.items() if profile == name]
        assert max(of_profile) - min(of_profile) <= 2


def test_at_least_30_percent_are_benign_with_at_least_eight_loads() -> None:
    benign = [slot for slot in slots(EpisodeRole.LAB) if slot.profile == "benign"]

    assert len(benign) >= 0.3 * len(slots(EpisodeRole.LAB))
    assert len({slot.sample_name for slot in benign}) >= 8
    assert all(slot.phases == ((Phase.CLEAN, slot.duration_s),) and not slot.background for slot in benign)
    assert {slot.sample_kind for slot in benign} == {SampleKind.BENIGN}


def test_a_third_of_malicious_episodes_run_beside_a_load_of_their_group() -> None:
    malicious = [slot for slot in slots(EpisodeRole.LAB) if slot.profile != "benign"]
    busy = [slot for slot in malicious if slot.background]

    assert len(busy) == len(malicious) / 3
    assert all(find_sample_group("benign", slot.background) == slot.group for slot in busy)
    assert "idle" not in {slot.background for slot in busy}
    assert all(slot.background_knobs for slot in busy)
    for name in MALICIOUS_PROFILES:
        assert any(slot.profile == name for slot in busy)


def test_session_has_at_most_two_slots_of_one_host_and_one_sample_group() -> None:
    for session in campaign():
        assert 1 <= len(session.slots) <= (1 if find_host_shape(session.host_id).is_alone else 2)
        assert {slot.host_id for slot in session.slots} == {session.host_id}
        assert len({slot.group for slot in session.slots}) == 1
        assert len({slot.role for slot in session.slots}) == 1


def test_lab_sessions_are_pairs_where_possible() -> None:
    sizes = {len(s.slots) for s in campaign() if s.slots[0].role is EpisodeRole.LAB and s.host_id != "smp2"}

    assert sizes == {2}


def test_each_host_starts_with_known_clean_episodes() -> None:
    for shape in HOST_SHAPES:
        roles = [slot.role for slot in slots() if slot.host_id == shape.host_id]
        first = [slot for slot in slots() if slot.host_id == shape.host_id][:3]

        assert roles[:3] == [EpisodeRole.COMMISSION] * 3
        assert EpisodeRole.COMMISSION not in roles[3:]
        assert {(slot.profile, slot.sample_name, slot.agent, slot.duration_s) for slot in first} == {
            ("benign", "idle", False, 120.0)
        }


def test_each_host_has_four_soak_episodes_one_per_group_spread_over_the_plan() -> None:
    for shape in HOST_SHAPES:
        soak = [slot for slot in slots(EpisodeRole.SOAK) if slot.host_id == shape.host_id]

        assert sorted(slot.group for slot in soak) == [0, 1, 2, 3]
        assert {(slot.profile, slot.agent, slot.duration_s) for slot in soak} == {("benign", False, 600.0)}
    kinds = [session.slots[0].role for session in campaign()][18:]
    gaps = np.diff([at for at, role in enumerate(kinds) if role is EpisodeRole.SOAK])
    assert gaps.max() <= 8


def test_every_prefix_is_balanced_over_hosts_profiles_and_groups() -> None:
    lab = slots(EpisodeRole.LAB)
    whole = Counter(s.profile for s in lab)
    for end in range(30, len(lab), 10):
        begun = lab[:end]
        hosts, groups = Counter(s.host_id for s in begun), Counter(s.group for s in begun)
        profiles = Counter(s.profile for s in begun)

        assert max(hosts.values()) - min(hosts.values()) <= 3
        assert max(groups.values()) - min(groups.values()) <= 6
        assert all(abs(profiles[name] - end * n / len(lab)) <= 5 for name, n in whole.items())


def test_about_fifty_episodes_cover_every_pair_of_host_and_profile() -> None:
    begun = slots(EpisodeRole.LAB)[:54]  # a round: every profile on every host, and half as many benign ones

    pairs = Counter((slot.host_id, slot.profile) for slot in begun)
    assert sum(pairs[shape.host_id, name] > 0 for shape in HOST_SHAPES for name in MALICIOUS_PROFILES) == 35
    for shape in HOST_SHAPES:
        for name in (*MALICIOUS_PROFILES, "benign"):
            assert sum(n for (host, profile), n in pairs.items() if host != shape.host_id and profile == name) >= 2


# ── One slot ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_timeline_repeats() -> None:
    seeds = [slot.plan_seed for slot in slots()]
    walks = [slot.phases for slot in slots(EpisodeRole.LAB) if len(slot.phases) > 1]

    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(walks)) == len(walks)


def test_slot_seed_is_the_hash_of_plan_host_and_index() -> None:
    slot = slots()[40]

    assert slot.plan_seed == compute_slot_seed("lab-v1", 1, slot.host_id, slot.index)
    assert (
        len({compute_slot_seed("a", 1, "pc", 0), compute_slot_seed("a", 2, "pc", 0), compute_slot_seed("a", 1, "q", 0)})
        == 3
    )


def test_phases_follow_the_transitions_and_fill_the_episode() -> None:
    for slot in slots(EpisodeRole.LAB):
        phases = [phase for phase, _ in slot.phases]
        assert sum(seconds for _, seconds in slot.phases) == pytest.approx(slot.duration_s)
        assert 100 <= slot.duration_s <= 180
        if slot.profile != "benign":
            for one, other in pairwise(phases):
                assert other in {phase for phase, _ in TRANSITION_PROBABILITIES[one]}
            assert all(20 <= seconds <= 46 for _, seconds in slot.phases[:-1])


def test_episodes_start_in_any_phase() -> None:
    starts = Counter(slot.phases[0][0] for slot in slots(EpisodeRole.LAB) if slot.profile != "benign")

    assert set(starts) == set(PHASES)


def test_settling_agent_chatter_and_knobs_are_drawn_per_episode() -> None:
    lab = slots(EpisodeRole.LAB)

    assert all(40 <= slot.settle_s <= 80 and 6 <= slot.chatter_s <= 30 for slot in slots())
    assert 0.4 <= sum(slot.agent for slot in lab) / len(lab) <= 0.6
    assert len({slot.settle_s for slot in lab}) > 200
    by_sample = defaultdict(set)
    for slot in lab:
        by_sample[slot.profile, slot.sample_name].add(slot.knobs)
    assert all(len(knobs) > 1 for (_, name), knobs in by_sample.items() if name != "idle")


def test_agent_is_independent_of_profile_and_first_phase() -> None:
    lab = slots(EpisodeRole.LAB)
    for of in (lambda s: s.profile == "benign", lambda s: s.phases[0][0] is Phase.ACTIVE, lambda s: bool(s.background)):
        share = [np.mean([slot.agent for slot in lab if of(slot) is side]) for side in (True, False)]
        assert abs(share[0] - share[1]) < 0.25


# ── Resuming ──────────────────────────────────────────────────────────────────────────────────────────────────────


# ── The gate ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", list_plans())
def test_baselines_of_the_built_in_plans_are_within_their_limits(name: str) -> None:
    assert all(row.is_accepted for row in check_plan(read_plan(name)))


ONE_WAY = SMALL.replace("[[hosts]]", 'order = ["clean", "armed", "infecting", "active", "dormant"]\n[[hosts]]', 1)


def test_fixed_phase_order_is_refused_unless_forced() -> None:
    plan = parse_plan(ONE_WAY, where="p.toml")

    with pytest.raises(PlanError, match="--force"):
        check_plan(plan)
    assert check_plan(plan, force=True)[0].value > 0.45


def test_fixed_phase_order_is_kept() -> None:
    plan = parse_plan(ONE_WAY, where="p.toml")
    malicious = [s for s in slots(EpisodeRole.LAB, of=build_sessions(plan)) if s.profile != "benign"]

    assert all([phase for phase, _ in s.phases] == list(PHASES[: len(s.phases)]) for s in malicious)


def test_elapsed_time_score_is_deterministic() -> None:
    plan = parse_plan(SMALL, where="p.toml")

    assert estimate_elapsed_time_f1(plan, 5) == estimate_elapsed_time_f1(plan, 5) != estimate_elapsed_time_f1(plan, 6)


def test_window_has_its_longest_phase_and_ties_go_to_the_later() -> None:
    walk = ((Phase.CLEAN, 14.0), (Phase.ARMED, 1.0), (Phase.CLEAN, 5.0), (Phase.ACTIVE, 9.0))

    codes = compute_window_phases(walk)  # windows from 0, 5, 10, 15 s

    assert codes.tolist() == [0, 0, 0, 3]
    assert compute_window_phases(((Phase.CLEAN, 5.0), (Phase.ACTIVE, 5.0))).tolist() == [3]
    assert compute_window_phases(((Phase.ACTIVE, 5.0), (Phase.CLEAN, 5.0))).tolist() == [0]
    assert compute_window_phases(((Phase.CLEAN, 9.9),)).tolist() == []


# ── The file ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plan_file_is_read_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SMALL)

    plan = read_plan(str(tmp_path / "mine.toml"))

    assert (plan.name, plan.episode_s, plan.hosts[0].profiles) == ("small", (100.0, 180.0), ())
    assert {slot.host_id for slot in slots(of=build_sessions(plan))} == {"pc", "smp2"}


def test_smoke_plan_is_short() -> None:
    smoke = slots(of=build_sessions(read_plan("smoke")))

    assert {slot.host_id for slot in smoke} == {"pc", "q35-none", "microvm"}
    assert len(smoke) == 12
    assert all(slot.duration_s == 45 and slot.settle_s == 12 for slot in smoke)


def test_smoke_plan_has_two_episodes_of_each_profile_on_each_host() -> None:
    smoke = slots(of=build_sessions(read_plan("smoke")))

    assert set(Counter((slot.host_id, slot.profile) for slot in smoke).values()) == {2}


def test_unknown_plan_error_lists_the_built_in_plans() -> None:
    with pytest.raises(PlanError, match="lab-v1, lab-v2"):
        read_plan("lab-v9")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"pc"', '"cp"', "it is one of .*pc"),
        ('"pc"', '"smp2"', "none twice"),
        ('"pc"', '"pc"\nprofiles = ["cryptmine"]', "did you mean cryptomine"),
        ('"pc"', '"pc"\nprofiles = ["benign"]', "benign always runs"),
        ("seed = 3", "seed = 3\nphases = 7", "unknown field"),
        ("seed = 3", "", "missing required field"),
        ("seed = 3", 'seed = "x"', "Expected `int`"),
        ("seed = 3", "seed = ", "mine.toml"),
        ("seed = 3", "seed = " + "9" * 5000, "not TOML"),
        ("seed = 3", "seed = " + "[" * 5000, "not TOML"),
        ("seed = 3", "seed = 3\nepisode_s = [180, 100]", "episode_s"),
        ("seed = 3", "seed = 3\nphase_s = [0, 100]", "phase_s"),
        ("seed = 3", "seed = 3\nsoak_s = 3601", "soak_s"),
        ("seed = 3", "seed = 3\nagent_share = 1.5", "agent_share"),
        ("seed = 3", 'seed = 3\norder = ["unknown"]', "order"),
        ("lab_per_host = 8", "lab_per_host = -1", "lab_per_host"),
        ("lab_per_host = 8", "lab_per_host = 0\ncommission_per_host = 0\nsoak_per_host = 0", "nothing to record"),
        ('"small"', '"../small"', "name"),
    ],
)
def test_invalid_plan_is_refused_with_file_and_reason(old: str, new: str, words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        parse_plan(SMALL.replace(old, new, 1), where="mine.toml")

    assert str(caught.value).startswith("mine.toml: ")


def test_unknown_host_error_suggests_the_nearest() -> None:
    with pytest.raises(PlanError, match="microvm"):
        find_host_shape("mircovm")


def test_plan_may_have_no_lab_episodes() -> None:
    plan = parse_plan(SMALL.replace("lab_per_host = 8", "lab_per_host = 0"), where="p.toml")

    assert {slot.role for slot in slots(of=build_sessions(plan))} == {EpisodeRole.COMMISSION, EpisodeRole.SOAK}


# ── Drawn hosts ───────────────────────────────────────────────────────────────────────────────────────────────────

DRAWN = SMALL.partition("[[hosts]]")[0] + "parallel_vms = 6\n[drawn_hosts]\ncount = 4\nseed = 2\n"


def test_a_plan_of_drawn_hosts_records_every_one_of_them() -> None:
    plan = parse_plan(DRAWN, where="drawn")
    ids = [shape.host_id for shape, _ in list_plan_hosts(plan)]

    assert ids == ["v2-00-q35", "v2-01-q35", "v2-02-q35", "v2-03-microvm"]
    counts = Counter(slot.host_id for slot in slots(EpisodeRole.LAB, of=build_sessions(plan)))
    assert counts == dict.fromkeys(ids, 8)


def test_chosen_and_drawn_hosts_stand_in_one_plan() -> None:
    plan = parse_plan(DRAWN + '[[hosts]]\nhost_id = "pc"\n', where="both")

    assert [shape.host_id for shape, _ in list_plan_hosts(plan)][:2] == ["pc", "v2-00-q35"]


def test_more_drawn_hosts_change_no_episode_of_the_others() -> None:
    more = slots(of=build_sessions(parse_plan(DRAWN.replace("count = 4", "count = 8"), where="drawn")))
    seeds = {(slot.host_id, slot.index): slot.plan_seed for slot in more}

    for slot in slots(of=build_sessions(parse_plan(DRAWN, where="drawn"))):
        assert seeds[slot.host_id, slot.index] == slot.plan_seed


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("parallel_vms = 6", "parallel_vms = 7", "parallel_vms: 7, expected 1 to 6"),
        ("parallel_vms = 6", "parallel_vms = 0", "parallel_vms: 0"),
        ("parallel_vms = 6", "session_cores = 0.0", "session_cores: 0"),
        ("count = 4", "count = 0", "drawn_hosts: count 0"),
        ("seed = 2", "seed = -2", "drawn_hosts: seed -2"),
        ("seed = 2", 'seed = 2\nprofiles = ["benign"]', "v2-00-q35: expected malicious profiles"),
        ("seed = 2", 'seed = 2\nprofiles = ["cryptomin"]', "cryptomin"),
        ("[drawn_hosts]\ncount = 4\nseed = 2\n", "", "hosts: expected at least one"),
    ],
)
def test_plan_of_drawn_hosts_with_a_wrong_value_is_refused(old: str, new: str, says: str) -> None:
    assert old in DRAWN

    with pytest.raises(PlanError, match=says):
        parse_plan(DRAWN.replace(old, new), where="drawn")
