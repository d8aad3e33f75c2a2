"""`record` as a user meets it, up to the point where a machine would be started."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Said
from tests.requirements import need_program

from phasewatch import atomic
from phasewatch.errors import DataError
from phasewatch.lab import campaign
from phasewatch.lab.campaign import RecordingOptions
from phasewatch.lab.recorder import RecordingSummary, SkipCode, SkippedHost

Call = Callable[..., Said]
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-profile.md"


@pytest.fixture
def profile_file(tmp_path: Path) -> Path:
    found = re.search(r"^```toml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    (tmp_path / "log-wiper.toml").write_text(found[1])
    return tmp_path / "log-wiper.toml"


def test_dry_run_of_a_custom_profile_lists_its_episodes(phasewatch: Call, tmp_path: Path, profile_file: Path) -> None:
    done = phasewatch("record", "--profile-file", profile_file, "--out", tmp_path / "s", "--dry-run", "--json")
    result = json.loads(done.out)["result"]

    assert done.code == 0
    assert result["elapsed_time"] < 0.25
    assert {slot["profile"] for s in result["sessions"] for slot in s["slots"]} == {"log-wiper", "benign"}
    assert not (tmp_path / "s").exists()


def test_an_unknown_key_is_bad_data_and_names_the_nearest(phasewatch: Call, tmp_path: Path, profile_file: Path) -> None:
    profile_file.write_text(profile_file.read_text().replace("[samples.phases]", "[samples.pases]"))

    done = phasewatch("record", "--profile-file", profile_file, "--out", tmp_path / "s")

    assert done.code == 3
    assert "unknown field `pases`" in done.err
    assert "did you mean phases or" in done.err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        pytest.param([], 2, "name what to record", id="nothing named"),
        pytest.param(["--plan", "smoke", "--profile-file", "x.toml"], 2, "leave it out", id="a plan and a profile"),
        pytest.param(["--driver", "d.sh", "--plan", "smoke"], 2, "--driver needs --image", id="a driver alone"),
        pytest.param(["--profile-file", "absent.toml"], 3, "absent.toml: No such file", id="no such profile"),
        pytest.param(["--image", "absent.qcow2"], 3, "absent.qcow2: No such file", id="no such image"),
        pytest.param(["--plan", "smoke", "--accel", "hvf"], 2, "kvm or tcg", id="an accelerator of elsewhere"),
    ],
)
def test_a_wrong_call_of_record_is_one_line_and_makes_no_store(
    phasewatch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)

    done = phasewatch("record", *arguments, "--out", "s")

    assert done.code == code
    assert says in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--host-id", "mine"),
        ("--machine", "q35"),
        ("--machine", "pc"),
        ("--mem", "2048"),
        ("--mem", "1024"),
        ("--vcpus", "1"),
        ("--boot-deadline", "300"),
    ],
)
def test_image_options_need_an_image(phasewatch: Call, tmp_path: Path, option: str, value: str) -> None:
    done = phasewatch("record", "--plan", "smoke", "--dry-run", "--out", tmp_path / "s", option, value)

    assert done.code == 2
    assert f"{option} needs --image; add it, or leave out {option}" in done.err


def test_an_image_boots_with_the_given_or_default_options(
    phasewatch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(b"QFI\xfb" + b"\0" * 100)
    shapes = []

    def keep(*arguments: object, options: RecordingOptions, **more: object) -> None:
        shapes.append(options.custom_machine)
        raise DataError("that was all")

    monkeypatch.setattr(campaign, "record_plan", keep)
    phasewatch("record", "--image", disk, "--out", tmp_path / "s")
    phasewatch(
        "record",
        "--image",
        disk,
        "--out",
        tmp_path / "s",
        "--machine",
        "q35",
        "--mem",
        "2048",
        "--vcpus",
        "2",
        "--boot-deadline",
        "60",
    )

    assert [(o.shape.host_id, o.shape.machine, o.shape.mem_mib, o.shape.vcpus, o.boot.deadline_s) for o in shapes] == [
        ("disk", "pc", 1024, 1, 300.0),
        ("disk", "q35", 2048, 2, 60.0),
    ]


def test_record_without_qemu_makes_nothing(phasewatch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    done = phasewatch("record", "--plan", "smoke", "--out", tmp_path / "s")

    assert done.code == 5
    assert "qemu-system-x86_64 does not run" in done.err
    assert "apt-get install qemu-system-x86" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_locked_store_is_not_changed(phasewatch: Call, tmp_path: Path) -> None:
    need_program("qemu-system-x86_64", "qemu-system-x86")
    store = tmp_path / "s"
    store.mkdir()

    with atomic.lock(store):
        done = phasewatch("record", "--plan", "smoke", "--out", store)

    assert done.code == 5
    assert str(store) in done.err
    assert not list(store.glob("*/*"))


def test_a_misspelt_key_of_a_plan_names_the_nearest(phasewatch: Call, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('name = "p"\nseed = 1\nlab_per_hots = 3\n[[hosts]]\nhost_id = "pc"\n')

    done = phasewatch("record", "--plan", tmp_path / "p.toml", "--out", tmp_path / "s")

    assert done.code == 3
    assert "unknown field `lab_per_hots`; did you mean lab_per_host" in done.err


def test_hosts_that_were_skipped_are_named_and_the_exit_code_is_1(
    phasewatch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[RecordingOptions] = []

    def skip(*arguments: object, options: RecordingOptions, **more: object) -> RecordingSummary:
        given.append(options)
        skipped = SkippedHost(host_id="v2-01-q35", episodes=3, code=SkipCode.NO_QUOTA, reason="record as root")
        return RecordingSummary(
            recorded=2,
            crowded=0,
            present=0,
            failed=(),
            failed_workloads=1,
            skipped_hosts=(skipped,),
            episodes_per_hour=41.0,
            late=0,
            skipped=0,
            recorder_cpu_s=1.0,
            wall_s=2.0,
        )

    monkeypatch.setattr(campaign, "record_plan", skip)
    (tmp_path / "p.toml").write_text(
        'name = "p"\nseed = 1\nlab_per_host = 3\nparallel_vms = 6\n[drawn_hosts]\ncount = 3\nseed = 2\n'
    )
    done = phasewatch("record", "--plan", tmp_path / "p.toml", "--out", tmp_path / "s")
    fewer = phasewatch("record", "--plan", tmp_path / "p.toml", "--out", tmp_path / "s", "--parallel", "4", "--json")

    assert (done.code, fewer.code) == (1, 1)
    assert "v2-01-q35: 3 episodes skipped (no-cpu-quota): record as root" in done.out
    assert json.loads(fewer.out)["result"]["skipped_hosts"][0]["code"] == "no-cpu-quota"
    assert [options.parallel_vms for options in given] == [6, 4]
    assert [shape.host_id for shape in given[0].shapes] == ["v2-00-q35", "v2-01-q35", "v2-02-q35"]
