"""Query libvirt for the statistics of domains: one blocking, read-only connection of the binding libvirt-python.

The binding is in Debian's package ``python3-libvirt`` or the extra ``libvirt``; without it there is no libvirt source.
All calls only read: ``virConnectOpenReadOnly``, ``virDomainLookupByUUIDString``, ``virDomainListGetStats`` and the
registration for reboot events. No name or text of a domain is ever interpreted.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any, Protocol

from phasewatch.errors import VmError

__all__ = ["LIBVIRT_URI", "DomainStats", "LibvirtClient", "StatsClient", "load_libvirt_binding"]

LIBVIRT_URI = "qemu:///system"  # never LIBVIRT_DEFAULT_URI, which may name another host
_DEBIAN_PACKAGES = Path("/usr/lib/python3/dist-packages")
_KEEPALIVE_S, _KEEPALIVE_COUNT = 2, 3  # a daemon that answers no ping for about 8 s ends every call with an error


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainStats:
    """Statistics of one domain, as ``virDomainListGetStats`` returns them.

    Attributes:
        uuid: The domain's UUID in lower case.
        name: Its name, which may be any text.
        values: Parameter → value, such as ``block.0.rd.bytes``; see `virsh domstats` for names and units.
    """

    uuid: str
    name: str
    values: Mapping[str, Any]


class StatsClient(Protocol):
    """A blocking connection that is used by one thread; tests pass a fake."""

    def open(self) -> None:
        """Connect; raise VmError if that fails."""

    def read(self, uuids: Sequence[str]) -> dict[str, DomainStats]:
        """Return the statistics of those domains that run; raise VmError if the connection is lost."""

    def count_resets(self, uuid: str) -> int:
        """Return how often a domain was reset since `open`."""

    def close(self) -> None:
        """Disconnect; never raises."""


@cache
def load_libvirt_binding(debian: Path = _DEBIAN_PACKAGES) -> Any:
    """Import the module ``libvirt`` of this environment, or else that of Debian's package.

    Args:
        debian: Folder of Debian's Python packages. Only the two modules of the binding are taken from it, and only if
            they were built for this version of Python.

    Raises:
        VmError: If there is no binding.
    """
    with suppress(ImportError):
        return importlib.import_module("libvirt")
    try:
        for name in ("libvirtmod", "libvirt"):
            spec = PathFinder.find_spec(name, [str(debian)])
            if spec is None or spec.loader is None:
                raise ImportError(name)
            sys.modules[name] = module = module_from_spec(spec)
            spec.loader.exec_module(module)
    except ImportError as exc:
        for name in ("libvirtmod", "libvirt"):
            sys.modules.pop(name, None)
        raise VmError(
            "libvirt's Python binding is missing: apt-get install python3-libvirt (for the distribution's version of "
            "Python), or pip install 'phasewatch[libvirt]', which builds it with gcc, pkg-config and libvirt-dev"
        ) from exc
    return sys.modules["libvirt"]


class LibvirtClient:
    """Read-only connection to the local libvirt daemon.

    Args:
        uri: URI of the connection.
    """

    def __init__(self, uri: str = LIBVIRT_URI) -> None:
        self._uri = uri
        self._connection: Any = None
        self._domains: dict[str, Any] = {}
        self._resets: Counter[str] = Counter()
        self._groups = self._flags = 0

    def open(self) -> None:
        """Connect.

        Raises:
            VmError: If the binding is missing, or the daemon refuses.
        """
        libvirt = load_libvirt_binding()
        _start_event_loop(libvirt)
        self._groups = (
            libvirt.VIR_DOMAIN_STATS_STATE
            | libvirt.VIR_DOMAIN_STATS_BALLOON
            | libvirt.VIR_DOMAIN_STATS_INTERFACE
            | libvirt.VIR_DOMAIN_STATS_BLOCK
        )
        # A domain whose monitor another client uses is reported without its disks, instead of waiting for that client.
        self._flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
        try:
            self._connection = libvirt.openReadOnly(self._uri)
        except libvirt.libvirtError as exc:
            raise VmError(f"libvirt ({self._uri}): {_describe_error(exc)}") from exc
        with suppress(libvirt.libvirtError):
            self._connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_COUNT)
        with suppress(libvirt.libvirtError):
            self._connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, self._count_reset, None)

    def read(self, uuids: Sequence[str]) -> dict[str, DomainStats]:
        """Return the statistics of those of the domains that run.

        Raises:
            VmError: If the connection is lost.
        """
        libvirt = load_libvirt_binding()
        try:
            for uuid in uuids:
                if uuid not in self._domains:
                    self._find_domain(libvirt, uuid)
            domains = [self._domains[uuid] for uuid in uuids if uuid in self._domains]
            answers = self._connection.domainListGetStats(domains, self._groups, self._flags) if domains else []
        except libvirt.libvirtError as exc:
            raise VmError(f"libvirt ({self._uri}): {_describe_error(exc)}") from exc
        stats = [
            DomainStats(uuid=domain.UUIDString().lower(), name=str(domain.name()), values=values)
            for domain, values in answers
        ]
        return {each.uuid: each for each in stats}

    def count_resets(self, uuid: str) -> int:
        """Return how often a domain was reset since `open`, by its guest or from outside."""
        return self._resets[uuid]

    def close(self) -> None:
        """Disconnect; never raises."""
        connection, self._connection = self._connection, None
        self._domains.clear()
        if connection is not None:
            with suppress(Exception):
                connection.close()

    def _find_domain(self, libvirt: Any, uuid: str) -> None:
        try:
            self._domains[uuid] = self._connection.lookupByUUIDString(uuid)
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise

    def _count_reset(self, connection: Any, domain: Any, opaque: Any) -> None:
        self._resets[domain.UUIDString().lower()] += 1


def _describe_error(error: Any) -> str:
    return " ".join(str(error).split()) or "unknown error"


@cache
def _start_event_loop(libvirt: Any) -> None:
    """Start the thread that receives events and answers pings; the binding has one such loop per process."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # else each error is also printed on stderr
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            with suppress(libvirt.libvirtError):
                libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt events", daemon=True).start()
