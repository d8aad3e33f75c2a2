"""Lines to a pipe, a terminal or a journal that wait for nobody: a reader that stands still stops no watch, and no end of one."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from typing import TextIO

WAITING = 2048  # lines: a quarter of an hour of events
LAST_WORD_S = 2.0  # that the end waits for what is still to be written


class Lines:
    """Writes lines in a thread of its own; when too many wait, the oldest is given up and counted.

    Args:
        stream: Has a descriptor, which is written to past the stream's own buffer.
    """

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self._fd = stream.fileno()
        self._waiting: deque[bytes] = deque()
        self._news = threading.Condition()
        self._is_closed = False
        self._error: OSError | None = None
        self._lost = 0
        # A daemon: where nobody reads it waits for ever, and must not hold the process.
        self._thread = threading.Thread(target=self._write, name="lines", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line.

        Raises:
            OSError: What an earlier line met, such as a closed pipe or a full disk.
        """
        with self._news:
            if self._error is not None:
                raise self._error
            if len(self._waiting) >= WAITING:
                self._waiting.popleft()
                self._lost += 1
            self._waiting.append(line.encode() + b"\n")
            self._news.notify()

    def close(self) -> int:
        """Wait a little for what is queued, then let go; gives how many lines were not written.

        Raises:
            OSError: What a line met.
        """
        with self._news:
            self._is_closed = True
            self._news.notify()
        self._thread.join(LAST_WORD_S)
        with self._news:
            if self._error is not None:
                raise self._error
            return self._lost + len(self._waiting) + self._thread.is_alive()

    def _write(self) -> None:
        while True:
            with self._news:
                while not self._waiting and not self._is_closed:
                    self._news.wait()
                if not self._waiting:
                    return
                data = self._waiting.popleft()
            try:
                while data:
                    data = data[self._write_some(data) :]
            except OSError as exc:
                with self._news:
                    self._error = exc
                return

    def _write_some(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:  # a descriptor that another program set so
            select.select([], [self._fd], [])
            return 0
