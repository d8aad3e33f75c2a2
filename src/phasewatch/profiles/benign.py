"""The benign kinds: what ordinary machines do, and four forms of doing nothing.

Volumes of reads and writes cover what real programs do: 100 kB/s to 4 MB/s, most of it from and to the disk. Source:
M. Hirano et al., RanSAP, 2022, doi 10.1016/j.fsidi.2021.301314 (Firefox, Excel, Zip and AESCrypt below real Windows).
"""

from __future__ import annotations

from importlib.resources import files

import msgspec

from phasewatch.profiles.model import ContentClass, ProfileSample, SafetyBounds, WorkloadProfile, parse_intensities
from phasewatch.types import BENIGN_PROFILE, SampleKind

__all__ = ["IDLE_SAMPLE", "IDLE_SAMPLES", "ImageKinds", "ImageSample", "build_benign_profile", "read_image_kinds"]

IDLE_SAMPLE = "idle"  # the benign sample without a load
# What an idle machine does beside background events, one form for each sample group.
IDLE_SAMPLES = (IDLE_SAMPLE, "idle-cron", "idle-timers", "idle-lookups")
# Real programs work on the disk, most small emulated ones hardly do. Without the weight, the median loaded window of an
# ordinary machine read nothing, and reads alone told malware from work.
_HEAVY_BPS, _HEAVY_WEIGHT = 2e6, 3

_FIRST: tuple[tuple[str, str, str], ...] = (
    ("idle", "only background events", ""),
    ("compile", "one process per unit: read, compute, write an object file", "duty 0.2 0.9 1"),
    ("backup", "copies the documents", "rate_kbps 100 3000 kB/s"),
    ("poller", "polls a web server", "period_s 1.5 12 s"),
    ("compress", "compresses documents", "duty 0.1 0.9 1"),
    ("find-grep", "searches the documents", "period_s 0.5 8 s"),
    ("download", "downloads files", "rate_kbps 50 1000 kB/s, period_s 2 15 s"),
    ("upload", "uploads a backup", "rate_kbps 10 400 kB/s, period_s 2 15 s"),
    ("hash", "computes digests of documents", "duty 0.1 0.9 1"),
    ("database", "small random writes with fsync", "rate_kbps 20 600 kB/s"),
    ("health-checks", "connects to known servers on known ports", "period_s 2 20 s"),
    ("package-install", "downloads and unpacks packages", "rate_kbps 100 1500 kB/s, period_s 2 20 s"),
    ("render", "computes", "duty 0.1 0.9 1"),
    ("log-rotate", "writes and compresses logs", "rate_kbps 30 1000 kB/s, period_s 2 20 s"),
)

# Name, description, intensities, content of its files. The order decides the sample group, so new rows come last.
_SECOND: tuple[tuple[str, str, str, str], ...] = (
    ("idle-timers", "wakes up a few times a second", "", "none"),
    ("idle-lookups", "looks up a name now and then", "", "none"),
    ("browse", "loads pages of many parts and writes a cache", "rate_kbps 300 3000 kB/s, period_s 1 8 s", "packed"),
    ("idle-cron", "a short job every half minute", "", "text"),
    ("spreadsheet", "opens, computes and saves large documents", "rate_kbps 800 6000 kB/s, period_s 0.5 3 s", "packed"),
    ("archive", "packs folders into archives, removes some originals", "rate_kbps 500 5000 kB/s", "packed"),
    ("encrypt-files", "the owner encrypts documents", "rate_kbps 600 6000 kB/s", "random"),
    ("photo-import", "imports pictures and makes previews", "rate_kbps 500 6000 kB/s, period_s 0.5 5 s", "packed"),
    ("stream-video", "plays a video from a server through a cache file", "rate_kbps 100 1200 kB/s", "packed"),
    ("virus-scan", "reads and digests all files", "rate_kbps 500 6000 kB/s", "none"),
    ("sync-folders", "compares two folders, copies what differs", "rate_kbps 400 5000 kB/s, period_s 0.5 4 s", "mixed"),
    ("index-build", "reads all files and writes a search index", "rate_kbps 300 4000 kB/s", "text"),
    ("software-update", "asks for updates, replaces programs", "period_s 4 25 s, piece_kib 100 1000 KiB", "packed"),
    ("chat", "one connection with short messages and a long poll", "period_s 1.5 12 s", "none"),
    ("monitor-agent", "runs short programs and reports their output", "period_s 3 20 s", "text"),
    ("name-lookups", "resolves many names, some of which do not exist", "rate_hz 0.5 8 1/s", "none"),
    ("inventory-scan", "connects to the ports of its own network", "rate_hz 0.5 12 1/s, pause_s 2 15 s", "none"),
    ("compact-database", "rewrites a database file in one pass", "rate_kbps 400 5000 kB/s, period_s 1 6 s", "mixed"),
    ("video-encode", "reads, computes, and writes a smaller file", "rate_kbps 200 3000 kB/s, duty 0.2 0.9 1", "packed"),
    ("memory-cache", "reads and writes a large table in memory", "duty 0.1 0.9 1, mem_mib 4 48 MiB", "none"),
    ("mail", "fetches, files and sends messages", "period_s 1 10 s, piece_kib 5 500 KiB", "text"),
    ("ledger", "appends records and syncs each", "rate_hz 1 25 1/s", "text"),
    ("batch-report", "queries a database, writes and sends a report", "rate_kbps 20 400 kB/s, period_s 3 20 s", "text"),
    ("log-shipper", "collects logs and uploads them in batches", "period_s 3 20 s, piece_kib 30 250 KiB", "text"),
    ("thumbnails", "reads pictures, computes, writes small files", "rate_kbps 300 4000 kB/s, duty 0.2 0.9 1", "packed"),
    ("test-suite", "writes and runs many short programs", "period_s 0.5 6 s", "code"),
)


class ImageSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A workload that is a program of one guest image: a benign kind, or with `profile` a malicious sample.

    Attributes:
        reads_bps, writes_bps: Expected smallest and largest disk volume, in bytes per second.
        twin, why: The workload that looks alike from outside, and what the two have in common.
    """

    name: str
    about: str
    intensities: str = ""
    content: ContentClass = ContentClass.MIXED
    twin: str = ""
    why: str = ""
    profile: str = BENIGN_PROFILE
    reads_bps: tuple[float, float] = (0.0, 0.0)
    writes_bps: tuple[float, float] = (0.0, 0.0)
    image: str = "debian"


class ImageKinds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The workloads that a guest image brings as programs."""

    kind: tuple[ImageSample, ...] = ()
    sample: tuple[ImageSample, ...] = ()


def read_image_kinds() -> ImageKinds:
    """Read the table of the Debian image's programs; empty if the package has none.

    Raises:
        msgspec.ValidationError: If the table is not valid.
    """
    table = files("phasewatch").joinpath("lab/guest/debian/kinds.toml")
    if not table.is_file():
        return ImageKinds()
    return msgspec.toml.decode(table.read_bytes(), type=ImageKinds)


def build_image_sample(row: ImageSample, *, common: str = "") -> ProfileSample:
    """Build the sample of a program of an image."""
    is_heavy = row.profile == BENIGN_PROFILE and max(*row.reads_bps, *row.writes_bps) >= _HEAVY_BPS
    return ProfileSample(
        name=row.name,
        about=row.about,
        knobs=parse_intensities(common) + parse_intensities(row.intensities),
        since=2,
        images=(row.image,),
        content=row.content,
        twin=row.twin,
        twin_reason=row.why,
        weight=_HEAVY_WEIGHT if is_heavy else 1,
    )


def build_benign_profile(twins: dict[str, tuple[str, str]], image_kinds: ImageKinds) -> WorkloadProfile:
    """Build the benign profile.

    Args:
        twins: Benign kind → malicious twin and the reason.
        image_kinds: Programs of a guest image, which come last.
    """

    def build(name: str, about: str, knobs: str, since: int, content: str) -> ProfileSample:
        twin, reason = twins.get(name, ("", ""))
        ranges = parse_intensities(knobs)
        is_heavy = any(knob.unit == "kB/s" and 1000 * knob.high >= _HEAVY_BPS for knob in ranges)
        return ProfileSample(
            name=name,
            about=about,
            knobs=ranges,
            since=since,
            content=ContentClass(content),
            twin=twin,
            twin_reason=reason,
            weight=_HEAVY_WEIGHT if is_heavy else 1,
        )

    return WorkloadProfile(
        name=BENIGN_PROFILE,
        kind=SampleKind.BENIGN,
        about="Benign loads.",
        attack=(),
        bounds=SafetyBounds(written_bytes=int(4e9), sent_bytes=int(4e8), processes=24),
        samples=(
            *(build(name, about, knobs, 1, "random") for name, about, knobs in _FIRST),
            *(build(name, about, knobs, 2, content) for name, about, knobs, content in _SECOND),
            *(build_image_sample(row) for row in image_kinds.kind),
        ),
    )
