"""A sha256 on the wire, as RFC 9530 spells it in `Content-Digest`."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence

_SHA256 = re.compile(r"\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:;.*)?")


def render_digest(digest: str) -> str:
    """Spell a sha256, given in hex."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:"


def parse_digest(fields: Sequence[str]) -> str | None:
    """Give the one sha256 of the header's fields, in hex; None if there is none or several. Other algorithms are passed over."""
    found = [match[1] for field in ",".join(fields).split(",") if (match := _SHA256.fullmatch(field))]
    return base64.b64decode(found[0]).hex() if len(found) == 1 else None
