"""Writes a simulated campaign into a store, session by session, from as many processes as wanted: the same bytes from any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np

from phasewatch.atomic import make_folder, sync_folder, write_whole, writer
from phasewatch.channels import registry_digest
from phasewatch.episode.bundle import pack, read_members
from phasewatch.episode.container import join_members
from phasewatch.episode.frame import compress_frame
from phasewatch.episode.rows import encode_columns
from phasewatch.errors import StoreError, UsageError
from phasewatch.simulate.activity import Knobs, named_rng
from phasewatch.simulate.campaign import Campaign, Session, sessions_of, slots_of
from phasewatch.simulate.episode import Draft, draw_episode
from phasewatch.simulate.faults import DUPLICATE, Fault, choose, copy_as, kinds_of
from phasewatch.store.disk import FILE_SYSTEMS_OWN, RECEIPT, SUFFIX, DiskStore, render_receipt
from phasewatch.vocab import Status
from phasewatch.walk import EPISODE_S
from phasewatch.workers import map_ordered

_LEVEL = 3
_FAULTY_S = 60.0  # in a shorter episode a fault is more than it says: a pause of five seconds makes a source slow, too
_MOST_DAYS = 36_500.0
_MOST_EFFECT, _MOST_INTENSITY = 3.0, 100.0  # beyond them counters outgrow 64 bits


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the truth file: what stands in the store, what was done to it, and what a validator must say."""

    host_id: str
    episode_id: str
    path: str
    fault: str
    status: Status
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
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
    between_s: tuple[float, float] = EPISODE_S,
    knobs: Knobs | None = None,
    kinds: Sequence[str] = (),
    on_progress: Callable[[int], None] | None = None,
) -> Simulated:
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
    if faults and between_s[0] < _FAULTY_S:
        raise UsageError(
            f"--faults {faults:g} --seconds {between_s[0]:g} {between_s[1]:g}: what a fault is called holds for "
            f"episodes of {_FAULTY_S:g} s and more; lengthen them, or leave the faults out"
        )
    knobs = knobs or Knobs()
    for option, value, most in (
        ("--days", days, _MOST_DAYS), ("--host-effect", knobs.host_effect, _MOST_EFFECT),
        ("--episode-effect", knobs.episode_effect, _MOST_EFFECT), ("--drift", knobs.drift_per_week, _MOST_EFFECT),
        ("--noise", knobs.tick_noise, _MOST_EFFECT),
        ("--malware-intensity", knobs.malware_intensity, _MOST_INTENSITY),
    ):  # fmt: skip
        if not 0 <= value <= most:
            raise UsageError(f"{option} {value:g}: 0 to {most:g}")
    if (drifted := knobs.drift_per_week * days / 7) > _MOST_EFFECT:
        raise UsageError(
            f"--drift {knobs.drift_per_week:g} --days {days:g}: a host would drift by {drifted:.3g}, at most {_MOST_EFFECT:g}"
        )
    if registry_digest():
        raise UsageError("simulate makes no channels of your own; leave out --channels and PHASEWATCH_CHANNELS")
    if store.exists() and (not store.is_dir() or any(e.name not in FILE_SYSTEMS_OWN for e in store.iterdir())):
        raise StoreError(f"{store}: something is already there; name a new folder, or remove it first")
    chosen = kinds_of(kinds)
    make_folder(store)
    campaign = Campaign(hosts=hosts, episodes=episodes, seed=seed, days=days, between_s=between_s, knobs=knobs)
    named = store.resolve() if store.name in ("", "..") else store
    truth_path = named.with_name(named.name + ".truth.jsonl")
    make = partial(_make_session, store, campaign, faults, tuple(fault.name for fault in chosen))
    made = faulty = 0
    with writer(truth_path) as file:
        for result in map_ordered(
            make, sessions_of(campaign), workers=workers, timeout_s=None if workers == 1 else 120
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
    return Simulated(store=store, truth=truth_path, episodes=made, faulty=faulty)


def _make_session(
    store: Path, campaign: Campaign, faults: float, names: Sequence[str], session: Session
) -> tuple[Truth, ...]:
    """Make and write the episodes of one session."""
    kinds = kinds_of(names)  # by name: what a fault does cannot travel to another process
    truths: list[Truth] = []
    sound: Draft | None = None  # the session's episode that a duplicate can copy
    for slot in slots_of(campaign, session):
        draft = draw_episode(named_rng(campaign.seed, "episode", slot.episode_id), slot, campaign.knobs)
        rng = named_rng(campaign.seed, "fault", slot.episode_id)
        fault = choose(rng, may_duplicate=sound is not None, kinds=kinds) if rng.random() < faults else None
        path = f"{slot.machine.host_id}/{slot.episode_id}{SUFFIX}"
        if fault is None:
            sound = draft
            DiskStore(store, durable=False).put(slot.machine.host_id, slot.episode_id, render(draft))
        else:
            if fault is DUPLICATE and sound is not None:
                draft = copy_as(sound, draft)
            _write_faulty(store / path, rng, draft, fault)
        truths.append(
            Truth(
                host_id=slot.machine.host_id, episode_id=slot.episode_id, path=path,
                fault=fault.name if fault else "", status=fault.status if fault else Status.ACCEPTED,
                reasons=fault.reasons if fault else (),
            )
        )  # fmt: skip
    return tuple(truths)


def _write_faulty(path: Path, rng: np.random.Generator, draft: Draft, fault: Fault) -> None:
    """Write a bundle with a fault, and the receipt that belongs to the fault."""
    undamaged, data = render_faulty(rng, draft, fault)
    make_folder(path.parent)
    write_whole(path, data, durable=False)
    vouched = {"of the file": data, "of the undamaged": undamaged, "wrong": data + b"?"}.get(fault.receipt)
    line = b"no digest here\n" if vouched is None else render_receipt(sha256(vouched).hexdigest(), path.name)
    if fault.receipt != "none":
        write_whole(path.with_name(path.name + RECEIPT), line, durable=False)


def render_faulty(rng: np.random.Generator, draft: Draft, fault: Fault) -> tuple[bytes, bytes]:
    """Pack a draft with a fault in it; give the bytes before the fault that is done to bytes, and those after it."""
    if fault.draft:
        draft = fault.draft(rng, draft)
    data = render(draft)
    if fault.members:
        members = {name: bytes(view) for name, view in read_members(data, file="").items()}
        data = compress_frame(join_members(fault.members(rng, members)), level=_LEVEL)
    return data, fault.data(rng, data) if fault.data else data


def render(draft: Draft) -> bytes:
    """Pack a draft."""
    members = {f"{source}.jsonl": encode_columns(rows) for source, rows in draft.rows.items()}
    return pack(draft.manifest, {"labels.jsonl": draft.labels(), **members}, level=_LEVEL)
