"""Authenticate hosts: read the tokens file, and compare tokens in constant time."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from phasewatch.errors import DataError
from phasewatch.types import HOST_ID_PATTERN

__all__ = ["MIN_TOKEN_CHARS", "HostToken", "find_host", "parse_tokens", "read_tokens", "render_hashed_lines"]

_HASH_PREFIX = "sha256:"
_PLAIN_TOKEN = re.compile(r"[!-~]{1,256}")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_TOKENS_FILE_BYTES = 1 << 20
MIN_TOKEN_CHARS = 16  # shorter tokens can be guessed, or found from their hash


@dataclass(frozen=True, slots=True, kw_only=True)
class HostToken:
    """One line of the tokens file.

    Attributes:
        host_id: The only host whose bundles the token may upload.
        digest: SHA-256 of the token.
        plain: The token itself if the file has it, which a shipper needs; never displayed.
    """

    host_id: str
    digest: bytes
    plain: str | None

    def __repr__(self) -> str:
        return f"HostToken(host_id={self.host_id!r})"


def read_tokens(path: Path) -> tuple[HostToken, ...]:
    """Read a tokens file: one line ``host_id: token`` or ``host_id: sha256:…`` per host, blank lines and comments.

    Raises:
        DataError: If other users can read it, or a line is malformed. Messages never quote a token.
    """
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise DataError(f"{path}: mode {mode:o}, others can read or change the tokens; run `chmod 600 {path}`")
        data = path.read_bytes() if path.stat().st_size <= _MAX_TOKENS_FILE_BYTES else b"\xff"
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}; write a tokens file with one line `host_id: token` per host") from exc
    try:
        tokens = parse_tokens(data.decode("ascii"), file=str(path))
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a tokens file; it is too large, or not plain ASCII") from None
    if not tokens:
        raise DataError(f"{path}: it has no token; write one line `host_id: token` per host")
    return tokens


def parse_tokens(text: str, *, file: str) -> tuple[HostToken, ...]:
    """Parse the lines of a tokens file; see `read_tokens`."""
    tokens: dict[bytes, HostToken] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        host_id, colon, rest = (part.strip() for part in line.partition(":"))
        where = f"{file}:{number}"
        if not colon or not HOST_ID_PATTERN.fullmatch(host_id):
            raise DataError(f"{where}: the line does not begin with a host_id and a colon; write `host_id: token`")
        if rest.startswith(_HASH_PREFIX):
            digits = rest.removeprefix(_HASH_PREFIX)
            if not _HEX_DIGEST.fullmatch(digits):
                raise DataError(f"{where}: what follows sha256: is not 64 hex digits; make it with `--hash-tokens`")
            token = HostToken(host_id=host_id, digest=bytes.fromhex(digits), plain=None)
        elif _PLAIN_TOKEN.fullmatch(rest):
            token = HostToken(host_id=host_id, digest=sha256(rest.encode()).digest(), plain=rest)
        else:
            raise DataError(f"{where}: a token is 1 to 256 printable ASCII characters without spaces")
        if token.digest in tokens:
            raise DataError(f"{where}: the token of another line again; each host needs its own")
        tokens[token.digest] = token
    return tuple(tokens.values())


def render_hashed_lines(tokens: Sequence[HostToken]) -> list[str]:
    """Return the lines of a tokens file with hashes in place of the tokens."""
    return [f"{token.host_id}: {_HASH_PREFIX}{token.digest.hex()}" for token in tokens]


def find_host(tokens: Sequence[HostToken], authorization: str) -> str | None:
    """Return the host of the token in an ``Authorization`` header; None for an unknown token.

    Every token is compared in constant time, so that the duration reveals nothing about a guess.
    """
    scheme, _, presented = authorization.partition(" ")
    digest = sha256(presented.strip().encode("utf-8", "surrogateescape")).digest()
    host = None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            host = token.host_id
    return host if scheme.lower() == "bearer" else None
