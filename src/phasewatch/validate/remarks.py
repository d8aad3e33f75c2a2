"""What a check has to say, before the table of codes says how severe it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from phasewatch.vocab import Source


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing that a check has to say of an episode.

    Attributes:
        code: A key of `gates.GATES`, without a source.
        words: What was found, and what was expected.
        source: Whose rows it is about; None if it is about no single source.
        place: The member; by default that of the source.
    """

    code: str
    words: str
    source: Source | None = field(default=None, kw_only=True)
    place: str = field(default="", kw_only=True)
