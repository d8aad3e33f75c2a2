"""Save a picture of a run's dashboard during replay: `python -m tools.picture RUN OUT.png [WIDTH [light|dark]]`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PLAYED_MS = 17_000  # replay time before the picture
MAX_WAIT_S = 120  # for an alarm


def start(run: str, folder: str) -> tuple[subprocess.Popen[str], str]:
    """Start the dashboard of a run; return its process and address."""
    command = [sys.executable, "-m", "phasewatch", "dashboard", run, "--port", "0", "--speed", "5", "--json"]
    process = subprocess.Popen([*command, "--token-file", f"{folder}/token"], stdout=subprocess.PIPE, text=True)
    output = ""
    for line in process.stdout or ():
        output += line
        if line.rstrip() == "}":
            return process, str(json.loads(output)["result"]["start"])
    raise SystemExit(f"{run}: the dashboard did not start")


def photograph(address: str, out: Path, width: int, scheme: str) -> None:
    """Open the page, wait until an alarm with its evidence is shown, and save a picture."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 2100}, color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(address)
        page.wait_for_selector('.scene[data-type="perf"][data-state="live"]', timeout=60_000)
        page.wait_for_timeout(PLAYED_MS)
        for _ in range(MAX_WAIT_S):
            page.keyboard.press("a")  # the machine with the oldest open alarm
            if page.locator("#evidence tr, .machine[data-state=infection][aria-selected=true]").count() >= 3:
                break
            page.wait_for_timeout(1000)
        page.wait_for_timeout(2000)  # the history of the machine is asked and drawn
        awaiting = page.locator('#view-machines .scene[data-type]:not([data-state="live"])').count()
        if awaiting:
            raise SystemExit(f"{awaiting} panels are not live")
        bottom = page.evaluate("document.querySelector('.detail').getBoundingClientRect().bottom + 16")
        page.screenshot(path=out, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": bottom})
        browser.close()


def main(arguments: Sequence[str]) -> int:
    """Save one picture."""
    run, out, *more = arguments
    with tempfile.TemporaryDirectory() as folder:
        process, address = start(run, folder)
        try:
            photograph(address, Path(out), int(more[0]) if more else 1440, more[1] if len(more) > 1 else "light")
        finally:
            process.terminate()
            process.wait(timeout=60)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
