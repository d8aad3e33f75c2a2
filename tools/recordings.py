"""Describe a store of recordings: `python -m tools.recordings STORE --out PAGE.md [--real FOLDER]`.

The page says how fast and how undisturbed the episodes were recorded, which extended channels move with which act, what
time, loads and durations alone would tell, and how much benign and malicious windows read, write, send and receive.
With `--real`, it sets disk volumes beside those of real programs and real ransomware: a folder of RanSAP recordings
(Hirano, Hodota, Kobayashi 2022, doi 10.1016/j.fsidi.2021.301314), `<machine>/<program>/<run>/ata_read.csv` and
`ata_write.csv`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import BINS_DIR
from phasewatch.audit.leakage import probe_leakage, read_leakage_windows
from phasewatch.binning.storage import open_bins
from phasewatch.bundle.archive import unpack_manifest
from phasewatch.bundle.model import Manifest
from phasewatch.channels import CHANNELS
from phasewatch.features.schema import stat_names
from phasewatch.features.tables import build_window_table
from phasewatch.lab.plan_checks import (
    MAX_CHANCE_DISTANCE,
    MAX_ELAPSED_TIME_F1,
    MIN_IDLE_SHARE,
    OUTLINE_SCORES,
    EpisodeOutline,
    compute_auc,
    score_outlines,
)
from phasewatch.lab.walks import LoadSpan
from phasewatch.profiles import IDLE_SAMPLES
from phasewatch.types import BENIGN_PROFILE, PHASES, STRIDE_S, WINDOW_S, BundleStatus, ChannelGroup, EpisodeRole, Phase
from phasewatch.validate.sweep import sweep
from phasewatch.validate.verdict import USABLE_STATUSES, BundleVerdict
from tools.results import table

LAB_VERSION = 2  # whose limits the page names
MIN_WINDOWS = 20  # of known values on either side of an AUC
RANSOMWARE_PROFILE, RANSOMWARE_PROGRAM = "ransom-walk", "TeslaCrypt"
VOLUMES = {  # channel → title
    "qmp.blk_rd_bytes": "read",
    "qmp.blk_wr_bytes": "written",
    "netflow.out_bytes": "sent",
    "netflow.in_bytes": "received",
}
DISK_VOLUMES = tuple(VOLUMES)[:2]
_IDLE = "idle"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedEpisode:
    """One usable episode.

    Attributes:
        means: Channel → ``(w,)`` float32 mean over each window; NaN where it is unknown.
        phase: ``(w,)`` int8 phase codes; -1 where the phase is unknown.
        spans: Phase, start and end of each label; Unix time in ns.
        load: ``(w,)`` the benign kind that ran in the middle of each window; `idle` without one.
    """

    verdict: BundleVerdict
    manifest: Manifest
    means: Mapping[str, NDArray[np.float32]]
    phase: NDArray[np.int8]
    spans: tuple[tuple[Phase, int, int], ...]
    load: NDArray[np.str_]

    @property
    def began_s(self) -> float:
        """Unix time at which its VM was started."""
        recording = self.manifest.recording
        before_s = recording.boot_s + recording.settle_s if recording else 0.0
        return self.manifest.started_wall_ns / 1e9 - before_s

    @property
    def ended_s(self) -> float:
        """Unix time of its end."""
        return self.manifest.started_wall_ns / 1e9 + self.manifest.duration_s

    @property
    def is_benign(self) -> bool:
        """Whether no malware runs."""
        return self.manifest.profile == BENIGN_PROFILE

    @property
    def image(self) -> str:
        """The guest image."""
        return (self.manifest.recording and self.manifest.recording.image) or "busybox"

    def build_outline(self) -> EpisodeOutline:
        """Return its phases and loads, without telemetry."""
        start_ns = self.manifest.started_wall_ns
        recording = self.manifest.recording
        return EpisodeOutline(
            phases=tuple((phase, (end - begin) / 1e9) for phase, begin, end in self.spans),
            loads=tuple(
                LoadSpan(kind=kind, start_s=(begin - start_ns) / 1e9, end_s=(end - start_ns) / 1e9)
                for kind, begin, end in (recording.load if recording else ())
            ),
            is_benign=self.is_benign,
        )


def read_episodes(store: Path, run: Path, verdicts: Sequence[BundleVerdict]) -> tuple[RecordedEpisode, ...]:
    """Read the usable episodes of a store, in the order of their starts.

    Args:
        store: The store.
        run: The folder into which it was validated.
        verdicts: The validation results.
    """
    bins = open_bins(run / BINS_DIR)
    by_id = {(v.host_id, v.episode_id): v for v in verdicts if v.status in USABLE_STATUSES}
    columns = [(i, name.removesuffix(".mean")) for i, name in enumerate(stat_names()) if name.endswith(".mean")]
    found = []
    for row in bins.rows:
        verdict = by_id.get((row.host_id, row.episode_id))
        if verdict is None:
            continue
        manifest = unpack_manifest((store / verdict.path).read_bytes(), file=verdict.path)
        windows = build_window_table(row, np.asarray(bins.episode_bins(row)))
        load = np.full(len(windows.phase), _IDLE, dtype="U64")
        for kind, start_ns, end_ns in manifest.recording.load if manifest.recording else ():
            if kind not in IDLE_SAMPLES:
                load[(start_ns <= windows.center_ns) & (windows.center_ns < end_ns)] = kind
        found.append(
            RecordedEpisode(
                verdict=verdict,
                manifest=manifest,
                means={name: windows.stats[:, i] for i, name in columns},
                phase=windows.phase,
                spans=row.spans,
                load=load,
            )
        )
    return tuple(sorted(found, key=lambda e: (e.manifest.started_wall_ns, e.verdict.episode_id)))


def group_rounds(episodes: Sequence[RecordedEpisode]) -> list[list[RecordedEpisode]]:
    """Group episodes whose VMs ran at the same time, in the order of their starts."""
    rounds: list[list[RecordedEpisode]] = []
    end_s = float("-inf")
    for e in sorted(episodes, key=lambda e: e.began_s):
        if e.began_s >= end_s:
            rounds.append([])
            end_s = e.ended_s
        rounds[-1].append(e)
        end_s = max(end_s, e.ended_s)
    return rounds


def render_rates(episodes: Sequence[RecordedEpisode]) -> str:
    """Render the recording rate and the contention by the number of VMs that recorded at a time."""
    by_size: dict[int, list[list[RecordedEpisode]]] = {}
    for members in group_rounds(episodes):
        by_size.setdefault(len(members), []).append(members)
    body = []
    for size, groups in sorted(by_size.items()):
        members = [e for group in groups for e in group]
        hours = sum(max(e.ended_s for e in group) - group[0].began_s for group in groups) / 3600
        recorded = sum(e.manifest.duration_s for e in members) / 3600
        waits = [e.verdict.vcpu_wait for e in members if np.isfinite(e.verdict.vcpu_wait)]
        rows, lost = (sum(sum(getattr(e.verdict, name)) for e in members) for name in ("rows", "lost"))
        body.append(
            [
                str(size),
                str(len(groups)),
                str(len(members)),
                f"{len(members) / hours:.0f}" if hours else "·",
                f"{recorded / hours:.2f}" if hours else "·",
                f"{fmean(waits):.3f}" if waits else "·",
                f"{max(waits):.3f}" if waits else "·",
                str(sum("contention" in e.verdict.reasons for e in members)),
                f"{1000 * lost / max(rows + lost, 1):.1f}",
            ]
        )
    head = ["VMs at a time", "rounds", "episodes", "episodes per hour", "VM-hours per hour"]
    head += ["contention, cores", "largest", "with contention", "lost rows per 1,000"]
    about = (
        "A round is the VMs that ran at the same time, from the start of the first VM to the end of the last episode. "
        "Contention is the CPU time that other work took from a VM, without what its quota withheld."
    )
    return f"## Rates and contention\n\n{about}\n\n{table([head, *body])}"


def render_contents(verdicts: Sequence[BundleVerdict], episodes: Sequence[RecordedEpisode]) -> str:
    """Render episodes, hours and infections by host."""
    body = []
    for host in sorted({e.verdict.host_id for e in episodes}):
        own = [e for e in episodes if e.verdict.host_id == host]
        shape = (own[0].manifest.recording and own[0].manifest.recording.shape) or {}
        quota = shape.get("quota_cores", "·")
        throttled = [
            e.manifest.recording.throttled_s / e.manifest.duration_s
            for e in own
            if e.manifest.recording and e.manifest.recording.throttled_s is not None
        ]
        of_role = {role: [e for e in own if e.manifest.role == role] for role in EpisodeRole}
        lab = of_role[EpisodeRole.LAB]
        n_infections = sum(phase is Phase.INFECTING for e in lab for phase, _, _ in e.spans)
        body.append(
            [
                host,
                own[0].image,
                own[0].manifest.host.cpu,
                str(own[0].manifest.host.mem_mib),
                str(own[0].manifest.host.vcpus),
                str(quota),
                f"{median(throttled):.0%}" if throttled else "·",
                str(len(lab)),
                str(n_infections),
                f"{sum(e.manifest.duration_s for e in lab) / 3600:.2f}",
                str(len(own) - len(lab) - len(of_role[EpisodeRole.SOAK])),
                f"{sum(e.manifest.duration_s for e in of_role[EpisodeRole.SOAK]) / 3600:.2f}",
            ]
        )
    head = ["host", "image", "CPU", "MiB", "vCPUs", "quota, cores", "throttled", "lab episodes", "infections"]
    head += ["lab, h", "baseline episodes", "soak, h"]
    counts = ", ".join(f"{n} {status}" for status in BundleStatus if (n := sum(v.status is status for v in verdicts)))
    reasons = Counter(reason for v in verdicts for reason in v.reasons)
    found = ", ".join(f"`{name}` {n}" for name, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    samples = {(e.manifest.profile, e.manifest.sample_name) for e in episodes if not e.is_benign}
    kinds = {str(kind) for e in episodes for kind in np.unique(e.load)} - {_IDLE}
    routines = {e.manifest.recording.routine for e in episodes if e.manifest.recording} - {None}
    total = (
        f"{counts}. Findings: {found or 'none'}. {len(samples)} samples, {len(routines)} infection routines and "
        f"{len(kinds)} benign kinds occur."
    )
    return f"## Contents\n\n{total}\n\n{table([head, *body])}"


def list_acts(episodes: Sequence[RecordedEpisode]) -> tuple[str, ...]:
    """Return the names of the acts that occur: phases, and for active the profile too."""
    profiles = sorted({e.manifest.profile for e in episodes if not e.is_benign})
    return (*(str(p) for p in PHASES[1:] if p is not Phase.ACTIVE), *(f"active {name}" for name in profiles))


def mark_act(episode: RecordedEpisode, act: str) -> NDArray[np.bool_]:
    """Mark the windows of an episode that show an act, ``(w,)``."""
    name, _, profile = act.partition(" ")
    in_phase = episode.phase == Phase(name).code
    return np.asarray(in_phase & (not profile or episode.manifest.profile == profile))


def render_separations(episodes: Sequence[RecordedEpisode]) -> str:
    """Render the area under the ROC curve of each extended channel and act, against clean windows of all episodes."""
    lab = [e for e in episodes if e.manifest.role == EpisodeRole.LAB]
    acts = list_acts(lab)
    body = []
    for channel in (c.full_name for c in CHANNELS if c.group is ChannelGroup.EXTENDED):
        areas = []
        clean = _collect(lab, channel, [e.phase == Phase.CLEAN.code for e in lab])
        for act in acts:
            positive = _collect(lab, channel, [mark_act(e, act) for e in lab])
            enough = min(len(positive), len(clean)) >= MIN_WINDOWS
            area = compute_auc(positive, clean) if enough else None
            areas.append("·" if area is None else f"**{area:.2f}**" if abs(area - 0.5) >= 0.2 else f"{area:.2f}")
        body.append([f"`{channel}`", *areas])
    counts = [f"{sum(int(mark_act(e, act).sum()) for e in lab):,}" for act in acts]
    about = (
        "The chance that a window of the act has a higher mean than a clean window, ties counted half; lab episodes of "
        "all hosts are pooled. Below 0.5 the channel is lower. A dot means fewer than "
        f"{MIN_WINDOWS} known windows. Areas 0.2 or more from 0.5 are bold."
    )
    return f"## Extended channels and acts\n\n{about}\n\n" + table([["channel", *acts], ["*windows*", *counts], *body])


def _collect(
    episodes: Sequence[RecordedEpisode], channel: str, masks: Iterable[NDArray[np.bool_]]
) -> NDArray[np.float64]:
    """Return the known means of a channel in the marked windows, ``(n,)`` float64."""
    parts = [e.means[channel][mask] for e, mask in zip(episodes, masks, strict=True)]
    values = np.concatenate([np.zeros(0), *parts])
    return np.asarray(values[np.isfinite(values)], np.float64)


def render_baselines(run: Path, episodes: Sequence[RecordedEpisode]) -> str:
    """Render what time, loads and durations alone would tell, on the recorded episodes."""
    time = probe_leakage(read_leakage_windows(run), only=("phase-from-elapsed-time",))[0]
    lab = [e.build_outline() for e in episodes if e.manifest.role == EpisodeRole.LAB]
    elapsed = "macro-F1 of the phase from the time since the first label"
    rows = [[elapsed, _render_number(time.value), f"at most {MAX_ELAPSED_TIME_F1[LAB_VERSION]:.2f}"]]
    near = f"{0.5 - MAX_CHANCE_DISTANCE:.2f} to {0.5 + MAX_CHANCE_DISTANCE:.2f} over the plan"
    rows += [[OUTLINE_SCORES[name], _render_number(value), near] for name, value in score_outlines(lab).items()]
    benign = [e for e in episodes if e.is_benign and e.manifest.role == EpisodeRole.LAB]
    idle = np.concatenate([np.zeros(0, bool), *(e.load == _IDLE for e in benign)])
    idle_share = float(idle.mean()) if len(idle) else None
    rows.append(["share of benign windows that are idle", _render_number(idle_share), f"at least {MIN_IDLE_SHARE:.2f}"])
    return f"## Shortcuts in the recordings\n\n{table([['baseline', 'here', 'limit'], *rows])}"


def _render_number(value: float | None) -> str:
    return "·" if value is None or not np.isfinite(value) else f"{value:.2f}"


def render_volumes(episodes: Sequence[RecordedEpisode], real: Path | None) -> str:
    """Render the volumes of benign and malicious windows, and of real programs where their recordings are given."""
    groups: dict[str, list[tuple[RecordedEpisode, NDArray[np.bool_]]]] = {}
    for e in episodes:
        known = e.phase >= 0
        if e.is_benign:
            groups.setdefault(f"benign, {e.image}, idle", []).append((e, known & (e.load == _IDLE)))
            groups.setdefault(f"benign, {e.image}, loaded", []).append((e, known & (e.load != _IDLE)))
    for e in episodes:
        if not e.is_benign:
            groups.setdefault(f"active {e.manifest.profile}", []).append((e, e.phase == Phase.ACTIVE.code))
    body = [row for name, parts in sorted(groups.items()) if (row := _render_volume_row(name, parts))]
    head = ["windows", "n", *(f"{title}, B/s" for title in VOLUMES.values())]
    about = "Median of the windows' means, and in brackets the 10th to the 90th percentile."
    parts_of_page = [f"## Volumes\n\n{about}\n\n{table([head, *body])}"]
    kinds: dict[str, list[tuple[RecordedEpisode, NDArray[np.bool_]]]] = {}
    for e in episodes:
        for kind in np.unique(e.load):
            if kind != _IDLE and e.is_benign:
                kinds.setdefault(f"{kind} ({e.image})", []).append((e, (e.phase >= 0) & (e.load == kind)))
    rows = [row for name, parts in sorted(kinds.items()) if (row := _render_volume_row(f"`{name}`", parts))]
    if rows:
        parts_of_page.append(f"By benign kind:\n\n{table([head, *rows])}")
    parts_of_page.append(_render_disk_areas(episodes))
    if real is not None:
        parts_of_page.append(_render_real(read_real_windows(real)))
    return "\n\n".join(parts_of_page)


def _render_volume_row(name: str, parts: Sequence[tuple[RecordedEpisode, NDArray[np.bool_]]]) -> list[str] | None:
    episodes, masks = [e for e, _ in parts], [mask for _, mask in parts]
    n = sum(int(mask.sum()) for mask in masks)
    if not n:
        return None
    return [name, f"{n:,}", *(_render_quantiles(_collect(episodes, channel, masks)) for channel in VOLUMES)]


def _render_quantiles(values: NDArray[np.float64]) -> str:
    if not len(values):
        return "·"
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"{_render_bytes(middle)} ({_render_bytes(low)} to {_render_bytes(high)})"


def _render_bytes(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def _render_disk_areas(episodes: Sequence[RecordedEpisode]) -> str:
    """Render how well disk volumes alone tell the emulated ransomware from benign windows."""
    lab = [e for e in episodes if e.manifest.role == EpisodeRole.LAB]
    attack = [mark_act(e, f"{Phase.ACTIVE} {RANSOMWARE_PROFILE}") for e in lab]
    rows = []
    for title, masks in (
        ("all benign windows", [(e.phase >= 0) & e.is_benign for e in lab]),
        ("benign windows with a load", [(e.phase >= 0) & e.is_benign & (e.load != _IDLE) for e in lab]),
    ):
        areas = [compute_auc(_collect(lab, c, attack), _collect(lab, c, masks)) for c in DISK_VOLUMES]
        rows.append([title, *map(_render_number, areas)])
    head = [f"active `{RANSOMWARE_PROFILE}` against", *(VOLUMES[c] for c in DISK_VOLUMES)]
    return f"Area under the ROC curve of one disk volume:\n\n{table([head, *rows])}"


def read_real_windows(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Read RanSAP recordings: program → ``(w, 2)`` float64, bytes read and written per second in windows of 10 s.

    Windows follow each other every 5 s, from the first access of a run to the last.

    Raises:
        FileNotFoundError: If the folder has no recording.
    """
    found: dict[str, list[NDArray[np.float64]]] = {}
    for path in sorted(folder.rglob("ata_read.csv")):
        parts = [_read_accesses(path), _read_accesses(path.with_name("ata_write.csv"))]
        times = np.concatenate([at for at, _ in parts])
        if not len(times):
            continue
        starts = np.arange(times.min(), times.max() - WINDOW_S, STRIDE_S)
        edges = np.stack([_sum_windows(at, size, starts) for at, size in parts], axis=1)
        found.setdefault(path.parent.parent.name, []).append(edges / WINDOW_S)
    if not found:
        raise FileNotFoundError(f"{folder} has no ata_read.csv; name the folder of unpacked RanSAP recordings")
    return {program: np.concatenate(windows) for program, windows in found.items()}


