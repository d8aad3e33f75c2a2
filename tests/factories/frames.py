"""Build Ethernet frames with IP packets inside."""

from __future__ import annotations

from struct import pack

MACS = b"\x52\x54\x00\x00\x00\x01" + b"\x52\x54\x00\x00\x00\x02"
SRC4, DST4 = b"\x0a\x00\x00\x01", b"\x0a\x00\x00\x02"
SRC6, DST6 = b"\xfe\x80" + bytes(13) + b"\x01", b"\xfe\x80" + bytes(13) + b"\x02"
SYN = pack("!HHIIBBHHH", 4000, 443, 1, 0, 0x50, 2, 512, 0, 0)
ASK = pack("!HHHH", 4000, 53, 8, 0)


def ipv4(body: bytes, protocol: int = 6, *, options: bytes = b"", fragment: int = 0) -> bytes:
    head = 20 + len(options)
    return (
        pack("!BBHHHBBH4s4s", 0x40 | head // 4, 0, head + len(body), 0, fragment, 64, protocol, 0, SRC4, DST4)
        + options
        + body
    )


def ipv6(body: bytes, protocol: int = 6) -> bytes:
    return pack("!IHBB16s16s", 6 << 28, len(body), protocol, 64, SRC6, DST6) + body


def ethernet(ethertype: int, body: bytes) -> bytes:
    return MACS + pack("!H", ethertype) + body
