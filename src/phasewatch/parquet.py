"""Read Parquet files of unknown origin: check the limits in the footer before any row is read."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phasewatch.errors import RunError

__all__ = ["check_footer", "convert_parquet_errors", "open_parquet"]

MAX_PARQUET_BYTES = 8 * 2**30
MAX_PARQUET_ROWS = 100_000_000
MAX_ROW_GROUPS = 100_000
MAX_PARQUET_COLUMNS = 4_096
MAX_ROWS_PER_BYTE = 200  # a constant column of a long table reaches this; a decompression bomb a million times more
ALWAYS_ALLOWED_ROWS = 200_000  # allowed in a file of any size


@contextmanager
def convert_parquet_errors(path: Path, *, hint: str) -> Iterator[None]:
    """Convert the errors of pyarrow in the block, which should hold nothing but the reading, to RunError.

    Args:
        path: The file that is read.
        hint: The command that writes it, such as ``phasewatch features``, for messages.
    """
    import pyarrow as pa

    again = f"make it again with `{hint}`"
    try:
        yield
    except FileNotFoundError as exc:
        raise RunError(f"{path}: absent; make it with `{hint}`") from exc
    except OSError as exc:  # pyarrow raises it for some malformed files too
        raise RunError(f"{path}: not a readable parquet file: {exc}; {again}") from exc
    except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, MemoryError) as exc:
        raise RunError(f"{path}: not a parquet file: {exc}; {again}") from exc


def open_parquet(path: Path, *, hint: str) -> Any:
    """Open a Parquet file after checking its size and footer.

    Args:
        path: The file.
        hint: The command that writes it, such as ``phasewatch features``, for messages.

    Returns:
        A `pyarrow.parquet.ParquetFile`.

    Raises:
        RunError: If the file is absent, not a regular file, not Parquet, or claims so many rows for its size that
            reading them would fill the memory.
    """
    import pyarrow.parquet as pq

    again = f"make it again with `{hint}`"
    with convert_parquet_errors(path, hint=hint):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_PARQUET_BYTES:
            raise RunError(f"{path}: not a file of at most {MAX_PARQUET_BYTES:,} bytes; {again}")
        file = pq.ParquetFile(path)
    try:
        check_footer(file.metadata, status.st_size)
    except ValueError as exc:
        file.close()
        raise RunError(f"{path}: {exc}; {again}") from exc
    return file


def check_footer(footer: Any, size_bytes: int) -> None:
    """Raise if a file of a given size cannot hold what its footer claims.

    Args:
        footer: A `pyarrow.parquet.FileMetaData`.
        size_bytes: Size of the file.

    Raises:
        ValueError: If it claims too many rows, row groups or columns.
    """
    rows = footer.num_rows
    if not 0 <= rows <= min(MAX_PARQUET_ROWS, ALWAYS_ALLOWED_ROWS + MAX_ROWS_PER_BYTE * size_bytes):
        raise ValueError(f"claims to hold {rows:,} rows in {size_bytes:,} bytes")
    if footer.num_row_groups > MAX_ROW_GROUPS or footer.num_columns > MAX_PARQUET_COLUMNS:
        raise ValueError(f"claims to hold {footer.num_row_groups:,} row groups of {footer.num_columns:,} columns")
