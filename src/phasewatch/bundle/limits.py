"""Every bound of a bundle in one place (DESIGN section 2); each is checked before memory is spent on what it bounds."""

from __future__ import annotations

MAX_COMPRESSED_BYTES = 16 << 20
MIN_ZSTD_FRAME_BYTES = 9  # zstd: magic number, the least frame header, the header of one empty block
MAX_DECOMPRESSED_BYTES = 32 << 20
MAX_ZSTD_WINDOW_BYTES = 8 << 20
MAX_MANIFEST_BYTES = 256 << 10
MAX_ROW_LINE_BYTES = 4 << 10  # the newline included
MAX_SOURCE_ROWS = 20_000
MAX_LABEL_ROWS = 64  # the end row included
MAX_STRING_CHARS = 200
MAX_LIST_ITEMS = 1_000  # of any list in the manifest

MIN_LABELLED_NS = 1_000_000_000
MAX_LABELLED_NS = 3_600_000_000_000
MIN_STAMP_NS = 2**60  # 2006: a stamp below is no Unix time in nanoseconds
MAX_STAMP_NS = 2**62  # 2116
DURATION_TOLERANCE_S = 0.001
MAX_CLOCK_DRIFT = 0.01
MAX_NOMINAL_HZ = 1_000.0
MAX_ROWS_EMITTED = 4_000_000  # of one source: a sampler of that rate through the longest episode, and some minutes more

INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1
