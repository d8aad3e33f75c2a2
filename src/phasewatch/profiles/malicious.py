"""The malicious profiles, their samples and the infection routines: emulations without exploit and payload."""

from __future__ import annotations

from phasewatch.profiles.model import (
    ContentClass,
    InfectionRoutine,
    ProfileSample,
    SafetyBounds,
    WorkloadProfile,
    parse_intensities,
)
from phasewatch.types import SampleKind

__all__ = ["COMMON_INTENSITIES", "MALICIOUS_TABLE", "ROUTINES", "list_routines"]

# Intensities of arrival, infection and dormancy in every profile; low enough to resemble a package installation.
COMMON_INTENSITIES = parse_intensities(
    "payload_kib 50 2000 KiB, arrive_s 1 12 s, infect_mb 0.2 20 MB, infect_s 10 25 s, heartbeat_s 6 60 s"
)

# Malicious sample → the benign kind that looks alike from outside, and what the two have in common.
_TWINS: dict[str, tuple[str, str]] = {
    "cryptomine/full": ("render", "the same loop in the same slices"),
    "cryptomine/throttled": ("render", "the same loop in the same slices"),
    "cryptomine/bursty": ("hash", "the same computing, in blocks"),
    "cryptomine/memory-hard": ("memory-cache", "the same accesses to a large table"),
    "cryptomine/page-walk": ("memory-cache", "the same accesses to a large table"),
    "cryptomine/small-slices": ("render", "the same loop in shorter slices"),
    "cryptomine/plot-files": ("compact-database", "long sequential writes, then reads of the same files"),
    "ransom-walk/overwrite": ("encrypt-files", "the same encryption in place, by the owner"),
    "ransom-walk/write-new-delete-old": ("encrypt-files", "an encrypted copy replaces the original"),
    "ransom-walk/throttled": ("find-grep", "the same slow walk over the documents"),
    "ransom-walk/archive-delete": ("archive", "packs documents and removes the originals"),
    "ransom-walk/read-then-overwrite": ("virus-scan", "the first pass reads all documents"),
    "scan-and-dial/low-and-slow": ("health-checks", "the same connections at the same rate"),
    "scan-and-dial/lateral": ("inventory-scan", "the same ports of the same network"),
    "scan-and-dial/subnet-bursts": ("inventory-scan", "the same connections, in bursts"),
    "scan-and-dial/name-guess": ("name-lookups", "the same lookups, more of them without an answer"),
    "beacon-c2/fixed": ("poller", "requests of the same length at the same interval"),
    "beacon-c2/jittered": ("poller", "requests of the same length"),
    "beacon-c2/long-poll": ("chat", "the same request, kept open"),
    "beacon-c2/keep-alive": ("chat", "the same connection, kept open"),
    "beacon-c2/post-only": ("monitor-agent", "the same small reports"),
    "beacon-c2/tasking": ("monitor-agent", "the same commands and reports"),
    "exfil-drip/http-bulk": ("upload", "the same requests of the same length"),
    "exfil-drip/archive-first": ("upload", "packs documents, then the same requests"),
    "exfil-drip/screenshots": ("log-shipper", "uploads of equal length at equal intervals"),
    "exfil-drip/chunks": ("log-shipper", "uploads of equal length at equal intervals"),
    "exfil-drip/dump-database": ("batch-report", "the same queries, then one upload"),
    "dropper-persist/in-pieces": ("package-install", "the same downloads"),
    "dropper-persist/cron-like": ("find-grep", "the same short programs"),
    "dropper-persist/update-loop": ("software-update", "the same requests, files and renames"),
    "dropper-persist/script-farm": ("test-suite", "the same short programs"),
    "dropper-persist/clean-logs": ("log-rotate", "the same rewriting of logs"),
}


def _malicious_profile(
    name: str,
    about: str,
    attack: str,
    written: float,
    sent: float,
    first: tuple[tuple[str, str, str], ...],
    second: tuple[tuple[str, str, str], ...],
) -> WorkloadProfile:
    """Build a profile of the samples of laboratory version 1 and those that version 2 added."""
    samples = []
    for since, rows in ((1, first), (2, second)):
        for sample, words, knobs in rows:
            twin, reason = _TWINS.get(f"{name}/{sample}", ("", ""))
            samples.append(
                ProfileSample(
                    name=sample,
                    about=words,
                    knobs=COMMON_INTENSITIES + parse_intensities(knobs),
                    since=since,
                    content=ContentClass.RANDOM,
                    twin=twin,
                    twin_reason=reason,
                )
            )
    return WorkloadProfile(
        name=name,
        kind=SampleKind.EMULATED,
        about=about,
        attack=tuple(attack.split()),
        samples=tuple(samples),
        bounds=SafetyBounds(written_bytes=int(written), sent_bytes=int(sent), processes=24),
    )


