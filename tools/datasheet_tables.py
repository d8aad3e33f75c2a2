"""Render the generated half of a corpus's datasheet: contents, leakage, and the cost of the guest agent."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.audit.leakage import LeakageResult, LeakageWindows, render_leakage
from phasewatch.channels import CHANNELS
from phasewatch.errors import DataError
from phasewatch.lab.plan import RecordingSession, RecordingSlot, compute_slot_seed
from phasewatch.lab.plan_checks import compute_auc
from phasewatch.profiles import IDLE_SAMPLE, PROFILES
from phasewatch.types import BENIGN_PROFILE, PHASES, BundleStatus, EpisodeRole, Phase, SampleKind, SourceKind
from phasewatch.validate.verdict import USABLE_STATUSES, BundleVerdict

MEAN_SUFFIX = ".mean"
MAX_SHOWN_CHANNELS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSeparation:
    """Separation of the windows of one phase from clean ones by single channels.

    Attributes:
        best: ``(channel, AUC)``, best first; an AUC below 0.5 means that the channel is lower than in clean.
    """

    phase: Phase
    windows: int
    best: tuple[tuple[str, float], ...]


def compute_separations(w: LeakageWindows) -> tuple[PhaseSeparation, ...]:
    """Rank the channels' window means by the area under the ROC curve against clean, over all lab episodes.

    The area is the chance that a window of the phase has a higher mean than a clean one, ties counted half
    (Mann and Whitney 1947). Windows of all hosts and profiles are pooled, so it understates what a model can do.
    """
    lab = w.role[w.episode_index] == "lab"
    columns = [i for i, name in enumerate(w.names) if name.endswith(MEAN_SUFFIX)]
    found = []
    for phase in PHASES[1:]:
        rows = lab & np.isin(w.y, (0, phase.code))
        is_phase = w.y[rows] == phase.code
        if not is_phase.any() or is_phase.all():
            continue
        areas = []
        for i in columns:
            x = w.x[rows, i]
            known = np.isfinite(x)
            area = compute_auc(x[is_phase & known], x[~is_phase & known])
            areas.append((w.names[i].removesuffix(MEAN_SUFFIX), 0.5 if area is None else area))
        best = sorted(areas, key=lambda each: (-abs(each[1] - 0.5), each[0]))[:MAX_SHOWN_CHANNELS]
        found.append(PhaseSeparation(phase=phase, windows=int(is_phase.sum()), best=tuple(best)))
    return tuple(found)


def render_separations(found: Sequence[PhaseSeparation]) -> list[tuple[str, str, str]]:
    """Render table rows: phase, number of windows, channels with their areas."""
    return [(str(s.phase), f"{s.windows:,}", ", ".join(f"`{name}` {area:.2f}" for name, area in s.best)) for s in found]


MAX_PAUSE_S = 45 * 60.0  # a longer pause between two starts begins a new recording day
UNKNOWN_PROCESSOR = "not written down"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeStart:
    """How one episode began.

    Attributes:
        started_s: Seconds since 1970.
        recorder: ``host.recorder`` of its manifest.
        boot_s: Seconds until the guest's first message; None if nothing was booted.
        shape: Facts of the host's shape; None in bundles of format version 1.
        throttled_share: Share of the episode in which the CPU quota stopped the VM; None without a quota.
    """

    host_id: str
    started_s: float
    recorder: str
    boot_s: float | None
    shape: Mapping[str, str | int | float] | None = None
    throttled_share: float | None = None


def _parse_processor(recorder: str) -> str:
    """Parse the processor from a manifest's ``host.recorder``; recordings before 29 November 2026 lack it."""
    found = re.search(r", on (.+)$", recorder)
    return found[1] if found else UNKNOWN_PROCESSOR


def group_recording_sessions(starts: Sequence[EpisodeStart]) -> list[list[EpisodeStart]]:
    """Group episodes by processor, and by pauses of more than `MAX_PAUSE_S`."""
    found: list[list[EpisodeStart]] = []
    for start in sorted(starts, key=lambda s: s.started_s):
        last = found[-1][-1] if found else None
        if (
            last is None
            or start.started_s - last.started_s > MAX_PAUSE_S
            or _parse_processor(start.recorder) != _parse_processor(last.recorder)
        ):
            found.append([])
        found[-1].append(start)
    return found


