"""Convert exceptions of other libraries, raised on untrusted bytes, to RunError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from phasewatch.errors import PhasewatchError, RunError

__all__ = ["foreign_errors"]


@contextmanager
def foreign_errors(place: str, action: str) -> Iterator[None]:
    """Raise RunError instead of any exception that another library raises on untrusted bytes.

    Libraries of native code share no base class of exceptions, and their messages may quote the bytes. The block must
    hold the library's call alone, so that errors of this package are not hidden.

    Args:
        place: File, and member of it.
        action: What failed, for the message: ``"torch refuses it"``.

    Raises:
        RunError: For every exception that is not a PhasewatchError.
    """
    try:
        yield
    except PhasewatchError:
        raise
    except Exception as exc:
        detail = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise RunError(
            f"{place}: {action}: {detail}; use models from a source that you trust, or train this one again"
        ) from exc
