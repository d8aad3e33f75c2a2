"""Who may come in: the machine's own address, the page's own origin, the cookie to look, the token to send."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qs

from phasewatch.dashboard.token import cookie_of, is_same

# Plotly makes a style element when it loads; everything else comes from the package.
CSP = "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
HEADERS = (
    ("Content-Security-Policy", CSP), ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"), ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)  # fmt: skip
COOKIE = "phasewatch"
# Any port: a tunnel changes it, a foreign name cannot fake it.
_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request goes no further."""

    status: int
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the gate looks at in a request; header values are empty where there is no such header."""

    method: str
    path: str
    query: str
    host: str
    origin: str
    cookie: str
    authorization: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The rules of one dashboard.

    Attributes:
        token: Its secret.
        is_open: Whether looking needs no cookie (`--no-auth`); sending always needs the token.
    """

    token: str
    is_open: bool = False

    def refuse(self, asked: Asked) -> Refusal | None:
        """Say why a request may not pass, or None."""
        if not _OWN_HOST.fullmatch(asked.host):
            # A name that somebody else's DNS points here: the page behind it must not read ours.
            return Refusal(status=421, words="this dashboard answers on 127.0.0.1 and localhost alone")
        if asked.origin and asked.origin not in (f"http://{asked.host}", f"https://{asked.host}"):
            return Refusal(status=403, words="a request from another origin")
        if asked.path == "/healthz":
            return None
        if asked.method not in ("GET", "HEAD"):
            kind, _, given = asked.authorization.partition(" ")
            if kind.lower() == "bearer" and is_same(given.strip(), self.token):
                return None
            return Refusal(status=401, words="wrong or missing token: send it as `Authorization: Bearer …`")
        if self.is_open or self.has_cookie(asked.cookie):
            return None
        return Refusal(status=401, words="open the address that `phasewatch dashboard` printed: it carries the token")

    def lets_in(self, asked: Asked) -> bool:
        """Say whether this is the start address with the right token."""
        given = parse_qs(asked.query).get("token", [""])[0] if len(asked.query) < 4096 else ""
        return asked.method == "GET" and asked.path == "/" and bool(given) and is_same(given, self.token)

    def is_known(self, asked: Asked) -> bool:
        """Whether a request carries a secret of this dashboard, not only a path that is open to all."""
        kind, _, given = asked.authorization.partition(" ")
        has_token = kind.lower() == "bearer" and is_same(given.strip(), self.token)
        return has_token or self.has_cookie(asked.cookie)

    def has_cookie(self, header: str) -> bool:
        """Say whether a Cookie header holds the viewer's cookie.

        The header is shared with every program of this machine, whatever its port; http.cookies gives up the whole of it
        for one foreign value that it does not like.
        """
        expected = cookie_of(self.token)
        pairs = (part.strip().partition("=") for part in header.split(";"))
        return any(name == COOKIE and is_same(value, expected) for name, _, value in pairs)

    def cookie(self) -> str:
        """Give the Set-Cookie header's value."""
        return f"{COOKIE}={cookie_of(self.token)}; HttpOnly; SameSite=Strict; Path=/; Max-Age=2592000"
