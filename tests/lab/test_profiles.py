"""The profile table: intensities, sample groups and safety bounds."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_network
from itertools import pairwise

import numpy as np
import pytest
from tests.lab.test_safety import EPISODE_S

from phasewatch.errors import UsageError
from phasewatch.lab.network.addresses import DNS_NET, LOCAL_NET, SCAN_NET
from phasewatch.profiles import (
    IDLE_SAMPLES,
    N_SAMPLE_GROUPS,
    PROFILES,
    ROUTINES,
    WorkloadProfile,
    draw_intensities,
    find_profile,
    find_sample,
    find_sample_group,
    list_samples,
)
from phasewatch.types import SampleKind

MALICIOUS = [row for row in PROFILES if row.kind is SampleKind.EMULATED]


def test_profiles_are_in_the_order_of_the_design() -> None:
    assert [row.name for row in PROFILES] == [
        "cryptomine",
        "ransom-walk",
        "scan-and-dial",
        "beacon-c2",
        "exfil-drip",
        "dropper-persist",
        "benign",
    ]


def test_sample_i_is_in_group_i_mod_4() -> None:
    names = [row.name for row in find_profile("benign").samples]

    assert [find_sample_group("benign", name) for name in names[:6]] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("group", range(N_SAMPLE_GROUPS))
def test_every_group_has_two_benign_loads_and_a_sample_of_every_profile(group: int) -> None:
    busy = [row.name for row in find_profile("benign").samples[group::N_SAMPLE_GROUPS] if row.name != "idle"]

    assert len(busy) >= 2
    assert all(row.samples[group::N_SAMPLE_GROUPS] for row in MALICIOUS)


def test_intensities_are_in_range_and_deterministic() -> None:
    for row in PROFILES:
        for one in row.samples:
            drawn = [draw_intensities(one, np.random.default_rng(7)) for _ in range(2)]

            assert drawn[0] == drawn[1]
            assert list(drawn[0]) == [knob.name for knob in one.knobs]
            assert all(knob.low * 0.999 <= drawn[0][knob.name] <= knob.high * 1.001 for knob in one.knobs)


def test_intensities_are_log_uniform() -> None:
    one = find_sample("ransom-walk", "throttled")
    knob = next(knob for knob in one.knobs if knob.name == "rate_kbps")
    rng = np.random.default_rng(1)

    drawn = [draw_intensities(one, rng)["rate_kbps"] for _ in range(800)]

    assert np.median(drawn) == pytest.approx((knob.low * knob.high) ** 0.5, rel=0.15)


@pytest.mark.parametrize("row", MALICIOUS, ids=lambda row: row.name)
def test_infection_writes_at_most_20_mb(row: WorkloadProfile) -> None:
    for one in row.samples:
        total = next(knob for knob in one.knobs if knob.name == "infect_mb")

        assert (total.low, total.high) == (0.2, 20)


@pytest.mark.parametrize("row", PROFILES, ids=lambda row: row.name)
def test_bounds_cover_the_highest_rates_of_each_sample(row: WorkloadProfile) -> None:
    rates = [knob.high * 1e3 for one in row.samples for knob in one.knobs if knob.name == "rate_kbps"]

    assert max(rates, default=0.0) * EPISODE_S <= max(row.bounds.written_bytes, row.bounds.sent_bytes)


def test_profiles_use_only_networks_of_the_sink() -> None:
    for row in PROFILES:
        for network in row.bounds.networks:
            assert any(ip_network(network).subnet_of(own) for own in (LOCAL_NET, DNS_NET, SCAN_NET))  # type: ignore[arg-type]


def test_malicious_profiles_have_attack_ids_and_benign_has_none() -> None:
    assert all(row.attack and all(id_.startswith("T1") for id_ in row.attack) for row in MALICIOUS)
    assert find_profile("benign").attack == ()


def test_sample_names_are_unique_within_a_profile() -> None:
    for row in PROFILES:
        assert all(a < b for a, b in pairwise(sorted(one.name for one in row.samples)))


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="cryptomine"):
        find_profile("criptomine")
    with pytest.raises(UsageError, match="throttled"):
        find_sample_group("cryptomine", "throtled")


OLD_SAMPLES = {
    "cryptomine": "full throttled bursty memory-hard",
    "ransom-walk": "overwrite write-new-delete-old intermittent throttled",
    "scan-and-dial": "sequential random low-and-slow one-port",
    "beacon-c2": "fixed jittered dns-only long-poll",
    "exfil-drip": "http-bulk small-posts dns-labels low-and-slow",
    "dropper-persist": "fetch-unpack cron-like self-copy in-pieces",
    "benign": "idle compile backup poller compress find-grep download upload hash database health-checks"
    " package-install render log-rotate",
}


@pytest.mark.parametrize("profile", OLD_SAMPLES)
def test_samples_of_version_1_keep_their_names_and_groups(profile: str) -> None:
    names = OLD_SAMPLES[profile].split()

    assert [find_sample_group(profile, name) for name in names] == [at % 4 for at in range(len(names))]
    assert [one.name for one in find_profile(profile).samples if one.since == 1] == names


def test_version_2_has_60_samples_40_benign_kinds_and_8_routines() -> None:
    assert sum(len(row.samples) for row in MALICIOUS) >= 60
    assert sum("busybox" in one.images for one in find_profile("benign").samples) >= 40
    assert len(ROUTINES) >= 8
    assert Counter(row.group for row in ROUTINES) == dict.fromkeys(range(4), 2)


def test_each_sample_group_has_its_own_idle_form() -> None:
    assert [find_sample_group("benign", name) for name in IDLE_SAMPLES] == [0, 1, 2, 3]


def test_twins_exist_and_have_a_reason() -> None:
    twins = [(one.twin, one.twin_reason) for row in MALICIOUS for one in row.samples if one.twin]

    assert len(twins) >= 20
    assert all(find_sample("benign", twin) and reason for twin, reason in twins)
    for one in find_profile("benign").samples:
        if one.twin:
            profile, _, name = one.twin.partition("/")
            assert find_sample(profile, name).twin == one.name


def test_benign_volumes_cover_what_real_programs_read_and_write() -> None:
    rates = [knob for one in find_profile("benign").samples for knob in one.knobs if knob.name == "rate_kbps"]

    assert sum(knob.high >= 1000 for knob in rates) >= 10  # kB/s
    assert max(knob.high for knob in rates) >= 4000


def test_samples_of_an_image_are_listed_only_for_it() -> None:
    for row in PROFILES:
        for group in range(N_SAMPLE_GROUPS):
            busybox = {one.name for one in list_samples(row.name, group, workloads=2)}
            debian = {one.name for one in list_samples(row.name, group, workloads=2, image="debian")}
            assert busybox <= debian
            assert {one.name for one in list_samples(row.name, group)} <= busybox
