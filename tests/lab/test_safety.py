"""The safety contract in a real VM: samples write only to the scratch disk and stay inside networks and bounds."""

from __future__ import annotations

import asyncio
import hashlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from ipaddress import IPv4Address, ip_network
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from tests.factories.vms import shape_of
from tests.requirements import need_debian_image, need_qemu

from phasewatch.lab import debian_packages, guest_image
from phasewatch.lab.campaign import QemuFactory, RecordingOptions, default_cache
from phasewatch.lab.network.sink import SinkLog
from phasewatch.lab.network.world import draw_world, render_world_knobs
from phasewatch.lab.qemu_command import HostShape, find_host_shape
from phasewatch.lab.vm import QemuVm
from phasewatch.profiles import PROFILES, ROUTINES, ProfileSample, SafetyBounds, WorkloadProfile
from phasewatch.telemetry.base import HostClock
from phasewatch.telemetry.netflow import TrafficRow
from phasewatch.types import SampleKind

EPISODE_S = 600.0  # what the bounds are for
BUSYBOX_SHAPE = find_host_shape("pc")
DEBIAN_SHAPE = shape_of(host_id="debian", machine="q35", mem_mib=512, image="debian")
FOLDERS = {"docs", ".cache", ".local", "work", "messages", "lost+found"}
BENIGN = SampleKind.BENIGN
# A world in which every upload arrives, because this test looks for the highest volumes.
WORLD = next(
    world
    for world in (draw_world(np.random.default_rng(seed)) for seed in range(1000))
    if all(server.behaviour in ("accept", "tls") for server in world.servers)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deeds:
    """What one sample did during its infection and then in `seconds` of its active phase."""

    sample: str
    seconds: float
    first_written: int
    first_sent: int
    written: int
    sent: int
    addresses: frozenset[str]
    log: SinkLog

    def written_in_an_episode(self) -> float:
        return self.first_written + self.written * EPISODE_S / self.seconds

    def sent_in_an_episode(self) -> float:
        return self.first_sent + self.sent * EPISODE_S / self.seconds


def sent_of(rows: Sequence[TrafficRow]) -> int:
    return sum(row.bytes for row in rows if row.outgoing)


async def deeds_of(
    vm: QemuVm, profile: WorkloadProfile, sample: ProfileSample, *, seconds: float, middling: bool
) -> Deeds:
    """Play one sample's first run and its work, with middling or with its highest intensities."""
    assert vm._sink is not None
    assert vm._monitor is not None
    ask, sink = vm._monitor.ask, vm._sink

    async def seen() -> tuple[int, SinkLog]:
        stats = (await ask("query-blockstats"))[0]["stats"]
        return int(stats["wr_bytes"]), await asyncio.to_thread(sink.read_log)

    knobs = [f"{k.name}={sqrt(k.low * k.high) if middling else k.high:.6g}" for k in sample.knobs]
    phase = "clean" if profile.kind is BENIGN else "active"
    routine = [row.name for row in ROUTINES][profile.samples.index(sample) % len(ROUTINES)]
    words = (phase, profile.name, sample.name, "7", *knobs, f"routine={routine}", *render_world_knobs(WORLD))
    before, before_log = await seen()
    if profile.kind is not BENIGN:
        installed = await vm.send("install", *words)
        assert await vm.wait_finished(installed.id, timeout_s=120) == 0
    between, between_log = await seen()
    await vm.send("phase", *words)
    await asyncio.sleep(seconds)
    after, log = await seen()
    await vm.send("phase", "clean", "cryptomine", "full", "7")
    await asyncio.sleep(2.0)  # what it still had under way is written, and forgotten
    return Deeds(
        sample=f"{profile.name}/{sample.name}",
        seconds=seconds,
        first_written=between - before,
        first_sent=sent_of(between_log.rows) - sent_of(before_log.rows),
        written=after - between,
        sent=sent_of(log.rows) - sent_of(between_log.rows),
        addresses=frozenset(row.ip for row in log.rows if row.outgoing and row.ip),
        log=log,
    )


def play(
    tmp_path: Path,
    samples: Sequence[tuple[WorkloadProfile, ProfileSample]],
    *,
    seconds: float,
    middling: bool,
    shape: HostShape = BUSYBOX_SHAPE,
) -> list[Deeds]:
    """Boot one machine, play samples on it one after the other, and look at its disk when it has powered off."""

    async def work() -> list[Deeds]:
        options = RecordingOptions(cache=default_cache(), accel="tcg")
        factory = QemuFactory(options=options, scratch=tmp_path, clock=HostClock())
        vm = factory(shape, 0, ())
        assert isinstance(vm, QemuVm)
        image = vm._settings.image
        digests = {path: digest_of(path) for path in (image.base_disk, image.root_disk) if path is not None}
        try:
            await vm.boot()
            await vm.set_world(WORLD)
            found = [await deeds_of(vm, *each, seconds=seconds, middling=middling) for each in samples]
            await vm.send("poweroff")
            await asyncio.wait_for(vm.wait_exited(), 120)
            assert top_folders(vm._settings.folder / "disk.qcow2", tmp_path / "disk.raw") <= FOLDERS
            assert {path: digest_of(path) for path in digests} == digests, "a disk of the image itself was written to"
            return found
        finally:
            await vm.stop()

    return asyncio.run(work())


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def top_folders(overlay: Path, raw: Path) -> set[str]:
    """Read what lies at the root of a disk that nobody uses any more."""
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(overlay), str(raw)], check=True)
    check = debian_packages.find_tool("e2fsck", "e2fsprogs")
    repaired = subprocess.run([check, "-fy", str(raw)], capture_output=True, check=False)  # replays the journal
    assert repaired.returncode in (0, 1), repaired.stdout.decode()
    debugfs = debian_packages.find_tool("debugfs", "e2fsprogs")
    listed = subprocess.run([debugfs, "-R", "ls -p /", str(raw)], capture_output=True, text=True, check=True).stdout
    raw.unlink()
    return {line.split("/")[5] for line in listed.splitlines() if line.count("/") >= 6} - {".", ".."}


