"""What the agent in the guest costs: pairs of idle machines side by side, one with it and one without (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.errors import DataError
from phasewatch.record.deal import BENIGN
from phasewatch.record.plan import IDLE, Session, Slot, slot_seed
from phasewatch.vocab import Phase, Role, SampleKind, Source

NAME = "footprint"
# The agent sends nothing over the network, and each machine's everyday traffic is drawn anew: that would be compared.
LEFT_OUT = (Source.GUEST, Source.NETFLOW)
SETTLE_S, LENGTH_S, CHATTER_S = 50.0, 90.0, 12.0


class ChannelCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host-side channel: its means over the bins, and the difference of each pair."""

    channel: str
    unit: str
    off: float
    on: float
    pairs: tuple[float, ...]


class Footprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of paired idle runs on one host."""

    host_id: str
    accel: str
    guest_image: str
    seconds: float
    pairs: int
    costs: tuple[ChannelCost, ...]


def footprint_file(corpus: Path) -> Path:
    """Give the place of a corpus's measured footprint: beside it."""
    return corpus.with_name(corpus.name + ".footprint.json")


def footprint_sessions(host_id: str, pairs: int) -> tuple[Session, ...]:
    """Lay out pairs of benign idle machines; who of the two has the agent changes from pair to pair, and so its core."""
    sessions = []
    for number in range(pairs):
        slots = tuple(_slot(host_id, 2 * number + place, agent=(number + place) % 2 == 1) for place in (0, 1))
        sessions.append(Session(session=f"{NAME}-{number:04d}", host_id=host_id, slots=slots))
    return tuple(sessions)


def _slot(host_id: str, index: int, *, agent: bool) -> Slot:
    return Slot(
        index=index, host_id=host_id, role=Role.LAB, profile=BENIGN, sample_name=IDLE, sample_kind=SampleKind.BENIGN,
        plan_seed=slot_seed(NAME, 1, host_id, index), agent=agent, settle_s=SETTLE_S, duration_s=LENGTH_S,
        phases=((Phase.CLEAN, LENGTH_S),), knobs=(), background="", background_knobs=(), chatter_s=CHATTER_S,
    )  # fmt: skip


def compare(pairs: Mapping[str, Mapping[bool, NDArray[np.float32]]]) -> tuple[ChannelCost, ...]:
    """Compare the bins of each session's two machines, channel by channel.

    Args:
        pairs: Session → agent on → ``(n_bins, 46)``.

    Raises:
        DataError: If there is no session with one machine of each.
    """
    whole = [pair for _, pair in sorted(pairs.items()) if set(pair) == {False, True}]
    if not whole:
        raise DataError("no session has one machine with the agent and one without; record the footprint again")
    costs = []
    for i, channel in enumerate(CHANNELS):
        if channel.source in LEFT_OUT:
            continue
        off, on = ([_mean(pair[agent][:, i]) for pair in whole] for agent in (False, True))
        if all(np.isfinite([*off, *on])):
            gaps = tuple(b - a for a, b in zip(off, on, strict=True))
            costs.append(
                ChannelCost(channel=channel.full_name, unit=channel.unit, off=fmean(off), on=fmean(on), pairs=gaps)
            )
    return tuple(costs)


def _mean(column: NDArray[np.float32]) -> float:
    known = column[np.isfinite(column)]
    return float(known.mean(dtype=np.float64)) if len(known) else float("nan")


def render_footprint(footprint: Footprint) -> tuple[str, list[Sequence[str]]]:
    """Give a sentence and a table's rows; only channels whose pairs all differ to one side are listed."""
    telling = [c for c in footprint.costs if min(c.pairs) > 0 or max(c.pairs) < 0]
    head = (
        f"{footprint.pairs} pairs of idle machines of the host `{footprint.host_id}` ({footprint.accel}), {footprint.seconds:.0f} s each, "
        f"side by side, one with the agent and one without. {len(telling)} of {len(footprint.costs)} channels moved to the same side in every pair."
    )
    rows = [
        (f"`{c.channel}`", c.unit, f"{c.off:.4g}", f"{c.on:.4g}", f"{min(c.pairs):+.2g} to {max(c.pairs):+.2g}")
        for c in telling
    ]
    return head, list(rows)
