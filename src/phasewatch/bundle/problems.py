"""Findings on a bundle: their types, the codes of the reader, and strict JSON parsing that names the faulty line."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from phasewatch.bundle import limits
from phasewatch.errors import BundleError
from phasewatch.types import BundleStatus, SourceKind

__all__ = [
    "FINDING_CODES",
    "BundleFinding",
    "CheckIssue",
    "FindingSpec",
    "Severity",
    "find_malformed_line",
    "find_severity",
    "parse_strict_json",
]

Severity = BundleStatus | Literal["note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleFinding:
    """A problem that was found in a bundle.

    Attributes:
        code: Stable kebab-case code, followed by a colon and the source if it concerns one
            (``silence:qmp``, a code of `validate.checks`).
        severity: The status that it gives the bundle; a note changes nothing.
        place: File, member and line, as far as known.
        words: What was found and what was expected.
    """

    code: str
    severity: Severity
    place: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingSpec:
    """The severity and the meaning of a code."""

    code: str
    severity: Severity
    about: str


def _parse_specs(severity: BundleStatus, rows: str) -> tuple[FindingSpec, ...]:
    """Parse lines of ``code about``."""
    parted = (line.split(None, 1) for line in rows.strip().splitlines())
    return tuple(FindingSpec(code=code, severity=severity, about=about) for code, about in parted)


# Errored: the bytes cannot be read, or would exceed a limit. Rejected: they can be read and break a rule.
_FINDING_SPECS = (
    *_parse_specs(
        BundleStatus.ERRORED,
        """
bundle-unreadable      The file or its receipt could not be opened or read; the next validation tries again.
bundle-missing         The store holds a receipt, but its bundle is gone.
compressed-size        The file is empty or larger than 16 MiB.
zstd-magic             The file does not begin as a zstd frame.
zstd-skippable         The file holds a skippable frame; a bundle is one frame of data.
zstd-header            The frame's header is cut off or uses bits that the format reserves.
zstd-checksum-flag     The frame has no checksum, so damage could not be detected.
zstd-dictionary        The frame needs a dictionary; bundles use none.
zstd-window            The frame asks for a window larger than 8 MiB.
zstd-corrupt           The frame cannot be decompressed, or its checksum does not match.
zstd-truncated         The file ends before its frame does.
zstd-trailing          Bytes follow the frame.
decompressed-size      The content is larger than 32 MiB.
tar-truncated          The tar ends inside a member or before its two closing blocks.
tar-checksum           A member's header does not match its own checksum.
tar-kind               A member is not a plain ustar file: a link, folder, device, sparse file or PAX or GNU extension.
tar-header             A member's header is not the one that this format writes (mode 0644, owner 0, fixed time).
tar-size               A member's size is not a number, or over its limit.
tar-padding            The bytes between a member's end and the next block are not zero.
tar-trailing           Something follows the tar's end.
line-size              A line is longer than 4 KiB.
rows-many              A source has more than 20,000 rows.
labels-many            There are more than 64 labels.
""",
    ),
    *_parse_specs(
        BundleStatus.REJECTED,
        """
