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

from phasewatch.binning.storage import BinIndexRow
from phasewatch.types import BundleStatus
from phasewatch.validate.verdict import USABLE_STATUSES, BundleVerdict

DUPLICATE_CODE, CONTESTED_CODE = "duplicate", "contested"

EpisodeKey = tuple[str, str]  # host_id, episode_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorVerdict:
    """What an earlier sweep, or the receiver on its arrival, said of a bundle.

    Attributes:
        sha256: Of the bundle that it was said of.
    """

    status: BundleStatus
    sha256: str
    reasons: frozenset[str]

    @property
    def was_duplicate(self) -> bool:
        """Whether it was refused because of its telemetry."""
        return not self.reasons.isdisjoint({DUPLICATE_CODE, CONTESTED_CODE})


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorVerdictLoaders:
    """Where to look for what was accepted before; both are asked only if there are copies.

    Attributes:
        load_last_sweep: Loads the last sweep's verdicts.
        load_on_arrival: Loads what the receiver said of one bundle on its arrival; None if nothing.
    """

    load_last_sweep: Callable[[], Mapping[EpisodeKey, PriorVerdict]]
    load_on_arrival: Callable[[EpisodeKey], PriorVerdict | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryHolder:
    """A usable bundle that holds some telemetry.

    Attributes:
        place: Of its verdict in the sweep's order.
        identity: Equal for bundles of the same host, labels and kind; see `_compute_identity`.
    """

    place: int
    verdict: BundleVerdict
    identity: bytes

    @property
    def key(self) -> EpisodeKey:
        """Host and episode."""
        return self.verdict.host_id, self.verdict.episode_id


def _compute_identity(row: BinIndexRow, bins: NDArray[np.float32]) -> bytes:
    """Return a digest of whose recording it is and what its labels say of which readings.

    The labels count from the first one on; where the readings lie against it is seen in the bins, ``(n, 46)``.
    """
    spans = [(str(phase), start - row.t0_ns, end - row.t0_ns) for phase, start, end in row.spans]
    who = (row.host_id, row.profile, row.sample_name, str(row.sample_kind), str(row.origin), str(row.role), spans)
    digest = hashlib.blake2b(repr(who).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(bins).data)
    return digest.digest()


def parse_prior_verdict(text: bytes) -> PriorVerdict | None:
    """Parse the file that the receiver puts beside a bundle; None if it is none."""
    try:
        said = json.loads(text)
        return PriorVerdict(
            status=BundleStatus(said["status"]),
            sha256=str(said["sha256"]),
            reasons=frozenset(map(str, said["reasons"])),
        )
    except (ValueError, KeyError, TypeError):
        return None


class DuplicateResolver:
    """Collects the usable bundles of a sweep by their telemetry, and rules on those that hold the same."""

    def __init__(self, evidence: PriorVerdictLoaders) -> None:
        self._evidence = evidence
        self._swept: Mapping[EpisodeKey, PriorVerdict] | None = None
        self._holders: dict[str, list[TelemetryHolder]] = defaultdict(list)

    def add(self, place: int, verdict: BundleVerdict, row: BinIndexRow, bins: NDArray[np.float32]) -> bool:
        """Add one usable bundle, in the sweep's order; return whether its bins may be needed.

        They are not if it repeats a bundle that is there already and was not accepted before.
        """
        holder = TelemetryHolder(place=place, verdict=verdict, identity=_compute_identity(row, bins))
        held = self._holders[verdict.telemetry_sha256]
        repeats = any(other.identity == holder.identity for other in held)
        held.append(holder)
        return not repeats or self._was_usable(holder)

    def resolve(self) -> dict[int, BundleVerdict]:
        """Rule on all of them: place → the verdict that replaces its own. Those that stay are not in it."""
        ruled: dict[int, BundleVerdict] = {}
        for held in self._holders.values():
            if len(held) > 1:
                ruled |= _resolve_group(held, self._find_earlier_holder(held))
        return ruled

    def _find_earlier_holder(self, held: Sequence[TelemetryHolder]) -> TelemetryHolder | None:
        """Find the one whose claim is older: the last sweep's word counts first, then the receiver's."""
        earlier = [h for h in held if self._was_usable(h) and not self._was_first_by_path(h, held)]
        if earlier:
            return earlier[0] if len({h.identity for h in earlier}) == 1 else None
        said = {h.place: self._load_on_arrival(h) for h in held}
        for holder in held:
            others = [said[h.place] for h in held if h.identity != holder.identity]
            own = said[holder.place]
            if (
                own
                and own.status in USABLE_STATUSES
                and others
                and all(other and other.was_duplicate for other in others)
            ):
                return next(h for h in held if h.identity == holder.identity)
        return None

    def _was_usable(self, holder: TelemetryHolder) -> bool:
        before = self._load_last_sweep().get(holder.key)
        return before is not None and before.status in USABLE_STATUSES and before.sha256 == holder.verdict.sha256

    def _was_first_by_path(self, holder: TelemetryHolder, held: Sequence[TelemetryHolder]) -> bool:
        """Whether it was accepted over another's claim only because its path came first, as older versions did."""
        others = [self._load_last_sweep().get(h.key) for h in held if h.identity != holder.identity]
        return any(
            other is not None and DUPLICATE_CODE in other.reasons and CONTESTED_CODE not in other.reasons
            for other in others
        )

    def _load_last_sweep(self) -> Mapping[EpisodeKey, PriorVerdict]:
        if self._swept is None:
            self._swept = self._evidence.load_last_sweep()
        return self._swept

    def _load_on_arrival(self, holder: TelemetryHolder) -> PriorVerdict | None:
        said = self._evidence.load_on_arrival(holder.key)
        return said if said is not None and said.sha256 == holder.verdict.sha256 else None


def _resolve_group(held: Sequence[TelemetryHolder], winner: TelemetryHolder | None) -> dict[int, BundleVerdict]:
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
        return {h.place: _build_rejection(h, winner, is_before=True) for h in held if h is not winner}
    return {
        h.place: _build_rejection(h, next(other for other in held if other.identity != h.identity), is_before=False)
        for h in held
    }


def _build_rejection(holder: TelemetryHolder, other: TelemetryHolder, *, is_before: bool) -> BundleVerdict:
    v, name = holder.verdict, "/".join(other.key)
    kept = [code for code in v.reasons if code not in (DUPLICATE_CODE, CONTESTED_CODE)]
    if holder.identity == other.identity:
        words = f"the same telemetry as {name}"
        codes: tuple[str, ...] = (DUPLICATE_CODE,)
    else:
        what = "another host" if holder.key[0] != other.key[0] else "other labels"
        words = f"the same telemetry as {name}, under {what}"
        words += (
            "; that one was accepted before"
            if is_before
            else "; neither was accepted before, so both are set aside: remove the false one, and sweep again"
        )
        codes = (CONTESTED_CODE, DUPLICATE_CODE)
    detail = f"{v.path}: {words}"
    return replace(v, status=BundleStatus.REJECTED, reasons=(*codes, *kept), detail=detail, duplicate_of=name)