def render_recording_sessions(
    starts: Sequence[EpisodeStart], hosts: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Render a table's head and rows: one row per group, with the median boot time of each host in seconds."""
    rows = []
    for sitting in group_recording_sessions(starts):
        began = datetime.fromtimestamp(sitting[0].started_s, UTC)
        boots = [[s.boot_s for s in sitting if s.host_id == host and s.boot_s is not None] for host in hosts]
        of = [began.strftime("%Y-%m-%d %H:%M"), str(len(sitting)), _parse_processor(sitting[0].recorder)]
        rows.append([*of, *(f"{statistics.median(b):.1f}" if b else "·" for b in boots)])
    return ["from (UTC)", "episodes", "processor", *hosts], rows


_SHAPE_COLUMNS = ("image", "machine", "cpu", "vcpus", "mem_mib", "quota_cores", "cache", "iops", "nic", "drawn")


def render_shapes(starts: Sequence[EpisodeStart]) -> tuple[list[str], list[list[str]]]:
    """Render a table's head and rows: the facts of each host's shape; no rows if no manifest has them."""
    by_host: dict[str, list[EpisodeStart]] = {}
    for start in starts:
        if start.shape is not None:
            by_host.setdefault(start.host_id, []).append(start)
    rows = []
    for host, mine in sorted(by_host.items()):
        shape = mine[0].shape or {}
        throttled = [start.throttled_share for start in mine if start.throttled_share is not None]
        facts = [str(shape.get(name, "·")) for name in _SHAPE_COLUMNS]
        rows.append([host, *facts, f"{statistics.median(throttled):.0%}" if throttled else "·"])
    return ["host", *(name.replace("_", " ") for name in _SHAPE_COLUMNS), "throttled"], rows


def _list_shape_section(starts: Sequence[EpisodeStart]) -> list[str]:
    head, rows = render_shapes(starts)
    if not rows:
        return []
    return [
        "### Hosts",
        "The shape of each host; `drawn` is distribution, seed and number of a drawn one. "
        "Throttled is the median share of an episode in which the CPU quota stopped the VM.",
        _render_table(head, rows),
    ]


FOOTPRINT_PLAN = "footprint"
# The agent sends nothing over the network. The everyday traffic differs between machines and would be compared.
EXCLUDED_SOURCES = (SourceKind.GUEST, SourceKind.NETFLOW)
FOOTPRINT_SETTLE_S, FOOTPRINT_DURATION_S, FOOTPRINT_CHATTER_S = 50.0, 90.0, 12.0


class ChannelCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The means of one host-side channel over the bins, and the difference of each pair."""

    channel: str
    unit: str
    off: float
    on: float
    pairs: tuple[float, ...]


class AgentFootprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of paired idle runs on one host."""

    host_id: str
    accel: str
    guest_image: str
    seconds: float
    pairs: int
    costs: tuple[ChannelCost, ...]


def build_footprint_path(corpus: Path) -> Path:
    """Return the path of a corpus's measured footprint, beside the corpus."""
    return corpus.with_name(corpus.name + ".footprint.json")


def build_footprint_sessions(host_id: str, pairs: int) -> tuple[RecordingSession, ...]:
    """Plan pairs of benign idle machines; the agent, and so its core, alternates between the two."""
    sessions = []
    for number in range(pairs):
        slots = tuple(
            _build_footprint_slot(host_id, 2 * number + place, agent=(number + place) % 2 == 1) for place in (0, 1)
        )
        sessions.append(RecordingSession(session=f"{FOOTPRINT_PLAN}-{number:04d}", host_id=host_id, slots=slots))
    return tuple(sessions)


def _build_footprint_slot(host_id: str, index: int, *, agent: bool) -> RecordingSlot:
    return RecordingSlot(
        index=index,
        host_id=host_id,
        role=EpisodeRole.LAB,
        profile=BENIGN_PROFILE,
        sample_name=IDLE_SAMPLE,
        sample_kind=SampleKind.BENIGN,
        plan_seed=compute_slot_seed(FOOTPRINT_PLAN, 1, host_id, index),
        agent=agent,
        settle_s=FOOTPRINT_SETTLE_S,
        duration_s=FOOTPRINT_DURATION_S,
        phases=((Phase.CLEAN, FOOTPRINT_DURATION_S),),
        knobs=(),
        chatter_s=FOOTPRINT_CHATTER_S,
    )


def compute_channel_costs(pairs: Mapping[str, Mapping[bool, NDArray[np.float32]]]) -> tuple[ChannelCost, ...]:
    """Compute the cost of the agent per channel, from the bins of each session's two machines.

    Args:
        pairs: Session → agent on → ``(n_bins, 46)`` float32.

    Raises:
        DataError: If there is no session with one machine of each.
    """
    whole = [pair for _, pair in sorted(pairs.items()) if set(pair) == {False, True}]
    if not whole:
        raise DataError("no session has one machine with the agent and one without; record the footprint again")
    costs = []
    for i, channel in enumerate(CHANNELS):
        if channel.source in EXCLUDED_SOURCES:
            continue
        off, on = ([_compute_finite_mean(pair[agent][:, i]) for pair in whole] for agent in (False, True))
        if all(np.isfinite([*off, *on])):
            gaps = tuple(b - a for a, b in zip(off, on, strict=True))
            costs.append(
                ChannelCost(channel=channel.full_name, unit=channel.unit, off=fmean(off), on=fmean(on), pairs=gaps)
            )
    return tuple(costs)


def _compute_finite_mean(column: NDArray[np.float32]) -> float:
    known = column[np.isfinite(column)]
    return float(known.mean(dtype=np.float64)) if len(known) else float("nan")


def render_footprint(footprint: AgentFootprint) -> tuple[str, list[Sequence[str]]]:
    """Render a sentence and table rows; only channels whose pairs all differ in the same direction are listed."""
    consistent = [c for c in footprint.costs if min(c.pairs) > 0 or max(c.pairs) < 0]
    head = (
        f"{footprint.pairs} pairs of idle machines of the host `{footprint.host_id}` ({footprint.accel}), "
        f"{footprint.seconds:.0f} s each, side by side, one with the agent and one without. "
        f"{len(consistent)} of {len(footprint.costs)} channels moved in the same direction in every pair."
    )
    rows = [
        (f"`{c.channel}`", c.unit, f"{c.off:.4g}", f"{c.on:.4g}", f"{min(c.pairs):+.2g} to {max(c.pairs):+.2g}")
        for c in consistent
    ]
    return head, list(rows)


GENERATED_MARKER = "<!-- generated by `make datasheet`: do not edit below -->"
TableRow = Sequence[str]


def compute_bundles_digest(paths_and_receipts: Iterable[tuple[str, str]]) -> str:
    """Return the sha256 over paths and receipts of the bundles that a datasheet describes."""
    text = "".join(f"{path} {receipt}\n" for path, receipt in sorted(paths_and_receipts))
    return sha256(text.encode()).hexdigest()


def parse_bundles_digest(page: str) -> str:
    """Parse the digest of the bundles that a page describes; empty if the page has none."""
    _, _, rest = page.partition("<!-- of the bundles ")
    return rest.partition(" ")[0]


def render_page(page: str, body: str) -> str:
    """Return the page with the generated half below its marker.

    Raises:
        ValueError: If the page has no marker.
    """
    head, marker, _ = page.partition(GENERATED_MARKER)
    if not marker:
        raise ValueError(f"the page has no line {GENERATED_MARKER!r}; add it where the generated half begins")
    return f"{head}{GENERATED_MARKER}\n\n{body}"


def render_datasheet(
    verdicts: Sequence[BundleVerdict],
    leaks: Sequence[LeakageResult],
    separations: Sequence[PhaseSeparation],
    footprint: AgentFootprint | None,
    *,
    digest: str,
    starts: Sequence[EpisodeStart] = (),
    checks: str = "",
) -> str:
    """Render the generated half in Markdown.

    Args:
        verdicts: The validation result of each bundle.
        leaks: Results of `audit.leakage.probe_leakage`.
        separations: Results of `compute_separations`.
        footprint: Cost of the guest's agent, if it was measured.
        digest: `compute_bundles_digest` of the bundles.
        starts: How each usable episode began.
        checks: Rendered standing checks; empty without any.
    """
    hosts = sorted({v.host_id for v in verdicts})
    parts = [
        f"<!-- of the bundles {digest} -->",
        _render_summary(verdicts),
        *([checks] if checks else []),
        *_list_shape_section(starts),
        "### Roles and hours",
        "Usable hours, and episodes in brackets.",
        _render_table(["role", *hosts, "all"], _build_role_rows(verdicts, hosts)),
        "### Profile × sample × host",
        "Lab episodes: accepted, `+n` degraded, `!n` rejected or unreadable; a dot means not recorded.",
        _render_table(
            ["profile", "sample", *hosts, "all"],
            _build_sample_rows([v for v in verdicts if v.role == EpisodeRole.LAB], hosts),
        ),
        "### Phases",
        _render_table(["phase", *hosts, "all", "share"], _build_phase_rows(verdicts, hosts)),
        "### Waiting for a core",
        "`vcpu_wait` of each usable episode, in cores; above 0.10 an episode is degraded (`contention`).",
        _render_table(
            ["host", "episodes", "median", "95 %", "highest", "above 0.10"], _build_wait_rows(verdicts, hosts)
        ),
        "### Speed of the physical machine",
        "Median seconds from QEMU's start to the guest's first message. Rows differ because the physical machines do: "
        "a host is a VM shape, and the speed of the machine below it is no feature and part of no split.",
        _render_table(*render_recording_sessions(starts, hosts)),
        "### Validation findings",
        _render_table(["finding", "episodes"], _build_finding_rows(verdicts)),
        "### Leakage",
        "Each question is answered out of fold by session; see `phasewatch audit`.",
        _render_table(["question", "figure", "against", "looked at"], render_leakage(leaks)),
        "### Separation from clean by single channels",
        "Area under the ROC curve of a window's mean against clean windows, pooled over hosts, "
        "profiles and busy loads; 0.50 separates nothing. This describes the recordings and is not a result.",
        _render_table(["phase", "windows", "channels"], render_separations(separations)),
        "### Cost of the agent in the guest",
        _render_footprint_section(footprint),
        "The range of each channel: `phasewatch channels --corpus`.",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _render_summary(verdicts: Sequence[BundleVerdict]) -> str:
    usable = [v for v in verdicts if v.status in USABLE_STATUSES]
    status = Counter(v.status for v in verdicts)
    said = ", ".join(f"{status[s]} {s}" for s in BundleStatus)
    started = [v.started_wall_ns / 1e9 for v in usable]
    days = sorted({datetime.fromtimestamp(s, UTC).date().isoformat() for s in started})
    hours = sum(v.duration_s for v in usable) / 3600
    lab = [v for v in usable if v.role == EpisodeRole.LAB]
    agent = sum(v.agent for v in lab)
    benign = sum(v.sample_kind == "benign" for v in lab)
    return (
        f"{len(verdicts)} bundles, {sum(v.bytes for v in verdicts) / 1e6:.1f} MB: {said}.\n"
        f"{hours:.1f} hours of machine time in {len({(v.host_id, v.session) for v in usable})} sessions"
        f"{f', recorded on {_join_words(days)} (UTC)' if days else ''}.\n"
        f"Of {len(lab)} usable lab episodes {benign} are benign, and the guest's agent was on in {agent}."
    )


def _join_words(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _build_role_rows(verdicts: Sequence[BundleVerdict], hosts: Sequence[str]) -> list[TableRow]:
    def cell(some: Sequence[BundleVerdict]) -> str:
        return f"{sum(v.duration_s for v in some) / 3600:.2f} ({len(some)})" if some else "0"

    usable = [v for v in verdicts if v.status in USABLE_STATUSES]
    return _build_host_rows(usable, hosts, [(str(role),) for role in EpisodeRole], lambda v: (v.role,), cell)


def _build_sample_rows(verdicts: Sequence[BundleVerdict], hosts: Sequence[str]) -> list[TableRow]:
    def cell(some: Sequence[BundleVerdict]) -> str:
        count = Counter(v.status for v in some)
        lost = count[BundleStatus.REJECTED] + count[BundleStatus.ERRORED]
        signs = (f"+{count[BundleStatus.DEGRADED]}" if count[BundleStatus.DEGRADED] else "") + (
            f" !{lost}" if lost else ""
        )
        return f"{count[BundleStatus.ACCEPTED]}{signs}" if some else "·"

    present = {(v.profile, v.sample_name) for v in verdicts}
    listed = [(row.name, sample) for row in PROFILES for sample in row.samples]
    # A campaign of the first laboratory has no samples of the second.
    known = [(name, one.name) for name, one in listed if one.since == 1 or (name, one.name) in present]
    others = sorted(present - set(known))
    return [
        *_build_host_rows(verdicts, hosts, [*known, *others], lambda v: (v.profile, v.sample_name), cell),
        ["**all**", "", *(cell([v for v in verdicts if v.host_id == host]) for host in hosts), cell(verdicts)],
    ]


def _build_host_rows(
    verdicts: Sequence[BundleVerdict],
    hosts: Sequence[str],
    keys: Sequence[tuple[str, ...]],
    key_of: Callable[[BundleVerdict], tuple[str, ...]],
    cell: Callable[[Sequence[BundleVerdict]], str],
) -> list[TableRow]:
    rows: list[TableRow] = []
    for key in keys:
        mine = [v for v in verdicts if key_of(v) == key]
        rows.append([*key, *(cell([v for v in mine if v.host_id == host]) for host in hosts), cell(mine)])
    return rows


def _build_phase_rows(verdicts: Sequence[BundleVerdict], hosts: Sequence[str]) -> list[TableRow]:
    lab = [v for v in verdicts if v.role == EpisodeRole.LAB and v.status in USABLE_STATUSES]
    total = sum(sum(v.seconds) for v in lab)
    rows: list[TableRow] = []
    for i, phase in enumerate(PHASES):
        per_host = [sum(v.seconds[i] for v in lab if v.host_id == host) for host in hosts]
        seconds = sum(per_host)
        share = f"{seconds / total:.0%}" if total else "—"
        rows.append([str(phase), *(f"{s / 60:.0f} min" for s in per_host), f"{seconds / 60:.0f} min", share])
    return rows


def _build_wait_rows(verdicts: Sequence[BundleVerdict], hosts: Sequence[str]) -> list[TableRow]:
    rows: list[TableRow] = []
    for host in [*hosts, ""]:
        waited = np.array(
            [
                v.vcpu_wait
                for v in verdicts
                if v.status in USABLE_STATUSES and host in ("", v.host_id) and v.vcpu_wait == v.vcpu_wait
            ]
        )
        if len(waited):
            figures = [f"{x:.3f}" for x in (np.median(waited), np.quantile(waited, 0.95), waited.max())]
            rows.append([host or "**all**", str(len(waited)), *figures, str(int((waited > 0.10).sum()))])
    return rows


def _build_finding_rows(verdicts: Sequence[BundleVerdict]) -> list[TableRow]:
    count = Counter(code for v in verdicts for code in v.reasons)
    return [[f"`{code}`", str(n)] for code, n in sorted(count.items())] or [["none", str(len(verdicts))]]


def _render_footprint_section(footprint: AgentFootprint | None) -> str:
    if footprint is None:
        return "Not measured yet: `make footprint`."
    head, rows = render_footprint(footprint)
    return f"{head}\n\n" + _render_table(
        ["channel", "unit", "agent off", "agent on", "on − off, lowest to highest pair"], rows
    )


def _render_table(head: Sequence[str], rows: Iterable[TableRow]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
