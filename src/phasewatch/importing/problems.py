"""Why an import refuses an input: codes, the exception, and the lines of the import log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from phasewatch.errors import escape_unprintable

__all__ = ["IMPORT_CODES", "ImportCode", "ImportOutcome", "ImportRecord", "ImportRefusal", "count_records"]

_MAX_WORDS = 200


class ImportCode(StrEnum):
    """Why an episode or a file was refused."""

    PATH = "path"
    SYMLINK = "symlink"
    UNREADABLE = "unreadable"
    ARCHIVE = "archive"
    COMPRESSED = "compressed"
    EXPANDED_SIZE = "expanded-size"
    DIGEST = "digest"
    LINE_SIZE = "line-size"
    TEXT = "text"
    JSON = "json"
    KEY_TWICE = "key-twice"
    NON_FINITE = "non-finite"
    ROW_WIDTH = "row-width"
    COLUMN_MISSING = "column-missing"
    VALUE_TYPE = "value-type"
    NUMBER_RANGE = "number-range"
    CLOCK = "clock"
    CLOCK_BACKWARDS = "clock-backwards"
    CLOCK_REPEATED = "clock-repeated"
    FIELD_TWICE = "field-twice"
    HOST = "host"
    EPISODE = "episode"
    EPISODE_TWICE = "episode-twice"
    SCHEMA = "schema"
    INCOMPLETE = "incomplete"
    LABEL = "label"
    LABELS_MANY = "labels-many"
    NO_ROWS = "no-rows"
    RATE = "rate"
    SPAN = "span"
    TOO_MANY = "too-many"
    BUNDLE = "bundle"
    ID_CONFLICT = "id-conflict"
    WORKER_LOST = "worker-lost"


IMPORT_CODES: dict[ImportCode, str] = {
    ImportCode.PATH: "A path is absolute, leaves its folder, or is malformed.",
    ImportCode.SYMLINK: "A file or folder is a symbolic link; links are not followed.",
    ImportCode.UNREADABLE: "A file cannot be opened or read, or is not a regular file.",
    ImportCode.ARCHIVE: "An archive is damaged, or holds something else than plain files, each once.",
    ImportCode.COMPRESSED: "A gzip or zstd file is damaged, or its window is too large.",
    ImportCode.EXPANDED_SIZE: "A compressed file or an archive expands to more than is allowed.",
    ImportCode.DIGEST: "The file's SHA-256 differs from the one in the index.",
    ImportCode.LINE_SIZE: "A line is longer than 64 KiB.",
    ImportCode.TEXT: "A line is not UTF-8 text, or holds a NUL.",
    ImportCode.JSON: "A line is not one JSON object, or the CSV quoting is broken.",
    ImportCode.KEY_TWICE: "A key or a column name is repeated.",
    ImportCode.NON_FINITE: "A number is NaN or infinite.",
    ImportCode.ROW_WIDTH: "A CSV line has more or fewer cells than there are columns.",
    ImportCode.COLUMN_MISSING: "A column or key that the map needs does not exist.",
    ImportCode.VALUE_TYPE: "A value is not of the type that the map needs.",
    ImportCode.NUMBER_RANGE: "A number does not fit into its field.",
    ImportCode.CLOCK: "A time cannot be parsed, or is outside the years 2006 to 2116.",
    ImportCode.CLOCK_BACKWARDS: "A time is earlier than the one before, by more than the map allows.",
    ImportCode.CLOCK_REPEATED: "Two rows of one table have the same time.",
    ImportCode.FIELD_TWICE: "Two tables give the same field at the same time.",
    ImportCode.HOST: "The name of a host is malformed, or two hosts would get the same name.",
    ImportCode.EPISODE: "The name of an episode is absent, malformed or too long.",
    ImportCode.EPISODE_TWICE: "The same episode is stored twice.",
    ImportCode.SCHEMA: "A metadata file is absent, malformed or of an unknown version.",
    ImportCode.INCOMPLETE: "The episode was not finished by its recorder.",
    ImportCode.LABEL: "A label names no phase, or labels are out of order or overlap.",
    ImportCode.LABELS_MANY: "The episode has more than 63 labels.",
    ImportCode.NO_ROWS: "The episode has no reading, or fewer than half of the expected rows.",
    ImportCode.RATE: "Rows come faster than 1,000 a second.",
    ImportCode.SPAN: "The episode is shorter than 12 s, or longer than an hour.",
    ImportCode.TOO_MANY: "More rows or events have to be held at a time than is allowed.",
    ImportCode.BUNDLE: "The result would break a rule of the bundle format.",
    ImportCode.ID_CONFLICT: "The store holds another bundle of the same episode; use a new store.",
    ImportCode.WORKER_LOST: "The process that read the files died, twice.",
}


class ImportRefusal(Exception):
    """An input cannot be imported; the import goes on with the next one.

    Attributes:
        code: Why.
        words: What was found and what was expected.
        file: The file, relative to the source; empty if unknown.
        line: Its line; 0 if unknown.
    """

    def __init__(self, code: ImportCode, words: str, *, file: str = "", line: int = 0) -> None:
        self.code, self.file, self.line = code, file, line
        self.words = escape_unprintable(words)[:_MAX_WORDS]
        super().__init__(f"{file}:{line}: {code}: {self.words}")


class ImportOutcome(StrEnum):
    """The outcome of one line of the import log."""

    IMPORTED = "imported"
    REFUSED = "refused"


class ImportRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `import_v1.jsonl`: an episode that was imported, or an input that was refused.

    Attributes:
        outcome: Imported or refused.
        input: Name of the group of files, relative to the source.
        input_sha256: Digest of the files' content, the map and the options.
        host_id, episode_id: Of the bundle; empty if refused before they were known.
        key: Name of the episode in the source.
        code, words, file, line: Why it was refused, and where.
        bytes: Size of the bundle.
        duration_s: Labelled time.
        labels: Labelled seconds by phase.
        skipped_lines: Bad lines that the map allowed to skip, in the whole input.
    """

    outcome: ImportOutcome
    input: str
    input_sha256: str
    host_id: str = ""
    episode_id: str = ""
    key: str = ""
    code: str = ""
    words: str = ""
    file: str = ""
    line: int = 0
    bytes: int = 0
    duration_s: float = 0.0
    labels: dict[str, float] = {}
    skipped_lines: int = 0


def count_records(records: Iterable[ImportRecord]) -> dict[str, int]:
    """Count log lines: those imported, and those refused by code."""
    counts = Counter("imported" if r.outcome is ImportOutcome.IMPORTED else f"refused {r.code}" for r in records)
    return dict(sorted(counts.items()))
