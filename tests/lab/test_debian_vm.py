"""The Debian guest in a VM: it boots, and plays a benign kind and an infection routine with real programs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.factories.vms import shape_of
from tests.requirements import need_debian_image

from phasewatch.lab.campaign import QemuFactory, RecordingOptions, default_cache
from phasewatch.telemetry.base import HostClock


@pytest.mark.vm
def test_debian_guest_boots_and_plays_real_programs(tmp_path: Path) -> None:
    need_debian_image()

    async def play() -> tuple[str, int]:
        options = RecordingOptions(cache=default_cache(), accel="tcg")
        factory = QemuFactory(options=options, scratch=tmp_path, clock=HostClock())
        machine = factory(shape_of(host_id="debian", machine="q35", mem_mib=512, image="debian"), 0, ())
        try:
            facts = await machine.boot()
            await machine.send("load", "sqlite-app", "7", "duty=0.5")
            knobs = ("routine=download-run", "seconds=8", "infect_mb=0.4")
            work = await machine.send("phase", "infecting", "ransom-walk", "openssl-tree", "7", *knobs)
            infected = await machine.wait_finished(work.id, timeout_s=240)
            await machine.send("phase", "active", "ransom-walk", "openssl-tree", "7", "rate_kbps=1000")
            await machine.send("unload")
            await machine.send("hello")
            return facts.guest_kernel, infected
        finally:
            await machine.stop()

    kernel, infected = asyncio.run(play())

    assert "cloud" in kernel
    assert infected == 0
