"""A workload of the user's own: a TOML file → a profile with the scripts that play it, and the sessions to record (pure)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phasewatch.errors import DataError, PlanError, UsageError
from phasewatch.lab.guest_image import GuestImage
from phasewatch.lab.plan import (
    PlanHost,
    PlanSpec,
    RecordingSession,
    RecordingSlot,
    build_rng,
    check_plan_spec,
    compute_slot_seed,
    draw_log_uniform,
    draw_phases,
)
from phasewatch.lab.qemu_command import HOST_SHAPES, HostShape, find_host_shape
from phasewatch.lab.vm import BootRule
from phasewatch.naming import RESERVED_HOST_IDS, make_host_id
from phasewatch.profiles import (
    EPISODE_RANGE_S,
    IDLE_SAMPLE,
    PHASE_RANGE_S,
    PROFILES,
    IntensityRange,
    ProfileSample,
    SafetyBounds,
    WorkloadProfile,
    draw_episode_length,
    draw_intensities,
)
from phasewatch.toml_config import parse_toml
from phasewatch.types import BENIGN_PROFILE, HOST_ID_PATTERN, PHASES, EpisodeRole, Phase, SampleKind

CUSTOM_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")  # the guest's driver keeps 31 characters
KNOB_NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,22}")  # becomes a variable of the shell
MAX_KNOBS = 16  # the guest's driver keeps 24, and its line has 1 KiB
MAX_CUSTOM_SAMPLES = 64
MAX_CUSTOM_EPISODES = 10_000
RESERVED_VARIABLES = ("seed", "phase", "sample")  # variables that every script has
MAX_SCRIPT_BYTES = 64 << 10


class CustomSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sample of a profile file.

    Attributes:
        knobs: Name → lowest and highest; drawn log-uniform for each episode, handed to the scripts as variables.
        phases: Phase → what the guest's shell runs when it begins. A phase without a script is quiet.
    """

    name: str
    about: str = ""
    knobs: dict[str, tuple[float, float]] = {}
    phases: dict[Phase, str] = {}