def _read_accesses(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return times in s, ascending, and bytes of the accesses in one file."""
    rows = np.loadtxt(path, delimiter=",", usecols=(0, 1, 3), ndmin=2) if path.stat().st_size else np.zeros((0, 3))
    at = rows[:, 0] + rows[:, 1] / 1e9
    order = np.argsort(at, kind="stable")
    return at[order], rows[order, 2]


def _sum_windows(
    at: NDArray[np.float64], size: NDArray[np.float64], starts: NDArray[np.float64]
) -> NDArray[np.float64]:
    total = np.concatenate([[0.0], np.cumsum(size)])
    return np.asarray(total[np.searchsorted(at, starts + WINDOW_S)] - total[np.searchsorted(at, starts)])


def _render_real(windows: Mapping[str, NDArray[np.float64]]) -> str:
    benign = np.concatenate([w for program, w in windows.items() if program != RANSOMWARE_PROGRAM])
    attack = windows.get(RANSOMWARE_PROGRAM, np.zeros((0, 2)))
    body = [
        [program, f"{len(w):,}", _render_quantiles(w[:, 0]), _render_quantiles(w[:, 1])]
        for program, w in sorted(windows.items())
    ]
    areas = [_render_number(compute_auc(attack[:, i], benign[:, i])) for i in range(2)]
    about = (
        "Recorded by others below real Windows machines (RanSAP; Hirano, Hodota, Kobayashi 2022, "
        "doi 10.1016/j.fsidi.2021.301314). "
        f"Area under the ROC curve of {RANSOMWARE_PROGRAM} against the other programs: read {areas[0]}, "
        f"written {areas[1]}."
    )
    return f"### Real programs and real ransomware\n\n{about}\n\n" + table(
        [["program", "n", "read, B/s", "written, B/s"], *body]
    )


class SensorCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cost of one group of sensors, from paired intervals on one VM (`tools/sensor_cost.py`).

    Attributes:
        load: What the guest did.
        group: The sensors that ran in addition.
        qemu, sampler: CPU time per second of each pair, with less without, in cores.
    """

    load: str
    group: str
    qemu: tuple[float, ...]
    sampler: tuple[float, ...]


def build_sensor_cost_path(store: Path) -> Path:
    """Return the path of a store's measured sensor costs, beside the store."""
    return store.with_name(store.name + ".sensors.json")


def render_sensor_costs(costs: Sequence[SensorCost]) -> str:
    """Render the paired costs: median and range of the pairs."""
    if not costs:
        return ""
    body = [[c.load, c.group, str(len(c.qemu)), *map(_render_pairs, (c.qemu, c.sampler))] for c in costs]
    head = ["guest", "sensors", "pairs", "QEMU, cores", "sampler, cores"]
    about = "CPU time of QEMU and of the sampler: with the sensors less without, in alternating intervals on one VM."
    return f"## Cost of the sensors\n\n{about}\n\n{table([head, *body])}"


def _render_pairs(values: Sequence[float]) -> str:
    return f"{median(values):+.4f} ({min(values):+.4f} to {max(values):+.4f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Describe a store of recordings.")
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="")
    parser.add_argument("--real", type=Path, help="folder of unpacked RanSAP recordings")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="phasewatch-recordings-") as folder:
        run = Path(folder)
        verdicts = sweep(options.store, run, workers=2).verdicts
        episodes = read_episodes(options.store, run, verdicts)
        costs_file = build_sensor_cost_path(options.store)
        costs = msgspec.json.decode(costs_file.read_bytes(), type=list[SensorCost]) if costs_file.is_file() else []
        sections = [
            f"# {options.title or options.store.name}: what was recorded",
            "Generated from the recordings by `python -m tools.recordings`; no number is typed in.",
            render_contents(verdicts, episodes),
            render_rates(episodes),
            render_baselines(run, episodes),
            render_separations(episodes),
            render_volumes(episodes, options.real),
            render_sensor_costs(costs),
        ]
    options.out.write_text("\n\n".join(part for part in sections if part) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
