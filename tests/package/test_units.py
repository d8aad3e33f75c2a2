"""The example units say only what systemd understands and what the command line knows."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phasewatch.cli.groups import COMMANDS, load_command

FOLDER = Path(__file__).parents[2] / "docs" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
PARSERS = {name: load_command(name) for name in COMMANDS}


def name_of(unit: Path) -> str:
    return unit.name


def test_watch_receive_and_ship_have_a_unit() -> None:
    assert {u.stem.rstrip("@").removeprefix("phasewatch-") for u in UNITS} == {"watch", "receive", "ship"}


@pytest.mark.parametrize("unit", UNITS, ids=name_of)
def test_a_unit_starts_a_command_with_options_that_it_has(unit: Path) -> None:
    line = re.search(r"^ExecStart=(.+)$", unit.read_text(), re.MULTILINE)
    assert line is not None
    program, name, *words = shlex.split(line[1])
    command = PARSERS.get(name)

    assert program.endswith("/phasewatch")
    assert name == unit.stem.rstrip("@").removeprefix("phasewatch-")
    if command is not None:  # in a checkout that lacks the command there is nothing to hold the options against
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("unit", [u for u in UNITS if "-watch" in u.stem], ids=name_of)
def test_a_machine_that_went_away_is_watched_again_when_it_comes_back_however_late(unit: Path) -> None:
    text = unit.read_text()
    settings = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))

    assert settings["Restart"] == "always"  # a watch whose machine is gone ends with code 0
    assert settings["StartLimitIntervalSec"] == "0"  # no number of tries is too many while it is down


def test_the_service_for_all_machines_may_capture_frames_and_has_no_other_capability() -> None:
    settings = dict(re.findall(r"^(\w+)=(.*)$", (FOLDER / "phasewatch-watch.service").read_text(), re.MULTILINE))

    assert (settings["User"], settings["Group"]) == ("libvirt-qemu", "libvirt-qemu")  # /proc/PID/io wants both
    assert settings["AmbientCapabilities"] == settings["CapabilityBoundingSet"] == "CAP_NET_RAW"
    assert "AF_PACKET" in settings["RestrictAddressFamilies"].split()


@pytest.mark.parametrize("unit", UNITS, ids=name_of)
def test_systemd_understands_a_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not at hand")
    # The program, the user and the files of a real installation are not here.
    text = unit.read_text().replace("/opt/phasewatch/bin/phasewatch", sys.executable)
    text = re.sub(r"^(User|Group)=.*\n", "", text, flags=re.MULTILINE)
    copy = tmp_path / unit.name.replace("@", "@web01")
    copy.write_text(text)

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60
    )

    ours = [line for line in done.stderr.splitlines() if copy.name in line or "web01" in line or "phasewatch" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("unit", UNITS, ids=name_of)
def test_a_unit_is_not_exposed_beyond_what_its_command_needs(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not at hand")
    copy = tmp_path / unit.name.replace("@", "@web01")
    copy.write_text(unit.read_text())

    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd does not analyse files")
    assert done.returncode == 0, done.stdout[-300:]
