"""Which QEMU is installed, and whether it is new enough."""

from __future__ import annotations

import re
import subprocess

from phasewatch.errors import MissingTool

OLDEST_QEMU = (7, 2)  # `-netdev dgram` came with it


def parse_qemu_version(text: str) -> tuple[str, tuple[int, ...]]:
    """Read the version from what ``qemu-system-… --version`` prints: as text, and as numbers; empty if there is none.

    >>> parse_qemu_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)")
    ('7.2.22', (7, 2, 22))
    """
    match = re.search(r"version (\d+(?:\.\d+)+)", text)
    return (match[1], tuple(int(part) for part in match[1].split("."))) if match else ("", ())


def qemu_version(arch: str) -> str:
    """Give the version of the installed QEMU.

    Raises:
        MissingTool: If there is none, or it is too old.
    """
    program = f"qemu-system-{arch}"
    package = "qemu-system-x86" if arch == "x86_64" else "qemu-system-arm"
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        raise MissingTool(f"{program} does not run ({exc}); install it: apt-get install {package}") from exc
    text, numbers = parse_qemu_version(said)
    if numbers < OLDEST_QEMU:
        least = ".".join(map(str, OLDEST_QEMU))
        raise MissingTool(
            f"{program} is of version {text or 'unknown'}; {least} or newer is needed (for its `-netdev dgram`): "
            f"install a newer {package}, for instance from your distribution's backports"
        )
    return text
