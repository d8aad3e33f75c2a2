"""Custom workloads and custom machines.

A profile file (TOML) becomes a profile, its scripts and a plan (`parse_workload`, `build_custom_sessions`). A disk
image with a driver script becomes a machine to record on (`read_custom_machine`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
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

__all__ = [
    "CLOUD_INIT_META_DATA",
    "CLOUD_INIT_USER_DATA",
    "CUSTOM_NAME_PATTERN",
    "CustomMachine",
    "CustomMachineOptions",
    "CustomProfile",
    "CustomRecording",
    "CustomSample",
    "CustomWorkload",
    "build_custom_sessions",
    "build_unscripted_workload",
    "parse_workload",
    "read_custom_machine",
]

CUSTOM_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")  # the guest's driver keeps 31 characters
_KNOB_NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,22}")  # becomes a shell variable
_MAX_KNOBS = 16  # the guest's driver keeps 24, and its line has 1 KiB
_MAX_SAMPLES = 64
_MAX_EPISODES = 10_000
_RESERVED_VARIABLES = ("seed", "phase", "sample")  # variables that every script has
_MAX_SCRIPT_BYTES = 64 << 10
_NAME_RULE = "expected 1 to 31 of the characters a-z, 0-9 and dash"

_QCOW2_MAGIC = b"QFI\xfb"
_MAX_DRIVER_BYTES = 1 << 20
_MACHINE_TYPES = ("pc", "q35")  # those with a firmware that boots a disk

# The seed disk with the driver is labelled `cidata`. Where the guest runs cloud-init, it finds these two files and
# starts the driver. Any other guest mounts the disk and starts `driver` itself.
CLOUD_INIT_META_DATA = "instance-id: phasewatch\nlocal-hostname: guest\n"
CLOUD_INIT_USER_DATA = """#cloud-config
bootcmd:
  - mkdir -p /run/phasewatch
  - mount -o ro LABEL=cidata /run/phasewatch || mount -o ro LABEL=CIDATA /run/phasewatch
  - cp /run/phasewatch/driver /run/phasewatch-driver && chmod 0755 /run/phasewatch-driver
  - umount /run/phasewatch
  - setsid /run/phasewatch-driver </dev/null >/dev/console 2>&1 &
"""


class CustomSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sample of a profile file.

    Attributes:
        knobs: Name → lowest and highest value. A value is drawn log-uniform for each episode and passed to the scripts
            as a variable.
        phases: Phase → script that the guest's shell runs when the phase begins. A phase without a script is quiet.
    """

    name: str
    about: str = ""
    knobs: dict[str, tuple[float, float]] = {}
    phases: dict[Phase, str] = {}


