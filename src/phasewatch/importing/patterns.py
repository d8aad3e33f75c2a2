"""Patterns of paths, such as ``**/{host}/{run}/reads.csv``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from phasewatch.errors import DataError

__all__ = ["PathPattern", "parse_pattern"]

_MAX_PATTERN = 200
_TOKEN = re.compile(r"\{([a-z][a-z0-9_]{0,39})\}|(\*\*/)|(\*)|([^{}*]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PathPattern:
    """A compiled pattern.

    Attributes:
        text: As it was written.
        names: The names in braces, in their order.
        regex: Matches a whole path.
    """

    text: str
    names: tuple[str, ...]
    regex: re.Pattern[str]

    def match(self, path: str) -> dict[str, str] | None:
        """Return the named parts of a path with forward slashes; None if it does not match."""
        found = self.regex.fullmatch(path)
        return found.groupdict() if found else None


def parse_pattern(text: str, *, where: str) -> PathPattern:
    """Compile a pattern: ``{name}`` and ``*`` match within a folder or file name, ``**/`` any number of folders.

    Raises:
        DataError: If it is empty, absolute, leads upwards, or has an unknown form.
    """
    if not text or len(text) > _MAX_PATTERN or text.startswith("/") or ".." in text.split("/"):
        raise DataError(f"{where} = {text[:60]!r}; expected a path below the source, such as '**/{{host}}/reads.csv'")
    parts: list[str] = []
    names: list[str] = []
    at = 0
    for token in _TOKEN.finditer(text):
        if token.start() != at:
            break
        at = token.end()
        name, folders, star, plain = token.groups()
        if name:
            if name in names:
                raise DataError(f"{where} = {text!r}: {{{name}}} is there twice")
            names.append(name)
            parts.append(f"(?P<{name}>[^/]+)")
        elif folders:
            parts.append("(?:[^/]+/)*")
        else:
            parts.append("[^/]*" if star else re.escape(plain))
    if at != len(text) or text.count("**/") > 2:
        raise DataError(f"{where} = {text!r}: expected names in braces, * and **/ (at most twice)")
    return PathPattern(text=text, names=tuple(names), regex=re.compile("".join(parts)))
