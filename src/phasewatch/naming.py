"""Ids made of names that people give: safe as folder, key and column, and two names stay two."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

RESERVED_HOST_IDS = frozenset({"sent", "refused"})  # folders of a shipper in an outbox, where host ids are folders too
_DIGEST_CHARS = 8


def make_host_id(name: str, *, fallback: str = "vm", taken: Collection[str] = (), identity: str = "") -> str:
    """Return the host id of a name: the name itself where it can be one, else what is left of it and a digest.

    Letters of other scripts, capitals, blanks and whatever goes beyond 63 characters are lost on the way; the digest of
    the whole name keeps apart what only differs in them.

    Args:
        name: As people gave it.
        fallback: What stands before the digest where nothing is left.
        taken: Ids that others have: one of these gets a digest too.
        identity: What the digest is of, where there is something better than the name.

    >>> host_id_of("web-01")
    'web-01'
    >>> host_id_of("Web 01")
    'web-01-ad63fded'
    """
    return _make_id(
        name, "a-z0-9._-", longest=63, fallback=fallback, taken={*RESERVED_HOST_IDS, *taken}, identity=identity
    )


def make_profile_name(name: str) -> str:
    """Return the profile name of a file's stem, by the same rule; it has 31 characters, and no dots.

    >>> profile_name_of("miner-2"), profile_name_of("My Bot_2.0")
    ('miner-2', 'my-bot-2-0-515f3032')
    """
    return _make_id(name, "a-z0-9-", longest=31, fallback="own", taken=(), identity="")


def _make_id(name: str, kept: str, *, longest: int, fallback: str, taken: Collection[str], identity: str) -> str:
    if re.fullmatch(f"[a-z0-9][{kept}]{{0,{longest - 1}}}", name) and name not in taken:
        return name
    plain = re.sub(f"[^{kept}]+", "-", name.lower()).strip("-._") or fallback
    mark = hashlib.sha256((identity or name).encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARS]
    return f"{plain[: longest - _DIGEST_CHARS - 1].rstrip('-._')}-{mark}"
