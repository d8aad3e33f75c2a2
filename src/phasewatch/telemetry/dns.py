"""Count DNS questions and answers of a VM: names, their length and entropy, TXT records, missing names (pure, bounded).

Only UDP messages are seen. Names stay here, as hashes; counts alone are read.

Source: RFC 1035, sections 4.1.1 and 4.1.2.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from math import log2
from typing import NamedTuple

__all__ = ["DNS_PORT", "MAX_NAMES", "DnsCounter", "DnsReading", "compute_entropy"]

DNS_PORT = 53
MAX_NAMES = 4096  # remembered names; a forgotten one is new when it is asked for again
_HEADER_BYTES = 12
_OPT_RECORD_BYTES = 11  # of EDNS, which most resolvers append
_QUESTION_TAIL_BYTES = 4  # type and class
_ANSWER_FLAG, _CODE_MASK, _NO_SUCH_NAME = 0x80, 0x0F, 3
_TYPE_TXT = 16


class DnsReading(NamedTuple):
    """One reading, in the order of the raw fields; all are counters."""

    dns_asked: int
    dns_new_names: int
    dns_name_bytes: int
    dns_entropy: int
    dns_txt: int
    dns_answers: int
    dns_nxdomain: int


class DnsCounter:
    """Counts DNS messages of a machine.

    Args:
        max_names: Maximum number of remembered names.
    """

    def __init__(self, *, max_names: int = MAX_NAMES) -> None:
        self._max = max_names
        self._names: OrderedDict[int, int] = OrderedDict()  # hash, whose key is new in each process → entropy (mbit)
        self._asked = self._new_names = self._name_bytes = self._entropy = self._txt = 0
        self._answers = self._missing = 0

    def add_message(self, frame: bytes, at: int, wire_bytes: int, *, outgoing: bool) -> None:
        """Count one message; anything that is none is ignored.

        Args:
            frame: The frame, or as much of it as was captured.
            at: Offset of the UDP header.
            wire_bytes: Size of the whole frame.
            outgoing: Whether the guest sent it: a question, else an answer.
        """
        begin = at + 8
        if len(frame) < begin + _HEADER_BYTES:
            return
        is_answer = bool(frame[begin + 2] & _ANSWER_FLAG)
        if is_answer == outgoing:
            return
        if is_answer:
            self._answers += 1
            self._missing += frame[begin + 3] & _CODE_MASK == _NO_SUCH_NAME
        else:
            self._add_question(frame, begin, wire_bytes)

    def pop_reading(self) -> DnsReading:
        """Return the counters."""
        return DnsReading(
            dns_asked=self._asked,
            dns_new_names=self._new_names,
            dns_name_bytes=self._name_bytes,
            dns_entropy=self._entropy,
            dns_txt=self._txt,
            dns_answers=self._answers,
            dns_nxdomain=self._missing,
        )

    def _add_question(self, frame: bytes, begin: int, wire_bytes: int) -> None:
        if frame[begin + 4 : begin + 6] != b"\0\1":  # every resolver asks one question a message
            return
        labels, at = [], begin + _HEADER_BYTES
        while at < len(frame) and 0 < frame[at] < 64:
            labels.append(frame[at + 1 : at + 1 + frame[at]])
            at += 1 + frame[at]
        is_whole = at < len(frame) and frame[at] == 0
        if not is_whole and at < len(frame):
            return  # a compressed name, which a question does not have
        name = b".".join(labels).lower()
        length = len(name)
        if not is_whole:  # the capture ends inside the name: what follows it has a known size
            has_records = frame[begin + 10 : begin + 12] != b"\0\0"
            rest = wire_bytes - begin - _HEADER_BYTES - _QUESTION_TAIL_BYTES - _OPT_RECORD_BYTES * has_records
            length = max(length, min(rest - 2, 253))
        self._asked += 1
        self._name_bytes += length
        self._entropy += self._remember(name)
        self._txt += is_whole and frame[at + 1 : at + 3] == bytes([0, _TYPE_TXT])

    def _remember(self, name: bytes) -> int:
        """Return the entropy of a name's characters (thousandths of a bit), computed once."""
        key = hash(name)
        known = self._names.get(key)
        if known is not None:
            self._names.move_to_end(key)
            return known
        self._new_names += 1
        if len(self._names) >= self._max:
            self._names.popitem(last=False)
        entropy = self._names[key] = round(1000 * compute_entropy(name.replace(b".", b"")))
        return entropy


def compute_entropy(characters: bytes) -> float:
    """Return the Shannon entropy of some characters in bits per character; 0 for none.

    >>> compute_entropy(b"aabb"), compute_entropy(b"aaaa")
    (1.0, 0.0)
    """
    total = len(characters)
    return -sum(n / total * log2(n / total) for n in Counter(characters).values()) + 0.0 if total else 0.0
