"""The servers that one episode talks to: an address, a port, a name and a behaviour for each role. Pure.

Every episode draws its own world, so an address means something only inside it. About a third of the addresses of
malicious roles belong to a benign role too, so an address alone does not tell good from bad.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from phasewatch.lab.network.addresses import DNS_IP, DNS_NET, DNS_PORT, LOCAL_NET, TIME_IP, TIME_PORT

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "MALICIOUS_ROLES",
    "NO_WORLD",
    "SHARED_SHARE",
    "TLS_PORTS",
    "WORLD_ROLES",
    "EpisodeWorld",
    "ServerBehaviour",
    "WorldServer",
    "draw_world",
    "render_world_knobs",
]

MALICIOUS_ROLES = ("c2", "pool", "exfil")
_BENIGN_ROLES = ("update", "database", "monitoring", "web")
WORLD_ROLES = (*MALICIOUS_ROLES, *_BENIGN_ROLES, "ntp", "dns")
SHARED_SHARE = 1 / 3  # of the malicious roles that live at the address of a benign one
TLS_PORTS = (443, 8443)  # the guest speaks bytes that look like TLS on these ports, and only there

_LOCAL_SHARE = 0.25  # of the servers that stand in the guest's own network
_USUAL_SHARE = 0.5  # of the episodes whose name or time server is the network's usual one
_FIRST_LOCAL_HOST, _LAST_LOCAL_HOST = 100, 199
_PORTS: dict[str, tuple[int, ...]] = {
    "c2": (80, 443, 8080, 8443, 4444),
    "pool": (3333, 443, 5555, 14444),
    "exfil": (80, 443, 8080, 8443),
    "update": (80, 443),
    "database": (3306, 5432, 6379, 27017),
    "monitoring": (9090, 8086, 443, 10051),
    "web": (80, 443, 8080),
}


class ServerBehaviour(StrEnum):
    """The reaction of a server of the world."""

    ACCEPT = "accept"
    REFUSE = "refuse"
    SILENT = "silent"
    SLOW = "slow"
    NXDOMAIN = "nxdomain"
    TLS = "tls"


# Behaviour → weight. Uploads need a server that takes them; everything else may fail, for good and bad alike.
_USUAL = ((ServerBehaviour.ACCEPT, 0.72), (ServerBehaviour.SLOW, 0.14), (ServerBehaviour.REFUSE, 0.05),
          (ServerBehaviour.SILENT, 0.05), (ServerBehaviour.NXDOMAIN, 0.04))  # fmt: skip
_RELIABLE = ((ServerBehaviour.ACCEPT, 0.85), (ServerBehaviour.SLOW, 0.15))
_NEEDED_ROLES = ("exfil", "pool", "update", "database", "web")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldServer:
    """One server. With `TLS`, it expects bytes that look like TLS."""

    role: str
    address: str
    port: int
    name: str
    behaviour: ServerBehaviour


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeWorld:
    """The servers of one episode, in the order of `WORLD_ROLES`; none for the fixed network of version 1."""

    servers: tuple[WorldServer, ...] = ()

    def find(self, role: str) -> WorldServer | None:
        """Return the server of a role; None without one."""
        return next((server for server in self.servers if server.role == role), None)

    @property
    def addresses(self) -> tuple[tuple[str, str], ...]:
        """``(role, "address:port")`` of each server."""
        return tuple((server.role, f"{server.address}:{server.port}") for server in self.servers)


NO_WORLD = EpisodeWorld()  # the fixed network of laboratory version 1


def draw_world(rng: np.random.Generator) -> EpisodeWorld:
    """Draw the servers of one episode. No two roles share an address, but malicious roles share a third of theirs."""
    taken: set[str] = set()
    benign = {role: _draw_server(rng, role, taken) for role in _BENIGN_ROLES}
    drawn = dict(benign)
    for role in MALICIOUS_ROLES:
        own = _draw_server(rng, role, taken)
        likes = [each for each in benign.values() if role not in _NEEDED_ROLES or _is_reliable(each)]
        host = likes[int(rng.integers(0, len(likes)))] if likes else own
        is_shared = rng.random() < SHARED_SHARE
        drawn[role] = replace(host, role=role) if is_shared else own
    for role, usual, port in (("ntp", TIME_IP, TIME_PORT), ("dns", DNS_IP, DNS_PORT)):
        address = str(usual) if rng.random() < _USUAL_SHARE else _draw_address(rng, taken)
        drawn[role] = WorldServer(role=role, address=address, port=port, name="", behaviour=ServerBehaviour.ACCEPT)
    return EpisodeWorld(servers=tuple(drawn[role] for role in WORLD_ROLES))


def render_world_knobs(world: EpisodeWorld) -> tuple[str, ...]:
    """Return the arguments that tell the guest its servers: ``at.ROLE=ADDRESS:PORT`` and ``name.ROLE=NAME``."""
    out: list[str] = []
    for server in world.servers:
        out.append(f"at.{server.role}={server.address}:{server.port}")
        if server.name:
            out.append(f"name.{server.role}={server.name}")
    return tuple(out)


def _is_reliable(server: WorldServer) -> bool:
    return server.behaviour in (ServerBehaviour.ACCEPT, ServerBehaviour.SLOW, ServerBehaviour.TLS)


def _draw_address(rng: np.random.Generator, taken: set[str]) -> str:
    while True:
        is_local = rng.random() < _LOCAL_SHARE
        number = int(rng.integers(_FIRST_LOCAL_HOST, _LAST_LOCAL_HOST + 1) if is_local else rng.integers(1, 255))
        address = str((LOCAL_NET if is_local else DNS_NET)[number])
        if address not in taken:
            taken.add(address)
            return address


def _draw_server(rng: np.random.Generator, role: str, taken: set[str]) -> WorldServer:
    address = _draw_address(rng, taken)
    ports = _PORTS[role]
    port = ports[int(rng.integers(0, len(ports)))]
    weights = _RELIABLE if role in _NEEDED_ROLES else _USUAL
    behaviour = weights[int(rng.choice(len(weights), p=[weight for _, weight in weights]))][0]
    if behaviour is ServerBehaviour.ACCEPT and port in TLS_PORTS:
        behaviour = ServerBehaviour.TLS
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    label = "".join(letters[int(k)] for k in rng.integers(0, len(letters), int(rng.integers(4, 13))))
    return WorldServer(role=role, address=address, port=port, name=f"{label}.example", behaviour=behaviour)
