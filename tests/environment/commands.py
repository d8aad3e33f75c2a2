"""The real command line in a process of its own, in an environment that holds nothing but what is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "phasewatch"
CORPUS = ROOT / "corpus" / "lab-v1"
EDGE = ROOT / "corpus" / "lab-v1.edge.zip"
PROGRAM = (sys.executable, "-m", "phasewatch")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def call(
    arguments: Sequence[str | Path | bytes], *, env: dict[str, str] | None = None, before: Sequence[str] = (),
    cwd: Path | None = None, timeout_s: float = 120, **streams: object,
) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
    """Run a command with only `PATH` set, and return what it wrote."""
    words = [*before, *PROGRAM, *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    given = {"PATH": PATH, "PYTHONDONTWRITEBYTECODE": "1"} | (env or {})
    channels = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(words, env=given, cwd=cwd, timeout=timeout_s, check=False, **channels)  # type: ignore[call-overload,no-any-return]


def one_bundle() -> Path:
    """Return the path of a bundled recording."""
    return next(path for path in sorted(CORPUS.glob("*/*.tar.zst")))