MALICIOUS_TABLE: tuple[WorkloadProfile, ...] = (
    _malicious_profile("cryptomine", "Mines cryptocurrency.", "T1496", 2e9, 4e6, (
        ("full", "computes hashes nearly all the time", "duty 0.5 0.9 1"),
        ("throttled", "computes hashes for a fixed share of each tenth of a second", "duty 0.1 0.5 1"),
        ("bursty", "alternates between computing and pausing", "duty 0.2 0.8 1, period_s 2 20 s"),
        ("memory-hard", "computes hashes over a large table", "duty 0.15 0.9 1, mem_mib 4 32 MiB"),
    ), (
        ("long-blocks", "computes for half a minute, rests for half a minute", "duty 0.3 0.7 1, period_s 20 60 s"),
        ("ramp", "raises its share of the processor slowly", "duty 0.3 0.9 1"),
        ("chatty-pool", "keeps one connection to the pool and reports often", "duty 0.1 0.6 1, period_s 1 5 s"),
        ("plot-files", "writes large files and reads them again", "rate_kbps 100 2000 kB/s, duty 0.1 0.5 1"),
        ("small-slices", "computes in slices of a few milliseconds", "duty 0.1 0.6 1"),
        ("page-walk", "walks over many pages of memory", "duty 0.15 0.8 1, mem_mib 8 48 MiB"),
        ("two-rates", "alternates between a high and a low share", "duty 0.2 0.7 1, period_s 5 30 s"),
        ("rare-bursts", "computes in rare bursts at random times", "duty 0.2 0.6 1, period_s 3 15 s"),
    )),
    _malicious_profile("ransom-walk", "Encrypts documents, one after the other.", "T1486 T1083", 4e9, 2e6, (
        ("overwrite", "overwrites each file in place", "rate_kbps 200 4000 kB/s"),
        ("write-new-delete-old", "writes an encrypted copy, deletes the original", "rate_kbps 200 3000 kB/s"),
        ("intermittent", "overwrites the head of each file, with pauses", "rate_kbps 100 1500 kB/s, pause_s 1 8 s"),
        ("throttled", "as overwrite, at a low rate", "rate_kbps 20 200 kB/s"),
    ), (
        ("head-and-tail", "overwrites the first and the last 64 KiB of each file", "rate_kbps 100 1500 kB/s"),
        ("rename-first", "renames all files, then overwrites them", "rate_kbps 150 3000 kB/s"),
        ("archive-delete", "packs each file into an archive, deletes the original", "rate_kbps 100 2000 kB/s"),
        ("wipe", "overwrites each file without reading it", "rate_kbps 150 3000 kB/s"),
        ("small-first", "overwrites the smallest files first, in bursts", "rate_kbps 100 2000 kB/s, pause_s 1 10 s"),
        ("read-then-overwrite", "reads all files once, then overwrites them", "rate_kbps 150 3000 kB/s"),
        ("sparse", "overwrites one block in sixteen of each file", "rate_kbps 100 1500 kB/s"),
        ("copy-then-overwrite", "keeps an encrypted copy and overwrites the original", "rate_kbps 150 2000 kB/s"),
    )),
    _malicious_profile("scan-and-dial", "Scans for open ports and connects to them.", "T1046 T1018", 2e8, 2e7, (
        ("sequential", "address after address, twelve ports each", "rate_hz 2 20 1/s"),
        ("random", "random addresses and ports", "rate_hz 1 15 1/s"),
        ("low-and-slow", "one attempt every few seconds", "rate_hz 0.15 1.5 1/s"),
        ("one-port", "one port on many addresses", "rate_hz 1 15 1/s"),
    ), (
        ("subnet-bursts", "bursts over neighbouring addresses, with long pauses", "rate_hz 3 20 1/s, pause_s 3 20 s"),
        ("guess-passwords", "logs in again and again at a few addresses", "rate_hz 0.5 5 1/s"),
        ("slow-random", "random addresses, at most one in two seconds", "rate_hz 0.1 0.5 1/s"),
        ("name-guess", "looks up guessed names, most of which do not exist", "rate_hz 0.5 8 1/s"),
        ("read-banners", "connects, waits for the greeting, and goes on", "rate_hz 0.5 6 1/s"),
        ("lateral", "a few ports of the machines in its own network", "rate_hz 0.5 8 1/s"),
        ("probe-web", "asks many addresses for a page", "rate_hz 0.5 6 1/s"),
        ("two-speeds", "alternates between a fast and a slow scan", "rate_hz 1 12 1/s, pause_s 5 20 s"),
    )),
    _malicious_profile("beacon-c2", "Polls a command-and-control server.", "T1071.001 T1071.004 T1573", 2e8, 1e7, (
        ("fixed", "polls at a fixed interval", "period_s 1.5 12 s"),
        ("jittered", "polls at random intervals", "period_s 1.5 12 s"),
        ("dns-only", "polls by DNS TXT queries", "period_s 1 10 s"),
        ("long-poll", "keeps a request open until it is answered", "period_s 1.5 10 s"),
    ), (
        ("dns-tunnel", "sends data in long DNS names, several at a time", "period_s 1 10 s"),
        ("domain-hop", "tries names until one exists, then polls", "period_s 2 12 s"),
        ("rounds", "five quick requests, then a long pause", "period_s 8 40 s"),
        ("keep-alive", "one connection with a short message at intervals", "period_s 1.5 12 s"),
        ("tasking", "polls, runs short programs and reports", "period_s 3 20 s"),
        ("fallback", "tries other addresses before its server", "period_s 2 15 s"),
        ("post-only", "reports its state in small uploads", "period_s 1.5 12 s"),
        ("long-tail", "polls at intervals with a long tail", "period_s 1.5 10 s"),
    )),
    _malicious_profile("exfil-drip", "Exfiltrates documents.", "T1041 T1048.003 T1030", 4e8, 4e8, (
        ("http-bulk", "few large uploads", "rate_kbps 50 500 kB/s"),
        ("small-posts", "many small uploads", "rate_kbps 5 60 kB/s"),
        ("dns-labels", "data in the labels of DNS queries", "rate_kbps 0.2 2 kB/s"),
        ("low-and-slow", "small uploads with long pauses", "rate_kbps 5 30 kB/s"),
    ), (
        ("archive-first", "packs documents into an archive, then uploads it", "rate_kbps 30 400 kB/s"),
        ("stream", "one connection that never pauses", "rate_kbps 5 100 kB/s"),
        ("bulk-bursts", "large uploads with long pauses", "rate_kbps 100 600 kB/s, period_s 10 40 s"),
        ("screenshots", "one picture every few seconds", "period_s 3 20 s, piece_kib 30 250 KiB"),
        ("key-log", "a few hundred bytes every few seconds", "period_s 1.5 10 s"),
        ("dump-database", "queries a database, uploads the rows", "rate_kbps 20 300 kB/s, period_s 3 20 s"),
        ("chunks", "uploads pieces of equal length at intervals", "period_s 1.5 12 s, piece_kib 8 128 KiB"),
        ("web-and-dns", "uploads by the web and by DNS in turn", "rate_kbps 1 20 kB/s"),
    )),
    _malicious_profile("dropper-persist", "Downloads stages and persists.", "T1105 T1053.003 T1547", 1e9, 1e7, (
        ("fetch-unpack", "downloads and unpacks", "period_s 3 20 s, piece_kib 50 800 KiB"),
        ("cron-like", "rewrites its cron files and checks its own digest", "period_s 1.5 10 s"),
        ("self-copy", "copies itself to many places", "period_s 2 15 s, piece_kib 50 1000 KiB"),
        ("in-pieces", "downloads in small pieces", "period_s 3 20 s, piece_kib 50 800 KiB"),
    ), (
        ("watchdog", "looks after its files and restores them", "period_s 1.5 10 s, piece_kib 50 500 KiB"),
        ("update-loop", "asks for updates and replaces its program", "period_s 4 25 s, piece_kib 100 1000 KiB"),
        ("script-farm", "writes and runs many short scripts", "period_s 1.5 10 s"),
        ("inject", "appends itself to documents", "period_s 1.5 12 s, piece_kib 5 100 KiB"),
        ("memory-modules", "downloads modules into memory and runs them", "period_s 4 20 s, piece_kib 100 1000 KiB"),
        ("clean-logs", "rewrites logs without its own traces", "period_s 2 15 s, piece_kib 50 800 KiB"),
        ("timer-files", "writes job and timer files and syncs them", "period_s 1 8 s"),
        ("staged-chain", "downloads a small, a middle and a large stage", "period_s 3 15 s, piece_kib 50 500 KiB"),
    )),
)  # fmt: skip

