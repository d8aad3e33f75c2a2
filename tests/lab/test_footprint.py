"""Cost of the guest agent, from pairs of idle VMs."""

from __future__ import annotations

import numpy as np
import pytest
from tools.datasheet_tables import build_footprint_sessions, compute_channel_costs

from phasewatch.channels import CHANNELS
from phasewatch.errors import DataError


def bins(value: float) -> np.ndarray:
    return np.full((10, len(CHANNELS)), value, np.float32)


def test_one_of_each_pair_has_the_agent_in_alternation() -> None:
    sessions = build_footprint_sessions("pc", 4)
    agents = [[slot.agent for slot in session.slots] for session in sessions]

    assert agents == [[False, True], [True, False], [False, True], [True, False]]
    assert len({slot.plan_seed for session in sessions for slot in session.slots}) == 8
    assert {(slot.profile, slot.sample_name) for session in sessions for slot in session.slots} == {("benign", "idle")}


def test_differences_are_computed_within_pairs() -> None:
    costs = compute_channel_costs({"a": {False: bins(1.0), True: bins(1.5)}, "b": {False: bins(3.0), True: bins(3.25)}})
    first = costs[0]

    assert (first.channel, first.off, first.on, first.pairs) == ("proc.cpu_user", 2.0, 2.375, (0.5, 0.25))
    assert not any(cost.channel.startswith("guest.") for cost in costs)


def test_channel_missing_in_one_of_a_pair_is_left_out() -> None:
    lacking = bins(1.0)
    lacking[:, 0] = np.nan

    assert compute_channel_costs({"a": {False: lacking, True: bins(1.0)}})[0].channel == "proc.cpu_sys"


def test_no_complete_pair_is_an_error() -> None:
    with pytest.raises(DataError, match="no session has one machine with the agent and one without"):
        compute_channel_costs({"a": {False: bins(1.0)}, "b": {True: bins(1.0)}})
