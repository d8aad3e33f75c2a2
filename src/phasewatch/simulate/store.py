"""Write a simulated campaign into a store; the bytes do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np

from phasewatch.atomic import make_folder, open_atomic, sync_folder, write_atomic
from phasewatch.bundle.archive import pack_bundle, unpack_members
from phasewatch.bundle.container import compress_frame, join_members
from phasewatch.bundle.rows import encode_columns
from phasewatch.channels import get_custom_channels_digest
from phasewatch.errors import StoreError, UsageError
from phasewatch.parallel.pool import map_ordered
from phasewatch.profiles import EPISODE_RANGE_S
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.simulate.episodes import (
    EpisodeDraft,
    SimulatedCampaign,
    SimulatedSession,
    draw_episode,
    draw_session_specs,
    iter_sessions,
)
from phasewatch.simulate.faults import DUPLICATE_FAULT, FaultSpec, copy_telemetry, draw_fault, find_faults
from phasewatch.simulate.generator import SimulationSettings, build_named_rng
from phasewatch.store.local import BUNDLE_SUFFIX, FILE_SYSTEM_FOLDERS, RECEIPT_SUFFIX, DiskStore, render_receipt
from phasewatch.types import BundleStatus

__all__ = ["GroundTruthRow", "SimulationResult", "pack_draft", "pack_faulty_draft", "simulate"]

_ZSTD_LEVEL = 3
# In a shorter episode a fault has further effects: a pause of five seconds also lowers the rate of a source.
_MIN_FAULTY_EPISODE_S = 60.0
_MAX_DAYS = 36_500.0
_MAX_EFFECT, _MAX_INTENSITY = 3.0, 100.0  # larger values overflow 64-bit counters


class GroundTruthRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the ground truth: a bundle, its injected fault, and the expected status and reasons of validation."""

    host_id: str
    episode_id: str
    path: str
    fault: str
    status: BundleStatus
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """The result of `simulate`: paths, and numbers of episodes and of those with a fault."""

    store: Path
    truth: Path
    episodes: int
    faulty: int


def simulate(
    store: Path,
    *,
    hosts: int = 6,
    episodes: int = 240,
    seed: int = 0,
    faults: float = 0.0,
    workers: int = 1,
    days: float = 10.0,
    between_s: tuple[float, float] = EPISODE_RANGE_S,
    settings: SimulationSettings | None = None,
    kinds: Sequence[str] = (),
    progress: Progress = NO_PROGRESS,
) -> SimulationResult:
    """Write a store of simulated episodes and its ground truth.

    Args:
        store: A folder that does not exist yet, or is empty.
        hosts: Number of hosts.
        episodes: Number of episodes, distributed over the hosts.
        seed: Equal seeds and numbers give equal bytes.
        faults: Share of episodes with a fault, 0 to 1.
        workers: Number of processes.
        days: Smallest number of days that the episodes span.
        between_s: Shortest and longest lab episode, in seconds.
        settings: Spread of hosts, episodes and ticks; None for the defaults.
        kinds: Names of the faults to choose from; empty for all.
        progress: Receives the number of written episodes under the task ``simulate``.

    Raises:
        UsageError: If a number is out of range.
        StoreError: If the folder is not empty.
    """
    settings = settings or SimulationSettings()
    campaign = SimulatedCampaign(
        hosts=hosts, episodes=episodes, seed=seed, days=days, between_s=between_s, settings=settings
    )
    _check_campaign(campaign, faults)
    if get_custom_channels_digest():
        raise UsageError("simulate cannot simulate custom channels; leave out --channels and PHASEWATCH_CHANNELS")
    if store.exists() and (not store.is_dir() or any(e.name not in FILE_SYSTEM_FOLDERS for e in store.iterdir())):
        raise StoreError(f"{store}: something is already there; name a new folder, or remove it first")
    chosen = find_faults(kinds)
    make_folder(store)
    named = store.resolve() if store.name in ("", "..") else store
    truth_path = named.with_name(named.name + ".truth.jsonl")
    make = partial(_make_session, store, campaign, faults, tuple(fault.name for fault in chosen))
    made = faulty = 0
    with open_atomic(truth_path) as file:
        for result in map_ordered(
            make, iter_sessions(campaign), workers=workers, timeout_s=None if workers == 1 else 120
        ):
            if result.value is None:
                raise StoreError(f"{store}: a session could not be made: {result.error}")
            for truth in result.value:
                file.write(msgspec.json.encode(truth) + b"\n")
                made, faulty = made + 1, faulty + bool(truth.fault)
            progress.update("simulate", made, episodes)
    for folder in sorted(each for each in store.iterdir() if each.is_dir()):
        sync_folder(folder)
    return SimulationResult(store=store, truth=truth_path, episodes=made, faulty=faulty)


