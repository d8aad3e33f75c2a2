"""The user's own folders, as the XDG specification has them; a user without a home folder is told what to set."""

from __future__ import annotations

import os
from pathlib import Path

from phasewatch.errors import MachineError


def user_folder(variable: str, below_home: str, *, otherwise: str) -> Path:
    """Return phasewatch's folder for one kind of file; nothing is made.

    Args:
        variable: Such as ``XDG_STATE_HOME``. A value that is no absolute path is ignored, as the specification asks.
        below_home: Where the folder lies if the variable is not set, such as ``.local/state``.
        otherwise: What a user without a home folder can do, for the error.

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
    """Return the folder of what can be made again: guest images, and whether a kernel boots on KVM.

    Raises:
        MachineError: If the user has no home folder.
    """
    return user_folder("XDG_CACHE_HOME", ".cache", otherwise="set HOME")
