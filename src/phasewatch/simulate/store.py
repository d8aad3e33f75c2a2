"""Writes a simulated campaign into a store, session by session, from as many processes as wanted: the same bytes from any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

_ZSTD_LEVEL = 3
_MIN_FAULTY_EPISODE_S = (
    60.0  # in a shorter episode a fault is more than it says: a pause of five seconds makes a source slow, too
)
_MAX_DAYS = 36_500.0
_MAX_EFFECT, _MAX_INTENSITY = 3.0, 100.0  # beyond them counters outgrow 64 bits


class GroundTruthRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the truth file: what stands in the store, what was done to it, and what a validator must say."""

    host_id: str
    episode_id: str
    path: str
    fault: str
    status: BundleStatus
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """What `simulate` made."""

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
    knobs: SimulationSettings | None = None,
    kinds: Sequence[str] = (),
    on_progress: Callable[[int], None] | None = None,
) -> SimulationResult:
    """Make a store of seeded episodes and, beside it, the truth about each.

    Args:
        store: A folder that does not exist yet, or is empty.
        hosts: How many hosts.
        episodes: How many in all, dealt over the hosts.
        seed: Same seed and numbers, same bytes.
        faults: Share of episodes that get a fault, 0 to 1.
        workers: Processes.
        days: Over how many days at least the episodes are spread.
        between_s: Shortest and longest lab episode.
        knobs: How noisy the world is; None for the usual.
        kinds: Names of the faults to choose from; none for all.
        on_progress: Called with the number of episodes made so far.

    Raises:
        UsageError: If a number makes no sense.
        StoreError: If something is already there.
    """
    if hosts < 1 or episodes < hosts:
        raise UsageError(f"--hosts {hosts} --episodes {episodes}: at least one host, and one episode for each")
    if not 0 <= faults <= 1:
        raise UsageError(f"--faults {faults:g}: a share, 0 to 1")
    if not 1 <= between_s[0] <= between_s[1] <= 3600:
        raise UsageError(f"--seconds {between_s[0]:g} {between_s[1]:g}: the shortest, then the longest, 1 to 3600")
    if faults and between_s[0] < _MIN_FAULTY_EPISODE_S:
        raise UsageError(
            f"--faults {faults:g} --seconds {between_s[0]:g} {between_s[1]:g}: what a fault is called holds for "
            f"episodes of {_MIN_FAULTY_EPISODE_S:g} s and more; lengthen them, or leave the faults out"
        )
    knobs = knobs or SimulationSettings()
    for option, value, most in (
        ("--days", days, _MAX_DAYS), ("--host-effect", knobs.host_effect, _MAX_EFFECT),
        ("--episode-effect", knobs.episode_effect, _MAX_EFFECT), ("--drift", knobs.drift_per_week, _MAX_EFFECT),
        ("--noise", knobs.tick_noise, _MAX_EFFECT),
        ("--malware-intensity", knobs.malware_intensity, _MAX_INTENSITY),
    ):  # fmt: skip
        if not 0 <= value <= most:
            raise UsageError(f"{option} {value:g}: 0 to {most:g}")
    if (drifted := knobs.drift_per_week * days / 7) > _MAX_EFFECT:
        raise UsageError(
            f"--drift {knobs.drift_per_week:g} --days {days:g}: a host would drift by {drifted:.3g}, at most {_MAX_EFFECT:g}"
        )
    if get_custom_channels_digest():
        raise UsageError("simulate makes no channels of your own; unset PHASEWATCH_CUSTOM_CHANNELS")
    if store.exists() and (not store.is_dir() or any(e.name not in FILE_SYSTEM_FOLDERS for e in store.iterdir())):
        raise StoreError(f"{store}: something is already there; name a new folder, or remove it first")
    chosen = find_faults(kinds)
    make_folder(store)
    campaign = SimulatedCampaign(hosts=hosts, episodes=episodes, seed=seed, days=days, between_s=between_s, knobs=knobs)
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
            if on_progress:
                on_progress(made)
    for folder in sorted(each for each in store.iterdir() if each.is_dir()):
        sync_folder(folder)
    return SimulationResult(store=store, truth=truth_path, episodes=made, faulty=faulty)


def _make_session(
    store: Path, campaign: SimulatedCampaign, faults: float, names: Sequence[str], session: SimulatedSession
) -> tuple[GroundTruthRow, ...]:
    """Make and write the episodes of one session."""
    kinds = find_faults(names)  # by name: what a fault does cannot travel to another process
    truths: list[GroundTruthRow] = []
    sound: EpisodeDraft | None = None  # the session's episode that a duplicate can copy
    for slot in draw_session_specs(campaign, session):
        draft = draw_episode(build_named_rng(campaign.seed, "episode", slot.episode_id), slot, campaign.knobs)
        rng = build_named_rng(campaign.seed, "fault", slot.episode_id)
        fault = draw_fault(rng, may_duplicate=sound is not None, kinds=kinds) if rng.random() < faults else None
        path = f"{slot.machine.host_id}/{slot.episode_id}{BUNDLE_SUFFIX}"
        if fault is None:
            sound = draft
            DiskStore(store, durable=False).put(slot.machine.host_id, slot.episode_id, pack_draft(draft))
        else:
            if fault is DUPLICATE_FAULT and sound is not None:
                draft = copy_telemetry(sound, draft)
            _write_faulty(store / path, rng, draft, fault)
        truths.append(
            GroundTruthRow(
                host_id=slot.machine.host_id, episode_id=slot.episode_id, path=path,
                fault=fault.name if fault else "", status=fault.status if fault else BundleStatus.ACCEPTED,
                reasons=fault.reasons if fault else (),
            )
        )  # fmt: skip
    return tuple(truths)


def _write_faulty(path: Path, rng: np.random.Generator, draft: EpisodeDraft, fault: FaultSpec) -> None:
    """Write a bundle with a fault, and the receipt that belongs to the fault."""
    undamaged, data = pack_faulty_draft(rng, draft, fault)
    make_folder(path.parent)
    write_atomic(path, data, durable=False)
    vouched = {"of the file": data, "of the undamaged": undamaged, "wrong": data + b"?"}.get(fault.receipt)
    line = b"no digest here\n" if vouched is None else render_receipt(sha256(vouched).hexdigest(), path.name)
    if fault.receipt != "none":
        write_atomic(path.with_name(path.name + RECEIPT_SUFFIX), line, durable=False)


def pack_faulty_draft(rng: np.random.Generator, draft: EpisodeDraft, fault: FaultSpec) -> tuple[bytes, bytes]:
    """Pack a draft with a fault in it; give the bytes before the fault that is done to bytes, and those after it."""
    if fault.draft:
        draft = fault.draft(rng, draft)
    data = pack_draft(draft)
    if fault.members:
        members = {name: bytes(view) for name, view in unpack_members(data, file="").items()}
        data = compress_frame(join_members(fault.members(rng, members)), level=_ZSTD_LEVEL)
    return data, fault.data(rng, data) if fault.data else data


def pack_draft(draft: EpisodeDraft) -> bytes:
    """Pack a draft."""
    members = {f"{source}.jsonl": encode_columns(rows) for source, rows in draft.rows.items()}
    return pack_bundle(draft.manifest, {"labels.jsonl": draft.encoded_labels(), **members}, level=_ZSTD_LEVEL)
