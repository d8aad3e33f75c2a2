"""Create HTTP clients; none uses a proxy of the environment, which could read tokens and alarms."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from phasewatch.errors import UsageError

__all__ = ["is_clear_text", "is_loopback", "make_http_client"]

if TYPE_CHECKING:
    from ssl import SSLContext

    import httpx


def make_http_client(
    *,
    base_url: str = "",
    token: str | None = None,
    timeout: httpx.Timeout | float,
    verify: SSLContext | bool = True,
) -> httpx.AsyncClient:
    """Return a client that ignores proxy variables and `.netrc` and follows no redirect.

    Args:
        base_url: Base of relative addresses.
        token: Bearer token of every request.
        timeout: Seconds.
        verify: How the server's certificate is checked.

    Raises:
        UsageError: If the address or the token cannot be used in a request.

    Source: ADR 0051.
    """
    import httpx

    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        return httpx.AsyncClient(
            base_url=base_url, headers=headers, timeout=timeout, verify=verify, trust_env=False, follow_redirects=False
        )
    except UnicodeEncodeError as exc:
        raise UsageError("the token holds a character that is not ASCII; copy it again") from exc
    except httpx.InvalidURL as exc:
        raise UsageError(f"{base_url}: {exc}; an address looks like https://store.example:8470") from exc


def is_clear_text(url: str) -> bool:
    """Whether requests to an address cross a network unencrypted: plain http to another machine."""
    import httpx

    try:
        parsed = httpx.URL(url)  # the client's own parser
    except (httpx.InvalidURL, UnicodeError):  # not an address; the client refuses it
        return False
    return parsed.scheme == "http" and bool(parsed.host) and not is_loopback(parsed.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback address of this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
