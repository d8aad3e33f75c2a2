"""The guest's C sources as text: samples, knobs, addresses and agent fields match the Python tables."""

from __future__ import annotations

import re
from importlib.resources import files
from ipaddress import IPv4Address

import pytest

from phasewatch.channels import list_raw_fields
from phasewatch.lab.guest_image import GUEST_SOURCES
from phasewatch.lab.network.addresses import is_lab_address
from phasewatch.profiles import PROFILES, ROUTINES, STEP_KNOBS
from phasewatch.types import SampleKind, SourceKind

TEXT = {name: files("phasewatch.lab.guest").joinpath(name).read_text() for name in GUEST_SOURCES}
C = {name: text for name, text in TEXT.items() if name.endswith(".c")}
READ = set(re.findall(r'knob\(job, "(\w+)"', "".join(C.values())))


def test_guest_reads_exactly_the_knobs_of_the_profile_table() -> None:
    drawn = {knob.name for row in PROFILES for one in row.samples for knob in one.knobs if "busybox" in one.images}

    assert drawn | set(STEP_KNOBS) == READ


@pytest.mark.parametrize("row", [row for row in PROFILES if row.kind is SampleKind.EMULATED], ids=lambda row: row.name)
def test_every_profile_is_implemented_in_the_guest(row) -> None:  # type: ignore[no-untyped-def]
    assert f'is(job->profile, "{row.name}")' in C["malware.c"]


def test_every_benign_load_is_implemented_in_the_guest() -> None:
    played = set(re.findall(r'is\(kind, "([\w-]+)"\)', C["benign.c"] + C["loads.c"]))

    assert played == {one.name for one in PROFILES[-1].samples if "busybox" in one.images} - {"idle"}


def test_every_sample_of_a_profile_is_known_to_the_guest() -> None:
    for row in PROFILES[:-1]:
        names = [one.name for one in row.samples if "busybox" in one.images]

        assert f'{{"{row.name}", {", ".join(chr(34) + name + chr(34) for name in names)}}}' in C["malware.c"]


def test_every_infection_routine_is_implemented_in_the_guest() -> None:
    assert set(re.findall(r'is\(routine, "([\w-]+)"\)', C["routines.c"])) == {row.name for row in ROUTINES}


def test_guest_sources_contain_only_addresses_of_the_sink() -> None:
    written = [int(word, 16) for text in C.values() for word in re.findall(r"\b0x((?:0a|c6)[0-9a-f]{6})u", text)]

    assert written
    assert all(is_lab_address(IPv4Address(address)) for address in written)
    assert not any(re.search(r'"\d+\.\d+\.\d+\.\d+"', text) for text in C.values())


def test_guest_resolves_only_reserved_names() -> None:
    asked = {
        name for text in C.values() for name in re.findall(r'"[^"\s]*?([\w-]+\.(?:com|net|org|io|example))"', text)
    }

    assert asked
    assert all(name.endswith(".example") for name in asked)  # RFC 2606


def test_agent_reports_exactly_the_raw_fields_in_order() -> None:
    assert re.findall(r'\\"(\w+)\\":', C["agent.c"]) == [spec.field for spec in list_raw_fields(SourceKind.GUEST)]


def test_guest_acknowledges_before_it_acts() -> None:
    obey = C["driver.c"].split("static void obey", 1)[1]
    acknowledged = obey.index('say("ack')

    assert all(obey.index(act) > acknowledged for act in ("fork()", "start(", "stop(", "reboot("))


def test_only_the_null_device_is_opened_for_writing_by_a_literal_path() -> None:
    opened = [
        line
        for text in C.values()
        for line in text.splitlines()
        if re.search(r'open\("[^"]*".*O_(WRONLY|RDWR|CREAT)', line)
    ]

    assert opened
    assert all('"/dev/null"' in line for line in opened)


def test_init_shortens_the_writeback_delay() -> None:
    assert "echo 500 > /proc/sys/vm/dirty_expire_centisecs" in TEXT["init.sh"]
    assert "echo 100 > /proc/sys/vm/dirty_writeback_centisecs" in TEXT["init.sh"]
