"""What is recorded at once: one session, or the lone soak episodes of two hosts, each on a core of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from phasewatch.record.hosts import HostShape
from phasewatch.record.plan import Session, Slot
from phasewatch.vocab import Role

OVERHEAD_S = 15.0  # boot, idle check and packing of one round, for the time left

Waiting = tuple[Session, tuple[Slot, ...]]  # a session and those of its slots that are to be recorded still
Round = tuple[Waiting, ...]


def take_round(queue: deque[Waiting], shapes: Mapping[str, HostShape], cores: int) -> Round:
    """Take from the queue what comes next.

    A soak episode is a session of its own (two on one host would have to be of one sample group, and a host needs one
    of each), and lasts ten minutes on one core. The next one of another host plays beside it: both are benign, so
    neither can tell the other's phase, and they stay two sessions.

    Args:
        queue: The sessions in their order, at least one; what is taken leaves it.
        shapes: Host id → shape.
        cores: How many cores there are for vCPU threads.
    """
    first = queue.popleft()
    if not _is_lone_soak(first, shapes):
        return (first,)
    (slot,) = first[1]
    free = cores - shapes[slot.host_id].vcpus
    for place, other in enumerate(queue):
        if (
            _is_lone_soak(other, shapes)
            and other[0].host_id != slot.host_id
            and other[1][0].duration_s == slot.duration_s
            and shapes[other[0].host_id].vcpus <= free
        ):
            del queue[place]
            return first, other
    return (first,)


def rounds(queue: deque[Waiting], shapes: Mapping[str, HostShape], cores: int) -> Iterator[Round]:
    """Empty the queue round by round."""
    while queue:
        yield take_round(queue, shapes, cores)


def round_s(one: Round) -> float:
    """Estimate how long a round takes, in seconds."""
    return max(slot.settle_s + slot.duration_s for _, slots in one for slot in slots) + OVERHEAD_S


def _is_lone_soak(one: Waiting, shapes: Mapping[str, HostShape]) -> bool:
    session, slots = one
    return len(slots) == 1 and slots[0].role is Role.SOAK and not shapes[session.host_id].is_alone