def _check_campaign(campaign: SimulatedCampaign, faults: float) -> None:
    """Raise UsageError if a number of a campaign is out of range."""
    shortest, longest = campaign.between_s
    if campaign.hosts < 1 or campaign.episodes < campaign.hosts:
        raise UsageError(
            f"--hosts {campaign.hosts} --episodes {campaign.episodes}: at least one host, and one episode for each"
        )
    if not 0 <= faults <= 1:
        raise UsageError(f"--faults {faults:g}: a share, 0 to 1")
    if not 1 <= shortest <= longest <= 3600:
        raise UsageError(f"--seconds {shortest:g} {longest:g}: the shortest, then the longest, 1 to 3600")
    if faults and shortest < _MIN_FAULTY_EPISODE_S:
        raise UsageError(
            f"--faults {faults:g} --seconds {shortest:g} {longest:g}: faults need episodes of "
            f"{_MIN_FAULTY_EPISODE_S:g} s or more; lengthen them, or leave the faults out"
        )
    settings = campaign.settings
    limits = {
        "--days": (campaign.days, _MAX_DAYS),
        "--host-effect": (settings.host_effect, _MAX_EFFECT),
        "--episode-effect": (settings.episode_effect, _MAX_EFFECT),
        "--drift": (settings.drift_per_week, _MAX_EFFECT),
        "--noise": (settings.tick_noise, _MAX_EFFECT),
        "--malware-intensity": (settings.malware_intensity, _MAX_INTENSITY),
    }
    for option, (value, highest) in limits.items():
        if not 0 <= value <= highest:
            raise UsageError(f"{option} {value:g}: 0 to {highest:g}")
    if (drift := settings.drift_per_week * campaign.days / 7) > _MAX_EFFECT:
        raise UsageError(
            f"--drift {settings.drift_per_week:g} --days {campaign.days:g}: a host would drift by {drift:.3g}, at most "
            f"{_MAX_EFFECT:g}"
        )


def _make_session(
    store: Path, campaign: SimulatedCampaign, faults: float, names: Sequence[str], session: SimulatedSession
) -> tuple[GroundTruthRow, ...]:
    """Draw and write the episodes of one session."""
    kinds = find_faults(names)  # by name, because the functions of a fault cannot be pickled
    truths: list[GroundTruthRow] = []
    intact: EpisodeDraft | None = None  # the session's episode that a duplicate can copy
    for spec in draw_session_specs(campaign, session):
        draft = draw_episode(build_named_rng(campaign.seed, "episode", spec.episode_id), spec, campaign.settings)
        rng = build_named_rng(campaign.seed, "fault", spec.episode_id)
        fault = draw_fault(rng, may_duplicate=intact is not None, kinds=kinds) if rng.random() < faults else None
        path = f"{spec.machine.host_id}/{spec.episode_id}{BUNDLE_SUFFIX}"
        if fault is None:
            intact = draft
            DiskStore(store, durable=False).put(spec.machine.host_id, spec.episode_id, pack_draft(draft))
        else:
            if fault is DUPLICATE_FAULT and intact is not None:
                draft = copy_telemetry(intact, draft)
            _write_faulty(store / path, rng, draft, fault)
        truths.append(
            GroundTruthRow(
                host_id=spec.machine.host_id,
                episode_id=spec.episode_id,
                path=path,
                fault=fault.name if fault else "",
                status=fault.status if fault else BundleStatus.ACCEPTED,
                reasons=fault.reasons if fault else (),
            )
        )
    return tuple(truths)


def _write_faulty(path: Path, rng: np.random.Generator, draft: EpisodeDraft, fault: FaultSpec) -> None:
    """Write a bundle with a fault, and the receipt that the fault calls for."""
    undamaged, data = pack_faulty_draft(rng, draft, fault)
    make_folder(path.parent)
    write_atomic(path, data, durable=False)
    receipted = {"of the file": data, "of the undamaged": undamaged, "wrong": data + b"?"}.get(fault.receipt)
    line = b"no digest here\n" if receipted is None else render_receipt(sha256(receipted).hexdigest(), path.name)
    if fault.receipt != "none":
        write_atomic(path.with_name(path.name + RECEIPT_SUFFIX), line, durable=False)


def pack_faulty_draft(rng: np.random.Generator, draft: EpisodeDraft, fault: FaultSpec) -> tuple[bytes, bytes]:
    """Pack a draft with a fault; return its bytes before and after the byte-level part of the fault."""
    if fault.draft:
        draft = fault.draft(rng, draft)
    data = pack_draft(draft)
    if fault.members:
        members = {name: bytes(view) for name, view in unpack_members(data, file="").items()}
        data = compress_frame(join_members(fault.members(rng, members)), level=_ZSTD_LEVEL)
    return data, fault.data(rng, data) if fault.data else data


def pack_draft(draft: EpisodeDraft) -> bytes:
    """Return the bytes of the bundle of a draft."""
    members = {f"{source}.jsonl": encode_columns(rows) for source, rows in draft.rows.items()}
    return pack_bundle(draft.manifest, {"labels.jsonl": draft.encoded_labels(), **members}, level=_ZSTD_LEVEL)
