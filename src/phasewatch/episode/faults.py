"""Which line of a member departs from the format, and how: the slow road, taken only when the fast one stumbled."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from phasewatch.episode import limits
from phasewatch.errors import BundleError

_VALUE = r'(?:null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|"[ !#-\[\]-~]*")'


class _KeyTwice(Exception):
    """A key stands twice in one object."""


class _NotFinite(Exception):
    """A number that JSON does not know."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = Counter(name for name, _ in pairs)  # one pass: a manifest has room for 26,000 keys
        raise _KeyTwice(next(name for name, n in counts.items() if n > 1))
    return made


def _constant(name: str) -> Any:
    raise _NotFinite(name)


def strict_json(text: bytes) -> Any:
    """Parse JSON and refuse what parsers usually let pass.

    Raises:
        BundleError: Code ``key-twice``, ``non-finite`` or ``json``; the caller knows the place.
    """
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant)
    except _KeyTwice as exc:
        raise BundleError(code="key-twice", words=f"the key {str(exc)[:60]!r} stands twice") from None
    except _NotFinite as exc:
        raise BundleError(code="non-finite", words=f"{exc} is not a finite number") from None
    except (ValueError, RecursionError) as exc:
        raise BundleError(code="json", words=f"not JSON: {str(exc)[:80]}") from None


def blame_line(
    data: bytes, decoder: msgspec.json.Decoder[Any], keys: Sequence[str], *, file: str, member: str, hint: str
) -> BundleError | None:
    """Find the first line that departs from the format.

    Args:
        data: The member; every line ends with a newline.
        decoder: The typed row.
        keys: Every key of a row, in order.
        file: What errors call the bundle.
        member: What they call the member.
        hint: What the fast decoder said; used when no single line can be blamed.

    Returns:
        The refusal; None if each line is well formed and only spells a number in its own way (``1e-5``), which is allowed.
    """
    form = re.compile((r"\{" + ",".join(f'"{re.escape(key)}":{_VALUE}' for key in keys) + r"\}").encode())
    for number, line in enumerate(data[:-1].split(b"\n"), 1):
        try:
            decoder.decode(line)
        except (msgspec.DecodeError, RecursionError) as exc:
            code, words = _explain(line, keys, str(exc))
        else:
            if form.fullmatch(line):
                continue
            code, words = _explain(line, keys, "")
        return BundleError(code=code, words=words, file=file, member=member, line=number)
    if hint:
        return BundleError(code="row-json", words=hint[:120], file=file, member=member)
    return None


def _explain(line: bytes, keys: Sequence[str], hint: str) -> tuple[str, str]:
    """Say what is wrong with one line, in the order in which a reader would want to know."""
    try:
        value = strict_json(line)
    except BundleError as exc:
        return f"row-{exc.code}", exc.words
    if not isinstance(value, dict):
        return "row-json", f"a line holds a {type(value).__name__}, not an object"
    for name in value:
        if name not in keys:
            return "row-key-unknown", f"the key {name[:60]!r} is none of the manifest's fields"
    for name in keys:
        if name not in value:
            return "row-key-missing", f"the key {name!r} is missing"
    for name, item in value.items():
        if isinstance(item, float) and item in (float("inf"), float("-inf")):
            return "row-non-finite", f"{name} is too large for a 64-bit float"
        if isinstance(item, int) and not limits.INT64_MIN <= item <= limits.INT64_MAX:
            return "row-int64", f"{name} does not fit into 64 bits"
    if hint:
        return "row-type", hint[:160]
    if list(value) != list(keys):
        return "row-key-order", "the keys stand in another order than the manifest's fields"
    return "row-form", "not spelled as the format does: no spaces, plain numbers"
