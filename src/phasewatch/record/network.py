"""The made-up network that a recorded guest sees: its addresses, and who accepts, refuses or stays silent."""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b
from ipaddress import IPv4Address, IPv4Network

GUEST_IP = IPv4Address("10.0.2.15")
DNS_IP = IPv4Address("10.0.2.3")
TIME_IP = IPv4Address("10.0.2.4")
WEB_IP = IPv4Address("10.0.2.80")

HOME_NET = IPv4Network("10.0.2.0/24")
NAMED_NET = IPv4Network("198.51.100.0/24")  # RFC 5737, documentation: every name resolves into it
SCAN_NET = IPv4Network("198.18.0.0/15")  # RFC 2544, benchmarks: what a scanner may knock at

DNS_PORT = 53
TIME_PORT = 123
WEB_PORTS = (80, 8080)

SINK_MAC = bytes.fromhex("52540077ff01")

# Shares of the scan range's (address, port) pairs, in percent: the rest stays silent.
ACCEPT_PERCENT = 12
REFUSE_PERCENT = 44


class Verdict(StrEnum):
    """What a TCP port does with a connection request."""

    SERVE = "serve"
    SWALLOW = "swallow"
    REFUSE = "refuse"
    SILENT = "silent"


def _digest(purpose: bytes, data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=purpose).digest(), "big")


def scan_verdict(address: IPv4Address, port: int) -> Verdict:
    """Give the fate of a connection to the scan range: the same for ever, by hash of address and port."""
    draw = _digest(b"scan", address.packed + port.to_bytes(2, "big")) % 100
    if draw < ACCEPT_PERCENT:
        return Verdict.SWALLOW
    return Verdict.REFUSE if draw < ACCEPT_PERCENT + REFUSE_PERCENT else Verdict.SILENT


def tcp_verdict(address: IPv4Address, port: int) -> Verdict:
    """Give what answers at this address and port: the web, the scan range, or a refusal."""
    if port in WEB_PORTS and (address == WEB_IP or address in NAMED_NET):
        return Verdict.SERVE
    return scan_verdict(address, port) if address in SCAN_NET else Verdict.REFUSE


def named_address(name: bytes) -> IPv4Address:
    """Give the address that a DNS name has: one of 254, by hash of the name without regard to case."""
    return NAMED_NET[1 + _digest(b"name", name.lower()) % 254]


def is_inside(address: IPv4Address) -> bool:
    """Tell whether an address belongs to the made-up network; what goes elsewhere breaks the safety contract."""
    return address in HOME_NET or address in NAMED_NET or address in SCAN_NET
