"""What a cell fixed beside its model when it was trained: the phase filter and the alarm, as an edge bundle holds them."""

from __future__ import annotations

from typing import Any

import msgspec

from phasewatch.errors import RunError
from phasewatch.models.alarm import AlarmRule
from phasewatch.models.checkpoint import Header
from phasewatch.models.filter import NONE, PHASE, PhaseFilter


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Phase filter and alarm; None where none was trained."""

    filter: PhaseFilter | None = None
    alarm: AlarmRule | None = None


def rules_of(header: Header) -> Rules:
    """Take them out of a checkpoint's header: the alarm is the one that hears the filter, where there is one."""
    return Rules(filter=header.filter, alarm=header.alarm.get(NONE if header.filter is None else PHASE))


def render_rules(rules: Rules) -> dict[str, Any]:
    """Give them as plain values."""
    plain: dict[str, Any] = msgspec.to_builtins(rules)
    return plain


def parse_rules(plain: dict[str, Any], *, file: str) -> Rules:
    """Read them.

    Raises:
        RunError: If a number in them cannot be.
    """
    try:
        return msgspec.convert(plain, Rules)
    except (msgspec.ValidationError, OverflowError, RecursionError) as exc:
        raise RunError(
            f"{file}: its filter or alarm: {exc}; make it again with `phasewatch export RUN --out X.zip`"
        ) from exc
