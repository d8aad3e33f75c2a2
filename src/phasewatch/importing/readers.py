"""Read untrusted JSON lines and CSV as a stream: every line, file and expansion is bounded."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from hashlib import sha256
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

from phasewatch import atomic
from phasewatch.importing.problems import ImportCode, ImportRefusal

__all__ = [
    "MAX_LINE_BYTES",
    "RowFormat",
    "SourceFile",
    "bind_column",
    "compute_file_digest",
    "iter_lines",
    "iter_table",
    "list_files",
    "open_expanded",
    "parse_object",
]

MAX_LINE_BYTES = 64 << 10
MAX_EXPANDED_BYTES = 64 << 30
MAX_EXPANSION = 1_000  # times the size of the compressed file
MAX_FILES = 1_000_000
_MAX_COLUMNS = 4_096
_MAX_WINDOW_LOG = 27
_FREE_EXPANSION_BYTES = 64 << 20  # small files may expand to this, whatever their ratio
_ZSTD_MAGIC, _GZIP_MAGIC = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"

Row = Any  # list[str] of a CSV line, or dict of a JSON line
RowGetter = Callable[[Row], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file below a source folder: its path with forward slashes relative to it, and its place on the disk."""

    relative: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """How the lines of a table are written.

    Attributes:
        kind: ``csv`` or ``jsonl``.
        columns: Names of the columns of a CSV file without a header; empty to read them from its first line.
        delimiter: Of a CSV file.
    """

    kind: str
    columns: tuple[str, ...] = ()
    delimiter: str = ","


def list_files(source: Path) -> Iterator[SourceFile | ImportRefusal]:
    """Yield the files below a folder, or the file itself, sorted by path; links are refused, not followed."""
    if source.is_file():
        yield SourceFile(relative=source.name, path=source)
        return
    seen = 0
    folders: list[tuple[str, Path]] = [("", source)]
    while folders:
        prefix, folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda e: e.name)
        except OSError as exc:
            yield ImportRefusal(ImportCode.UNREADABLE, exc.strerror or str(exc), file=prefix or ".")
            continue
        below: list[tuple[str, Path]] = []
        for entry in listed:
            seen += 1
            if seen > MAX_FILES:
                yield ImportRefusal(ImportCode.TOO_MANY, f"more than {MAX_FILES:,} files", file=prefix)
                return
            relative = prefix + entry.name
            try:
                relative.encode("utf-8")
            except UnicodeEncodeError:
                yield ImportRefusal(ImportCode.PATH, "a name is not UTF-8", file=ascii(relative))
                continue
            if entry.is_symlink():
                yield ImportRefusal(ImportCode.SYMLINK, "links are not followed; copy the file", file=relative)
            elif entry.is_dir(follow_symlinks=False):
                below.append((f"{relative}/", Path(entry.path)))
            elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                yield SourceFile(relative=relative, path=Path(entry.path))
        folders += reversed(below)


def compute_file_digest(file: SourceFile) -> bytes:
    """Return the SHA-256 of a file's content.

    Raises:
        ImportRefusal: If it cannot be read.
    """
    digest = sha256()
    try:
        with atomic.open_regular(file.path) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as exc:
        raise ImportRefusal(ImportCode.UNREADABLE, exc.strerror or str(exc), file=file.relative) from None
    return digest.digest()


