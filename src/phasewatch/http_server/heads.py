"""Refuse ambiguous HTTP request heads before a tolerant parser reads them."""

from __future__ import annotations

import re

__all__ = ["MAX_HEADER_LINES", "MAX_HEAD_BYTES", "find_head_fault"]

MAX_HEAD_BYTES = 16 << 10
MAX_HEADER_LINES = 100

_HEAD_END = re.compile(rb"\n\r?\n")
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n)")
_CONTROL_CHARACTER = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [\x21-\x7e]+ HTTP/1\.[01]")
_FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTENT_LENGTH = re.compile(rb"0|[1-9][0-9]{0,18}")
_FRAMING_FIELDS = frozenset({b"content-length", b"transfer-encoding"})


def find_head_fault(data: bytes) -> str | None:
    """Return why a request head is refused; None if it is valid or not yet complete.

    RFC 9112 allows servers to repair some of these heads. Behind a proxy that repairs them differently, the rest of
    such a request would be read as another request (request smuggling), so none is repaired.

    Args:
        data: The bytes since the last request, the head first.
    """
    end = _HEAD_END.search(data)
    head = data[: end.end()] if end else data
    if len(head) > MAX_HEAD_BYTES:
        return f"the request head is longer than {MAX_HEAD_BYTES:,} bytes"
    if head.count(b"\n") > MAX_HEADER_LINES + 2:
        return f"the request has more than {MAX_HEADER_LINES} header lines"
    if end is None:
        return None
    if _BARE_LINE_END.search(head):
        return "a line of the request head does not end in CR LF"
    if _CONTROL_CHARACTER.search(head):
        return "the request head holds a control character"
    first, *lines = head[:-4].split(b"\r\n")
    if not _REQUEST_LINE.fullmatch(first):
        return "the request line is not that of HTTP/1.0 or HTTP/1.1"
    return _find_field_fault(lines, is_old=first.endswith(b"1.0"))


def _find_field_fault(lines: list[bytes], *, is_old: bool) -> str | None:
    framing: list[tuple[bytes, bytes]] = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if line[:1] in b" \t":
            return "a header is folded over several lines"
        if not colon or not _FIELD_NAME.fullmatch(name):
            return "a header line is not NAME: VALUE"
        name = name.lower()
        if b"_" in name and name.replace(b"_", b"-") in _FRAMING_FIELDS:
            return "a header that frames the body is misspelled"
        if name in _FRAMING_FIELDS:
            framing.append((name, value.strip(b" \t").lower()))
    if len(framing) > 1:
        return "the body's length is stated more than once"
    for name, value in framing:
        if name == b"content-length" and not _CONTENT_LENGTH.fullmatch(value):
            return "Content-Length is not a plain decimal number"
        if name == b"transfer-encoding" and (value != b"chunked" or is_old):
            return "the only Transfer-Encoding understood is chunked, in HTTP/1.1"
    return None
