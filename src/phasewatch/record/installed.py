"""What this machine is: which QEMU is installed and whether it is new enough, and which processor runs it."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

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


def parse_processor(cpuinfo: str, tsc_khz: int | None) -> str:
    """Name a processor from the text of ``/proc/cpuinfo``, family and model in numbers, since clouds hide the rest.

    Args:
        tsc_khz: Rate of its time stamp counter; None where it has none.

    Returns:
        At most 80 printable ASCII characters; empty if the text names no processor.

    >>> parse_processor("cpu family\\t: 23\\nmodel\\t\\t: 1\\nmodel name\\t: AMD EPYC\\n", 1_996_250)
    'AMD EPYC (family 23, model 1) at 1996 MHz'
    """
    said = dict(re.findall(r"^(cpu family|model|model name)\s*: (.+)$", cpuinfo, re.MULTILINE))
    if "model name" not in said:
        return ""
    which = f" (family {said['cpu family']}, model {said['model']})" if {"cpu family", "model"} <= said.keys() else ""
    rate = f" at {tsc_khz // 1000} MHz" if tsc_khz else ""
    return re.sub(r"[^ -~]", "?", f"{said['model name'][:40]}{which}{rate}")[:80]


def processor(tsc_khz: int | None) -> str:
    """Name this machine's processor, or at least its architecture."""
    return (
        parse_processor(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), tsc_khz)
        or platform.machine()
    )
