"""Rounds of a recording: one session, or soak episodes of two hosts at the same time."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest
from tests.factories.vms import session_of, shape_of, slot_of

from phasewatch.lab.plan import build_sessions, list_plan_hosts, parse_plan
from phasewatch.lab.plans import read_plan
from phasewatch.lab.qemu_command import HOST_SHAPES, HostShape
from phasewatch.lab.recorder import PendingSession, estimate_round_s, iterate_rounds, pop_round
from phasewatch.types import EpisodeRole

DRAWN = """
name = "drawn"
seed = 1
parallel_vms = 6
lab_per_host = 24
[drawn_hosts]
count = 16
seed = 2
"""
SHAPES = {host_id: shape_of(host_id=host_id, vcpus=2 if host_id == "smp2" else 1) for host_id in ("pc", "q35", "smp2")}


def lone(host_id: str, role: EpisodeRole = EpisodeRole.SOAK, *, seed: int = 1, **changes: Any) -> PendingSession:
    slot = slot_of(seed, host_id=host_id, role=role, **changes)
    return session_of(slot, name=f"{host_id}-{seed}"), (slot,)


def names(one: tuple[PendingSession, ...]) -> list[str]:
    return [session.session for session, _ in one]


def test_soak_episode_runs_beside_the_next_one_of_another_host() -> None:
    queue = deque([lone("pc"), lone("pc", seed=2), lone("q35", EpisodeRole.LAB), lone("q35", seed=3)])

    assert names(pop_round(queue, SHAPES, 2)) == ["pc-1", "q35-3"]
    assert names(tuple(queue)) == ["pc-2", "q35-1"]


@pytest.mark.parametrize(
    "beside",
    [
        lone("pc", seed=2),
        lone("smp2"),
        lone("q35", EpisodeRole.LAB),
        lone("q35", EpisodeRole.COMMISSION),
        lone("q35", duration_s=61.0),
    ],
    ids=["same host", "two vCPUs", "lab", "commission", "another length"],
)
def test_soak_episode_runs_alone_where_no_other_fits(beside: PendingSession) -> None:
    queue = deque([lone("pc"), beside])

    assert names(pop_round(queue, SHAPES, 2)) == ["pc-1"]
    assert names(pop_round(queue, SHAPES, 2)) == names((beside,))


def test_one_core_runs_one_soak_episode() -> None:
    assert names(pop_round(deque([lone("pc"), lone("q35")]), SHAPES, 1)) == ["pc-1"]


def test_no_third_episode_runs_beside_a_pair() -> None:
    slots = (slot_of(1, role=EpisodeRole.SOAK), slot_of(2, role=EpisodeRole.SOAK))
    queue = deque([(session_of(*slots), slots), lone("q35")])

    assert names(pop_round(queue, SHAPES, 2)) == ["s1"]


def test_round_lasts_as_long_as_its_longest_slot() -> None:
    assert estimate_round_s((lone("pc", settle_s=10.0), lone("q35", settle_s=50.0))) == 60.0 + 50.0 + 15.0


def test_rounds_cover_the_whole_plan_and_use_at_most_two_cores() -> None:
    shapes = {host.host_id: host for host in HOST_SHAPES}
    sessions = build_sessions(read_plan("lab-v1"))
    taken = list(iterate_rounds(deque((session, session.slots) for session in sessions), shapes, 2))

    assert sorted(name for one in taken for name in names(one)) == sorted(session.session for session in sessions)
    for one in taken:
        slots = [slot for _, slots in one for slot in slots]
        assert sum(shapes[slot.host_id].vcpus for slot in slots) <= 2
        assert len({slot.role for slot in slots}) == 1
    assert Counter(len(one) for one in taken if one[0][1][0].role is EpisodeRole.SOAK) == {2: 10, 1: 4}


# --- CPU quotas -----------------------------------------------------------------------------------------------------


def quota(host_id: str, cores: float, **changes: Any) -> dict[str, HostShape]:
    return {host_id: shape_of(host_id=host_id, quota_cores=cores, **changes)}


def lab(host_id: str, count: int) -> PendingSession:
    slots = tuple(slot_of(seed, host_id=host_id) for seed in range(count))
    return session_of(*slots, name=host_id), slots


def take_sizes(pending: PendingSession, shapes: dict[str, HostShape], *, cores: int = 2, vms: int = 6) -> list[int]:
    return [len(one[0][1]) for one in iterate_rounds(deque([pending]), shapes, cores, vms)]


@pytest.mark.parametrize(
    ("cores", "sizes"),
    [(0.25, [6]), (0.4, [6]), (0.5, [6]), (0.6, [3, 3]), (0.7, [3, 3]), (1.0, [3, 3]), (1.5, [2, 2, 2])],
)
def test_session_is_split_into_even_rounds_whose_quotas_fit_the_cores(cores: float, sizes: list[int]) -> None:
    assert take_sizes(lab("a", 6), quota("a", cores)) == sizes


def test_quota_above_the_machine_runs_one_vm_at_a_time() -> None:
    assert take_sizes(lab("a", 2), quota("a", 1.5), cores=1) == [1, 1]


def test_fewer_vms_at_a_time_split_a_session_further() -> None:
    assert take_sizes(lab("a", 6), quota("a", 0.25), vms=2) == [2, 2, 2]


def test_rest_of_a_split_session_comes_next_and_keeps_its_name() -> None:
    queue = deque([lab("a", 3), lab("b", 1)])
    shapes = quota("a", 1.5) | quota("b", 1.5)

    assert [names(one) for one in iterate_rounds(queue, shapes, 2, 6)] == [["a"], ["a"], ["b"]]


def test_soak_episodes_of_several_hosts_fill_the_cores_with_their_quotas() -> None:
    shapes = quota("a", 0.9) | quota("b", 0.9) | quota("c", 0.9) | quota("d", 0.7) | quota("e", 0.3)
    queue = deque([lone(host_id) for host_id in "abcde"])

    assert [names(one) for one in iterate_rounds(queue, shapes, 2, 6)] == [["a-1", "b-1", "c-1", "e-1"], ["d-1"]]


def baselines(host_id: str, n: int) -> PendingSession:
    slots = tuple(slot_of(i, host_id=host_id, role=EpisodeRole.COMMISSION) for i in range(n))
    return session_of(*slots, name=host_id), slots


def test_baseline_episodes_under_quotas_run_beside_those_of_other_hosts() -> None:
    shapes = quota("a", 0.8) | quota("b", 0.5) | quota("c", 0.4) | quota("d", 0.5)
    queue = deque([baselines("a", 1), lab("d", 1), baselines("b", 3), baselines("c", 2)])

    assert [names(one) for one in iterate_rounds(queue, shapes, 2, 6)] == [["a", "b"], ["d"], ["c"]]


def test_baseline_episodes_without_a_quota_run_alone() -> None:
    queue = deque([baselines("pc", 1), baselines("q35", 1)])

    assert [names(one) for one in iterate_rounds(queue, SHAPES, 2, 6)] == [["pc"], ["q35"]]


def test_every_session_of_a_drawn_plan_fits_two_cores() -> None:
    plan = parse_plan(DRAWN, where="drawn")
    shapes = {shape.host_id: shape for shape, _ in list_plan_hosts(plan)}
    sessions = build_sessions(plan)

    for session in sessions:
        assert sum(shapes[slot.host_id].cores for slot in session.slots) <= 2
        assert len(session.slots) <= 6
        assert len({slot.group for slot in session.slots}) == 1
    sizes = [len(session.slots) for session in sessions if session.slots[0].role is EpisodeRole.LAB]
    assert max(sizes) > 2
    taken = [slots for one in iterate_rounds(deque((s, s.slots) for s in sessions), shapes, 2, 6) for _, slots in one]
    assert sum(map(len, taken)) == sum(len(session.slots) for session in sessions)