# Each routine differs in mechanism; two belong to each sample group.
ROUTINES: tuple[InfectionRoutine, ...] = tuple(
    InfectionRoutine(name=name, about=about, group=group, attack=tuple(attack.split()))
    for name, about, group, attack in (
        ("download-run", "downloads one program, checks it and runs it", 0, "T1105 T1204"),
        ("package-like", "fetches an index and packages, unpacks and configures them", 1, "T1195 T1105"),
        ("in-pieces", "fetches many pieces with pauses, joins them and checks the whole", 2, "T1105 T1027"),
        ("build-on-target", "writes source files, compiles and links them", 3, "T1027.004 T1059"),
        ("memory-only", "loads its program into memory and writes no file", 0, "T1620 T1055"),
        ("script-persist", "runs scripts that write jobs and start files", 1, "T1059.004 T1053.003"),
        ("network-push", "an intruder logs in after attempts, looks around and pushes the program", 2, "T1570 T1110"),
        ("slow-drip", "collects the program in small answers over a minute or more", 3, "T1071.004 T1132"),
    )
)


def list_routines(group: int, *, image: str) -> tuple[InfectionRoutine, ...]:
    """Return the routines of a sample group that a guest image can play."""
    return tuple(row for row in ROUTINES if row.group == group and image in row.images)
