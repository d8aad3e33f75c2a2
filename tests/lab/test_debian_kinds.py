"""The programs of the Debian image: each has a row in the table, keeps to the scratch disk and to the lab's network."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.resources import files
from ipaddress import IPv4Address

import pytest
from tests.requirements import need_program

from phasewatch.lab.debian_image import list_debian_kinds
from phasewatch.lab.network.addresses import is_lab_address
from phasewatch.profiles import PROFILES

FOLDER = files("phasewatch.lab.guest").joinpath("debian")
TABLE = tomllib.loads(FOLDER.joinpath("kinds.toml").read_text())
TEXT = {kind.name: kind.read_text() for kind in list_debian_kinds()}
BENIGN = {row["name"]: row for row in TABLE["kind"]}
SAMPLES = {f"{row['profile']}.{row['name']}.active": row for row in TABLE["sample"]}
ROUTINES = {name for name in TEXT if name.startswith("routine.")}


def test_every_program_has_a_row_and_every_row_a_program() -> None:
    assert TEXT.keys() - ROUTINES == BENIGN.keys() | SAMPLES.keys()
    assert len(BENIGN) >= 16


def test_twins_exist_and_are_explained() -> None:
    malicious = {f"{row.name}/{sample.name}" for row in PROFILES for sample in row.samples}
    malicious |= {f"{row['profile']}/{row['name']}" for row in SAMPLES.values()}

    assert {row["twin"] for row in BENIGN.values() if row.get("twin")} <= malicious
    assert {row["twin"] for row in SAMPLES.values() if row.get("twin")} <= BENIGN.keys()
    assert all(bool(row.get("twin")) == bool(row.get("why")) for row in TABLE["kind"] + TABLE["sample"])


def test_samples_belong_to_profiles_of_the_table() -> None:
    assert {row["profile"] for row in SAMPLES.values()} <= {row.name for row in PROFILES}


@pytest.mark.parametrize("name", sorted(TEXT))
def test_program_is_valid_bash_and_starts_with_what_it_is(name: str) -> None:
    need_program("bash", "bash")
    first, about, library, *_ = TEXT[name].splitlines()

    assert first == "#!/bin/bash"
    assert re.fullmatch(r"# \w.*", about)
    assert library == ". /usr/lib/phasewatch/lib.sh"
    subprocess.run(["bash", "-n"], input=TEXT[name], text=True, check=True)


@pytest.mark.parametrize("name", sorted(BENIGN))
def test_benign_kind_runs_until_it_is_killed(name: str) -> None:
    assert TEXT[name].splitlines()[-1].startswith("walk ")


@pytest.mark.parametrize("name", sorted(set(TEXT) - set(BENIGN)))
def test_step_of_an_attack_reports_that_it_was_not_done(name: str) -> None:
    assert "fail " in TEXT[name] or "walk " in TEXT[name]


def test_programs_read_only_the_intensities_of_their_row_and_of_the_lab() -> None:
    of_all = {"duty", "seconds", "infect_s", "infect_mb"}
    for name, row in (BENIGN | SAMPLES).items():
        read = set(re.findall(r"(?:whole|permille) (\w+)", TEXT[name])) | set(re.findall(r"knob\[(\w+)\]", TEXT[name]))
        given = {words.split()[0] for words in row.get("intensities", "").split(",") if words}

        assert read <= given | of_all, name
        assert given <= read | {"duty"}, name


def test_programs_contain_only_addresses_of_the_lab() -> None:
    written = [word for text in TEXT.values() for word in re.findall(r"(?<![\d.])\d+\.\d+\.\d+\.\d+(?![\d.])", text)]
    ranges = [word for text in TEXT.values() for word in re.findall(r"\b\d+\.\d+\.\$", text)]

    assert all(is_lab_address(IPv4Address(word)) or word == "127.0.0.1" for word in written)
    assert set(ranges) <= {"198.18.$", "198.19.$"}  # RFC 2544, the lab's range for scanners


def test_programs_resolve_only_reserved_names() -> None:
    names = {name for text in TEXT.values() for name in re.findall(r"[\w-]+\.(?:com|net|org|io|example)\b", text)}

    assert names
    assert all(name.endswith(".example") for name in names)  # RFC 2606


def test_programs_name_only_files_of_the_scratch_disk_for_writing() -> None:
    written = re.compile(r"(?:>>?|\bof=|\bmkdir -p |\brm -rf )\"?(/[\w./-]+)")
    targets = {path for text in TEXT.values() for path in written.findall(text)}

    assert all(path.startswith(("/data/", "/dev/null")) for path in targets)


def test_kinds_cover_the_disk_volumes_of_real_programs() -> None:
    """Median bytes per second that real programs read and wrote: Firefox, Zip, Excel, AESCrypt.

    Source: M. Hirano et al., RanSAP, 2022, doi 10.1016/j.fsidi.2021.301314.
    """
    for key, volumes in (("reads_bps", (121e3, 930e3, 1.10e6, 1.31e6)), ("writes_bps", (260e3, 570e3, 864e3, 1.16e6))):
        for volume in volumes:
            assert sum(row[key][0] <= volume <= row[key][1] for row in BENIGN.values()) >= 4
