"""The container of a bundle: one zstd frame around a tar of plain ustar files with fixed headers.

Both are parsed here, block by block, because general libraries accept more than the format allows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from phasewatch.bundle import limits
from phasewatch.errors import BundleError
from phasewatch.types import SourceKind

__all__ = [
    "LABELS_FILE",
    "MANIFEST_FILE",
    "MEMBER_FILES",
    "compress_frame",
    "decompress_frame",
    "decompress_start",
    "find_member_source",
    "join_members",
    "split_members",
]

MANIFEST_FILE = "manifest.json"
LABELS_FILE = "labels.jsonl"
MEMBER_FILES = (MANIFEST_FILE, LABELS_FILE, *(f"{source}.jsonl" for source in SourceKind))  # in this order

_TAR_BLOCK_BYTES = 512
_ZERO_BLOCK = bytes(_TAR_BLOCK_BYTES)
_MTIME = 1_000_000_000  # fixed, and late enough that tar does not warn of an implausible time
_TYPE_NAMES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"x": "a PAX extension",
    b"g": "a PAX extension",
    b"L": "a GNU long name",
    b"K": "a GNU long link",
    b"S": "a GNU sparse file",
    b"\0": "an old-style file",
}


def find_member_source(name: str) -> SourceKind | None:
    """Return the source whose rows a member holds; None for the manifest and the labels."""
    return None if name in (MANIFEST_FILE, LABELS_FILE) else SourceKind(name.removesuffix(".jsonl"))


@lru_cache(maxsize=4096)
def _build_tar_header(name: str, size: int) -> bytes:
    """Return the only valid header of a member of this name and size."""
    fields = (
        name.encode().ljust(100, b"\0"),
        b"0000644\0",  # mode
        b"0000000\0",  # owner
        b"0000000\0",  # group
        b"%011o\0" % size,
        b"%011o\0" % _MTIME,
        b" " * 8,  # checksum, filled in below
        b"0",  # a plain file
        bytes(100),  # link name
        b"ustar\x0000",
        bytes(32),  # owner name
        bytes(32),  # group name
        b"0000000\0",  # device
        b"0000000\0",
        bytes(155),  # prefix
        bytes(12),
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def join_members(members: Mapping[str, bytes]) -> bytes:
    """Return the tar of the members, which must be in the order of `MEMBER_FILES`."""
    pieces: list[bytes] = []
    for name, content in members.items():
        pieces += (_build_tar_header(name, len(content)), content, bytes(-len(content) % _TAR_BLOCK_BYTES))
    return b"".join((*pieces, _ZERO_BLOCK, _ZERO_BLOCK))


def split_members(tar: bytes, *, file: str, only_first: bool = False) -> dict[str, memoryview]:
    """Split a tar into its members.

    Args:
        tar: The decompressed frame; with ``only_first`` its beginning is enough.
        file: Name of the bundle in errors.
        only_first: Stop after the first member.

    Returns:
        Views of the contents, by member name.

    Raises:
        BundleError: If it holds anything but the members of the format, in order, each once, and the closing zeros.
    """

    def refuse(code: str, words: str, member: str = "") -> BundleError:
        return BundleError(code=code, words=words, file=file, member=member)

    view = memoryview(tar)
    members: dict[str, memoryview] = {}
    at = 0
    while True:
        block = tar[at : at + _TAR_BLOCK_BYTES]
        if len(block) < _TAR_BLOCK_BYTES:
            raise refuse("tar-truncated", f"ends at byte {len(tar):,}, where a header or the closing zeros belong")
        if block == _ZERO_BLOCK:
            break
        name, size = _parse_tar_header(block, refuse)
        if name in members:
            raise refuse("member-twice", "the tar holds it twice", name)
        if members and MEMBER_FILES.index(name) < MEMBER_FILES.index(next(reversed(members))):
            raise refuse("member-order", f"it comes after {next(reversed(members))}", name)
        at += _TAR_BLOCK_BYTES
        if at + size > len(tar):
            raise refuse("tar-truncated", f"{size:,} bytes announced, {len(tar) - at:,} found", name)
        members[name] = view[at : at + size]
        if only_first:
            return members
        at += size
        padding = -size % _TAR_BLOCK_BYTES
        if tar[at : at + padding].strip(b"\0"):
            raise refuse("tar-padding", "bytes other than zero after the content", name)
        at += padding
    if len(tar) < at + 2 * _TAR_BLOCK_BYTES:
        raise refuse("tar-truncated", "the second of the two closing blocks is missing")
    if tar[at:].strip(b"\0"):
        raise refuse("tar-trailing", "bytes other than zero after the tar's end")
    return members


def _parse_tar_header(block: bytes, refuse: Callable[..., BundleError]) -> tuple[str, int]:
    """Return the name and size in a header, which must be the only valid one for them."""
    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        raise refuse("tar-checksum", "the header's checksum is not a number") from None
    if checksum != sum(block) - sum(block[148:156]) + 8 * 32:
        raise refuse("tar-checksum", "a header does not match its checksum")
    kind = block[156:157]
    if kind != b"0":
        raise refuse("tar-kind", f"a member is {_TYPE_NAMES.get(kind, f'of type {kind!r}')}, not a plain file")
    if block[257:265] != b"ustar\x0000":
        raise refuse("tar-kind", "a header is not plain ustar")
    name = block[:100].rstrip(b"\0").decode("ascii", "replace")
    if name not in MEMBER_FILES:
        raise refuse("member-unknown", f"the tar holds {name[:60]!r}; members are {', '.join(MEMBER_FILES)}")
    digits = block[124:135]
    if not digits.isdigit() or b"8" in digits or b"9" in digits or block[135:136] != b"\0":
        raise refuse("tar-size", "the size is not eleven octal digits", name)
    size = int(digits, 8)
    if name == MANIFEST_FILE and size > limits.MAX_MANIFEST_BYTES:
        raise refuse("tar-size", f"{size:,} bytes; at most {limits.MAX_MANIFEST_BYTES:,} are allowed", name)
    if block != _build_tar_header(name, size):
        raise refuse("tar-header", "mode, owner, time or another header field is not the format's", name)
    return name, size


if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports.zstd import CompressionParameter, DecompressionParameter, ZstdDecompressor, ZstdError, compress
else:
    from compression.zstd import CompressionParameter, DecompressionParameter, ZstdDecompressor, ZstdError, compress

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_WINDOW_LOG = limits.MAX_ZSTD_WINDOW_BYTES.bit_length() - 1


def compress_frame(content: bytes, *, level: int) -> bytes:
    """Compress into one zstd frame with the content's size and a checksum.

    Raises:
        ValueError: If the level is not 1 to 19, or the content exceeds its limit.
    """
    if not 1 <= level <= 19:
        raise ValueError(f"zstd level {level}; bundles use 1 to 19")
    if len(content) > limits.MAX_DECOMPRESSED_BYTES:
        raise ValueError(f"the episode is {len(content):,} bytes; a bundle holds {limits.MAX_DECOMPRESSED_BYTES:,}")
    options: dict[int, int] = {CompressionParameter.compression_level: level, CompressionParameter.checksum_flag: 1}
    if len(content) > limits.MAX_ZSTD_WINDOW_BYTES:
        options[CompressionParameter.window_log] = _WINDOW_LOG
    packed = bytes(compress(content, options=options))
    if len(packed) > limits.MAX_COMPRESSED_BYTES:
        raise ValueError(f"the bundle is {len(packed):,} bytes; at most {limits.MAX_COMPRESSED_BYTES:,} are allowed")
    return packed


def _check_frame_header(data: bytes, *, file: str) -> int | None:
    """Check the header of a zstd frame (RFC 8878, section 3.1.1.1) and return the size in it, if any.

    Raises:
        BundleError: If the header is not valid in a bundle.
    """

    def refuse(code: str, words: str) -> BundleError:
        return BundleError(code=code, words=words, file=file)

    if not data:
        raise refuse("compressed-size", "the file is empty")
    if len(data) > limits.MAX_COMPRESSED_BYTES:
        raise refuse("compressed-size", f"{len(data):,} bytes; at most {limits.MAX_COMPRESSED_BYTES:,} are allowed")
    if len(data) >= 4 and data[0] & 0xF0 == 0x50 and data[1:4] == b"\x2a\x4d\x18":
        raise refuse("zstd-skippable", "a skippable frame comes before the data")
    if data[:4] != _ZSTD_MAGIC:
        short = len(data) < 4 and _ZSTD_MAGIC.startswith(data)
        raise refuse(
            "zstd-truncated" if short else "zstd-magic", f"begins with {data[:4].hex()}, not {_ZSTD_MAGIC.hex()}"
        )
    if len(data) < 5:
        raise refuse("zstd-truncated", "the frame's header is cut off")
    descriptor = data[4]
    single_segment = bool(descriptor & 0x20)
    if descriptor & 0x18:
        raise refuse("zstd-header", "unused or reserved bits are set")
    if not descriptor & 0x04:
        raise refuse("zstd-checksum-flag", "the frame carries no checksum")
    if descriptor & 0x03:
        raise refuse("zstd-dictionary", "the frame names a dictionary")
    size_width = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    at = 5 if single_segment else 6
    if len(data) < at + size_width:
        raise refuse("zstd-truncated", "the frame's header is cut off")
    size: int | None = None
    if size_width:
        size = int.from_bytes(data[at : at + size_width], "little") + (256 if size_width == 2 else 0)
        if size > limits.MAX_DECOMPRESSED_BYTES:
            raise refuse(
                "decompressed-size", f"the frame says {size:,} bytes; at most {limits.MAX_DECOMPRESSED_BYTES:,}"
            )
    if single_segment:
        window = size or 0
    else:
        base = 1 << (10 + (data[5] >> 3))
        window = base + base // 8 * (data[5] & 7)
    if window > limits.MAX_ZSTD_WINDOW_BYTES:
        raise refuse(
            "zstd-window", f"a window of {window:,} bytes; at most {limits.MAX_ZSTD_WINDOW_BYTES:,} are allowed"
        )
    return size


def _build_decompressor() -> ZstdDecompressor:
    # A new one for each call: one that is shared between threads reports corruption in good data (measured).
    return ZstdDecompressor(options={DecompressionParameter.window_log_max: _WINDOW_LOG})


def decompress_frame(data: bytes, *, file: str) -> bytes:
    """Decompress the single zstd frame of a bundle.

    Raises:
        BundleError: If it is damaged, truncated, followed by other bytes, or too large.
    """
    size = _check_frame_header(data, file=file)
    most = limits.MAX_DECOMPRESSED_BYTES if size is None else size
    decompressor = _build_decompressor()
    try:
        content = decompressor.decompress(data, max_length=most + 1)
    except ZstdError as exc:
        raise BundleError(code="zstd-corrupt", words=str(exc)[:120], file=file) from None
    if len(content) > most:
        raise BundleError(code="decompressed-size", words=f"more than {most:,} bytes come out", file=file)
    if not decompressor.eof:
        raise BundleError(code="zstd-truncated", words=f"the frame goes on after {len(data):,} bytes", file=file)
    if decompressor.unused_data:
        tail = decompressor.unused_data
        is_skippable = len(tail) >= 4 and tail[0] & 0xF0 == 0x50 and tail[1:4] == b"\x2a\x4d\x18"
        code = "zstd-skippable" if is_skippable else "zstd-trailing"
        raise BundleError(code=code, words=f"{len(tail):,} bytes follow the frame", file=file)
    return bytes(content)


def decompress_start(data: bytes, most: int, *, file: str) -> bytes:
    """Decompress at most ``most`` bytes of the beginning.

    Raises:
        BundleError: If the header is not a bundle's, or the start is damaged.
    """
    _check_frame_header(data, file=file)
    try:
        return bytes(_build_decompressor().decompress(data, max_length=most))
    except ZstdError as exc:
        raise BundleError(code="zstd-corrupt", words=str(exc)[:120], file=file) from None
