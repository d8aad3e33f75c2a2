"""The connections of a server: limited places and time for strangers, reserved places for clients with a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, Protocol

__all__ = [
    "ConnectionEntry",
    "ConnectionLimits",
    "ConnectionStage",
    "ConnectionTable",
    "attach_connection",
    "find_address_group",
    "set_connection_owner",
]

_SCOPE_KEY = "phasewatch.connection"
_SITE_BITS = 64  # one customer has a whole IPv6 /64


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """The limits on the connections of a server.

    A *stranger* is a connection that has not shown a valid token (or cookie) yet.

    Attributes:
        connections: Maximum number of connections.
        reserved: Places that strangers cannot use.
        per_address: Maximum of strangers of one IPv4 address, one IPv6 /64, or of this machine.
        per_owner: Maximum of connections that a token's owner has; further ones remain strangers.
        head_s: From the first byte of a request, or from the connection, to the end of the request head.
        handshake_s: For TLS.
        idle_s: A stranger's pause after a response.
        owner_idle_s: The same, with a valid token.
        stranger_s: A stranger's total time; a response that has begun is finished.
        stranger_requests: A stranger's total requests.
        stall_s: A client that reads no bytes of its response for this time is disconnected.
        drain_s, drain_bytes: For the rest of a request that is already answered.
        sweep_s: Interval of the checks.
    """

    connections: int = 512
    reserved: int = 128
    per_address: int = 64
    per_owner: int = 32
    head_s: float = 10.0
    handshake_s: float = 10.0
    idle_s: float = 5.0
    owner_idle_s: float = 60.0
    stranger_s: float = 30.0
    stranger_requests: int = 100
    stall_s: float = 20.0
    drain_s: float = 5.0
    drain_bytes: int = 32 << 20
    sweep_s: float = 0.5


class ConnectionStage(StrEnum):
    """The state of a connection."""

    HANDSHAKE = "handshake"
    HEAD = "head"
    ANSWER = "answer"  # a request is being answered; the application limits its time
    DRAIN = "drain"
    IDLE = "idle"
    CLOSING = "closing"


class ConnectionPeer(Protocol):
    """The live end of a connection, as the table needs it."""

    def find_stage(self) -> ConnectionStage:
        """Return what the connection is busy with now."""

    def abort(self) -> None:
        """Close the connection at once; pending data is not sent."""


@dataclass(slots=True, eq=False, kw_only=True)
class ConnectionEntry:
    """One connection's entry in the table.

    Attributes:
        peer: The live end.
        group: The address, as `find_address_group` gives it.
        opened_s: Time of acceptance.
        stage, since_s: Its state, and the start of that.
        owner: Owner of the token that it has shown; empty for a stranger.
        requests: Number of answered requests.
        blocked_since_s: Since when its client does not read; None while it does.
    """

    peer: ConnectionPeer
    group: str
    opened_s: float
    stage: ConnectionStage
    since_s: float
    owner: str = ""
    requests: int = 0
    blocked_since_s: float | None = None


class ConnectionTable:
    """All connections of one server; the caller passes the time, in seconds of one clock."""

    def __init__(self, limits: ConnectionLimits) -> None:
        """Start without connections."""
        self.limits = limits
        self._entries: dict[ConnectionEntry, None] = {}  # in the order of opening

    def __len__(self) -> int:
        return len(self._entries)

    def open(
        self, peer: ConnectionPeer, address: str, stage: ConnectionStage, *, now_s: float
    ) -> ConnectionEntry | None:
        """Add a new connection; if the table is full, the oldest stranger is disconnected.

        Returns:
            The entry; None if there is no place and no stranger to disconnect.
        """
        group, limits = find_address_group(address), self.limits
        strangers = [each for each in self._entries if not each.owner]
        groups = Counter(each.group for each in strangers)
        if groups[group] >= limits.per_address:
            self._evict(each for each in strangers if each.group == group)
        elif len(strangers) >= limits.connections - limits.reserved or len(self._entries) >= limits.connections:
            largest = max(groups.values(), default=0)
            self._evict(each for each in strangers if groups[each.group] == largest)
        if len(self._entries) >= limits.connections:
            return None
        entry = ConnectionEntry(peer=peer, group=group, opened_s=now_s, stage=stage, since_s=now_s)
        self._entries[entry] = None
        return entry

    def _evict(self, candidates: Iterator[ConnectionEntry]) -> None:
        # By age, not by idleness: a busy client must not outlive a new one that is sending its request head.
        victim = min(candidates, key=lambda each: (each.stage is ConnectionStage.ANSWER, each.opened_s), default=None)
        if victim is not None:
            self.close(victim)
            victim.peer.abort()

    def close(self, entry: ConnectionEntry) -> None:
        """Remove a connection that ended; further calls do nothing."""
        self._entries.pop(entry, None)

    def set_owner(self, entry: ConnectionEntry, owner: str) -> None:
        """Record the owner of a connection that showed a valid token.

        Connections beyond the share of their owner, or beyond the places that leave room for strangers, remain
        strangers.
        """
        if entry.owner or entry not in self._entries:
            return
        owners = Counter(each.owner for each in self._entries if each.owner)
        places = self.limits.connections - min(self.limits.reserved, self.limits.connections // 8)
        if owners[owner] < self.limits.per_owner and owners.total() < places:
            entry.owner = owner

    def is_exhausted(self, entry: ConnectionEntry, *, now_s: float) -> bool:
        """Whether a stranger has used its requests or its time."""
        limits = self.limits
        if entry.owner:
            return False
        return entry.requests >= limits.stranger_requests or now_s - entry.opened_s >= limits.stranger_s

    def find_overdue(self, *, now_s: float) -> list[ConnectionEntry]:
        """Return the connections that exceed a time limit."""
        for entry in self._entries:
            stage = entry.peer.find_stage()
            if stage is not entry.stage:
                entry.stage, entry.since_s = stage, now_s
        return [entry for entry in self._entries if self._is_overdue(entry, now_s)]

    def _is_overdue(self, entry: ConnectionEntry, now_s: float) -> bool:
        limits = self.limits
        if entry.blocked_since_s is not None and now_s - entry.blocked_since_s >= limits.stall_s:
            return True
        if entry.stage in (ConnectionStage.HEAD, ConnectionStage.IDLE) and self.is_exhausted(entry, now_s=now_s):
            return True
        patience_s = {
            ConnectionStage.HANDSHAKE: limits.handshake_s,
            ConnectionStage.HEAD: limits.head_s,
            ConnectionStage.ANSWER: float("inf"),
            ConnectionStage.DRAIN: limits.drain_s,
            ConnectionStage.IDLE: limits.owner_idle_s if entry.owner else limits.idle_s,
            ConnectionStage.CLOSING: limits.drain_s,
        }
        return now_s - entry.since_s >= patience_s[entry.stage]


def find_address_group(address: str) -> str:
    """Return the group of an address: the IPv4 address, the IPv6 /64, or ``loopback`` for this machine.

    >>> find_address_group("127.3.2.1") == find_address_group("::1") == find_address_group("::ffff:127.0.0.1")
    True
    >>> find_address_group("2001:db8::1") == find_address_group("2001:db8::ffff:1")
    True
    """
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return "loopback"
    return str(ip_network((ip, _SITE_BITS), strict=False)) if isinstance(ip, IPv6Address) else str(ip)


class ConnectionHandle(Protocol):
    """A connection whose owner can be set."""

    def set_owner(self, owner: str) -> None:
        """Record the owner of the valid token that was shown."""


def attach_connection(scope: MutableMapping[str, Any], connection: ConnectionHandle) -> None:
    """Add a connection to the ASGI scope of a request."""
    scope[_SCOPE_KEY] = connection


def set_connection_owner(scope: Mapping[str, Any], owner: str) -> None:
    """Record the owner of a request's connection; do nothing if the scope has no connection."""
    connection: ConnectionHandle | None = scope.get(_SCOPE_KEY)
    if connection is not None:
        connection.set_owner(owner)