@contextmanager
def open_expanded(file: SourceFile) -> Iterator[tuple[BufferedIOBase, int]]:
    """Open a file, decompressing gzip and zstd by their magic numbers, and yield it with the most bytes to read.

    Raises:
        ImportRefusal: If it cannot be opened or decompressed.
    """
    if sys.version_info < (3, 14):
        from backports.zstd import DecompressionParameter, ZstdError, ZstdFile
    else:
        from compression.zstd import DecompressionParameter, ZstdError, ZstdFile
    try:
        with atomic.open_regular(file.path) as raw:
            size = os.fstat(raw.fileno()).st_size
            magic = raw.peek(4)[:4]
            most = min(MAX_EXPANDED_BYTES, max(_FREE_EXPANSION_BYTES, MAX_EXPANSION * size))
            if magic == _ZSTD_MAGIC:
                options: dict[int, int] = {DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
                with ZstdFile(raw, options=options) as stream:
                    yield cast(BufferedIOBase, stream), most
            elif magic[:2] == _GZIP_MAGIC:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield cast(BufferedIOBase, stream), most
            else:
                yield raw, max(size, 1) * 2  # a file that grows while it is read ends somewhere
    except (ZstdError, zlib.error, gzip.BadGzipFile, EOFError) as exc:
        raise ImportRefusal(ImportCode.COMPRESSED, str(exc), file=file.relative) from None
    except OSError as exc:
        raise ImportRefusal(ImportCode.UNREADABLE, exc.strerror or str(exc), file=file.relative) from None


def iter_lines(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is not blank, without line ends and a byte-order mark.

    Raises:
        ImportRefusal: At the first line that is too long or not text, or if too much is expanded.
    """
    with open_expanded(file) as (stream, most):
        total = number = 0
        while line := stream.readline(MAX_LINE_BYTES + 2):
            number += 1
            total += len(line)
            if total > most:
                words = f"more than {most:,} bytes come out"
                raise ImportRefusal(ImportCode.EXPANDED_SIZE, words, file=file.relative, line=number)
            if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
                words = f"longer than {MAX_LINE_BYTES:,} bytes"
                raise ImportRefusal(ImportCode.LINE_SIZE, words, file=file.relative, line=number)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise ImportRefusal(ImportCode.TEXT, "not UTF-8", file=file.relative, line=number) from None
            if "\0" in text:
                raise ImportRefusal(ImportCode.TEXT, "a NUL", file=file.relative, line=number)
            if text.strip():
                yield number, text


def iter_table(
    file: SourceFile, form: RowFormat, *, skips: int = 0, skipped: list[int] | None = None
) -> Generator[tuple[int, Row, tuple[str, ...]], None, None]:
    """Yield line number, row and column names (empty for JSON) of each line of a table.

    Args:
        file: The file.
        form: How its lines are written.
        skips: Number of malformed lines that are left out.
        skipped: Receives their numbers.

    Raises:
        ImportRefusal: At the first malformed line that is not left out.
    """
    columns = form.columns
    for number, text in iter_lines(file):
        try:
            if form.kind == "jsonl":
                yield number, parse_object(text), ()
                continue
            cells = _split_cells(text, form.delimiter)
            if not columns:
                columns = _check_header(cells)
                continue
            if len(cells) != len(columns):
                words = f"{len(cells)} cells; there are {len(columns)} columns"
                raise ImportRefusal(ImportCode.ROW_WIDTH, words)
            yield number, cells, columns
        except ImportRefusal as bad:
            bad.file, bad.line = file.relative, number
            if skipped is None or len(skipped) >= skips:
                raise
            skipped.append(number)


def _split_cells(text: str, delimiter: str) -> list[str]:
    if '"' not in text:
        return text.split(delimiter)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except (csv.Error, StopIteration) as exc:
        raise ImportRefusal(ImportCode.JSON, f"broken CSV quoting: {exc}") from None


def _check_header(cells: Sequence[str]) -> tuple[str, ...]:
    columns = tuple(cell.strip() for cell in cells)
    if len(columns) > _MAX_COLUMNS:
        raise ImportRefusal(ImportCode.ROW_WIDTH, f"{len(columns):,} columns; at most {_MAX_COLUMNS:,} are allowed")
    if len(set(columns)) != len(columns):
        name = next(c for c in columns if columns.count(c) > 1)
        raise ImportRefusal(ImportCode.KEY_TWICE, f"the column {name[:60]!r} is repeated")
    return columns


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        name = next(n for n in names if names.count(n) > 1)
        raise ImportRefusal(ImportCode.KEY_TWICE, f"the key {name[:60]!r} is repeated")
    return made


def _refuse_constant(name: str) -> Any:
    raise ImportRefusal(ImportCode.NON_FINITE, f"{name} is no finite number")


_DECODER = json.JSONDecoder(object_pairs_hook=_build_object, parse_constant=_refuse_constant, parse_float=Decimal)


def parse_object(text: str) -> dict[str, Any]:
    """Parse one JSON object strictly; fractions become exact decimals.

    Raises:
        ImportRefusal: If it is no object, a key is repeated, or a number is NaN or infinite.
    """
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as exc:
        raise ImportRefusal(ImportCode.JSON, f"not JSON: {str(exc)[:80]}") from None
    if not isinstance(value, dict):
        raise ImportRefusal(ImportCode.JSON, f"a {type(value).__name__}, not an object")
    return value


def bind_column(name: str, columns: tuple[str, ...]) -> RowGetter | None:
    """Return a function that reads a column of a row; None if a CSV file does not have it.

    A JSON name may lead into nested objects with dots (``blockstats.wr_bytes``) and into lists by number.
    """
    if columns:
        if name not in columns:
            return None
        place = columns.index(name)
        return lambda row: row[place]
    path = name.split(".")
    return lambda row: _find_nested(row, name, path)


_INDEX = re.compile(r"[0-9]{1,6}")


def _find_nested(row: dict[str, Any], name: str, path: Sequence[str]) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for step in path:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and _INDEX.fullmatch(step) and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value
