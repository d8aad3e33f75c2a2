"""Units of imported numbers: every unit is stated by the map, and none is guessed."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from phasewatch.errors import DataError, suggest_names

__all__ = ["UnitFacts", "compute_factor", "parse_quantity"]

_UNITS: dict[str, tuple[str, Fraction]] = {
    "B": ("bytes", Fraction(1)),
    "KiB": ("bytes", Fraction(2**10)),
    "MiB": ("bytes", Fraction(2**20)),
    "GiB": ("bytes", Fraction(2**30)),
    "kB": ("bytes", Fraction(10**3)),
    "MB": ("bytes", Fraction(10**6)),
    "GB": ("bytes", Fraction(10**9)),
    "ns": ("time", Fraction(1)),
    "us": ("time", Fraction(10**3)),
    "ms": ("time", Fraction(10**6)),
    "s": ("time", Fraction(10**9)),
    "min": ("time", Fraction(60 * 10**9)),
    "1": ("count", Fraction(1)),
    "%": ("count", Fraction(1, 100)),
    "1/1000": ("count", Fraction(1, 1000)),
    "bit": ("information", Fraction(1)),
    "mbit": ("information", Fraction(1, 1000)),
}
# Shares of a core are times per second.
_RATE_UNITS: dict[str, tuple[str, Fraction]] = {
    "cores": ("time", Fraction(10**9)),
    "% of a core": ("time", Fraction(10**7)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFacts:
    """Sizes that units of the source's machine depend on; 0 where the map does not state them."""

    ticks_per_second: int = 0
    page_bytes: int = 0
    sector_bytes: int = 0

    def find(self, name: str) -> tuple[str, Fraction] | None:
        """Return dimension and size of a unit that depends on the machine; None if it is no such unit.

        Raises:
            DataError: If the map does not state the size.
        """
        table = {
            "ticks": ("time", Fraction(10**9, max(self.ticks_per_second, 1)), "ticks_per_second"),
            "pages": ("bytes", Fraction(self.page_bytes), "page_bytes"),
            "sectors": ("bytes", Fraction(self.sector_bytes), "sector_bytes"),
        }
        if name not in table:
            return None
        dimension, size, key = table[name]
        if not getattr(self, key):
            raise DataError(f"unit {name!r} needs `{key}` in the map")
        return dimension, size


def compute_factor(unit: str, target: str, *, facts: UnitFacts, is_rate: bool = False) -> Fraction:
    """Return the factor from a stated unit to the unit of a raw field.

    Args:
        unit: The unit in the map; ``KiB/s`` or ``cores`` for a rate.
        target: The unit of the raw field, or of the counter that the rate adds to.
        facts: Sizes of ticks, pages and sectors.
        is_rate: Whether the number is an amount per second of the target's unit.

    Raises:
        DataError: If the unit is empty or unknown, or measures something else than the target.
    """
    if not unit:
        raise DataError('the unit is missing; state it, for example unit = "B"; units are never guessed')
    if is_rate:
        if unit in _RATE_UNITS:
            dimension, size = _RATE_UNITS[unit]
        elif unit.endswith("/s"):
            dimension, size = _find_unit(unit.removesuffix("/s"), facts)
        else:
            raise DataError(f"unit {unit!r} of a rate; expected a unit per second such as B/s, 1/s or cores")
    elif unit == target:
        return Fraction(1)
    else:
        per_s = unit.endswith("/s") and unit not in _UNITS
        dimension, size = _find_unit(unit.removesuffix("/s") if per_s else unit, facts)
        dimension += "/s" if per_s else ""
    target_dimension, target_size = _find_target(target)
    if dimension != target_dimension:
        raise DataError(f"unit {unit!r} measures {dimension}; the field is in {target!r} ({target_dimension})")
    return size / target_size


def _find_unit(name: str, facts: UnitFacts) -> tuple[str, Fraction]:
    found = _UNITS.get(name) or facts.find(name)
    if found is None:
        known = [*_UNITS, *_RATE_UNITS, "ticks", "pages", "sectors"]
        raise DataError(f"unknown unit {name!r}; {suggest_names(name, known)}")
    return found


def _find_target(target: str) -> tuple[str, Fraction]:
    """Return dimension and size of a raw field's unit; a user's own field may have any."""
    base = target.removesuffix("/s")
    if base in _UNITS:
        dimension, size = _UNITS[base]
        return (dimension if base == target else f"{dimension}/s"), size
    return f"in {target!r}", Fraction(1)


def parse_quantity(text: str, dimension: str, *, where: str) -> int:
    """Parse a text such as ``1.5 ms`` or ``1 MiB`` into whole ns or bytes.

    Args:
        text: A number, a space and a unit.
        dimension: ``time`` or ``bytes``.
        where: Key of the map, for messages.

    Raises:
        DataError: If it is no such text.
    """
    number, _, unit = text.strip().partition(" ")
    found = _UNITS.get(unit.strip())
    try:
        value = Fraction(number) if len(number) <= 20 and "e" not in number.lower() else None
    except (ValueError, ZeroDivisionError):
        value = None
    if value is None or value < 0 or found is None or found[0] != dimension:
        example = "1 ms" if dimension == "time" else "1 MiB"
        raise DataError(f"{where} = {text[:40]!r}; expected a number and a unit, such as {example!r}")
    return int(value * found[1])
