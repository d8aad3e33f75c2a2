"""Small stores on disk for tests of validator, pipeline and command line: sound episodes, and hands to spoil one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from tests.factories.bundles import T0, S, episode, members_of

from phasewatch.bundle.archive import pack_bundle
from phasewatch.bundle.container import compress_frame, join_members
from phasewatch.bundle.model import Episode
from phasewatch.store.local import RECEIPT_SUFFIX, DiskStore, render_receipt

ACTIVE = {"active": {"out_bytes": 2e5, "cpu_user_ns": 8e8}}  # so that the phases of a test can be told apart


def put(store: Path, whole: Episode) -> Path:
    """Store an episode with its receipt."""
    data = pack_bundle(whole.manifest, members_of(whole), level=3)
    return DiskStore(store, durable=False).put(whole.manifest.host.host_id, whole.manifest.episode_id, data)


def put_bytes(path: Path, data: bytes) -> Path:
    """Write other bytes in place of a bundle, with the receipt that fits them."""
    path.write_bytes(data)
    path.with_name(path.name + RECEIPT_SUFFIX).write_bytes(render_receipt(sha256(data).hexdigest(), path.name))
    return path


def put_members(store: Path, whole: Episode, change: Callable[[dict[str, bytes]], Mapping[str, bytes]]) -> Path:
    """Store an episode of whose members some were changed behind the manifest's back."""
    from phasewatch.bundle.archive import unpack_members

    path = put(store, whole)
    members = {name: bytes(view) for name, view in unpack_members(path.read_bytes(), file="").items()}
    return put_bytes(path, compress_frame(join_members(dict(change(members))), level=3))


def write_store(store: Path, *, hosts: int = 3, sessions: int = 4, seconds: float = 20.0) -> Path:
    """Write a store that every recipe can be cut from: each session runs a benign machine beside a malicious one.

    Every third malicious one begins active, or the clock alone would tell the phase.
    """
    number = 0
    for h in range(hosts):
        for s in range(sessions):
            for profile, phases in (
                ("benign", (("clean", 2 * seconds),)),
                ("cryptomine", (("clean", seconds), ("active", seconds))[:: -1 if s % 3 == 1 else 1]),
            ):
                number += 1
                put(
                    store,
                    episode(
                        phases, number=number, host_id=f"h{h}", profile=profile, session=f"h{h}-s{s}",
                        agent=False, rates_of=ACTIVE, t0_ns=T0 + number * 1000 * S,
                    ),
                )  # fmt: skip
    return store
