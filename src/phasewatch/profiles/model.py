"""The types of the workload table: profiles, samples, intensities, safety bounds, infection routines."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import exp, log
from typing import TYPE_CHECKING

from phasewatch.types import SampleKind

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "N_SAMPLE_GROUPS",
    "ContactForm",
    "ContentClass",
    "InfectionRoutine",
    "IntensityRange",
    "ProfileSample",
    "SafetyBounds",
    "WorkloadProfile",
    "draw_intensities",
    "parse_intensities",
]

N_SAMPLE_GROUPS = 4  # sample i of a profile belongs to group i mod 4; held_out_sample holds out a group


class ContentClass(StrEnum):
    """The content of the files that a workload writes."""

    NONE = "none"
    TEXT = "text"
    CODE = "code"
    PACKED = "packed"
    RANDOM = "random"
    MIXED = "mixed"


class ContactForm(StrEnum):
    """How malware that waits (armed or dormant) keeps in touch with its server."""

    NONE = "none"
    DNS = "dns"
    HTTP = "http"
    LONG_POLL = "long-poll"
    JITTER = "jitter"


@dataclass(frozen=True, slots=True, kw_only=True)
class IntensityRange:
    """One intensity; its value is drawn for each episode, log-uniform between `low` and `high`."""

    name: str
    low: float
    high: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyBounds:
    """Limits of a profile in one episode of at most ten minutes; a test checks each sample."""

    written_bytes: int
    sent_bytes: int
    processes: int
    networks: tuple[str, ...] = ("10.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSample:
    """One variant of a profile.

    Attributes:
        since: Version of the laboratory that introduced it; a plan draws only samples up to its own version.
        images: Guest images that can play it.
        content: Content of the files that it writes.
        twin: The workload that looks alike from outside: a benign kind of a malicious sample, or
            ``profile/sample`` of a benign kind. Empty without one.
        twin_reason: What the two have in common.
        weight: How many times as often as a kind of weight 1 a walk of loads draws it.
    """

    name: str
    about: str
    knobs: tuple[IntensityRange, ...]
    since: int = 1
    images: tuple[str, ...] = ("busybox", "debian")
    content: ContentClass = ContentClass.RANDOM
    twin: str = ""
    twin_reason: str = ""
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadProfile:
    """A kind of emulated malware, or the benign loads.

    Attributes:
        attack: ATT&CK technique ids that it resembles.
        samples: Its variants; sample i belongs to sample group i mod 4.
        bounds: Limits that every sample keeps.
    """

    name: str
    kind: SampleKind
    about: str
    attack: tuple[str, ...]
    samples: tuple[ProfileSample, ...]
    bounds: SafetyBounds


@dataclass(frozen=True, slots=True, kw_only=True)
class InfectionRoutine:
    """One way to infect a machine. Every malicious sample of a group uses only the routines of its group.

    Attributes:
        group: Sample group, 0 to 3, so that a group that is held out holds out its routines.
        attack: ATT&CK technique ids that it resembles.
    """

    name: str
    about: str
    group: int
    attack: tuple[str, ...]
    images: tuple[str, ...] = ("busybox", "debian")


def parse_intensities(text: str) -> tuple[IntensityRange, ...]:
    """Parse groups of `name low high unit`, separated by commas."""
    parts = [part.split() for part in text.split(",") if part.strip()]
    return tuple(
        IntensityRange(name=name, low=float(low), high=float(high), unit=unit) for name, low, high, unit in parts
    )


def draw_intensities(sample: ProfileSample, rng: np.random.Generator) -> dict[str, float]:
    """Draw the intensities of one episode, log-uniform, in the order of the sample's knobs."""
    return {knob.name: float(exp(rng.uniform(log(knob.low), log(knob.high)))) for knob in sample.knobs}