class CustomRecording(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The section `recording` of a profile file; its keys mean the same as in `PlanSpec`."""

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
    """The contents of a profile file."""

    name: str
    samples: tuple[CustomSample, ...]
    kind: SampleKind = SampleKind.EMULATED
    about: str = ""
    attack: tuple[str, ...] = ()
    recording: CustomRecording = CustomRecording()


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomWorkload:
    """A custom profile with its scripts and its plan.

    Attributes:
        profile: The profile; its safety bounds are zero and are not tested.
        scripts: ``(sample, phase)`` → shell text.
        spec: The plan that its sessions are drawn from.
    """

    profile: WorkloadProfile
    scripts: Mapping[tuple[str, Phase], str]
    spec: PlanSpec


def parse_workload(text: str, *, where: str) -> CustomWorkload:
    """Parse a profile file.

    Args:
        text: TOML.
        where: Name of the file, for messages.

    Raises:
        PlanError: If the text is not TOML, has unknown or missing keys, or has a value out of range.
    """
    custom = parse_toml(text, CustomProfile, where=where)
    try:
        _check_profile(custom)
        for sample in custom.samples:
            _check_sample(sample, custom.kind)
    except PlanError as exc:
        raise PlanError(f"{where}: {exc}") from exc
    spec = _build_spec(custom)
    try:
        check_plan_spec(spec)
    except PlanError as exc:
        raise PlanError(f"{where}: recording: {exc}") from exc
    return CustomWorkload(
        profile=_build_profile(custom),
        scripts={(sample.name, phase): script for sample in custom.samples for phase, script in sample.phases.items()},
        spec=spec,
    )


def _build_spec(custom: CustomProfile) -> PlanSpec:
    recording = custom.recording
    return PlanSpec(
        name=custom.name,
        seed=recording.seed,
        hosts=tuple(PlanHost(host_id=host) for host in recording.hosts),
        lab_per_host=recording.episodes,
        benign_share=1.0 if custom.kind is SampleKind.BENIGN else recording.benign_share,
        agent_share=recording.agent_share,
        settle_s=recording.settle_s,
        episode_s=recording.episode_s,
        phase_s=recording.phase_s,
        chatter_s=recording.chatter_s,
    )


def _build_profile(custom: CustomProfile) -> WorkloadProfile:
    return WorkloadProfile(
        name=custom.name,
        kind=custom.kind,
        about=custom.about,
        attack=custom.attack,
        samples=tuple(
            ProfileSample(
                name=sample.name,
                about=sample.about,
                knobs=tuple(
                    IntensityRange(name=name, low=low, high=high, unit="1")
                    for name, (low, high) in sample.knobs.items()
                ),
            )
            for sample in custom.samples
        ),
        # Not tested as the built-in profiles are: the author of a custom workload is responsible for it.
        bounds=SafetyBounds(written_bytes=0, sent_bytes=0, processes=0),
    )


def build_unscripted_workload(name: str) -> CustomWorkload:
    """Build the workload of a custom machine whose driver runs everything: a live profile with one sample.

    Raises:
        PlanError: If the name is not allowed.
    """
    text = f'name = "{name}"\nkind = "live"\n[[samples]]\nname = "{name}"\n[recording]\nagent_share = 0\n'
    return parse_workload(text, where="the driver's name")


def _check_profile(custom: CustomProfile) -> None:
    """Raise PlanError if a name, the number of samples or the section `recording` is not allowed."""
    if not CUSTOM_NAME_PATTERN.fullmatch(custom.name):
        raise PlanError(f"name {custom.name!r}: {_NAME_RULE}")
    if custom.name in {row.name for row in PROFILES}:
        raise PlanError(f"name {custom.name!r}: a profile of phasewatch has this name; choose another name")
    names = {sample.name for sample in custom.samples}
    if not 1 <= len(custom.samples) <= _MAX_SAMPLES or len(names) != len(custom.samples):
        raise PlanError(f"samples: expected 1 to {_MAX_SAMPLES} samples with different names")
    if not 1 <= custom.recording.episodes <= _MAX_EPISODES:
        raise PlanError(f"recording: episodes: {custom.recording.episodes}, expected 1 to {_MAX_EPISODES}")
    if not custom.recording.hosts:
        raise PlanError("recording: hosts: expected at least one")


def _check_sample(sample: CustomSample, kind: SampleKind) -> None:
    """Raise PlanError if a name, a knob or a script of a sample is not allowed."""
    if not CUSTOM_NAME_PATTERN.fullmatch(sample.name):
        raise PlanError(f"sample {sample.name!r}: {_NAME_RULE}")
    if len(sample.knobs) > _MAX_KNOBS:
        raise PlanError(f"sample {sample.name}: {len(sample.knobs)} knobs; at most {_MAX_KNOBS}")
    for knob, (low, high) in sample.knobs.items():
        if not _KNOB_NAME_PATTERN.fullmatch(knob):
            raise PlanError(
                f"sample {sample.name}: knob {knob!r}: expected 1 to 23 of the characters a-z, 0-9 and underscore, "
                "a letter first"
            )
        if knob in _RESERVED_VARIABLES:
            raise PlanError(
                f"sample {sample.name}: knob {knob!r}: a variable of that name is set already; choose another"
            )
        if not 0 < low <= high < 1e12:
            raise PlanError(f"sample {sample.name}: knob {knob}: {low:g} to {high:g}; expected 0 < lowest <= highest")
    for phase, script in sample.phases.items():
        if phase not in PHASES or (kind is SampleKind.BENIGN and phase is not Phase.CLEAN):
            allowed = "clean, because it is benign" if kind is SampleKind.BENIGN else ", ".join(PHASES)
            raise PlanError(f"sample {sample.name}: phases: {phase}: only {allowed}")
        if len(script.encode()) > _MAX_SCRIPT_BYTES or "\0" in script:
            raise PlanError(
                f"sample {sample.name}: phases: {phase}: a script has at most {_MAX_SCRIPT_BYTES >> 10} KiB and no NUL"
            )


def build_custom_sessions(
    workload: CustomWorkload, *, hosts: tuple[str, ...] = (), alone: bool = False
) -> tuple[RecordingSession, ...]:
    """Build the sessions of a workload: samples in turn, in pairs of one sample, with benign episodes in between.

    Args:
        workload: The profile and its plan.
        hosts: Host ids that replace those of the plan. With `alone` they need not be known host shapes.
        alone: Whether to record one VM at a time, as on a custom machine.
    """
    sessions: list[RecordingSession] = []
    for host_id in hosts or tuple(host.host_id for host in workload.spec.hosts):
        single = alone or find_host_shape(host_id).is_alone
        slots = [_build_custom_slot(workload, host_id, index) for index in range(workload.spec.lab_per_host)]
        while slots:
            first = slots.pop(0)
            # Two episodes of a session have the same sample; otherwise no sample could be held out.
            same = (s for s in slots if (s.profile, s.sample_name) == (first.profile, first.sample_name))
            second = next(same, None)
            pair = (first,) if single or second is None else (first, second)
            slots = [slot for slot in slots if slot not in pair]
            name = f"{workload.spec.name}-{len(sessions):04d}"
            sessions.append(RecordingSession(session=name, host_id=host_id, slots=pair))
    return tuple(sessions)


def _build_custom_slot(workload: CustomWorkload, host_id: str, index: int) -> RecordingSlot:
    spec, profile = workload.spec, workload.profile
    seed = compute_slot_seed(spec.name, spec.seed, host_id, index)
    # Benign episodes are spread evenly: the n-th is benign where the running total of the share passes an integer.
    is_benign = profile.kind is SampleKind.BENIGN
    before, after = int(index * spec.benign_share), int((index + 1) * spec.benign_share)
    is_idle = not is_benign and after > before
    sample = profile.samples[(index if is_benign else index - before) % len(profile.samples)]
    duration_s = draw_episode_length(build_rng(seed, "length"), between_s=spec.episode_s)
    is_clean = is_idle or is_benign
    return RecordingSlot(
        index=index,
        host_id=host_id,
        role=EpisodeRole.LAB,
        profile=BENIGN_PROFILE if is_idle else profile.name,
        sample_name=IDLE_SAMPLE if is_idle else sample.name,
        sample_kind=SampleKind.BENIGN if is_idle else profile.kind,
        plan_seed=seed,
        agent=bool(build_rng(seed, "agent").random() < spec.agent_share),
        settle_s=round(float(build_rng(seed, "settle").uniform(*spec.settle_s)), 3),
        duration_s=duration_s,
        phases=((Phase.CLEAN, duration_s),) if is_clean else draw_phases(spec, build_rng(seed, "walk"), duration_s),
        knobs=() if is_idle else tuple(draw_intensities(sample, build_rng(seed, "knobs")).items()),
        chatter_s=round(draw_log_uniform(build_rng(seed, "chatter"), spec.chatter_s), 3),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomMachine:
    """A machine that `record --image` boots.

    Attributes:
        shape: Its host shape; its `host_id` names the host in the store.
        image: Its disk, which is never written to: each episode gets an overlay.
        driver: Text of the driver script; empty if the image brings its own.
        boot: Deadline of the driver's ready message.
    """

    shape: HostShape
    image: GuestImage
    driver: bytes
    boot: BootRule


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomMachineOptions:
    """How a custom machine is named and started.

    Attributes:
        host_id: Host name in the store. If empty, the name of the image, with a digest where that cannot be a host id
            or is taken.
        machine: ``pc`` or ``q35``.
        mem_mib: Memory in MiB.
        vcpus: Number of vCPUs.
        boot_s: Deadline of the driver's ready message, in seconds.
    """

    host_id: str = ""
    machine: str = "pc"
    mem_mib: int = 1024
    vcpus: int = 1
    boot_s: float = 300.0


def read_custom_machine(disk: Path, driver: Path | None, options: CustomMachineOptions) -> CustomMachine:
    """Read a disk image and a driver script, and build the machine to boot.

    Args:
        disk: A bootable qcow2 image.
        driver: The script, or None if the image brings its own driver.
        options: Name and hardware of the machine.

    Raises:
        UsageError: If a number or a name is not allowed.
        DataError: If a file cannot be read or has the wrong format.
    """
    lab_ids = {shape.host_id for shape in HOST_SHAPES}
    if options.host_id in RESERVED_HOST_IDS | lab_ids:
        raise UsageError(
            f"--host-id {options.host_id}: a machine of the lab or a folder of `ship` has this name, and the two would "
            "count as one; choose another"
        )
    host_id = options.host_id or make_host_id(disk.stem, fallback="image", taken=lab_ids)
    _check_machine_options(options, host_id)
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
    if magic != _QCOW2_MAGIC:
        raise DataError(f"{disk}: not a qcow2 image; make one with `qemu-img convert -O qcow2 {disk} disk.qcow2`")
    if driver is not None and (not script.startswith(b"#!") or len(script) > _MAX_DRIVER_BYTES):
        raise DataError(f"{driver}: not a script of at most {_MAX_DRIVER_BYTES >> 20} MiB that begins with `#!`")
    return CustomMachine(
        shape=HostShape(
            host_id=host_id,
            about="a custom machine",
            machine=options.machine,
            mem_mib=options.mem_mib,
            vcpus=options.vcpus,
            data_mib=0,
        ),
        image=GuestImage(kernel=None, initrd=None, base_disk=disk, kernel_release="", digest=digest.hexdigest()),
        driver=script,
        boot=BootRule(deadline_s=options.boot_s, tries=1),
    )


def _check_machine_options(options: CustomMachineOptions, host_id: str) -> None:
    if not HOST_ID_PATTERN.fullmatch(host_id):
        raise UsageError(f"--host-id {host_id!r}: it must match {HOST_ID_PATTERN.pattern}")
    if options.machine not in _MACHINE_TYPES:
        raise UsageError(f"--machine {options.machine}: a custom image boots on {' or '.join(_MACHINE_TYPES)}")
    if not (64 <= options.mem_mib <= 65536 and 1 <= options.vcpus <= 64 and 1 <= options.boot_s <= 3600):
        raise UsageError(
            f"--mem {options.mem_mib}, --vcpus {options.vcpus}, --boot-deadline {options.boot_s:g}: expected "
            "64 to 65536 MiB, 1 to 64, 1 to 3600 s"
        )
