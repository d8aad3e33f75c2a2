"""Write a watch's lines to a stream without blocking it; `phasewatch.alarms` delivers alarms to other programs."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections import deque
from typing import TextIO

__all__ = ["NonBlockingWriter"]

MAX_QUEUED_LINES = 2048  # over ten minutes of events
LINES_FLUSH_TIMEOUT_S = 2.0  # how long the end of a watch waits for queued lines
_READER_GONE_ERRNOS = frozenset({errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN})


class NonBlockingWriter:
    """Writes lines to a stream in a thread of its own, so that a slow reader delays nobody.

    A line that cannot be written is dropped and counted, and the next one is tried.

    Args:
        stream: A stream with a file descriptor; lines go to the descriptor, past the stream's own buffer.
    """

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self._fd = stream.fileno()
        self._waiting: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._is_closed = self._is_gone = self._is_cut = False
        self._failure: OSError | None = None
        self._lost = 0
        # A daemon thread: it may wait for ever for a reader, and must not keep the process alive.
        self._thread = threading.Thread(target=self._write, name="lines", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line; drop the oldest one if too many wait."""
        with self._changed:
            if self._is_gone or len(self._waiting) >= MAX_QUEUED_LINES:
                self._lost += 1
            if self._is_gone:
                return
            if len(self._waiting) >= MAX_QUEUED_LINES:
                self._waiting.popleft()
            self._waiting.append(line.encode("utf-8", "backslashreplace") + b"\n")
            self._changed.notify()

    @property
    def failure(self) -> OSError | None:
        """The first write error, such as a full disk; None if there was none."""
        with self._changed:
            return self._failure

    @property
    def is_gone(self) -> bool:
        """Whether the reader has closed its end, so that nothing can be written any more."""
        with self._changed:
            return self._is_gone

    def close(self) -> int:
        """Wait up to `LINES_FLUSH_TIMEOUT_S` for queued lines; return how many lines were not written."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(LINES_FLUSH_TIMEOUT_S)
        with self._changed:
            return self._lost + len(self._waiting) + self._thread.is_alive()

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                data = self._waiting.popleft()
            if self._is_cut:
                data = b"\n" + data  # end the line before, of which only a part was written
            n_bytes = len(data)
            try:
                while data:
                    data = data[self._write_some(data) :]
                self._is_cut = False
            except OSError as exc:
                self._is_cut = self._is_cut or len(data) < n_bytes
                with self._changed:
                    self._failure = self._failure or exc
                    self._is_gone = exc.errno in _READER_GONE_ERRNOS
                    self._lost += 1
                    if self._is_gone:
                        self._lost += len(self._waiting)
                        self._waiting.clear()
                        return

    def _write_some(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:  # another program made the descriptor non-blocking
            select.select([], [self._fd], [])
            return 0
