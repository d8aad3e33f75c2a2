"""Record a plan on this machine: `record_plan`.

It prepares what the recorder needs (cache, images, accelerator, store lock, scratch folder), runs the recorder, and
releases everything at the end, also after SIGINT and SIGTERM.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from phasewatch import atomic
from phasewatch.errors import CgroupError, MachineError, UsageError
from phasewatch.lab import process
from phasewatch.lab.cgroup import CpuController, open_cpu_controller
from phasewatch.lab.custom_workload import CLOUD_INIT_META_DATA, CLOUD_INIT_USER_DATA, CustomMachine
from phasewatch.lab.debian_image import build_debian_image
from phasewatch.lab.guest_image import DEFAULT_DATA_MIB, GuestImage, build_guest_image
from phasewatch.lab.host import AcceleratorChoice, choose_accelerator, read_qemu_version
from phasewatch.lab.plan import RecordingSession
from phasewatch.lab.qemu_command import HOST_SHAPES, HostShape
from phasewatch.lab.recorder import PlanRecorder, RecordingSummary, SkipCode, SkippedHost
from phasewatch.lab.vm import LabMachine, QemuVm, VmSettings, read_tsc_khz
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.store.local import DiskStore
from phasewatch.telemetry.base import AsyncClock, HostClock
from phasewatch.user_folders import cache_folder

__all__ = [
    "IMAGE_BUILDERS",
    "QemuFactory",
    "RecordingOptions",
    "build_image",
    "default_cache",
    "exit_on_signals",
    "record_plan",
    "run_until_terminated",
]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingOptions:
    """How a plan is recorded.

    Attributes:
        cache: Folder of guest images and KVM results.
        shapes: The host shapes that the plan may name.
        idle_wait_s: Longest wait for an idle machine before each session, in seconds.
        accel: ``kvm`` or ``tcg`` to force an accelerator; empty chooses KVM where it works.
        scripts: ``profile/sample/phase`` → shell text of a custom workload.
        custom_machine: A custom machine that replaces the built-in guest image.
        parallel_vms: Largest number of VMs at a time.
        open_controller: Finds the place for CPU quotas; called if the plan has a host with one.
    """

    cache: Path
    shapes: Sequence[HostShape] = HOST_SHAPES
    idle_wait_s: float = 600.0
    accel: str = ""
    scripts: Mapping[str, str] | None = None
    custom_machine: CustomMachine | None = None
    parallel_vms: int = 2
    open_controller: Callable[[], CpuController] = open_cpu_controller


@dataclass(slots=True, kw_only=True)
class QemuFactory:
    """Creates VMs. It builds each image and tests KVM once, when first needed.

    Attributes:
        options: Cache, accelerator, custom workload and custom machine.
        scratch: Folder for overlays and sockets.
        clock: The clock of the host.
        controller: Where the groups of VMs with a CPU quota are made; None if no shape has one.
    """

    options: RecordingOptions
    scratch: Path
    clock: AsyncClock
    controller: CpuController | None = None
    _n_created: int = 0
    _images: dict[tuple[str, str, int], GuestImage] = field(default_factory=dict)
    _accelerators: dict[str, AcceleratorChoice] = field(default_factory=dict)
    _tsc_khz: int | None = field(default_factory=read_tsc_khz)

    def prepare(self, shape: HostShape) -> tuple[GuestImage, str]:
        """Return the image and the accelerator for a shape; the first call builds and tests them."""
        custom, accel = self.options.custom_machine, self.options.accel
        if not accel:
            accel = "tcg" if shape.accel == "tcg" else self._find_accelerator(shape.arch, shape.data_mib)
        return custom.image if custom else self._build_image(shape.image, shape.arch, shape.data_mib), accel

    def _build_image(self, image: str, arch: str, data_mib: int) -> GuestImage:
        key = image, arch, data_mib
        if key not in self._images:
            if image == "debian":
                self._images[key] = build_debian_image(self.options.cache, data_mib=data_mib)
            else:
                self._images[key] = build_guest_image(
                    self.options.cache, arch, data_mib=data_mib, scripts=self.options.scripts
                )
        return self._images[key]

    def _find_accelerator(self, arch: str, data_mib: int) -> str:
        if arch not in self._accelerators:
            self._accelerators[arch] = choose_accelerator(
                arch=arch,
                # The built-in guest proves KVM also for a custom machine, whose slow boot would look like a hang.
                # A custom machine has no documents, so its data size is 0.
                files=lambda: self._build_image("busybox", arch, data_mib or DEFAULT_DATA_MIB),
                cache=self.options.cache,
                qemu_version=read_qemu_version(arch),
            )
        return self._accelerators[arch].accel

    def __call__(self, shape: HostShape, place: int, cores: tuple[int, ...]) -> LabMachine:
        """Create one VM without starting it."""
        custom = self.options.custom_machine
        image, accel = self.prepare(shape)
        self._n_created += 1
        return QemuVm(
            VmSettings(
                shape=shape,
                image=image,
                accel=accel,
                folder=self.scratch / str(self._n_created),
                number=place,
                cores=cores,
                tsc_khz=self._tsc_khz,
                clock=self.clock,
                seed_files=_build_seed_files(custom),
                boot=custom.boot if custom else None,
                controller=self.controller,
                group_number=self._n_created,
            )
        )


def _build_seed_files(custom: CustomMachine | None) -> tuple[tuple[str, bytes], ...]:
    if custom is None or not custom.driver:
        return ()
    return (
        ("meta-data", CLOUD_INIT_META_DATA.encode()),
        ("user-data", CLOUD_INIT_USER_DATA.encode()),
        ("driver", custom.driver),
    )


# Name of a guest image → function that builds it from a cache folder and the size of its documents in MiB.
IMAGE_BUILDERS: Mapping[str, Callable[[Path, int], GuestImage]] = MappingProxyType(
    {
        "busybox": lambda cache, data_mib: build_guest_image(cache, "x86_64", data_mib=data_mib),
        "debian": lambda cache, data_mib: build_debian_image(cache, data_mib=data_mib),
    }
)


def build_image(name: str, *, data_mib: int = DEFAULT_DATA_MIB) -> GuestImage:
    """Return a guest image from the default cache; build it at first use.

    Args:
        name: A key of `IMAGE_BUILDERS`.
        data_mib: Size of the documents on the data disk, in MiB.

    Raises:
        MissingToolError: If a tool, a right or a package is missing.
        MachineError: If a step of the build failed, or the disk is full.
    """
    cache = default_cache()
    _make_cache(cache)
    with exit_on_signals():
        return IMAGE_BUILDERS[name](cache, data_mib)


def default_cache() -> Path:
    """Return the folder of guest images and KVM results.

    Raises:
        MachineError: If the user has no home folder.
    """
    return cache_folder()


def _make_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise MachineError(
            f"{cache}: guest images cannot be kept here ({exc.strerror}); set XDG_CACHE_HOME to a folder that can be "
            "written to"
        ) from exc


def record_plan(
    sessions: Sequence[RecordingSession],
    *,
    store: Path,
    options: RecordingOptions,
    progress: Progress = NO_PROGRESS,
) -> RecordingSummary:
    """Record every slot of a plan that the store does not hold yet.

    Args:
        sessions: The plan.
        store: Folder for the bundles; created if absent, and locked while recording.
        options: How to record.
        progress: Receives the number of finished slots under the task ``record``.

    Raises:
        BusyError: If another recorder writes into the store.
        MissingToolError: If QEMU or a tool that builds the image is missing, or QEMU is too old.
        MachineError: If a disk is full.
        UsageError: If the plan names a host that is not among the shapes.
    """
    shapes = {shape.host_id: shape for shape in options.shapes}
    for session in sessions:
        if session.host_id not in shapes:
            raise UsageError(
                f"session {session.session}: no host {session.host_id!r}; known: {', '.join(sorted(shapes))}"
            )
    for arch in sorted({shapes[session.host_id].arch for session in sessions}):
        read_qemu_version(arch)
    clock = HostClock()
    _make_cache(options.cache)
    store.mkdir(parents=True, exist_ok=True)
    parent = process.find_scratch_parent()
    with exit_on_signals(), atomic.lock(store), process.create_scratch_folder(parent) as scratch:
        process.sweep_scratch_folders(parent)
        for folder in (store, *(store / host_id for host_id in sorted(shapes))):
            if folder.is_dir():  # only folders that bundles are written to; a receiver sweeps its own folder
                atomic.sweep_temporaries(folder)
        controller, skipped = _open_controller(sessions, shapes, options)
        factory = QemuFactory(options=options, scratch=scratch, clock=clock, controller=controller)
        if (custom := options.custom_machine) is not None:
            logger.info(
                "%s: booting %s; its driver must send `ready` within %g s",
                custom.shape.host_id,
                custom.image.base_disk,
                custom.boot.deadline_s,
            )
        hosts = dict.fromkeys(session.host_id for session in sessions)
        skipped += _prepare_hosts(factory, [shapes[host_id] for host_id in hosts if host_id not in dict(skipped)])
        left_out = dict(skipped)
        recorder = PlanRecorder(
            store=DiskStore(store),
            shapes=shapes,
            machines=factory,
            clock=clock,
            progress=progress,
            idle_wait_s=options.idle_wait_s,
            cores=tuple(sorted(os.sched_getaffinity(0))),
            vms=options.parallel_vms,
            disk_folders=(store, scratch),
        )
        chosen = [session for session in sessions if session.host_id not in left_out]
        summary = asyncio.run(run_until_terminated(recorder.record(chosen)))
    return replace(summary, skipped_hosts=(*_list_skipped_hosts(sessions, left_out), *summary.skipped_hosts))


# Host id → why none of its episodes can be recorded.
_Obstacles = list[tuple[str, tuple[SkipCode, str]]]


def _open_controller(
    sessions: Sequence[RecordingSession], shapes: Mapping[str, HostShape], options: RecordingOptions
) -> tuple[CpuController | None, _Obstacles]:
    """Find the place for CPU quotas; without one, no host with a quota can be recorded."""
    limited = [host_id for host_id in dict.fromkeys(s.host_id for s in sessions) if shapes[host_id].quota_cores]
    if not limited:
        return None, []
    try:
        return options.open_controller(), []
    except CgroupError as exc:
        logger.warning("%d hosts are skipped: %s", len(limited), exc)
        return None, [(host_id, (SkipCode.NO_QUOTA, str(exc))) for host_id in limited]


def _prepare_hosts(factory: QemuFactory, shapes: Sequence[HostShape]) -> _Obstacles:
    """Build the images before the first VM, because building one is a load too.

    Raises:
        MachineError: If the busybox image cannot be built. Hosts with the Debian image are skipped instead, because it
            needs root and a package mirror, which a campaign can do without.
    """
    obstacles: _Obstacles = []
    for shape in shapes:
        try:
            factory.prepare(shape)
        except MachineError as exc:
            if shape.image != "debian":
                raise
            logger.warning("%s is skipped: %s", shape.host_id, exc)
            obstacles.append((shape.host_id, (SkipCode.NO_IMAGE, str(exc))))
    return obstacles


def _list_skipped_hosts(
    sessions: Sequence[RecordingSession], obstacles: Mapping[str, tuple[SkipCode, str]]
) -> tuple[SkippedHost, ...]:
    n_slots = Counter(session.host_id for session in sessions for _ in session.slots)
    return tuple(
        SkippedHost(host_id=host_id, episodes=n_slots[host_id], code=code, reason=reason)
        for host_id, (code, reason) in obstacles.items()
    )


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into exceptions inside the block, so that VMs are stopped and folders removed.

    A shell without job control starts `record … &` with SIGINT ignored, and Python keeps it ignored, so such a recorder
    could not be stopped. Handlers that other code has set stay as they are. Outside the main thread nothing changes.
    """
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    before = {number: signal.getsignal(number) for number in handlers}
    replaced = {number for number, handler in before.items() if handler in (signal.SIG_IGN, signal.SIG_DFL)}
    if threading.current_thread() is not threading.main_thread():
        replaced = set()
    for number in replaced:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, before[number])


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


async def run_until_terminated(work: Coroutine[Any, Any, _T]) -> _T:
    """Await a coroutine and return its result; SIGTERM cancels it, so that it can clean up.

    Raises:
        SystemExit: With code 143 after SIGTERM.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    with suppress(ValueError, RuntimeError):  # not the main thread, which alone handles signals
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise  # Ctrl-C: asyncio.run turns it into KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        with suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGTERM)
