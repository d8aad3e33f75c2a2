"""Lines to a pipe, a terminal or a journal that wait for nobody: a reader that stands still or leaves stops no watch."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections import deque
from typing import TextIO

WAITING = 2048  # lines: a quarter of an hour of events
LAST_WORD_S = 2.0  # that the end waits for what is still to be written
_GONE = frozenset({errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN})


class Lines:
    """Writes lines in a thread of its own; what cannot be written is given up and counted, and the next line tried.

    Args:
        stream: Has a descriptor, which is written to past the stream's own buffer.
    """

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self._fd = stream.fileno()
        self._waiting: deque[bytes] = deque()
        self._news = threading.Condition()
        self._is_closed = self._is_gone = self._is_cut = False
        self._failure: OSError | None = None
        self._lost = 0
        # A daemon: where nobody reads it waits for ever, and must not hold the process.
        self._thread = threading.Thread(target=self._write, name="lines", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line; of too many that wait the oldest is given up."""
        with self._news:
            if self._is_gone or len(self._waiting) >= WAITING:
                self._lost += 1
            if self._is_gone:
                return
            if len(self._waiting) >= WAITING:
                self._waiting.popleft()
            self._waiting.append(line.encode("utf-8", "backslashreplace") + b"\n")
            self._news.notify()

    @property
    def failure(self) -> OSError | None:
        """What the first line met that could not be written, such as a full disk; None so far."""
        with self._news:
            return self._failure

    @property
    def is_gone(self) -> bool:
        """Whether the reader has left for good: nothing can be written any more."""
        with self._news:
            return self._is_gone

    def close(self) -> int:
        """Wait a little for what is queued, then let go; return how many lines were not written."""
        with self._news:
            self._is_closed = True
            self._news.notify()
        self._thread.join(LAST_WORD_S)
        with self._news:
            return self._lost + len(self._waiting) + self._thread.is_alive()

    def _write(self) -> None:
        while True:
            with self._news:
                while not self._waiting and not self._is_closed:
                    self._news.wait()
                if not self._waiting:
                    return
                data = self._waiting.popleft()
            if self._is_cut:
                data = b"\n" + data  # what was written of the line before stands alone
            whole = len(data)
            try:
                while data:
                    data = data[self._write_some(data) :]
                self._is_cut = False
            except OSError as exc:
                self._is_cut = self._is_cut or len(data) < whole
                with self._news:
                    self._failure = self._failure or exc
                    self._is_gone = exc.errno in _GONE
                    self._lost += 1
                    if self._is_gone:
                        self._lost += len(self._waiting)
                        self._waiting.clear()
                        return

    def _write_some(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:  # a descriptor that another program set so
            select.select([], [self._fd], [])
            return 0
