"""Profiles, samples, intensities and safety bounds of the emulated workloads, and the random walk over phases.

The lab, the guest program, the simulator and the docs share this table. Every profile is an emulation: CPU time, files
on a scratch disk, and sockets to the recorder's own sink. The ATT&CK technique ids name what a profile resembles; there
is no exploit and no payload.
"""

from __future__ import annotations

from phasewatch.profiles.benign import IDLE_SAMPLE, IDLE_SAMPLES
from phasewatch.profiles.malicious import COMMON_INTENSITIES, ROUTINES, list_routines
from phasewatch.profiles.model import (
    N_SAMPLE_GROUPS,
    ContactForm,
    ContentClass,
    InfectionRoutine,
    IntensityRange,
    ProfileSample,
    SafetyBounds,
    WorkloadProfile,
    draw_intensities,
)
from phasewatch.profiles.phase_walk import (
    EPISODE_RANGE_S,
    PHASE_RANGE_S,
    START_PROBABILITIES,
    TRANSITION_PROBABILITIES,
    draw_episode_length,
    draw_phase_walk,
)
from phasewatch.profiles.table import PROFILES, find_profile, find_sample, find_sample_group, list_samples

__all__ = [
    "COMMON_INTENSITIES",
    "EPISODE_RANGE_S",
    "IDLE_SAMPLE",
    "IDLE_SAMPLES",
    "N_SAMPLE_GROUPS",
    "PHASE_RANGE_S",
    "PROFILES",
    "ROUTINES",
    "START_PROBABILITIES",
    "STEP_KNOBS",
    "TRANSITION_PROBABILITIES",
    "ContactForm",
    "ContentClass",
    "InfectionRoutine",
    "IntensityRange",
    "ProfileSample",
    "SafetyBounds",
    "WorkloadProfile",
    "draw_episode_length",
    "draw_intensities",
    "draw_phase_walk",
    "find_profile",
    "find_sample",
    "find_sample_group",
    "list_routines",
    "list_samples",
]

# Numbers that the host sends with a step beside the intensities: planned seconds of the phase, and the share of reads
# that must come from the disk instead of the guest's page cache.
STEP_KNOBS = ("seconds", "cold")
