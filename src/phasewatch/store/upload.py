"""A body on its way into the store: in memory while it is small, then in the store's own unfinished file."""

from __future__ import annotations

from collections.abc import Callable

from phasewatch.store.base import Incoming


class Upload:
    """Begins an `Incoming` when there is something to write; most bundles need one step on the disk, not four."""

    def __init__(self, begin: Callable[[], Incoming]) -> None:
        """Hold nothing yet.

        Args:
            begin: Opens the unfinished file.
        """
        self.held = bytearray()
        self._begin = begin
        self._incoming: Incoming | None = None

    @property
    def is_begun(self) -> bool:
        """Whether there is an unfinished file to be dropped."""
        return self._incoming is not None

    def flush(self) -> Incoming:
        """Write what is held."""
        if self._incoming is None:
            self._incoming = self._begin()
        self._incoming.write(bytes(self.held))
        self.held.clear()
        return self._incoming

    def content(self) -> bytes:
        """Give all bytes taken so far."""
        return bytes(self.held) if self._incoming is None else self.flush().content()

    def publish(self, digest: str) -> bool:
        """Publish the bundle with its receipt, see `Incoming.publish`; then there is nothing left to drop."""
        is_new = self.flush().publish(digest)
        if is_new:
            self._incoming = None
        return is_new

    def drop(self) -> None:
        """Remove the unfinished file."""
        if self._incoming is not None:
            self._incoming.drop()
            self._incoming = None
