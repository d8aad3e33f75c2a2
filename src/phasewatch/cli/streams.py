"""Standard streams that never end a command: closed ones are replaced, unprintable characters are escaped."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

__all__ = ["STANDARD_OUTPUT", "drop_output", "escape_for_terminal", "flush_output", "prepare_streams"]

STANDARD_OUTPUT = "standard output"  # the file name of its errors


def escape_for_terminal(text: str) -> str:
    """Escape the characters of `text` that do not print, so that data cannot control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class _OutputFile(io.FileIO):
    """Standard output whose write errors carry the name `STANDARD_OUTPUT`."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError as exc:  # without its errno, or click exits with 1
            raise BrokenPipeError(STANDARD_OUTPUT) from exc
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, STANDARD_OUTPUT) from exc


class _LogFile(io.FileIO):
    """Standard error that drops what cannot be written, because the work itself goes on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Open closed standard streams at ``/dev/null``, and escape characters that output and error cannot encode.

    Otherwise the first file that a command opens gets the number of a closed stream, and is printed into.
    """
    for number in (0, 1, 2):
        _open_if_closed(number)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  open until the process ends
    if sys.stdout is sys.__stdout__:  # else it was redirected within this process
        sys.stdout = _wrap_text(_OutputFile(1, "wb", closefd=False), like=sys.stdout, is_log=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrap_text(_LogFile(2, "wb", closefd=False), like=sys.stderr, is_log=True)


def flush_output() -> None:
    """Write the buffer of standard output.

    Raises:
        OSError: If it cannot be written. The buffer is dropped, so that the interpreter does not try again at exit.
    """
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()
        raise


def drop_output() -> None:
    """Discard everything that is written to standard output from now on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _open_if_closed(number: int) -> None:
    try:
        os.fstat(number)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
        null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, usually this one
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)


def _wrap_text(file: io.FileIO, *, like: TextIO | None, is_log: bool) -> TextIO:
    lines = is_log or file.isatty()
    encoding = like.encoding if like is not None else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=lines,
        write_through=getattr(like, "write_through", False),
    )
