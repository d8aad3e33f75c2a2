"""Measure what a watch costs the guest: the guest's own benchmark on a real Linux, alternately unwatched and watched.

The guest does a fixed piece of work: checksums over its memory and synchronous writes to its disk. The time from its
acknowledgement to its end is measured. Each pair has a half without and a half with `phasewatch watch`, in an order
that changes from pair to pair.

    python bench/run.py --only overhead          # at most six minutes; use a machine that does nothing else
    python bench/overhead.py --pairs 2           # a short try that writes nothing
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from timing import Figure, Part

from phasewatch.errors import PhasewatchError
from phasewatch.lab.campaign import default_cache
from phasewatch.lab.guest_driver import GuestDriver
from phasewatch.lab.guest_image import build_guest_image
from phasewatch.lab.qemu_command import HostShape, VmPaths, build_qemu_command
from phasewatch.telemetry.base import HostClock

QEMU = "qemu-system-x86_64"
EDGE = Path(__file__).parents[1] / "corpus" / "lab-v1.edge.zip"
N_PAIRS = 12
MAX_WORK_S = 600.0
WORK = """
i=0
while [ $i -lt 20 ]; do
  i=$((i+1))
  dd if=/dev/zero bs=64k count=32 2>/dev/null | sha256sum > /dev/null
  dd if=/dev/zero of=/data/bench bs=16k count=16 conv=fsync 2>/dev/null
done
rm -f /data/bench
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTimes:
    """Seconds of the guest's work in each pair."""

    unwatched_s: list[float]
    watched_s: list[float]

    def compute_overhead(self) -> tuple[float, float, float]:
        """Return the median overhead in %, and its 95 % interval from a bootstrap over the pairs."""
        slower = 100 * (np.array(self.watched_s) / np.array(self.unwatched_s) - 1)
        rng = np.random.default_rng(0)
        drawn = np.median(rng.choice(slower, (2000, len(slower))), axis=1)
        low, high = np.percentile(drawn, (2.5, 97.5))
        return float(np.median(slower)), float(low), float(high)


class _BenchGuest:
    """A guest of the lab that does the work on command."""

    def __init__(self, folder: Path) -> None:
        image = build_guest_image(default_cache(), "x86_64", scripts={"bench/work/active": WORK})
        if image.kernel is None or image.initrd is None:
            raise SystemExit("the guest image has no kernel")
        paths = VmPaths(folder=folder)
        overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image.base_disk), "-F", "qcow2"]
        subprocess.run([*overlay, str(paths.overlay)], check=True)
        argv = build_qemu_command(
            HostShape(host_id="bench", about="", machine="pc"),
            accel="tcg",
            kernel=image.kernel,
            initrd=image.initrd,
            sockets=paths,
            mac="52:54:00:77:00:0a",
            tsc_khz=None,
        )
        argv[argv.index("-netdev") + 1] = "user,id=n0,restrict=on"  # no packet leaves the machine
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(argv, stdin=quiet, stdout=quiet, stderr=quiet)
        self._ctl = paths.ctl
        self.driver = GuestDriver(clock=HostClock(), name="bench")

    async def wait_ready(self) -> None:
        for _ in range(300):
            try:
                await self.driver.open(self._ctl)
                break
            except OSError:
                await asyncio.sleep(0.1)
        await asyncio.wait_for(self.driver.wait_ready(), 120)

    async def work(self) -> float:
        """Do the work and return its seconds."""
        ack = await self.driver.send("phase", "active", "bench", "work", "1")
        began_s = time.monotonic()
        if await self.driver.wait_finished(ack.id, timeout_s=MAX_WORK_S):
            raise SystemExit("the guest's benchmark failed")
        return time.monotonic() - began_s


async def _work_watched(guest: _BenchGuest, edge: Path) -> float:
    """Watch the guest, do the work as soon as the first bin is there, and end the watch."""
    command = [sys.executable, "-m", "phasewatch", "watch", "--pid", str(guest.process.pid), "--model", str(edge)]
    watcher = await asyncio.create_subprocess_exec(
        *command, "--json", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, limit=1 << 22
    )
    if watcher.stdout is None or not await watcher.stdout.readline():
        raise SystemExit("the watch ended before its first bin")
    drained = asyncio.create_task(watcher.stdout.read())
    try:
        return await guest.work()
    finally:
        watcher.terminate()
        await drained
        await watcher.wait()


async def measure_pairs(folder: Path, edge: Path, n_pairs: int) -> PairedTimes:
    """Boot the guest and measure the pairs."""
    guest = _BenchGuest(folder)
    times = PairedTimes(unwatched_s=[], watched_s=[])
    try:
        await guest.wait_ready()
        await guest.work()  # warms up
        for pair in range(n_pairs):
            for is_watched in (False, True) if pair % 2 == 0 else (True, False):
                if is_watched:
                    times.watched_s.append(await _work_watched(guest, edge))
                else:
                    times.unwatched_s.append(await guest.work())
    finally:
        await guest.driver.close()
        guest.process.kill()
        guest.process.wait()
    return times


def measure(corpus: Path, *, n_pairs: int = N_PAIRS) -> Part:
    """Measure the pairs."""
    title = "What a watch costs the guest"
    if shutil.which(QEMU) is None:
        return Part(title=title, about=f"Not measured: {QEMU} is not installed here.")
    with tempfile.TemporaryDirectory(prefix="pw-") as folder:
        times = asyncio.run(measure_pairs(Path(folder), corpus / "lab-v1.edge.zip", n_pairs))
    median, low, high = times.compute_overhead()
    return Part(
        title=title,
        about=(
            f"A fixed piece of work in a Linux guest under TCG (checksums and synchronous writes, "
            f"{np.median(times.unwatched_s):.1f} s), {n_pairs} pairs without and with `phasewatch watch --json`."
        ),
        figures=(
            Figure(
                what="slow-down of the guest's own benchmark, median",
                must="≤1",
                aim="≤0.5",
                unit="%",
                measured=median,
                note=f"95 % interval {low:.2g} to {high:.2g} % over {n_pairs} pairs",
            ),
        ),
    )


def main() -> None:
    """Measure and print the times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=N_PAIRS)
    given = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="pw-") as folder:
            times = asyncio.run(measure_pairs(Path(folder), EDGE, given.pairs))
    except PhasewatchError as exc:
        raise SystemExit(str(exc)) from exc
    print(
        json.dumps(
            {
                "unwatched_s": [round(s, 3) for s in times.unwatched_s],
                "watched_s": [round(s, 3) for s in times.watched_s],
                "overhead_percent": [round(x, 2) for x in times.compute_overhead()],
            }
        )
    )


if __name__ == "__main__":
    main()
