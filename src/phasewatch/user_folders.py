"""The user's folders by the XDG base directory specification."""

from __future__ import annotations

import os
from pathlib import Path

from phasewatch.errors import MachineError

__all__ = ["cache_folder", "user_folder"]


def user_folder(variable: str, below_home: str, *, otherwise: str) -> Path:
    """Return phasewatch's folder for one kind of file; it is not created.

    Args:
        variable: Such as ``XDG_STATE_HOME``. A value that is not an absolute path is ignored, as specified.
        below_home: Path below the home folder if the variable is not set, such as ``.local/state``.
        otherwise: What a user without a home folder can do instead, for the error.

    Raises:
        MachineError: If the variable is not set and the user has no home folder.
    """
    chosen = os.environ.get(variable, "")
    if os.path.isabs(chosen):  # noqa: PTH117  text, not a path
        return Path(chosen) / "phasewatch"
    home = os.path.expanduser("~")  # noqa: PTH111  it leaves the tilde where there is no home, and raises nothing
    if not os.path.isabs(home):  # noqa: PTH117
        raise MachineError(
            f"this user has no home folder (HOME is not set); set {variable} to a folder, or {otherwise}"
        )
    return Path(home) / below_home / "phasewatch"


def cache_folder() -> Path:
    """Return the cache folder: guest images, and which kernels boot on KVM.

    Raises:
        MachineError: If the user has no home folder.
    """
    return user_folder("XDG_CACHE_HOME", ".cache", otherwise="set HOME")
