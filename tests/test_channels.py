"""The registry of channels: how many there are, whom they trust, and that no row contradicts another."""

from __future__ import annotations

from collections import Counter

import pytest

from phasewatch.channels import (
    BASE_CHANNELS,
    CHANNELS,
    LEVEL_CHANNELS,
    RAW_FIELDS,
    SENSOR_SETS,
    build_channel_mask,
    list_channel_sets,
    list_raw_fields,
)
from phasewatch.errors import UsageError
from phasewatch.features.schema import schema_hash
from phasewatch.types import ChannelGroup, SourceKind

GOLDEN_HASH = "312a5755ebcadb45a23ab74c09d939cb9e6d6591fb5a48ab6260223d14e9d410"
GOLDEN_BASE_HASH = "7165986bc7c3a214895575027f79c837dd9c64b24c3d3d86040c6f24b1ebcd2b"


def test_there_are_46_base_channels_of_four_sources() -> None:
    assert Counter(c.source for c in BASE_CHANNELS) == {
        SourceKind.PROC: 13, SourceKind.QMP: 14, SourceKind.NETFLOW: 11, SourceKind.GUEST: 8,
    }  # fmt: skip


def test_there_are_27_extended_channels_behind_them_that_the_host_measures() -> None:
    extended = CHANNELS[len(BASE_CHANNELS) :]

    assert CHANNELS[: len(BASE_CHANNELS)] == BASE_CHANNELS
    assert Counter(c.source for c in extended) == {SourceKind.QMP: 12, SourceKind.NETFLOW: 15}
    assert all(c.in_deployment and c.group is ChannelGroup.EXTENDED for c in extended)


@pytest.mark.parametrize("source", SourceKind)
def test_extended_fields_come_behind_the_base_fields_of_a_row(source: SourceKind) -> None:
    groups = [spec.group for spec in list_raw_fields(source)]

    assert groups == sorted(groups)  # "base" < "extended"


def test_a_defender_has_35_of_them_without_the_guests_word() -> None:
    assert sum(build_channel_mask("realistic")) == sum(c.in_deployment for c in BASE_CHANNELS) == 35


def test_the_schema_hash_is_the_one_that_models_were_made_for() -> None:
    assert schema_hash() == GOLDEN_HASH
    assert schema_hash(BASE_CHANNELS) == GOLDEN_BASE_HASH  # of models without extended channels, as before them


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


@pytest.mark.parametrize("name", ["realistic", "oracle", "portable", "proc", "qmp", "netflow", "guest", "libvirt"])
def test_sets_of_base_channels_have_no_extended_channel(name: str) -> None:
    chosen = [c for c, is_in in zip(CHANNELS, build_channel_mask(name), strict=True) if is_in]

    assert not any(c.group is ChannelGroup.EXTENDED for c in chosen)


def test_the_extended_set_is_realistic_and_all_new_channels_without_kvm() -> None:
    extended, realistic, kvm = (set(_names(name)) for name in ("extended", "realistic", "kvm"))

    assert extended == realistic | {c.full_name for c in CHANNELS if c.group is ChannelGroup.EXTENDED} - kvm
    assert kvm == {c.full_name for c in CHANNELS if c.accel == "kvm"}


def _names(channel_set: str) -> list[str]:
    return [c.full_name for c, is_in in zip(CHANNELS, build_channel_mask(channel_set), strict=True) if is_in]


@pytest.mark.parametrize("name", list_channel_sets())
def test_a_threat_model_chooses_at_least_one_channel(name: str) -> None:
    assert any(build_channel_mask(name))


def test_an_unknown_threat_model_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="no channel set 'realsitic'; did you mean realistic"):
        build_channel_mask("realsitic")


def test_a_channel_set_can_be_taken_away_from_another() -> None:
    without = set(_names("extended-dns"))

    assert without == set(_names("extended")) - set(_names("dns"))
    assert set(_names("proc+netflow-flows-dns")) == set(_names("proc+netflow")) - set(_names("flows+dns"))


def test_the_sensor_sets_are_what_extended_adds_to_realistic() -> None:
    added = [name for sensor in SENSOR_SETS for name in _names(sensor)]

    assert len(added) == len(set(added))
    assert set(added) == set(_names("extended")) - set(_names("realistic"))


def test_a_channel_set_without_channels_is_refused() -> None:
    with pytest.raises(UsageError, match="no channel left"):
        build_channel_mask("dns-netflow-dns")
