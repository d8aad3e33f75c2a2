"""Parse numbers of untrusted rows exactly, and convert them to raw fields."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from phasewatch.bundle import limits
from phasewatch.importing.problems import ImportCode, ImportRefusal

__all__ = ["Number", "convert_number", "parse_number"]

Number = int | Fraction

_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,60})?|\.[0-9]{1,60})(?:[eE][+-]?[0-9]{1,3})?")
_NON_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_MAX_EXPONENT = 60  # far outside any 64-bit number; larger ones would cost memory as exact fractions


def parse_number(value: Any, column: str) -> Number:
    """Return a cell or JSON value as an exact number.

    Args:
        value: Text of a CSV cell, or an int or Decimal of a JSON line.
        column: Name of the column, for messages.

    Raises:
        ImportRefusal: If it is no finite number, or has too many digits.
    """
    if type(value) is int:
        return _check_size(value, column)
    if isinstance(value, str):
        text = value.strip()
        if _WHOLE.fullmatch(text):
            return int(text)
        if _NON_FINITE.fullmatch(text):
            raise ImportRefusal(ImportCode.NON_FINITE, f"{column} is {text}; expected a finite number")
        if not _DECIMAL.fullmatch(text):
            raise ImportRefusal(ImportCode.VALUE_TYPE, f"{column} is {text[:40]!r}; expected a number")
        try:
            value = Decimal(text)
        except InvalidOperation:
            raise ImportRefusal(ImportCode.VALUE_TYPE, f"{column} is {text[:40]!r}; expected a number") from None
    if not isinstance(value, Decimal):
        kind = "true or false" if isinstance(value, bool) else f"a {type(value).__name__}"
        raise ImportRefusal(ImportCode.VALUE_TYPE, f"{column} is {kind}; expected a number")
    if not value.is_finite():
        raise ImportRefusal(ImportCode.NON_FINITE, f"{column} is {value}; expected a finite number")
    if value and (abs(value.adjusted()) > _MAX_EXPONENT or len(value.as_tuple().digits) > 2 * _MAX_EXPONENT):
        raise ImportRefusal(ImportCode.NUMBER_RANGE, f"{column} has an exponent or digits beyond any field")
    exact = Fraction(value)
    return exact.numerator if exact.denominator == 1 else exact


def _check_size(value: int, column: str) -> int:
    if not -(2**200) < value < 2**200:
        raise ImportRefusal(ImportCode.NUMBER_RANGE, f"{column} has more digits than any field")
    return value


def convert_number(value: Number, *, is_float: bool, column: str) -> int | float:
    """Return an exact number as a value of a raw field; fractions of a whole-number field are cut off downwards.

    Raises:
        ImportRefusal: If it does not fit.
    """
    if is_float:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ImportRefusal(ImportCode.NUMBER_RANGE, f"{column} does not fit into a 64-bit float")
        return number + 0.0
    whole = value if type(value) is int else math.floor(value)
    if not limits.INT64_MIN <= whole <= limits.INT64_MAX:
        raise ImportRefusal(ImportCode.NUMBER_RANGE, f"{column} does not fit into 64 bits")
    return whole
