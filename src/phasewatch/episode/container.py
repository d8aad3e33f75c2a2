"""The tar inside a bundle: plain ustar files with fixed headers, written and walked by hand in 512-byte blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from phasewatch.episode import limits
from phasewatch.errors import BundleError
from phasewatch.vocab import Source

MANIFEST = "manifest.json"
LABELS = "labels.jsonl"
MEMBERS = (MANIFEST, LABELS, *(f"{source}.jsonl" for source in Source))  # in the order in which they stand

_BLOCK = 512
_ZERO = bytes(_BLOCK)
_MTIME = 1_000_000_000  # fixed, and late enough that tar does not call it implausible
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe",
    b"x": "a PAX extension", b"g": "a PAX extension", b"L": "a GNU long name", b"K": "a GNU long link",
    b"S": "a GNU sparse file", b"\0": "an old-style file",
}  # fmt: skip


def source_of(name: str) -> Source | None:
    """Give the source whose rows a member holds; None for manifest and labels."""
    return None if name in (MANIFEST, LABELS) else Source(name.removesuffix(".jsonl"))


@lru_cache(maxsize=4096)
def _header(name: str, size: int) -> bytes:
    """Spell the one header that this format has for a member."""
    fields = (
        name.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size,
        b"%011o\0" % _MTIME, b" " * 8, b"0", bytes(100), b"ustar\x0000", bytes(32), bytes(32), b"0000000\0",
        b"0000000\0", bytes(155), bytes(12),
    )  # fmt: skip
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def join_members(members: Mapping[str, bytes]) -> bytes:
    """Write the tar; the caller hands the members in order."""
    pieces: list[bytes] = []
    for name, content in members.items():
        pieces += (_header(name, len(content)), content, bytes(-len(content) % _BLOCK))
    return b"".join((*pieces, _ZERO, _ZERO))


def split_members(tar: bytes, *, file: str, only_first: bool = False) -> dict[str, memoryview]:
    """Walk the tar and give each member's content, as views into it.

    Args:
        tar: The decompressed frame; with ``only_first`` its beginning is enough.
        file: What errors call the bundle.
        only_first: Stop after the first member.

    Raises:
        BundleError: At anything but the format's members, plain, in order, each once, closed by zeros.
    """

    def refuse(code: str, words: str, member: str = "") -> BundleError:
        return BundleError(code=code, words=words, file=file, member=member)

    view = memoryview(tar)
    found: dict[str, memoryview] = {}
    at = 0
    while True:
        block = tar[at : at + _BLOCK]
        if len(block) < _BLOCK:
            raise refuse("tar-truncated", f"ends at byte {len(tar):,}, where a header or the closing zeros belong")
        if block == _ZERO:
            break
        name, size = _read_header(block, refuse)
        if name in found:
            raise refuse("member-twice", "the tar holds it twice", name)
        if found and MEMBERS.index(name) < MEMBERS.index(next(reversed(found))):
            raise refuse("member-order", f"stands after {next(reversed(found))}", name)
        at += _BLOCK
        if at + size > len(tar):
            raise refuse("tar-truncated", f"{size:,} bytes announced, {len(tar) - at:,} there", name)
        found[name] = view[at : at + size]
        if only_first:
            return found
        at += size
        padding = -size % _BLOCK
        if tar[at : at + padding].strip(b"\0"):
            raise refuse("tar-padding", "bytes other than zero after the content", name)
        at += padding
    if len(tar) < at + 2 * _BLOCK:
        raise refuse("tar-truncated", "the second of the two closing blocks is missing")
    if tar[at:].strip(b"\0"):
        raise refuse("tar-trailing", "bytes other than zero after the tar's end")
    return found


def _read_header(block: bytes, refuse: object) -> tuple[str, int]:
    """Read one header and hold it against the only one that a member of this name and size may have."""
    assert callable(refuse)
    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        raise refuse("tar-checksum", "the header's checksum is not a number") from None
    if checksum != sum(block) - sum(block[148:156]) + 8 * 32:
        raise refuse("tar-checksum", "a header does not match its checksum")
    kind = block[156:157]
    if kind != b"0":
        raise refuse("tar-kind", f"a member is {_KINDS.get(kind, f'of type {kind!r}')}, not a plain file")
    if block[257:265] != b"ustar\x0000":
        raise refuse("tar-kind", "a header is not plain ustar")
    name = block[:100].rstrip(b"\0").decode("ascii", "replace")
    if name not in MEMBERS:
        raise refuse("member-unknown", f"the tar holds {name[:60]!r}; members are {', '.join(MEMBERS)}")
    digits = block[124:135]
    if not digits.isdigit() or b"8" in digits or b"9" in digits or block[135:136] != b"\0":
        raise refuse("tar-size", "the size is not eleven octal digits", name)
    size = int(digits, 8)
    if name == MANIFEST and size > limits.MANIFEST_BYTES:
        raise refuse("tar-size", f"{size:,} bytes; at most {limits.MANIFEST_BYTES:,} are allowed", name)
    if block != _header(name, size):
        raise refuse("tar-header", "mode, owner, time or another header field is not the format's", name)
    return name, size
