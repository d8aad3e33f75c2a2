"""The workload table: all profiles and their samples, and how to look them up."""

from __future__ import annotations

from dataclasses import replace

from phasewatch.errors import UsageError, suggest_names
from phasewatch.profiles.benign import IDLE_SAMPLES, build_benign_profile, build_image_sample, read_image_kinds
from phasewatch.profiles.malicious import COMMON_INTENSITIES, MALICIOUS_TABLE
from phasewatch.profiles.model import N_SAMPLE_GROUPS, ProfileSample, WorkloadProfile
from phasewatch.types import BENIGN_PROFILE

__all__ = [
    "PROFILES",
    "find_profile",
    "find_sample",
    "find_sample_group",
    "list_samples",
]


def _build_table() -> tuple[WorkloadProfile, ...]:
    image_kinds = read_image_kinds()
    malicious = tuple(
        replace(
            row,
            samples=row.samples
            + tuple(
                replace(sample, knobs=COMMON_INTENSITIES + sample.knobs)
                for sample in (build_image_sample(each) for each in image_kinds.sample if each.profile == row.name)
            ),
        )
        for row in MALICIOUS_TABLE
    )
    twins: dict[str, tuple[str, str]] = {}
    for row in malicious:
        for sample in row.samples:
            if sample.twin:
                twins.setdefault(sample.twin, (f"{row.name}/{sample.name}", sample.twin_reason))
    return (*malicious, build_benign_profile(twins, image_kinds))


PROFILES: tuple[WorkloadProfile, ...] = _build_table()


def find_profile(name: str) -> WorkloadProfile:
    """Return the profile with this name.

    Raises:
        UsageError: If no profile has this name; the message suggests the nearest.
    """
    for row in PROFILES:
        if row.name == name:
            return row
    raise UsageError(f"no profile {name!r}; {suggest_names(name, [row.name for row in PROFILES])}")


def find_sample(profile_name: str, name: str) -> ProfileSample:
    """Return a sample of a profile.

    Raises:
        UsageError: If the profile or the sample does not exist; the message suggests the nearest.
    """
    rows = find_profile(profile_name).samples
    for row in rows:
        if row.name == name:
            return row
    raise UsageError(f"{profile_name} has no sample {name!r}; {suggest_names(name, [row.name for row in rows])}")


def find_sample_group(profile_name: str, name: str) -> int:
    """Return the sample group of a sample, 0 to 3: its index in the profile modulo 4.

    Raises:
        UsageError: If the profile or the sample does not exist.
    """
    sample = find_sample(profile_name, name)
    return find_profile(profile_name).samples.index(sample) % N_SAMPLE_GROUPS


def list_samples(
    profile_name: str, group: int, *, workloads: int = 1, image: str = "busybox"
) -> tuple[ProfileSample, ...]:
    """Return the samples of a profile's group that a version of the laboratory has and a guest image can play.

    Raises:
        UsageError: If the profile does not exist.
    """
    rows = find_profile(profile_name).samples[group::N_SAMPLE_GROUPS]
    return tuple(row for row in rows if row.since <= workloads and image in row.images)


def _check_table() -> None:
    """Raise ValueError at import if the table is inconsistent."""
    for row in PROFILES:
        names = [s.name for s in row.samples]
        if len(names) < N_SAMPLE_GROUPS or len(set(names)) != len(names):
            raise ValueError(f"profiles: {row.name} needs at least {N_SAMPLE_GROUPS} samples with different names")
        for sample in row.samples:
            if any(not 0 < knob.low < knob.high for knob in sample.knobs):
                raise ValueError(f"profiles: {row.name}/{sample.name} has a knob without a range")
            if bool(sample.twin) != bool(sample.twin_reason):
                raise ValueError(f"profiles: {row.name}/{sample.name} has a twin without a reason, or no twin")
            if sample.twin and row.name != BENIGN_PROFILE:
                find_sample(BENIGN_PROFILE, sample.twin)
    for group, name in enumerate(IDLE_SAMPLES):
        if find_sample_group(BENIGN_PROFILE, name) != group:
            raise ValueError(f"profiles: {name} is not in sample group {group}")


_check_table()
