"""The page of the receiver's answers shows what it answers: real curl, real receiver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.requirements import need_program

SCRIPT = Path(__file__).parents[2] / "tools" / "transcribe.py"


def test_the_answers_that_the_reference_shows_are_those_that_curl_gets() -> None:
    need_program("curl", "curl")
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
