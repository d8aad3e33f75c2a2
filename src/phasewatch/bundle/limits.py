"""The limits of a bundle (docs/formats/bundle.md); each is checked before memory is allocated."""

from __future__ import annotations

__all__ = [
    "DURATION_TOLERANCE_S",
    "INT64_MAX",
    "INT64_MIN",
    "MAX_CLOCK_DRIFT",
    "MAX_COMPRESSED_BYTES",
    "MAX_DECOMPRESSED_BYTES",
    "MAX_LABELLED_NS",
    "MAX_LABEL_ROWS",
    "MAX_LIST_ITEMS",
    "MAX_MANIFEST_BYTES",
    "MAX_NOMINAL_HZ",
    "MAX_ROWS_EMITTED",
    "MAX_ROW_LINE_BYTES",
    "MAX_SOURCE_ROWS",
    "MAX_STAMP_NS",
    "MAX_STRING_CHARS",
    "MAX_ZSTD_WINDOW_BYTES",
    "MIN_LABELLED_NS",
    "MIN_STAMP_NS",
    "MIN_ZSTD_FRAME_BYTES",
]

MAX_COMPRESSED_BYTES = 16 << 20
MIN_ZSTD_FRAME_BYTES = 9  # magic number, smallest frame header, header of one empty block
MAX_DECOMPRESSED_BYTES = 32 << 20
MAX_ZSTD_WINDOW_BYTES = 8 << 20
MAX_MANIFEST_BYTES = 256 << 10
MAX_ROW_LINE_BYTES = 4 << 10  # with the newline
MAX_SOURCE_ROWS = 20_000
MAX_LABEL_ROWS = 64  # with the end row
MAX_STRING_CHARS = 200
MAX_LIST_ITEMS = 1_000  # of any list in the manifest

MIN_LABELLED_NS = 1_000_000_000
MAX_LABELLED_NS = 3_600_000_000_000
MIN_STAMP_NS = 2**60  # year 2006; smaller stamps are not Unix nanoseconds
MAX_STAMP_NS = 2**62  # year 2116
DURATION_TOLERANCE_S = 0.001
MAX_CLOCK_DRIFT = 0.01
MAX_NOMINAL_HZ = 1_000.0
MAX_ROWS_EMITTED = 4_000_000  # of one source: MAX_NOMINAL_HZ for the longest episode and some minutes

INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1
