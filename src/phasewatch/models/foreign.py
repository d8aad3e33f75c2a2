"""Errors of other libraries become ours at the border, in this one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from phasewatch.errors import PhasewatchError, RunError


@contextmanager
def foreign_errors(place: str, action: str) -> Iterator[None]:
    """Raise RunError in place of whatever another library raises on bytes that a stranger may have made.

    Libraries of native code share no base class of errors, and their messages may quote the bytes. Put only the call of
    the library inside, so that no error of our own code is hidden.

    Args:
        place: File, and member where there is one.
        action: What was tried, for the message: ``"XGBoost refuses it"``.

    Raises:
        RunError: For every exception but our own.
    """
    try:
        yield
    except PhasewatchError:
        raise
    except Exception as exc:
        words = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise RunError(
            f"{place}: {action}: {words}; take models from those you trust, or train this one again"
        ) from exc
