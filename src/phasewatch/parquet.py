"""The border to parquet files that may come from elsewhere: bounds are read off the footer before any row is."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phasewatch.errors import RunError

MAX_PARQUET_BYTES = 8 * 2**30
MAX_PARQUET_ROWS = 100_000_000
MAX_ROW_GROUPS = 100_000
MAX_PARQUET_COLUMNS = 4_096
MAX_ROWS_PER_BYTE = 200  # a constant column of a long table packs this well; a bomb packs a million times better
ALWAYS_ALLOWED_ROWS = 200_000  # that a file of any size may hold


@contextmanager
def convert_parquet_errors(path: Path, *, hint: str) -> Iterator[None]:
    """Raise RunError for what pyarrow raises while it opens or reads a file; put only the reading inside."""
    import pyarrow as pa

    again = f"make it again with `{hint}`"
    try:
        yield
    except FileNotFoundError as exc:
        raise RunError(f"{path}: absent; make it with `{hint}`") from exc
    except OSError as exc:  # pyarrow calls some broken files so, too
        raise RunError(f"{path}: not a readable parquet file: {exc}; {again}") from exc
    except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, MemoryError) as exc:
        raise RunError(f"{path}: not a parquet file: {exc}; {again}") from exc


def open_parquet(path: Path, *, hint: str) -> Any:
    """Open a parquet file whose footer keeps the bounds.

    Args:
        path: The file.
        hint: What makes it, for messages: ``phasewatch features``.

    Returns:
        A `pyarrow.parquet.ParquetFile`.

    Raises:
        RunError: If it is absent, no regular file, no parquet file, or says that it holds more than a file of its size
            can: so many rows that reading them would fill the memory.
    """
    import pyarrow.parquet as pq

    again = f"make it again with `{hint}`"
    with convert_parquet_errors(path, hint=hint):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_PARQUET_BYTES:
            raise RunError(f"{path}: not a file of at most {MAX_PARQUET_BYTES:,} bytes; {again}")
        file = pq.ParquetFile(path)
    if words := find_footer_fault(file.metadata, found.st_size):
        file.close()
        raise RunError(f"{path}: {words}; {again}")
    return file


def find_footer_fault(footer: Any, size: int) -> str:
    """Return what a footer claims that a file of `size` bytes cannot hold, in words; empty if there is nothing."""
    rows = footer.num_rows
    if not 0 <= rows <= min(MAX_PARQUET_ROWS, ALWAYS_ALLOWED_ROWS + MAX_ROWS_PER_BYTE * size):
        return f"says that it holds {rows:,} rows in {size:,} bytes"
    if footer.num_row_groups > MAX_ROW_GROUPS or footer.num_columns > MAX_PARQUET_COLUMNS:
        return f"says that it holds {footer.num_row_groups:,} row groups of {footer.num_columns:,} columns"
    return ""
