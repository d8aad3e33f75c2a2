"""Log messages of the command line: plain lines on standard error, chosen with ``-v`` and ``-q``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from phasewatch.cli.streams import escape_for_terminal

__all__ = ["configure_logging", "is_quiet", "route_logs"]

_LOGGER = logging.getLogger("phasewatch")


def configure_logging(level: int = logging.INFO) -> None:
    """Print log records of phasewatch from `level` on; `DEBUG` adds the logger's name to each line.

    Args:
        level: A level of `logging`: ``WARNING`` for ``-q``, ``INFO`` by default, ``DEBUG`` for ``-v``.
    """
    for handler in [h for h in _LOGGER.handlers if isinstance(h, _LineHandler)]:
        _LOGGER.removeHandler(handler)
    _LOGGER.addHandler(_LineHandler(_write_to_stderr, with_name=level <= logging.DEBUG))
    _LOGGER.setLevel(level)


def is_quiet() -> bool:
    """Return whether only warnings and errors are wanted."""
    return not _LOGGER.isEnabledFor(logging.INFO)


@contextmanager
def route_logs(write: Callable[[str], None]) -> Iterator[None]:
    """Send log lines to `write` within the block; for commands that must not block on standard error.

    Args:
        write: Takes one line without a line end. It may not log.
    """
    ours = [h for h in _LOGGER.handlers if isinstance(h, _LineHandler)]
    before = [handler.write for handler in ours]
    for handler in ours:
        handler.write = write
    try:
        yield
    finally:
        for handler, old in zip(ours, before, strict=True):
            handler.write = old


class _LineHandler(logging.Handler):
    """Writes one line per record, with unprintable characters escaped."""

    def __init__(self, write: Callable[[str], None], *, with_name: bool) -> None:
        super().__init__()
        self.write = write
        self.setFormatter(logging.Formatter("%(name)s: %(message)s" if with_name else "%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except (TypeError, ValueError):  # a log call with the wrong number of arguments
            self.handleError(record)
            return
        for line in text.splitlines():
            self.write(escape_for_terminal(line))


def _write_to_stderr(line: str) -> None:
    if sys.stderr is not None:  # looked up at each line: a progress bar redirects it
        sys.stderr.write(line + "\n")