member-unknown         The tar holds a file that the format does not know.
member-twice           The tar holds a file twice.
member-order           The tar's files are not in the order of the format.
member-missing         The manifest or the labels are missing, or a member that the manifest lists.
member-unlisted        The tar holds a source's rows that the manifest does not list.
member-bytes           A member's size differs from the manifest's.
member-sha256          A member's digest differs from the manifest's.
member-rows            A member's number of lines differs from the manifest's.
manifest-json          The manifest is not JSON, or not text.
manifest-key-twice     A key of the manifest is repeated in one object.
manifest-schema        A key of the manifest is unknown, missing or of the wrong type.
manifest-format        The manifest names a format that this reader does not know.
manifest-id            An id in the manifest is malformed.
manifest-string        A string is empty where it must not be, too long, or not printable ASCII.
manifest-range         A number of the manifest is outside its range, or a list too long.
manifest-source        A source with rows lacks its fields, rate, count or clock in the manifest.
manifest-fields        The listed row keys are not raw fields of their source, in their order, each once.
manifest-agent         The agent was off, but the guest reported.
manifest-rows          More rows arrived than the sampler emitted.
clock-pair             A pair of clock readings does not move forward, or drifts by more than 1 %.
text-encoding          A member holds a byte-order mark, a NUL or a byte that is not ASCII.
text-last-newline      A member's last line has no newline.
text-blank-line        A member holds a blank line.
row-json               A line is not one JSON object.
row-key-twice          A key is repeated in one row.
row-key-unknown        A row has a key that the manifest's fields do not name.
row-key-missing        A row lacks a key that the manifest's fields name.
row-key-order          A row's keys are not in the order of the manifest's fields.
row-type               A value has the wrong type: text or a fraction for a whole number, or null for a stamp.
row-non-finite         A value is NaN or infinite, or too large for a 64-bit float.
row-int64              A whole number does not fit into 64 bits.
row-form               A row has spaces, or numbers in another form than that of the format.
row-stamp              A row's stamp is negative.
label-phase            A label names an unknown phase.
label-order            A label's stamps do not strictly increase.
label-end              The last label is not `end`, an earlier one is, or there is no phase before it.
label-stamp            A label's wall stamp is not Unix time in nanoseconds, or its monotonic stamp is negative.
label-span             The labels span less than 1 s or more than 1 h.
label-duration         The manifest's duration differs from the labels' by more than 1 ms.
""",
    ),
)

FINDING_CODES: dict[str, FindingSpec] = {spec.code: spec for spec in _FINDING_SPECS}


def find_severity(code: str) -> Severity:
    """Return the severity of a code of the reader; a source after a colon is ignored.

    Raises:
        KeyError: If `FINDING_CODES` does not have the code. It has no codes of `validate.checks`, such as ``silence``.
    """
    return FINDING_CODES[code.partition(":")[0]].severity


_VALUE_PATTERN = r'(?:null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|"[ !#-\[\]-~]*")'


class _DuplicateKeyError(Exception):
    """A key is repeated in one object."""


class _NonFiniteNumberError(Exception):
    """A number that JSON does not have: NaN or an infinity."""


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = Counter(name for name, _ in pairs)  # one pass: a manifest has room for 26,000 keys
        raise _DuplicateKeyError(next(name for name, n in counts.items() if n > 1))
    return made


def _reject_constant(name: str) -> Any:
    raise _NonFiniteNumberError(name)


def parse_strict_json(text: bytes) -> Any:
    """Parse JSON and refuse repeated keys and the literals NaN and Infinity; ``1e999`` is parsed as infinite.

    Raises:
        BundleError: Code ``key-twice``, ``non-finite`` or ``json``, without a place.
    """
    try:
        return json.loads(text, object_pairs_hook=_build_object, parse_constant=_reject_constant)
    except _DuplicateKeyError as exc:
        raise BundleError(code="key-twice", words=f"the key {str(exc)[:60]!r} is repeated") from None
    except _NonFiniteNumberError as exc:
        raise BundleError(code="non-finite", words=f"{exc} is not a finite number") from None
    except (ValueError, RecursionError) as exc:
        raise BundleError(code="json", words=f"not JSON: {str(exc)[:80]}") from None


def find_malformed_line(
    data: bytes, decoder: msgspec.json.Decoder[Any], keys: Sequence[str], *, file: str, member: str, hint: str
) -> BundleError | None:
    """Find the first line that breaks the format.

    Args:
        data: The content of the member; every line ends with a newline.
        decoder: The decoder of one row.
        keys: The keys of a row, in order.
        file: Name of the bundle in errors.
        member: Name of the member in errors.
        hint: Error of the decoder for all lines; used if no single line is at fault.

    Returns:
        The error; None if every line is well formed and only a number has another valid form (``1e-5``).
    """
    form = re.compile((r"\{" + ",".join(f'"{re.escape(key)}":{_VALUE_PATTERN}' for key in keys) + r"\}").encode())
    for number, line in enumerate(data[:-1].split(b"\n"), 1):
        try:
            decoder.decode(line)
        except (msgspec.DecodeError, RecursionError) as exc:
            code, words = _classify_line_error(line, keys, str(exc))
        else:
            if form.fullmatch(line):
                continue
            code, words = _classify_line_error(line, keys, "")
        return BundleError(code=code, words=words, file=file, member=member, line=number)
    if hint:
        return BundleError(code="row-json", words=hint[:120], file=file, member=member)
    return None


def _classify_line_error(line: bytes, keys: Sequence[str], hint: str) -> tuple[str, str]:
    """Return the code and the text of the most basic error of one line."""
    try:
        value = parse_strict_json(line)
    except BundleError as exc:
        return f"row-{exc.code}", exc.words
    if not isinstance(value, dict):
        return "row-json", f"a line holds a {type(value).__name__}, not an object"
    for name in value:
        if name not in keys:
            return "row-key-unknown", f"the key {name[:60]!r} is not among the manifest's fields"
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
        return "row-key-order", "the keys are not in the order of the manifest's fields"
    return "row-form", "the line has spaces, or numbers in another form than that of the format"


@dataclass(frozen=True, slots=True)
class CheckIssue:
    """A problem that a check found in an episode; `validate.checks` turns it into a finding.

    Attributes:
        code: A key of `validate.checks.CHECK_CODES`, without a source.
        words: What was found and what was expected.
        source: The source that it concerns, if any.
        place: The member; by default that of the source.
    """

    code: str
    words: str
    source: SourceKind | None = field(default=None, kw_only=True)
    place: str = field(default="", kw_only=True)
