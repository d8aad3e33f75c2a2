"""Who may come in: the machine's own address, the page's own origin, the cookie to look, the token to send."""

from __future__ import annotations

import hmac
import os
import re
import secrets
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import parse_qs

from phasewatch.errors import MachineError
from phasewatch.user_folders import user_folder

TOKEN_VARIABLE = "PHASEWATCH_TOKEN"
_MAX_TOKEN_CHARS = 512


def find_token_path() -> Path:
    """Return where the token lies if nobody says otherwise: in the user's state folder.

    Raises:
        MachineError: If the user has no home folder.
    """
    otherwise = f"name a file with --token-file ({TOKEN_VARIABLE} holds a token for `produce`)"
    return user_folder("XDG_STATE_HOME", ".local/state", otherwise=otherwise) / "dashboard.token"


def ensure_token(path: Path) -> str:
    """Read the token, or make one on first start.

    Raises:
        MachineError: If it cannot be made, others may read the file, or it holds no token.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(made, 0o600)  # whatever the umask: a file that its owner cannot read is no token
    except OSError as exc:
        if os.path.lexists(path):
            return read_token(path)
        raise MachineError(
            f"{path}: the dashboard's token cannot be kept here ({exc.strerror}); name a file with --token-file, "
            "or set XDG_STATE_HOME to a folder that can be written to"
        ) from exc
    token = secrets.token_urlsafe(32)
    with os.fdopen(made, "w") as file:
        file.write(token + "\n")
    return token


def read_token(path: Path) -> str:
    """Read the token that a dashboard on this machine made.

    Raises:
        MachineError: If there is none, others may read it, or it is not one.
    """
    try:
        with path.open("rb") as file:
            mode, text = os.fstat(file.fileno()).st_mode & 0o777, file.read(_MAX_TOKEN_CHARS + 1)
    except FileNotFoundError as exc:
        raise MachineError(
            f"{path}: no token here; start `phasewatch dashboard` once, or set {TOKEN_VARIABLE}"
        ) from exc
    if mode & 0o077:
        raise MachineError(f"{path}: others may read it (mode {mode:o}); `chmod 600 {path}`, or delete it")
    token = text.decode("ascii", "replace").strip()
    if not (16 <= len(token) <= _MAX_TOKEN_CHARS and token.isascii() and token.isprintable()):
        raise MachineError(f"{path}: holds no token; delete it, and the next start makes one")
    return token


def compute_cookie(token: str) -> str:
    """Give what a browser carries instead of the token: who reads a cookie cannot send events with it."""
    return sha256(b"phasewatch viewer " + token.encode()).hexdigest()


def is_same_secret(given: str, expected: str) -> bool:
    """Compare two secrets in constant time."""
    return hmac.compare_digest(sha256(given.encode("utf-8", "replace")).digest(), sha256(expected.encode()).digest())


# Plotly makes a style element when it loads; everything else comes from the package.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)
SECURITY_HEADERS = (
    ("Content-Security-Policy", CONTENT_SECURITY_POLICY), ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"), ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)  # fmt: skip
COOKIE_NAME = "phasewatch"
# Any port: a tunnel changes it, a foreign name cannot fake it.
_LOCAL_HOST_PATTERN = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRefusal:
    """Why a request goes no further."""

    status: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRequest:
    """What the gate looks at in a request; header values are empty where there is no such header."""

    method: str
    path: str
    query: str
    host: str
    origin: str
    cookie: str
    authorization: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessControl:
    """The rules of one dashboard.

    Attributes:
        token: Its secret.
        is_open: Whether looking needs no cookie (`--no-auth`); sending always needs the token.
    """

    token: str
    is_open: bool = False

    def find_refusal(self, asked: AccessRequest) -> AccessRefusal | None:
        """Say why a request may not pass, or None."""
        if not _LOCAL_HOST_PATTERN.fullmatch(asked.host):
            # A name that somebody else's DNS points here: the page behind it must not read ours.
            return AccessRefusal(status=421, message="this dashboard answers on 127.0.0.1 and localhost alone")
        if asked.origin and asked.origin not in (f"http://{asked.host}", f"https://{asked.host}"):
            return AccessRefusal(status=403, message="a request from another origin")
        if asked.path == "/healthz":
            return None
        if asked.method not in ("GET", "HEAD"):
            kind, _, given = asked.authorization.partition(" ")
            if kind.lower() == "bearer" and is_same_secret(given.strip(), self.token):
                return None
            return AccessRefusal(status=401, message="wrong or missing token: send it as `Authorization: Bearer …`")
        if self.is_open or self.has_cookie(asked.cookie):
            return None
        return AccessRefusal(
            status=401, message="open the address that `phasewatch dashboard` printed: it carries the token"
        )

    def is_login(self, asked: AccessRequest) -> bool:
        """Say whether this is the start address with the right token."""
        given = parse_qs(asked.query).get("token", [""])[0] if len(asked.query) < 4096 else ""
        return asked.method == "GET" and asked.path == "/" and bool(given) and is_same_secret(given, self.token)

    def has_credentials(self, asked: AccessRequest) -> bool:
        """Whether a request carries a secret of this dashboard, not only a path that is open to all."""
        kind, _, given = asked.authorization.partition(" ")
        has_token = kind.lower() == "bearer" and is_same_secret(given.strip(), self.token)
        return has_token or self.has_cookie(asked.cookie)

    def has_cookie(self, header: str) -> bool:
        """Say whether a Cookie header holds the viewer's cookie.

        The header is shared with every program of this machine, whatever its port; http.cookies gives up the whole of it
        for one foreign value that it does not like.
        """
        expected = compute_cookie(self.token)
        pairs = (part.strip().partition("=") for part in header.split(";"))
        return any(name == COOKIE_NAME and is_same_secret(value, expected) for name, _, value in pairs)

    def render_set_cookie(self) -> str:
        """Give the Set-Cookie header's value."""
        return f"{COOKIE_NAME}={compute_cookie(self.token)}; HttpOnly; SameSite=Strict; Path=/; Max-Age=2592000"
