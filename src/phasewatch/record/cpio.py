"""A deterministic cpio archive in the kernel's `newc` form (kernel docs, "initramfs buffer format")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file or folder of the archive; times and owners are always 0."""

    name: str
    mode: int
    data: bytes = b""


def build_archive(entries: Iterable[Entry]) -> bytes:
    """Give the archive's bytes: same entries, same bytes."""
    out = bytearray()
    for number, entry in enumerate([*entries, Entry(name="TRAILER!!!", mode=0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08x" % value for value in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)
