"""Resolve bundles with the same telemetry: which one is kept, and when none is.

The same rows with the same host and labels are copies, of which one is kept. With another host or other labels, at most
one bundle is true: the one that was accepted earlier is kept, and without such evidence all are rejected. The order of
names or paths does not count.
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

__all__ = [
    "CONTESTED_CODE",
    "DUPLICATE_CODE",
    "DuplicateResolver",
    "EpisodeKey",
    "PriorVerdict",
    "PriorVerdictLoaders",
    "TelemetryHolder",
    "parse_prior_verdict",
]

DUPLICATE_CODE, CONTESTED_CODE = "duplicate", "contested"

EpisodeKey = tuple[str, str]  # host_id, episode_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorVerdict:
    """The verdict on a bundle by an earlier validation or by the receiver.

    Attributes:
        sha256: Digest of that bundle.
        reasons: Codes of its findings.
    """

    status: BundleStatus
    sha256: str
    reasons: frozenset[str]

    @property
    def was_duplicate(self) -> bool:
        """Whether it was rejected as a duplicate or as contested."""
        return not self.reasons.isdisjoint({DUPLICATE_CODE, CONTESTED_CODE})


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorVerdictLoaders:
    """Loaders of earlier verdicts; they are called only if there are copies.

    Attributes:
        load_last_sweep: Loads the verdicts of the last validation.
        load_on_arrival: Loads the receiver's verdict on one bundle; None without one.
    """

    load_last_sweep: Callable[[], Mapping[EpisodeKey, PriorVerdict]]
    load_on_arrival: Callable[[EpisodeKey], PriorVerdict | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryHolder:
    """A usable bundle with some telemetry.

    Attributes:
        place: Place of its verdict in the order of the store.
        identity: Digest of host, labels and kind; see `_compute_identity`.
    """

    place: int
    verdict: BundleVerdict
    identity: bytes

    @property
    def key(self) -> EpisodeKey:
        """The ids of host and episode."""
        return self.verdict.host_id, self.verdict.episode_id


def _compute_identity(row: BinIndexRow, bins: NDArray[np.float32]) -> bytes:
    """Return a digest of an episode's host, profile, kind, role, labels and bins.

    Args:
        row: The index row; the labels count relative to the first one.
        bins: ``(n, 73)`` float32; they show where the readings lie relative to the labels.
    """
    spans = [(str(phase), start - row.t0_ns, end - row.t0_ns) for phase, start, end in row.spans]
    who = (row.host_id, row.profile, row.sample_name, str(row.sample_kind), str(row.origin), str(row.role), spans)
    digest = hashlib.blake2b(repr(who).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(bins).data)
    return digest.digest()


def parse_prior_verdict(text: bytes) -> PriorVerdict | None:
    """Parse the status file that the receiver writes beside a bundle; None if it is malformed."""
    try:
        content = json.loads(text)
        return PriorVerdict(
            status=BundleStatus(content["status"]),
            sha256=str(content["sha256"]),
            reasons=frozenset(map(str, content["reasons"])),
        )
    except (ValueError, KeyError, TypeError):
        return None


class DuplicateResolver:
    """Groups the usable bundles of a store by their telemetry and resolves the groups."""

    def __init__(self, loaders: PriorVerdictLoaders) -> None:
        self._loaders = loaders
        self._swept: Mapping[EpisodeKey, PriorVerdict] | None = None
        self._holders: dict[str, list[TelemetryHolder]] = defaultdict(list)

    def add(self, place: int, verdict: BundleVerdict, row: BinIndexRow, bins: NDArray[np.float32]) -> bool:
        """Add one usable bundle, in the order of the store.

        Args:
            place: Place of its verdict.
            verdict: The verdict.
            row: Index row of its bins.
            bins: ``(n, 73)`` float32.

        Returns:
            Whether its bins may be needed: not if it repeats an earlier bundle and was not accepted before.
        """
        holder = TelemetryHolder(place=place, verdict=verdict, identity=_compute_identity(row, bins))
        held = self._holders[verdict.telemetry_sha256]
        repeats = any(other.identity == holder.identity for other in held)
        held.append(holder)
        return not repeats or self._was_usable(holder)

    def resolve(self) -> dict[int, BundleVerdict]:
        """Return the verdicts that replace those of rejected copies, by place."""
        replaced: dict[int, BundleVerdict] = {}
        for held in self._holders.values():
            if len(held) > 1:
                replaced |= _resolve_group(held, self._find_earlier_holder(held))
        return replaced

    def _find_earlier_holder(self, held: Sequence[TelemetryHolder]) -> TelemetryHolder | None:
        """Return the bundle that the last validation, or else the receiver, accepted first; None if unknown."""
        earlier = [h for h in held if self._was_usable(h) and not self._was_first_by_path(h, held)]
        if earlier:
            return earlier[0] if len({h.identity for h in earlier}) == 1 else None
        on_arrival = {h.place: self._load_on_arrival(h) for h in held}
        for holder in held:
            others = [on_arrival[h.place] for h in held if h.identity != holder.identity]
            own = on_arrival[holder.place]
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
        """Whether it was accepted before another bundle only because of its path, as older versions did."""
        others = [self._load_last_sweep().get(h.key) for h in held if h.identity != holder.identity]
        return any(
            other is not None and DUPLICATE_CODE in other.reasons and CONTESTED_CODE not in other.reasons
            for other in others
        )

    def _load_last_sweep(self) -> Mapping[EpisodeKey, PriorVerdict]:
        if self._swept is None:
            self._swept = self._loaders.load_last_sweep()
        return self._swept

    def _load_on_arrival(self, holder: TelemetryHolder) -> PriorVerdict | None:
        verdict = self._loaders.load_on_arrival(holder.key)
        return verdict if verdict is not None and verdict.sha256 == holder.verdict.sha256 else None


def _resolve_group(held: Sequence[TelemetryHolder], winner: TelemetryHolder | None) -> dict[int, BundleVerdict]:
    """Resolve bundles with the same telemetry.

    Args:
        held: At least two bundles, in the order of the store.
        winner: The one that was accepted before, if any.

    Returns:
        The verdicts that replace those of rejected bundles, by place.
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
            else "; neither was accepted before, so both are rejected: remove the false one and validate again"
        )
        codes = (CONTESTED_CODE, DUPLICATE_CODE)
    detail = f"{v.path}: {words}"
    return replace(v, status=BundleStatus.REJECTED, reasons=(*codes, *kept), detail=detail, duplicate_of=name)
