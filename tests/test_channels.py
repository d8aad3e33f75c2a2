"""The registry of channels: how many there are, whom they trust, and that no row contradicts another."""

from __future__ import annotations

from collections import Counter

import pytest

from phasewatch.channels import CHANNELS, LEVEL_CHANNELS, RAW_FIELDS, build_channel_mask, list_channel_sets
from phasewatch.errors import UsageError
from phasewatch.features.schema import schema_hash
from phasewatch.types import SourceKind

GOLDEN_HASH = "7165986bc7c3a214895575027f79c837dd9c64b24c3d3d86040c6f24b1ebcd2b"


def test_there_are_46_channels_of_four_sources() -> None:
    assert Counter(c.source for c in CHANNELS) == {
        SourceKind.PROC: 13, SourceKind.QMP: 14, SourceKind.NETFLOW: 11, SourceKind.GUEST: 8,
    }  # fmt: skip


def test_a_defender_has_35_of_them_without_the_guests_word() -> None:
    assert sum(build_channel_mask("realistic")) == sum(c.in_deployment for c in CHANNELS) == 35


def test_the_schema_hash_is_the_one_that_models_were_made_for() -> None:
    assert schema_hash() == GOLDEN_HASH


def test_what_exists_under_emulation_only_is_in_no_portable_model() -> None:
    portable = [c for c, chosen in zip(CHANNELS, build_channel_mask("portable"), strict=True) if chosen]

    assert {c.accel for c in portable} == {"any"}
    assert {c.full_name for c in CHANNELS if c.accel == "tcg"} == {
        "qmp.jit_tb", "qmp.jit_tlb_partial", "qmp.vcpu_busy", "qmp.vcpu_user",
    }  # fmt: skip


def test_no_channel_is_a_level() -> None:
    assert not {c.full_name for c in CHANNELS} & {c.full_name for c in LEVEL_CHANNELS}


def test_every_raw_field_is_read_by_a_channel_or_a_level() -> None:
    read = {(c.source, field) for c in (*CHANNELS, *LEVEL_CHANNELS) for field in c.fields}

    assert {(r.source, r.field) for r in RAW_FIELDS} == read


@pytest.mark.parametrize("name", list_channel_sets())
def test_a_threat_model_chooses_at_least_one_channel(name: str) -> None:
    assert any(build_channel_mask(name))


def test_an_unknown_threat_model_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="no channel set 'realsitic'; did you mean realistic"):
        build_channel_mask("realsitic")
