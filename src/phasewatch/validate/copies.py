"""Copies of telemetry: which of several bundles with the same rows counts, and when none may.

Labels and host belong to what a recording is. The same rows under the same host and labels are a copy, of which one is
kept. Under another host or other labels they are a claim that somebody else's recording is one's own, or that something
else happened in it: what was accepted before stays, and without such evidence all of them are set aside. A name or a
path that sorts first decides nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from phasewatch.grid.files import GridRow
from phasewatch.validate.verdict import USABLE, Verdict
from phasewatch.vocab import Status

DUPLICATE, CONTESTED = "duplicate", "contested"

Key = tuple[str, str]  # host_id, episode_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorVerdict:
    """What an earlier sweep, or the receiver on its arrival, said of a bundle.

    Attributes:
        sha256: Of the bundle that it was said of.
    """

    status: Status
    sha256: str
    reasons: frozenset[str]

    @property
    def was_copy(self) -> bool:
        """Whether it was refused because of its telemetry."""
        return not self.reasons.isdisjoint({DUPLICATE, CONTESTED})


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalEvidence:
    """Where to look for what was accepted before; both are asked only if there are copies.

    Attributes:
        swept: Loads the last sweep's verdicts.
        admitted: Loads what the receiver said of one bundle on its arrival; None if nothing.
    """

    swept: Callable[[], Mapping[Key, PriorVerdict]]
    admitted: Callable[[Key], PriorVerdict | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A usable bundle that holds some telemetry.

    Attributes:
        place: Of its verdict in the sweep's order.
        identity: Equal for bundles of the same host, labels and kind; see `identity_of`.
    """

    place: int
    verdict: Verdict
    identity: bytes

    @property
    def key(self) -> Key:
        """Host and episode."""
        return self.verdict.host_id, self.verdict.episode_id


def identity_of(row: GridRow, bins: NDArray[np.float32]) -> bytes:
    """Return a digest of whose recording it is and what its labels say of which readings.

    The labels count from the first one on; where the readings lie against it is seen in the bins, ``(n, 46)``.
    """
    spans = [(str(phase), start - row.t0_ns, end - row.t0_ns) for phase, start, end in row.spans]
    who = (row.host_id, row.profile, row.sample_name, str(row.sample_kind), str(row.origin), str(row.role), spans)
    digest = hashlib.blake2b(repr(who).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(bins).data)
    return digest.digest()


def parse_admitted(text: bytes) -> PriorVerdict | None:
    """Parse the file that the receiver puts beside a bundle; None if it is none."""
    try:
        said = json.loads(text)
        return PriorVerdict(
            status=Status(said["status"]), sha256=str(said["sha256"]), reasons=frozenset(map(str, said["reasons"]))
        )
    except (ValueError, KeyError, TypeError):
        return None


class Copies:
    """Collects the usable bundles of a sweep by their telemetry, and rules on those that hold the same."""

    def __init__(self, evidence: ArrivalEvidence) -> None:
        self._evidence = evidence
        self._swept: Mapping[Key, PriorVerdict] | None = None
        self._holders: dict[str, list[Holder]] = defaultdict(list)

    def add(self, place: int, verdict: Verdict, row: GridRow, bins: NDArray[np.float32]) -> bool:
        """Add one usable bundle, in the sweep's order; return whether its bins may be needed.

        They are not if it repeats a bundle that is there already and was not accepted before.
        """
        holder = Holder(place=place, verdict=verdict, identity=identity_of(row, bins))
        held = self._holders[verdict.telemetry_sha256]
        repeats = any(other.identity == holder.identity for other in held)
        held.append(holder)
        return not repeats or self._was_usable(holder)

    def rule(self) -> dict[int, Verdict]:
        """Rule on all of them: place → the verdict that replaces its own. Those that stay are not in it."""
        ruled: dict[int, Verdict] = {}
        for held in self._holders.values():
            if len(held) > 1:
                ruled |= rule_on(held, self._accepted_before(held))
        return ruled

    def _accepted_before(self, held: Sequence[Holder]) -> Holder | None:
        """Find the one whose claim is older: the last sweep's word counts first, then the receiver's."""
        earlier = [h for h in held if self._was_usable(h) and not self._was_first_by_path(h, held)]
        if earlier:
            return earlier[0] if len({h.identity for h in earlier}) == 1 else None
        said = {h.place: self._admitted(h) for h in held}
        for holder in held:
            others = [said[h.place] for h in held if h.identity != holder.identity]
            own = said[holder.place]
            if own and own.status in USABLE and others and all(other and other.was_copy for other in others):
                return next(h for h in held if h.identity == holder.identity)
        return None

    def _was_usable(self, holder: Holder) -> bool:
        before = self._before().get(holder.key)
        return before is not None and before.status in USABLE and before.sha256 == holder.verdict.sha256

    def _was_first_by_path(self, holder: Holder, held: Sequence[Holder]) -> bool:
        """Whether it was accepted over another's claim only because its path came first, as older versions did."""
        others = [self._before().get(h.key) for h in held if h.identity != holder.identity]
        return any(
            other is not None and DUPLICATE in other.reasons and CONTESTED not in other.reasons for other in others
        )

    def _before(self) -> Mapping[Key, PriorVerdict]:
        if self._swept is None:
            self._swept = self._evidence.swept()
        return self._swept

    def _admitted(self, holder: Holder) -> PriorVerdict | None:
        said = self._evidence.admitted(holder.key)
        return said if said is not None and said.sha256 == holder.verdict.sha256 else None


def rule_on(held: Sequence[Holder], winner: Holder | None) -> dict[int, Verdict]:
    """Rule on bundles of the same telemetry, in the sweep's order.

    Args:
        held: At least two.
        winner: The one that was accepted before; None if none was.

    Returns:
        Place → the verdict that replaces its own.
    """
    if winner is None and len({h.identity for h in held}) == 1:
        winner = held[0]
    if winner is not None:
        return {h.place: _refuse(h, winner, is_before=True) for h in held if h is not winner}
    return {
        h.place: _refuse(h, next(other for other in held if other.identity != h.identity), is_before=False)
        for h in held
    }


def _refuse(holder: Holder, other: Holder, *, is_before: bool) -> Verdict:
    v, name = holder.verdict, "/".join(other.key)
    kept = [code for code in v.reasons if code not in (DUPLICATE, CONTESTED)]
    if holder.identity == other.identity:
        words = f"the same telemetry as {name}"
        codes: tuple[str, ...] = (DUPLICATE,)
    else:
        what = "another host" if holder.key[0] != other.key[0] else "other labels"
        words = f"the same telemetry as {name}, under {what}"
        words += (
            "; that one was accepted before"
            if is_before
            else "; neither was accepted before, so both are set aside: remove the false one, and sweep again"
        )
        codes = (CONTESTED, DUPLICATE)
    detail = f"{v.path}: {words}"
    return replace(v, status=Status.REJECTED, reasons=(*codes, *kept), detail=detail, duplicate_of=name)
