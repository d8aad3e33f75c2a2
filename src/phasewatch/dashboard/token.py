"""The one secret of a dashboard: made on first start, kept in a file that only its owner reads, compared in constant time."""

from __future__ import annotations

import hmac
import os
import secrets
from hashlib import sha256
from pathlib import Path

from phasewatch.errors import MachineError
from phasewatch.user_folders import user_folder

VARIABLE = "PHASEWATCH_TOKEN"
_LONGEST = 512


def token_path() -> Path:
    """Return where the token lies if nobody says otherwise: in the user's state folder.

    Raises:
        MachineError: If the user has no home folder.
    """
    otherwise = f"name a file with --token-file ({VARIABLE} holds a token for `produce`)"
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
            mode, text = os.fstat(file.fileno()).st_mode & 0o777, file.read(_LONGEST + 1)
    except FileNotFoundError as exc:
        raise MachineError(f"{path}: no token here; start `phasewatch dashboard` once, or set {VARIABLE}") from exc
    if mode & 0o077:
        raise MachineError(f"{path}: others may read it (mode {mode:o}); `chmod 600 {path}`, or delete it")
    token = text.decode("ascii", "replace").strip()
    if not (16 <= len(token) <= _LONGEST and token.isascii() and token.isprintable()):
        raise MachineError(f"{path}: holds no token; delete it, and the next start makes one")
    return token


def cookie_of(token: str) -> str:
    """Give what a browser carries instead of the token: who reads a cookie cannot send events with it."""
    return sha256(b"phasewatch viewer " + token.encode()).hexdigest()


def is_same(given: str, expected: str) -> bool:
    """Compare two secrets in constant time."""
    return hmac.compare_digest(sha256(given.encode("utf-8", "replace")).digest(), sha256(expected.encode()).digest())
