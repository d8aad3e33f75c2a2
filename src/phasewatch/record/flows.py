"""What passes the network card, as the VM's sink counts it: the `netflow` source."""

from __future__ import annotations

import asyncio

from phasewatch.errors import VmError
from phasewatch.record.base import Values, nothing_of
from phasewatch.record.sink import Sink
from phasewatch.vocab import Source


class NetflowSource:
    """Asks one VM's sink for its counters; the sink stays the VM's."""

    source = Source.NETFLOW

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._asked: asyncio.Future[Values] | None = None

    async def open(self) -> None:
        """Begin the first tick of `dst_ports` and `dst_ips`."""
        await self.read()

    async def close(self) -> None:
        """Nothing is held."""

    async def read(self) -> Values:
        """Take one reading; None-filled while the sink is silent."""
        # In a thread: a sink that hangs must not hold up the ticks of the neighbour. Never two questions at once.
        if self._asked is not None and not self._asked.done():
            return nothing_of(self.source)
        self._asked = asyncio.ensure_future(asyncio.to_thread(self._take))
        return await asyncio.shield(self._asked)

    def _take(self) -> Values:
        try:
            return tuple(self._sink.take())
        except VmError:
            return nothing_of(self.source)