def assert_inside(deeds: Deeds, bounds: SafetyBounds) -> None:
    networks = [ip_network(network) for network in bounds.networks]
    outside = [a for a in deeds.addresses if not any(IPv4Address(a) in network for network in networks)]

    assert outside == [], deeds.sample
    assert deeds.log.ignored.outside == 0, deeds.sample
    assert deeds.log.frames_beyond == 0, deeds.sample
    assert deeds.written_in_an_episode() <= bounds.written_bytes, deeds
    assert deeds.sent_in_an_episode() <= bounds.sent_bytes, deeds


# The loudest of each where they differ: what holds for it holds for its quieter kin.
ONE_EACH = [
    ("cryptomine", "memory-hard"),
    ("ransom-walk", "overwrite"),
    ("scan-and-dial", "random"),
    ("beacon-c2", "fixed"),
    ("exfil-drip", "http-bulk"),
    ("dropper-persist", "self-copy"),
    ("benign", "package-install"),
]
ONE_EACH_OF_DEBIAN = [
    ("cryptomine", "sha256-loop"),
    ("ransom-walk", "openssl-tree"),
    ("scan-and-dial", "nmap-ports"),
    ("beacon-c2", "curl-poll"),
    ("exfil-drip", "curl-archives"),
    ("dropper-persist", "deb-stages"),
    ("benign", "rsync-backup"),
]
BY_NAME = {(row.name, one.name): (row, one) for row in PROFILES for one in row.samples}


@pytest.mark.vm
def test_one_sample_of_each_profile_stays_inside_its_bounds(tmp_path: Path) -> None:
    need_qemu()
    assert_all_work_inside(ONE_EACH, play(tmp_path, [BY_NAME[name] for name in ONE_EACH], seconds=6.0, middling=True))


@pytest.mark.vm
def test_one_debian_program_of_each_profile_stays_inside_its_bounds(tmp_path: Path) -> None:
    need_debian_image()
    samples = [BY_NAME[name] for name in ONE_EACH_OF_DEBIAN]

    found = play(tmp_path, samples, seconds=6.0, middling=True, shape=DEBIAN_SHAPE)

    assert all(sample.images == ("debian",) for _, sample in samples)
    assert_all_work_inside(ONE_EACH_OF_DEBIAN, found)


def assert_all_work_inside(names: Sequence[tuple[str, str]], found: Sequence[Deeds]) -> None:
    assert {name for name, _ in names} == {row.name for row in PROFILES}
    for deeds, (name, _) in zip(found, names, strict=True):
        assert_inside(deeds, next(row for row in PROFILES if row.name == name).bounds)
    assert sum(deeds.sent for deeds in found) > 10_000  # they did work
    assert sum(deeds.written for deeds in found) > 100_000


@pytest.mark.vm
@pytest.mark.soak
@pytest.mark.parametrize("image", ["busybox", "debian"])
@pytest.mark.parametrize("row", PROFILES, ids=lambda row: row.name)
def test_every_sample_stays_inside_its_bounds_at_its_highest_intensities(
    tmp_path: Path, row: WorkloadProfile, image: str
) -> None:
    if image == "debian":
        need_debian_image()
    else:
        need_qemu()
    # The Debian image plays its own programs here; the built-in samples are the same program in both images.
    samples = [(row, one) for one in row.samples if one.images[0] == image]
    shape = DEBIAN_SHAPE if image == "debian" else BUSYBOX_SHAPE
    for deeds in play(tmp_path, samples, seconds=20.0, middling=False, shape=shape):
        assert_inside(deeds, row.bounds)


def test_processes_are_bounded_by_the_sources() -> None:
    text = {
        name: files("phasewatch.lab.guest").joinpath(name).read_text()
        for name in guest_image.GUEST_SOURCES
        if name.endswith(".c")
    }
    forks = {name: len(re.findall(r"\bfork\(\)", body)) for name, body in text.items()}

    # base.c waits for each child; malware.c forks once per further core; driver.c once per role, killed with its group.
    assert {name: n for name, n in forks.items() if n} == {"base.c": 1, "malware.c": 1, "driver.c": 2}
    assert "waitpid(child, &status, 0)" in text["base.c"]
    assert re.search(r"core > 1; core--\)[^\n]*\n\s*if \(fork\(\) == 0\)", text["malware.c"])
    assert not any(re.search(r"\b(system|popen|vfork|clone|daemon)\(", body) for body in text.values())
