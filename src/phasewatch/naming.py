"""Ids derived from names that people choose: valid as folder, key and column, and distinct for distinct names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

__all__ = ["RESERVED_HOST_IDS", "make_host_id", "make_profile_name"]

# `ship` keeps sent/ and refused/ beside the hosts' folders, so no host may have these names.
RESERVED_HOST_IDS = frozenset({"sent", "refused"})
_DIGEST_CHARS = 8


def make_host_id(name: str, *, fallback: str = "vm", taken: Collection[str] = (), identity: str = "") -> str:
    """Return the host id of a name: the name itself if it is valid and free, otherwise a changed name with a digest.

    A valid id has at most 63 small letters, digits, dots, underscores and hyphens. In a changed name, capitals become
    small letters and other characters become hyphens. It is cut to 54 characters, and a hyphen and 8 hexadecimal
    digits of the digest are appended, so that names that differ only in these points have different ids.

    Args:
        name: A name that a person chose.
        fallback: The part before the digest if nothing else remains of the name.
        taken: Ids in use; a name among them gets a digest too.
        identity: Text whose digest is appended instead of the name's, such as a UUID if several VMs have one name.

    >>> make_host_id("web-01")
    'web-01'
    >>> make_host_id("Web 01")
    'web-01-ad63fded'
    """
    return _make_id(
        name, "a-z0-9._-", longest=63, fallback=fallback, taken={*RESERVED_HOST_IDS, *taken}, identity=identity
    )


def make_profile_name(name: str) -> str:
    """Return the profile name of a file's stem.

    The rule is that of `make_host_id`, but with at most 31 characters and without dots and underscores.

    >>> make_profile_name("miner-2"), make_profile_name("My Bot_2.0")
    ('miner-2', 'my-bot-2-0-515f3032')
    """
    return _make_id(name, "a-z0-9-", longest=31, fallback="own", taken=(), identity="")


def _make_id(name: str, kept: str, *, longest: int, fallback: str, taken: Collection[str], identity: str) -> str:
    if re.fullmatch(f"[a-z0-9][{kept}]{{0,{longest - 1}}}", name) and name not in taken:
        return name
    plain = re.sub(f"[^{kept}]+", "-", name.lower()).strip("-._") or fallback
    digest = hashlib.sha256((identity or name).encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARS]
    return f"{plain[: longest - _DIGEST_CHARS - 1].rstrip('-._')}-{digest}"
