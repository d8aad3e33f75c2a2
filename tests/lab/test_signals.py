"""SIGINT and SIGTERM end a recorder in order, also as a background job of a plain shell."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

CHILD = """
import asyncio, contextlib, signal, sys, time
from phasewatch.lab.campaign import exit_on_signals, run_until_terminated

async def record():
    try:
        print("recording", flush=True)
        await asyncio.sleep(60)
    finally:
        print("machines stopped", flush=True)

@contextlib.contextmanager
def folder():
    try:
        yield
    finally:
        print("folder removed", flush=True)

with exit_on_signals(), folder():
    if sys.argv[1] == "prepares":
        print("preparing", flush=True)
        time.sleep(60)
    asyncio.run(run_until_terminated(record()))
"""


def ignore_sigint() -> None:
    """Ignore SIGINT, as a shell without job control does for `command &`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("before", [None, ignore_sigint], ids=["in the foreground", "in the background"])
@pytest.mark.parametrize("does", ["prepares", "records"])
def test_signal_stops_the_machines_and_removes_the_folder(
    does: str, before: Callable[[], None] | None, number: signal.Signals
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, does],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )
    assert child.stdout is not None
    first = child.stdout.readline().strip()
    child.send_signal(number)
    rest, error = child.communicate(timeout=60)

    assert first == ("preparing" if does == "prepares" else "recording")
    assert rest.split("\n")[:-1] == [*(["machines stopped"] if does == "records" else []), "folder removed"]
    assert child.returncode in ((-signal.SIGINT, 1) if number == signal.SIGINT else (128 + signal.SIGTERM,)), error
