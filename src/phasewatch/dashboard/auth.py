"""Access control of the dashboard: local host names, same origin, a cookie to view and a token to send events."""

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

__all__ = [
    "CONTENT_SECURITY_POLICY",
    "SECURITY_HEADERS",
    "TOKEN_VARIABLE",
    "AccessControl",
    "AccessRefusal",
    "AccessRequest",
    "compute_cookie",
    "ensure_token",
    "find_token_path",
    "is_same_secret",
    "read_token",
]

TOKEN_VARIABLE = "PHASEWATCH_TOKEN"
_MAX_TOKEN_CHARS = 512


def find_token_path() -> Path:
    """Return the default path of the token, in the state folder of the user.

    Raises:
        MachineError: If the user has no home folder.
    """
    otherwise = f"name a file with --token-file ({TOKEN_VARIABLE} holds a token for `publish`)"
    return user_folder("XDG_STATE_HOME", ".local/state", otherwise=otherwise) / "dashboard.token"


def ensure_token(path: Path) -> str:
    """Read the token, or create one if the file does not exist.

    Raises:
        MachineError: If the file cannot be created, is open to other users, or holds no token.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(descriptor, 0o600)  # independent of the umask
    except OSError as exc:
        if os.path.lexists(path):
            return read_token(path)
        raise MachineError(
            f"{path}: the token of the dashboard cannot be written ({exc.strerror}); name a file with --token-file, "
            "or set XDG_STATE_HOME to a writable folder"
        ) from exc
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    return token


def read_token(path: Path) -> str:
    """Read the token that a dashboard on this machine created.

    Raises:
        MachineError: If the file does not exist, is open to other users, or holds no token.
    """
    try:
        with path.open("rb") as file:
            mode, text = os.fstat(file.fileno()).st_mode & 0o777, file.read(_MAX_TOKEN_CHARS + 1)
    except FileNotFoundError as exc:
        raise MachineError(
            f"{path}: there is no token; start `phasewatch dashboard` once, or set {TOKEN_VARIABLE}"
        ) from exc
    if mode & 0o077:
        raise MachineError(f"{path}: open to other users (mode {mode:o}); `chmod 600 {path}`, or delete it")
    token = text.decode("ascii", "replace").strip()
    if not (16 <= len(token) <= _MAX_TOKEN_CHARS and token.isascii() and token.isprintable()):
        raise MachineError(f"{path}: holds no token; delete it, and the next start creates one")
    return token


def compute_cookie(token: str) -> str:
    """Return the value of the viewer's cookie: a hash of the token, so that a stolen cookie cannot send events."""
    return sha256(b"phasewatch viewer " + token.encode()).hexdigest()


def is_same_secret(given: str, expected: str) -> bool:
    """Compare two secrets in constant time."""
    return hmac.compare_digest(sha256(given.encode("utf-8", "replace")).digest(), sha256(expected.encode()).digest())


# Plotly adds a style element when it loads, which needs 'unsafe-inline'.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)
SECURITY_HEADERS = (
    ("Content-Security-Policy", CONTENT_SECURITY_POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
_COOKIE_NAME = "phasewatch"
# Any port is accepted, because a tunnel changes it and a foreign host name cannot.
_LOCAL_HOST_PATTERN = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRefusal:
    """HTTP status and message of a refused request."""

    status: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRequest:
    """The parts of a request that the access rules use; a missing header is an empty string."""

    method: str
    path: str
    query: str
    host: str
    origin: str
    cookie: str
    authorization: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessControl:
    """Access rules of one dashboard.

    Attributes:
        token: Secret of the dashboard.
        is_open: Whether viewing needs no cookie (`--no-auth`); sending events always needs the token.
    """

    token: str
    is_open: bool = False

    def find_refusal(self, request: AccessRequest) -> AccessRefusal | None:
        """Return the refusal of a request, or None if it is allowed.

        GET and HEAD need the cookie and ignore a bearer token; every other method needs the token and ignores the
        cookie.
        """
        if not _LOCAL_HOST_PATTERN.fullmatch(request.host):
            # DNS rebinding: a page of a foreign host name that resolves to this address must not read ours.
            return AccessRefusal(status=421, message="this dashboard only answers requests for 127.0.0.1 and localhost")
        if request.origin and request.origin not in (f"http://{request.host}", f"https://{request.host}"):
            return AccessRefusal(status=403, message="requests from other origins are not allowed")
        if request.path == "/healthz":
            return None
        if request.method not in ("GET", "HEAD"):
            kind, _, given = request.authorization.partition(" ")
            if kind.lower() == "bearer" and is_same_secret(given.strip(), self.token):
                return None
            return AccessRefusal(status=401, message="wrong or missing token: send it as `Authorization: Bearer …`")
        if self.is_open or self.has_cookie(request.cookie):
            return None
        return AccessRefusal(
            status=401, message="open the address that `phasewatch dashboard` printed; it contains the token"
        )

    def is_login(self, request: AccessRequest) -> bool:
        """Return whether the request is ``GET /?token=…`` with the right token."""
        given = parse_qs(request.query).get("token", [""])[0] if len(request.query) < 4096 else ""
        return request.method == "GET" and request.path == "/" and bool(given) and is_same_secret(given, self.token)

    def has_credentials(self, request: AccessRequest) -> bool:
        """Return whether a request has a valid token or cookie."""
        kind, _, given = request.authorization.partition(" ")
        has_token = kind.lower() == "bearer" and is_same_secret(given.strip(), self.token)
        return has_token or self.has_cookie(request.cookie)

    def has_cookie(self, header: str) -> bool:
        """Return whether a Cookie header has the viewer's cookie.

        Browsers send one host's cookies to every port, so the header may hold those of other programs. `http.cookies`
        is not used, because it drops the whole header if one foreign value is malformed.
        """
        expected = compute_cookie(self.token)
        pairs = (part.strip().partition("=") for part in header.split(";"))
        return any(name == _COOKIE_NAME and is_same_secret(value, expected) for name, _, value in pairs)

    def render_set_cookie(self) -> str:
        """Render the value of the Set-Cookie header."""
        return f"{_COOKIE_NAME}={compute_cookie(self.token)}; HttpOnly; SameSite=Strict; Path=/; Max-Age=2592000"
