"""One zstd frame with a checksum, read within bounds: the header is checked here because decompressors let too much pass."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from phasewatch.episode import limits
from phasewatch.errors import BundleError

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports.zstd import CompressionParameter, DecompressionParameter, ZstdDecompressor, ZstdError, compress
else:
    from compression.zstd import CompressionParameter, DecompressionParameter, ZstdDecompressor, ZstdError, compress

_MAGIC = b"\x28\xb5\x2f\xfd"
_WINDOW_LOG = limits.ZSTD_WINDOW_BYTES.bit_length() - 1


def compress_frame(content: bytes, *, level: int) -> bytes:
    """Compress into one frame that states its content's size and carries a checksum.

    Raises:
        ValueError: If the level would need a larger window than readers take, or the content is over its bound.
    """
    if not 1 <= level <= 19:
        raise ValueError(f"zstd level {level}; bundles use 1 to 19")
    if len(content) > limits.DECOMPRESSED_BYTES:
        raise ValueError(f"the episode is {len(content):,} bytes; a bundle holds {limits.DECOMPRESSED_BYTES:,}")
    options: dict[int, int] = {CompressionParameter.compression_level: level, CompressionParameter.checksum_flag: 1}
    if len(content) > limits.ZSTD_WINDOW_BYTES:
        options[CompressionParameter.window_log] = _WINDOW_LOG
    packed = bytes(compress(content, options=options))
    if len(packed) > limits.COMPRESSED_BYTES:
        raise ValueError(f"the bundle is {len(packed):,} bytes; at most {limits.COMPRESSED_BYTES:,} are allowed")
    return packed


def check_header(data: bytes, *, file: str) -> int | None:
    """Check the frame's header (RFC 8878, section 3.1.1.1) and give the content's size, if it says so.

    Raises:
        BundleError: If this is no frame that a bundle may be.
    """

    def refuse(code: str, words: str) -> BundleError:
        return BundleError(code=code, words=words, file=file)

    if not data:
        raise refuse("compressed-size", "the file is empty")
    if len(data) > limits.COMPRESSED_BYTES:
        raise refuse("compressed-size", f"{len(data):,} bytes; at most {limits.COMPRESSED_BYTES:,} are allowed")
    if len(data) >= 4 and data[0] & 0xF0 == 0x50 and data[1:4] == b"\x2a\x4d\x18":
        raise refuse("zstd-skippable", "a skippable frame stands before the data")
    if data[:4] != _MAGIC:
        short = len(data) < 4 and _MAGIC.startswith(data)
        raise refuse("zstd-truncated" if short else "zstd-magic", f"begins with {data[:4].hex()}, not {_MAGIC.hex()}")
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
        if size > limits.DECOMPRESSED_BYTES:
            raise refuse("decompressed-size", f"the frame says {size:,} bytes; at most {limits.DECOMPRESSED_BYTES:,}")
    if single_segment:
        window = size or 0
    else:
        base = 1 << (10 + (data[5] >> 3))
        window = base + base // 8 * (data[5] & 7)
    if window > limits.ZSTD_WINDOW_BYTES:
        raise refuse("zstd-window", f"a window of {window:,} bytes; at most {limits.ZSTD_WINDOW_BYTES:,} are allowed")
    return size


def _decompressor() -> ZstdDecompressor:
    # A new one each time: shared between threads it reports corruption in good data (measured).
    return ZstdDecompressor(options={DecompressionParameter.window_log_max: _WINDOW_LOG})


def decompress_frame(data: bytes, *, file: str) -> bytes:
    """Decompress the one frame that a bundle is.

    Raises:
        BundleError: If it is damaged, cut, followed by anything, or larger than the bound.
    """
    size = check_header(data, file=file)
    most = limits.DECOMPRESSED_BYTES if size is None else size
    machine = _decompressor()
    try:
        content = machine.decompress(data, max_length=most + 1)
    except ZstdError as exc:
        raise BundleError(code="zstd-corrupt", words=str(exc)[:120], file=file) from None
    if len(content) > most:
        raise BundleError(code="decompressed-size", words=f"more than {most:,} bytes come out", file=file)
    if not machine.eof:
        raise BundleError(code="zstd-truncated", words=f"the frame goes on after {len(data):,} bytes", file=file)
    if machine.unused_data:
        tail = machine.unused_data
        is_skippable = len(tail) >= 4 and tail[0] & 0xF0 == 0x50 and tail[1:4] == b"\x2a\x4d\x18"
        code = "zstd-skippable" if is_skippable else "zstd-trailing"
        raise BundleError(code=code, words=f"{len(tail):,} bytes follow the frame", file=file)
    return bytes(content)


def decompress_start(data: bytes, most: int, *, file: str) -> bytes:
    """Decompress no more than the first ``most`` bytes.

    Raises:
        BundleError: If the header is not a bundle's, or the start is damaged.
    """
    check_header(data, file=file)
    try:
        return bytes(_decompressor().decompress(data, max_length=most))
    except ZstdError as exc:
        raise BundleError(code="zstd-corrupt", words=str(exc)[:120], file=file) from None
