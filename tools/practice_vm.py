"""Boot a guest of the lab that a watcher can watch, and emulate an infection in it: `python -m tools.practice_vm`.

For trying out a watch and its alarms from end to end. No malware runs: the guest plays a harmless profile of
`phasewatch record`, on a simulated network that no packet leaves. Each step is printed with its time (UTC), so that it
can be compared with what the watcher says.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from phasewatch.errors import PhasewatchError
from phasewatch.lab.campaign import QemuFactory, RecordingOptions, default_cache, exit_on_signals, run_until_terminated
from phasewatch.lab.guest_driver import CommandAck
from phasewatch.lab.network.world import draw_world
from phasewatch.lab.process import create_scratch_folder, find_scratch_parent
from phasewatch.lab.qemu_command import HostShape
from phasewatch.lab.session import run_episode
from phasewatch.lab.slots import RecordingSlot, build_rng
from phasewatch.lab.vm import MachineFacts, QemuVm, VmSettings, read_tsc_khz
from phasewatch.lab.walks import LoadSpan
from phasewatch.profiles import (
    IDLE_SAMPLES,
    draw_intensities,
    find_profile,
    find_sample,
    find_sample_group,
    list_routines,
)
from phasewatch.telemetry.base import HostClock, TelemetrySource
from phasewatch.types import EpisodeRole, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class PracticePlan:
    """What the guest does.

    Attributes:
        name: Name of the VM.
        image: Guest image, ``debian`` or ``busybox``.
        profile, sample: The profile that is played.
        seed: Decides addresses and intensities.
        clean_s, active_s, after_s: Seconds before the infection, from its start to its end, and afterwards.
    """

    name: str
    image: str
    profile: str
    sample: str
    seed: int
    clean_s: float
    active_s: float
    after_s: float


def build_practice_slot(plan: PracticePlan) -> RecordingSlot:
    """Build the episode: clean, infecting until its routine has ended, active, and clean again."""
    group = find_sample_group(plan.profile, plan.sample)
    phases = (
        (Phase.CLEAN, plan.clean_s),
        (Phase.INFECTING, plan.active_s / 3),
        (Phase.ACTIVE, plan.active_s * 2 / 3),
        (Phase.CLEAN, plan.after_s),
    )
    duration_s = sum(seconds for _, seconds in phases)
    return RecordingSlot(
        index=0,
        host_id=plan.name,
        role=EpisodeRole.LAB,
        profile=plan.profile,
        sample_name=plan.sample,
        sample_kind=find_profile(plan.profile).kind,
        plan_seed=plan.seed,
        agent=False,
        settle_s=0.0,
        duration_s=duration_s,
        phases=phases,
        knobs=tuple(draw_intensities(find_sample(plan.profile, plan.sample), build_rng(plan.seed, "knobs")).items()),
        chatter_s=15.0,
        loads=(LoadSpan(kind=IDLE_SAMPLES[group], start_s=0.0, end_s=duration_s),),
        routine=list_routines(group, image=plan.image)[0].name,
        world=draw_world(build_rng(plan.seed, "world")),
    )


def build_practice_shape(plan: PracticePlan) -> HostShape:
    """Build the VM's hardware."""
    if plan.image == "debian":
        return HostShape(host_id=plan.name, about="", machine="q35", mem_mib=512, image="debian")
    return HostShape(host_id=plan.name, about="", machine="pc")


class _PracticeVm(QemuVm):
    """A VM that nothing is recorded of; it prints what the guest was told."""

    async def boot(self) -> MachineFacts:
        facts = await super().boot()
        _print(f"the guest is up after {facts.boot_s:.0f} s: Linux {facts.guest_kernel}, process {facts.qemu_pid}")
        return facts

    async def send(self, verb: str, *arguments: str) -> CommandAck:
        ack = await super().send(verb, *arguments)
        if verb == "phase":
            _print(" ".join(arguments[:3]))
        return ack

    def sources(self, *, sensors: bool = True) -> tuple[TelemetrySource, ...]:
        return ()


def _print(text: str) -> None:
    print(time.strftime("%H:%M:%SZ", time.gmtime()), text, flush=True)


async def _run(plan: PracticePlan, socket: Path, scratch: Path) -> None:
    shape, clock = build_practice_shape(plan), HostClock()
    options = RecordingOptions(cache=default_cache(), shapes=(shape,))
    image, accel = QemuFactory(options=options, scratch=scratch, clock=clock).prepare(shape)
    _print(f"booting {plan.name}, {plan.image} under {accel}")
    settings = VmSettings(
        shape=shape,
        image=image,
        accel=accel,
        folder=scratch / "vm",
        number=0,
        cores=(),
        tsc_khz=read_tsc_khz(),
        clock=clock,
        watch_socket=socket,
    )
    await run_episode(_PracticeVm(settings), build_practice_slot(plan), clock)


def parse_arguments(words: list[str]) -> PracticePlan:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="practice_vm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="web01", help="name of the VM")
    parser.add_argument("--image", choices=("debian", "busybox"), default="debian", help="guest image")
    parser.add_argument("--profile", default="cryptomine", help="see docs/reference/profiles.md")
    parser.add_argument("--sample", default="full")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clean", type=float, default=120.0, help="seconds before the infection")
    parser.add_argument("--active", type=float, default=120.0, help="seconds from the infection to its end")
    parser.add_argument("--after", type=float, default=120.0, help="seconds after it")
    given = parser.parse_args(words)
    return PracticePlan(
        name=given.name,
        image=given.image,
        profile=given.profile,
        sample=given.sample,
        seed=given.seed,
        clean_s=given.clean,
        active_s=given.active,
        after_s=given.after,
    )


def main() -> None:
    """Run the VM to the end of its plan."""
    plan = parse_arguments(sys.argv[1:])
    logging.basicConfig(level=logging.WARNING)
    try:
        with exit_on_signals(), create_scratch_folder(find_scratch_parent()) as scratch:
            asyncio.run(run_until_terminated(_run(plan, scratch / "watch.qmp", scratch)))
    except PhasewatchError as exc:
        raise SystemExit(str(exc)) from exc
    _print("ended")


if __name__ == "__main__":
    main()