class CustomRecording(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a profile file wants to be recorded; the words mean what they mean in a plan."""

    episodes: int = 12
    seed: int = 1
    hosts: tuple[str, ...] = ("pc",)
    benign_share: float = 1 / 3
    agent_share: float = 0.5
    settle_s: tuple[float, float] = (40.0, 80.0)
    episode_s: tuple[float, float] = EPISODE_RANGE_S
    phase_s: tuple[float, float] = PHASE_RANGE_S
    chatter_s: tuple[float, float] = (6.0, 30.0)


class CustomProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A profile file as its author writes it."""

    name: str
    samples: tuple[CustomSample, ...]
    kind: SampleKind = SampleKind.EMULATED
    about: str = ""
    attack: tuple[str, ...] = ()
    recording: CustomRecording = CustomRecording()


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomWorkload:
    """A profile that is in no table.

    Attributes:
        scripts: ``(sample, phase)`` → shell text.
        spec: The plan that its sessions are drawn by.
    """

    profile: WorkloadProfile
    scripts: Mapping[tuple[str, Phase], str]
    spec: PlanSpec


def parse_workload(text: str, *, where: str) -> CustomWorkload:
    """Read a profile file.

    Args:
        text: TOML.
        where: Its file, for messages.

    Raises:
        PlanError: If it is not TOML, has unknown or missing keys, or asks for the impossible.
    """
    own = parse_toml(text, CustomProfile, where=where)
    for words in _find_problems(own):
        raise PlanError(f"{where}: {words}")
    asked = own.recording
    spec = PlanSpec(
        name=own.name, seed=asked.seed, hosts=tuple(PlanHost(host_id=host) for host in asked.hosts),
        lab_per_host=asked.episodes, benign_share=1.0 if own.kind is SampleKind.BENIGN else asked.benign_share,
        agent_share=asked.agent_share, settle_s=asked.settle_s, episode_s=asked.episode_s, phase_s=asked.phase_s,
        chatter_s=asked.chatter_s,
    )  # fmt: skip
    try:
        check_plan_spec(spec)
    except PlanError as exc:
        raise PlanError(f"{where}: recording: {exc}") from exc
    return CustomWorkload(
        profile=WorkloadProfile(
            name=own.name, kind=own.kind, about=own.about, attack=own.attack,
            samples=tuple(
                ProfileSample(
                    name=s.name, about=s.about,
                    knobs=tuple(IntensityRange(name=k, low=low, high=high, unit="1") for k, (low, high) in s.knobs.items()),
                )
                for s in own.samples
            ),
            # Not tested as ours are: what an own workload does is its author's promise.
            bounds=SafetyBounds(written_bytes=0, sent_bytes=0, processes=0),
        ),
        scripts={(s.name, phase): script for s in own.samples for phase, script in s.phases.items()},
        spec=spec,
    )  # fmt: skip


def build_unscripted_workload(name: str) -> CustomWorkload:
    """Give the workload of an own machine whose driver does everything: a live profile of one sample, by the usual plan.

    Raises:
        PlanError: If the name can be none.
    """
    text = f'name = "{name}"\nkind = "live"\n[[samples]]\nname = "{name}"\n[recording]\nagent_share = 0\n'
    return parse_workload(text, where="the driver's name")


def _find_problems(own: CustomProfile) -> Iterator[str]:
    known = [row.name for row in PROFILES]
    if not CUSTOM_NAME_PATTERN.fullmatch(own.name):
        yield f"name {own.name!r}: letters a-z, digits and dash, 1 to 31 of them"
    if own.name in known:
        yield f"name {own.name!r}: a profile of phasewatch; choose another name"
    if not 1 <= len(own.samples) <= MAX_CUSTOM_SAMPLES or len({s.name for s in own.samples}) != len(own.samples):
        yield f"samples: 1 to {MAX_CUSTOM_SAMPLES}, and none twice"
    if not 1 <= own.recording.episodes <= MAX_CUSTOM_EPISODES:
        yield f"recording: episodes: {own.recording.episodes}, expected 1 to {MAX_CUSTOM_EPISODES}"
    if not own.recording.hosts:
        yield "recording: hosts: at least one"
    for s in own.samples:
        if not CUSTOM_NAME_PATTERN.fullmatch(s.name):
            yield f"sample {s.name!r}: letters a-z, digits and dash, 1 to 31 of them"
        if len(s.knobs) > MAX_KNOBS:
            yield f"sample {s.name}: {len(s.knobs)} knobs; at most {MAX_KNOBS}"
        for knob, (low, high) in s.knobs.items():
            if not KNOB_NAME_PATTERN.fullmatch(knob):
                yield f"sample {s.name}: knob {knob!r}: a-z, digits and underscore, 1 to 23 of them, a letter first"
            if knob in RESERVED_VARIABLES:
                yield f"sample {s.name}: knob {knob!r}: a variable of that name is set already; choose another"
            if not 0 < low <= high < 1e12:
                yield f"sample {s.name}: knob {knob}: {low:g} to {high:g}; expected 0 < lowest <= highest"
        for phase, script in s.phases.items():
            if phase not in PHASES or (own.kind is SampleKind.BENIGN and phase is not Phase.CLEAN):
                allowed = "clean, because it is benign" if own.kind is SampleKind.BENIGN else ", ".join(PHASES)
                yield f"sample {s.name}: phases: {phase}: only {allowed}"
            if len(script.encode()) > MAX_SCRIPT_BYTES or "\0" in script:
                yield f"sample {s.name}: phases: {phase}: a script has at most {MAX_SCRIPT_BYTES >> 10} KiB and no NUL"


def build_custom_sessions(
    work: CustomWorkload, *, hosts: tuple[str, ...] = (), alone: bool = False
) -> tuple[RecordingSession, ...]:
    """Lay out the episodes of a workload: samples in turn, pairs of one sample, benign ones strewn in.

    Args:
        work: The profile and its plan.
        hosts: Instead of the plan's; they need not be of the table where `alone` is set.
        alone: One VM at a time, as on a machine of the user's own.
    """
    sessions: list[RecordingSession] = []
    for host_id in hosts or tuple(host.host_id for host in work.spec.hosts):
        single = alone or find_host_shape(host_id).is_alone
        slots = [_build_custom_slot(work, host_id, index) for index in range(work.spec.lab_per_host)]
        while slots:
            first = slots.pop(0)
            # Beside a sample only the same sample: else none could be held out.
            twin = next((s for s in slots if (s.profile, s.sample_name) == (first.profile, first.sample_name)), None)
            pair = (first,) if single or twin is None else (first, twin)
            slots = [slot for slot in slots if slot not in pair]
            sessions.append(
                RecordingSession(session=f"{work.spec.name}-{len(sessions):04d}", host_id=host_id, slots=pair)
            )  # fmt: skip
    return tuple(sessions)


def _build_custom_slot(work: CustomWorkload, host_id: str, index: int) -> RecordingSlot:
    spec, own = work.spec, work.profile
    seed = compute_slot_seed(spec.name, spec.seed, host_id, index)
    # Spread evenly: the n-th episode is benign where the share's running total passes a whole number.
    beside = own.kind is not SampleKind.BENIGN
    before, after = int(index * spec.benign_share), int((index + 1) * spec.benign_share)
    is_idle = beside and after > before
    played = own.samples[(index - before if beside else index) % len(own.samples)]
    duration_s = draw_episode_length(build_rng(seed, "length"), between_s=spec.episode_s)
    is_clean = is_idle or own.kind is SampleKind.BENIGN
    return RecordingSlot(
        index=index, host_id=host_id, role=EpisodeRole.LAB,
        profile=BENIGN_PROFILE if is_idle else own.name,
        sample_name=IDLE_SAMPLE if is_idle else played.name,
        sample_kind=SampleKind.BENIGN if is_idle else own.kind,
        plan_seed=seed,
        agent=bool(build_rng(seed, "agent").random() < spec.agent_share),
        settle_s=round(float(build_rng(seed, "settle").uniform(*spec.settle_s)), 3),
        duration_s=duration_s,
        phases=((Phase.CLEAN, duration_s),) if is_clean else draw_phases(spec, build_rng(seed, "walk"), duration_s),
        knobs=() if is_idle else tuple(draw_intensities(played, build_rng(seed, "knobs")).items()),
        background="", background_knobs=(),
        chatter_s=round(draw_log_uniform(build_rng(seed, "chatter"), spec.chatter_s), 3),
    )  # fmt: skip


QCOW2_MAGIC = b"QFI\xfb"
MAX_DRIVER_BYTES = 1 << 20
CUSTOM_MACHINE_TYPES = ("pc", "q35")  # those with a firmware that boots a disk

# The disk with the driver is labelled `cidata`: where cloud-init runs in the guest it finds these two files and starts
# the driver; any other guest mounts the disk and starts `driver` itself.
CLOUD_INIT_META_DATA = "instance-id: phasewatch\nlocal-hostname: guest\n"
CLOUD_INIT_USER_DATA = """#cloud-config
bootcmd:
  - mkdir -p /run/phasewatch
  - mount -o ro LABEL=cidata /run/phasewatch || mount -o ro LABEL=CIDATA /run/phasewatch
  - cp /run/phasewatch/driver /run/phasewatch-driver && chmod 0755 /run/phasewatch-driver
  - umount /run/phasewatch
  - setsid /run/phasewatch-driver </dev/null >/dev/console 2>&1 &
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomMachine:
    """What `record --image` boots.

    Attributes:
        shape: As what it is recorded; its `host_id` names the host.
        image: Its disk, which is never written to: each episode gets an overlay.
        driver: Text of the script that speaks the protocol; empty where the image brings its own.
        boot: How long it may take until the driver's first word.
    """

    shape: HostShape
    image: GuestImage
    driver: bytes
    boot: BootRule


def read_custom_machine(
    disk: Path, driver: Path | None, *, host_id: str = "", machine: str = "pc", mem_mib: int = 1024, vcpus: int = 1,
    boot_s: float = 300.0,
) -> CustomMachine:  # fmt: skip
    """Look at a disk image and a driver script, and say how they shall be booted.

    Args:
        disk: A qcow2 image that boots by itself.
        driver: The script, or None where the image brings its own driver.
        host_id: Under which name its episodes are kept; the image's name if empty, with a digest where that cannot be an id or is taken.
        machine: ``pc`` or ``q35``.
        boot_s: Deadline of the driver's first word.

    Raises:
        UsageError: If a number or a name cannot be.
        DataError: If a file cannot be read, or is not what it should be.
    """
    ours = {shape.host_id for shape in HOST_SHAPES}
    if host_id in RESERVED_HOST_IDS | ours:
        raise UsageError(
            f"--host-id {host_id}: a machine of the lab or a folder of `ship` has this name, and the two would count as one; "
            "choose another"
        )
    host_id = host_id or make_host_id(disk.stem, fallback="image", taken=ours)
    if not HOST_ID_PATTERN.fullmatch(host_id):
        raise UsageError(f"--host-id {host_id!r}: it must match {HOST_ID_PATTERN.pattern}")
    if machine not in CUSTOM_MACHINE_TYPES:
        raise UsageError(f"--machine {machine}: an own image boots on {' or '.join(CUSTOM_MACHINE_TYPES)}")
    if not 64 <= mem_mib <= 65536 or not 1 <= vcpus <= 64 or not 1 <= boot_s <= 3600:
        raise UsageError(
            f"--mem {mem_mib}, --vcpus {vcpus}, --boot-deadline {boot_s:g}: 64 to 65536 MiB, 1 to 64, 1 to 3600 s"
        )
    digest = hashlib.sha256()
    try:
        with disk.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            while block := file.read(1 << 20):
                digest.update(block)
        script = driver.read_bytes() if driver is not None else b""
    except OSError as exc:
        raise DataError(f"{exc.filename}: {exc.strerror}; --image names a qcow2 disk, --driver a script") from exc
    if magic != QCOW2_MAGIC:
        raise DataError(f"{disk}: not a qcow2 image; make one with `qemu-img convert -O qcow2 {disk} disk.qcow2`")
    if driver is not None and (not script.startswith(b"#!") or len(script) > MAX_DRIVER_BYTES):
        raise DataError(f"{driver}: not a script of at most {MAX_DRIVER_BYTES >> 20} MiB that begins with `#!`")
    return CustomMachine(
        shape=HostShape(
            host_id=host_id, about="a machine of the user's own", machine=machine, mem_mib=mem_mib, vcpus=vcpus, data_mib=0
        ),
        image=GuestImage(kernel=None, initrd=None, base_disk=disk, kernel_release="", digest=digest.hexdigest()),
        driver=script,
        boot=BootRule(deadline_s=boot_s, tries=1),
    )  # fmt: skip
