"""Standard streams that end no command: a closed one is replaced, a character that cannot be encoded is spelled out."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

STANDARD_OUTPUT = "standard output"


class _OutputFile(io.FileIO):
    """Standard output: where writing fails, the error says where."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError as exc:  # without its number, by which click would know it and exit with 1
            raise BrokenPipeError(STANDARD_OUTPUT) from exc
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, STANDARD_OUTPUT) from exc


class _LogFile(io.FileIO):
    """Standard error: progress and messages that nobody can read are dropped, because the work itself went on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Open what is closed at `/dev/null`, and let standard output and error write whatever text they are given.

    Without it the first file that a command opens gets a closed stream's number, and is printed into.
    """
    for number in (0, 1, 2):
        _open_if_closed(number)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  it lives as long as the process
    if sys.stdout is sys.__stdout__:  # else somebody redirected it within this process
        sys.stdout = _wrap_text(_OutputFile(1, "wb", closefd=False), like=sys.stdout, is_log=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrap_text(_LogFile(2, "wb", closefd=False), like=sys.stderr, is_log=True)


def flush_output() -> None:
    """Write out what stands in standard output's buffer.

    Raises:
        OSError: If it cannot be written. The buffer is dropped, so that the interpreter does not try again at its end.
    """
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()
        raise


def drop_output() -> None:
    """Send the rest of standard output nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _open_if_closed(number: int) -> None:
    try:
        os.fstat(number)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
        null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so this one
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)


def _wrap_text(file: io.FileIO, *, like: TextIO | None, is_log: bool) -> TextIO:
    lines = is_log or file.isatty()
    encoding = like.encoding if like is not None else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(file), encoding=encoding, errors="backslashreplace", line_buffering=lines,
        write_through=getattr(like, "write_through", False),
    )  # fmt: skip
