"""The plan of laboratory version 2: old plans stay as they were, loads and durations tell nothing, breadth is first."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tests.factories.vms import session_of, slot_of

from phasewatch.errors import PlanError, UsageError
from phasewatch.lab.plan import RecordingSession, RecordingSlot, build_sessions, list_plan_hosts, parse_plan
from phasewatch.lab.plan_checks import check_plan, compute_auc, compute_plan_baselines, refuse_leaky_plan
from phasewatch.lab.plans import read_plan
from phasewatch.lab.walks import LoadSpan, list_load_kinds
from phasewatch.profiles import (
    IDLE_SAMPLES,
    PROFILES,
    ROUTINES,
    TRANSITION_PROBABILITIES,
    find_profile,
    find_sample,
    find_sample_group,
)
from phasewatch.types import BENIGN_PROFILE, EpisodeRole, Phase

SECOND = """
name = "second"
seed = 3
workloads = 2
lab_per_host = 12
commission_per_host = 0
soak_per_host = 0
episode_s = [120, 480]
phase_s = [10, 300]
[[hosts]]
host_id = "pc"
[[hosts]]
host_id = "q35-none"
"""


@cache
def campaign() -> tuple[RecordingSession, ...]:
    return build_sessions(read_plan("lab-v2"))


def slots(role: EpisodeRole = EpisodeRole.LAB) -> list[RecordingSlot]:
    return [slot for session in campaign() for slot in session.slots if slot.role is role]


def malicious() -> list[RecordingSlot]:
    return [slot for slot in slots() if slot.profile != BENIGN_PROFILE]


def benign() -> list[RecordingSlot]:
    return [slot for slot in slots() if slot.profile == BENIGN_PROFILE]


# ── Old plans ─────────────────────────────────────────────────────────────────────────────────────────────────────


def compute_slot_digest(plan: str) -> str:
    digest = hashlib.sha256()
    for session in build_sessions(read_plan(plan)):
        for slot in session.slots:
            row = [session.session, slot.index, slot.host_id, str(slot.role), slot.profile, slot.sample_name]
            row += [str(slot.sample_kind), slot.plan_seed, slot.agent, slot.settle_s, slot.duration_s]
            row += [[(str(phase), seconds) for phase, seconds in slot.phases], slot.knobs, slot.background]
            row += [slot.background_knobs, slot.chatter_s]
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("plan", "digest"),
    [
        ("lab-v1", "fbedc1224e7ad2a1621d02583b5619a8ddd02038a468001b4083af892bd47a63"),
        ("smoke", "ba29017d1f5184379dac97e18050a93a53e436ab10212fe7b36cedd8d5f02e58"),
    ],
)
def test_plans_of_version_1_draw_the_same_slots_as_before(plan: str, digest: str) -> None:
    assert compute_slot_digest(plan) == digest


def test_slots_of_version_1_have_one_load_at_most_and_the_fixed_network() -> None:
    for session in build_sessions(read_plan("lab-v1")):
        for slot in session.slots:
            assert [(span.start_s, span.end_s) for span in slot.loads] in ([], [(0.0, slot.duration_s)])
            assert (slot.routine, slot.addresses, slot.cold) == ("", (), 0.0)


# ── The campaign ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_campaign_has_the_roles_of_the_design() -> None:
    hosts = [shape.host_id for shape, _ in list_plan_hosts(read_plan("lab-v2"))]

    assert len(hosts) >= 16
    assert len(slots()) >= 240
    assert Counter(slot.host_id for slot in slots(EpisodeRole.COMMISSION)) == dict.fromkeys(hosts, 3)
    assert sum(slot.duration_s for slot in slots(EpisodeRole.SOAK)) >= 30 * 3600


def test_at_least_a_hundred_episodes_have_an_infection() -> None:
    assert sum(any(phase is Phase.INFECTING for phase, _ in slot.phases) for slot in slots()) >= 100


def test_every_sample_is_recorded_once_to_three_times() -> None:
    counts = Counter((slot.profile, slot.sample_name) for slot in malicious())

    known = {(row.name, one.name) for row in PROFILES[:-1] for one in row.samples if "busybox" in one.images}
    assert known <= set(counts)
    assert max(counts.values()) <= 3


def test_every_benign_kind_runs_in_the_lab_and_in_the_soak() -> None:
    known = {one.name for one in find_profile(BENIGN_PROFILE).samples if "busybox" in one.images} - set(IDLE_SAMPLES)
    for role in (EpisodeRole.LAB, EpisodeRole.SOAK):
        assert known <= {kind for slot in slots(role) for kind in list_load_kinds(slot.loads)}


def test_half_of_the_episodes_run_loads_whatever_their_profile() -> None:
    for some in (malicious(), benign()):
        share = np.mean([bool(list_load_kinds(slot.loads)) for slot in some])
        assert share == pytest.approx(0.5, abs=0.04)


def test_loads_fill_the_episode_and_belong_to_its_sample_group() -> None:
    for slot in [*slots(), *slots(EpisodeRole.SOAK)]:
        ends = [0.0, *(span.end_s for span in slot.loads)]
        assert [span.start_s for span in slot.loads] == ends[:-1]
        assert ends[-1] == slot.duration_s
        assert {find_sample_group(BENIGN_PROFILE, span.kind) for span in slot.loads} == {slot.group}


def test_benign_episodes_are_named_after_their_first_load_or_their_idle_form() -> None:
    for slot in benign():
        assert slot.sample_name == [*list_load_kinds(slot.loads), IDLE_SAMPLES[slot.group]][0]
        assert slot.phases == ((Phase.CLEAN, slot.duration_s),)


def test_benign_walks_visit_several_kinds() -> None:
    walks = [list_load_kinds(slot.loads) for slot in benign() if list_load_kinds(slot.loads)]

    assert np.mean([len(kinds) for kinds in walks]) > 1.5


def test_most_loads_work_on_the_disk_as_real_programs_do() -> None:
    for some in (malicious(), benign(), slots(EpisodeRole.SOAK)):
        spans = [span for slot in some for span in slot.loads if not span.is_idle]
        weights = [find_sample(BENIGN_PROFILE, span.kind).weight for span in spans]
        lengths = np.array([span.end_s - span.start_s for span in spans])

        assert lengths[np.array(weights) > 1].sum() > lengths.sum() / 2


def test_a_quarter_of_benign_time_is_idle() -> None:
    idle_s = sum(span.end_s - span.start_s for slot in benign() for span in slot.loads if span.is_idle)

    assert idle_s >= sum(slot.duration_s for slot in benign()) / 4


def test_no_episode_ends_within_30_s_of_an_onset() -> None:
    for slot in malicious():
        at_s = 0.0
        for phase, seconds in slot.phases:
            assert phase is not Phase.INFECTING or slot.duration_s - at_s >= 30.0
            at_s += seconds


def test_phases_and_episodes_have_the_lengths_of_the_design() -> None:
    lengths = [seconds for slot in malicious() for _, seconds in slot.phases[:-1]]

    assert all(120 <= slot.duration_s <= 480 for slot in slots())
    assert min(lengths) >= 10
    assert max(lengths) <= 300
    assert np.median(lengths) < 80  # log-uniform: half of them last less than the geometric mean of the limits
    for slot in malicious():
        for (one, _), (other, _) in zip(slot.phases, slot.phases[1:], strict=False):
            assert other in {phase for phase, _ in TRANSITION_PROBABILITIES[one]}


def test_a_sample_group_uses_only_its_own_routines() -> None:
    used = defaultdict(set)
    for slot in malicious():
        used[slot.group].add(slot.routine)

    assert len(ROUTINES) >= 8
    for group in range(4):
        assert used[group] == {row.name for row in ROUTINES if row.group == group}
    assert {slot.routine for slot in benign()} == {""}


def test_routines_are_used_equally_often() -> None:
    counts = Counter(slot.routine for slot in malicious() if any(phase is Phase.INFECTING for phase, _ in slot.phases))

    for group in range(4):
        own = [counts[row.name] for row in ROUTINES if row.group == group]
        assert max(own) - min(own) <= 2


def test_waiting_malware_has_five_forms() -> None:
    for form in ("armed_form", "dormant_form"):
        counts = Counter(getattr(slot, form) for slot in malicious())
        assert set(counts) == {"none", "dns", "http", "long-poll", "jitter"}
        assert min(counts.values()) >= len(malicious()) / 10


def test_every_episode_has_addresses_of_its_own() -> None:
    addresses = [dict(slot.addresses) for slot in slots()]

    roles = {"c2", "pool", "exfil", "update", "database", "monitoring", "ntp", "dns"}
    assert all(set(one) >= roles for one in addresses)
    assert len({one["c2"] for one in addresses}) > 0.7 * len(addresses)


def test_sessions_hold_one_host_and_one_sample_group() -> None:
    for session in campaign():
        assert {slot.host_id for slot in session.slots} == {session.host_id}
        assert len({slot.group for slot in session.slots}) == 1


# ── The pilot ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pilot_is_a_part_of_the_campaign() -> None:
    whole = {session.session: session for session in campaign()}
    pilot = build_sessions(read_plan("lab-v2-pilot"))
    chosen = [slot for session in pilot for slot in session.slots]

    assert all(whole[session.session] == session for session in pilot)
    assert sum(slot.role is EpisodeRole.LAB for slot in chosen) >= 40
    assert sum(slot.duration_s for slot in chosen if slot.role is EpisodeRole.SOAK) >= 3 * 3600
    images = {shape.host_id: shape.image for shape, _ in list_plan_hosts(read_plan("lab-v2"))}
    hosts = {slot.host_id for slot in chosen}
    assert len(hosts) >= 6
    assert sum(images[host_id] == "debian" for host_id in hosts) >= 2


def test_part_of_an_unknown_plan_or_host_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('part_of = "lab-v9"\nhosts = ["pc"]\n')
    (tmp_path / "b.toml").write_text('part_of = "lab-v1"\nhosts = ["cp"]\nlab_per_host = 1\n')

    with pytest.raises(PlanError, match=r"a\.toml: part_of: 'lab-v9'"):
        read_plan(str(tmp_path / "a.toml"))
    with pytest.raises(UsageError, match="no host 'cp'"):
        build_sessions(read_plan(str(tmp_path / "b.toml")))


# ── The gate ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_area_under_the_curve_counts_ties_half() -> None:
    assert compute_auc(np.array([1.0, 1.0]), np.array([0.0, 1.0])) == 0.75
    assert compute_auc(np.array([0.0]), np.array([1.0])) == 0.0
    assert compute_auc(np.zeros(0), np.array([1.0])) is None


def test_plan_whose_benign_machines_are_never_idle_is_refused_unless_forced() -> None:
    text = SECOND.replace("workloads = 2", "workloads = 2\nbusy_share = 1.0\nidle_share = 0.0")
    plan = parse_plan(text, where="p.toml")

    with pytest.raises(PlanError, match="idle"):
        check_plan(plan)
    assert not all(row.is_accepted for row in check_plan(plan, force=True))


def test_drawn_episodes_with_loads_only_on_benign_machines_show_in_the_baseline() -> None:
    load = LoadSpan(kind="compile", start_s=0.0, end_s=60.0)
    idle = LoadSpan(kind="idle", start_s=0.0, end_s=60.0)
    busy = slot_of(1, profile="benign", sample_name="compile", phases=((Phase.CLEAN, 60.0),), loads=(load,))
    quiet = slot_of(2, phases=((Phase.ARMED, 60.0),), loads=(idle,))

    rows = compute_plan_baselines(parse_plan(SECOND, where="p.toml"), [session_of(busy), session_of(quiet)])

    drawn = {row.name: row.drawn for row in rows}
    assert drawn["load_armed"] == 0.0
    assert drawn["load_dormant"] is None
    assert drawn["idle_share"] == 0.0


def test_refusal_names_the_baseline_and_its_limits() -> None:
    plan = parse_plan(SECOND, where="p.toml")
    rows = compute_plan_baselines(plan)

    refuse_leaky_plan(plan, rows)
    assert {row.name for row in rows} == {
        "elapsed_time",
        "load_armed",
        "load_dormant",
        "duration",
        "whole_duration",
        "idle_share",
    }
