"""Connect to the receivers of a configuration once, without sending an alarm."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass

from phasewatch.alarms.config import OutputConfig, SyslogTransport, parse_syslog_address
from phasewatch.errors import PhasewatchError

__all__ = ["ProbeResult", "probe_receivers"]

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What a connection showed.

    Attributes:
        name: Output.
        is_reached: Whether the receiver took the connection; None if that cannot be known without an alarm.
        words: What was seen.
    """

    name: str
    is_reached: bool | None
    words: str


async def probe_receivers(config: OutputConfig) -> tuple[ProbeResult, ...]:
    """Connect to each receiver, all at once; a webhook is only connected to, because a request would page somebody.

    Args:
        config: Settings without faults.
    """
    probes = []
    if config.webhook:
        probes.append(_probe_url("webhook", config.webhook.url, path="", ca_file=config.webhook.ca_file))
    if config.alertmanager:
        known = config.alertmanager
        probes += [_probe_url("alertmanager", url, path="/-/ready", ca_file=known.ca_file) for url in known.urls]
    if config.syslog:
        probes.append(_probe_syslog(config.syslog.address))
    if config.metrics:
        probes.append(_probe_port(config.metrics.port))
    return tuple(await asyncio.gather(*probes))


async def _probe_url(name: str, url: str, *, path: str, ca_file: str) -> ProbeResult:
    import httpx

    from phasewatch.alarms.webhook import build_tls_context

    parts = httpx.URL(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        context = build_tls_context(ca_file) if parts.scheme == "https" else None
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(parts.host, port, ssl=context)
            try:
                if not path:
                    return ProbeResult(name=name, is_reached=True, words=f"{parts.host}:{port} accepts connections")
                target = f"{parts.path.rstrip('/')}{path}"
                writer.write(
                    f"GET {target} HTTP/1.1\r\nHost: {parts.netloc.decode()}\r\nConnection: close\r\n\r\n".encode()
                )
                status = (await reader.readline())[:200].decode("latin-1").strip()
            finally:
                await _close(writer)
    except (OSError, PhasewatchError, ValueError) as exc:  # ValueError: a line without end
        reason = getattr(exc, "strerror", None) or str(exc) or "it did not answer in time"
        return ProbeResult(name=name, is_reached=False, words=f"{parts.host}:{port}: {reason}")
    return ProbeResult(name=name, is_reached=" 200" in status, words=f"{target}: {status}")


async def _probe_syslog(text: str) -> ProbeResult:
    address = parse_syslog_address(text)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            if address.transport is SyslogTransport.UNIX:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    sock.setblocking(False)
                    await loop.sock_connect(sock, address.path)
            elif address.transport is SyslogTransport.TCP:
                _, writer = await asyncio.open_connection(address.host, address.port)
                await _close(writer)
            else:
                await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
                return ProbeResult(
                    name="syslog", is_reached=None, words=f"{text}: UDP does not show whether it arrives"
                )
    except OSError as exc:
        reason = exc.strerror or str(exc) or "it did not answer in time"
        return ProbeResult(name="syslog", is_reached=False, words=f"{text}: {reason}")
    return ProbeResult(name="syslog", is_reached=True, words=f"{text} accepts connections")


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def _probe_port(port: int) -> ProbeResult:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as exc:
            return ProbeResult(name="metrics", is_reached=False, words=f"port {port}: {exc.strerror}")
    return ProbeResult(name="metrics", is_reached=True, words=f"port {port} is free")
