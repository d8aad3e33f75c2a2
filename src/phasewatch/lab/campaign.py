"""`record_plan`: everything that a plan needs of this machine, found, locked, and let go of again."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from phasewatch import atomic
from phasewatch.errors import MachineError, UsageError
from phasewatch.lab import process
from phasewatch.lab.custom_workload import CLOUD_INIT_META_DATA, CLOUD_INIT_USER_DATA, CustomMachine
from phasewatch.lab.guest_image import DEFAULT_DATA_MIB, GuestImage, build_guest_image
from phasewatch.lab.host import AcceleratorChoice, choose_accelerator, read_qemu_version
from phasewatch.lab.plan import RecordingSession
from phasewatch.lab.qemu_command import HOST_SHAPES, HostShape
from phasewatch.lab.recorder import PlanRecorder, RecorderProgress, RecordingSummary, SilentProgress
from phasewatch.lab.vm import LabMachine, QemuVm, VmSettings, read_tsc_khz
from phasewatch.store.local import DiskStore
from phasewatch.telemetry.base import AsyncClock, HostClock
from phasewatch.user_folders import cache_folder

_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True)
class QemuFactory:
    """Makes VMs: builds each image and looks for KVM once, when first needed.

    Attributes:
        cache: Folder of images and KVM verdicts.
        scratch: Folder for overlays and sockets.
        accel: ``kvm`` or ``tcg`` to insist on it; empty leaves it to the probe.
        scripts: ``profile/sample/phase`` → shell text of a workload of the user's own, for our guest image.
        custom_machine: The user's own machine, instead of our guest image.
        report_line: Takes a line for people while a boot takes long.
    """

    cache: Path
    scratch: Path
    clock: AsyncClock
    accel: str = ""
    scripts: Mapping[str, str] | None = None
    custom_machine: CustomMachine | None = None
    report_line: Callable[[str], None] = lambda line: None
    _n_created: int = 0
    _images: dict[tuple[str, int], GuestImage] = field(default_factory=dict)
    _verdicts: dict[str, AcceleratorChoice] = field(default_factory=dict)
    _tsc_khz: int | None = field(default_factory=read_tsc_khz)

    def prepare(self, shape: HostShape) -> tuple[GuestImage, str]:
        """Give the image and the accelerator for a shape; both are found at the first call."""
        accel = self.accel or ("tcg" if shape.accel == "tcg" else self._find_accelerator(shape.arch, shape.data_mib))
        return self.custom_machine.image if self.custom_machine else self._image(shape.arch, shape.data_mib), accel

    def _image(self, arch: str, data_mib: int) -> GuestImage:
        key = arch, data_mib
        if key not in self._images:
            self._images[key] = build_guest_image(self.cache, arch, data_mib=data_mib, scripts=self.scripts)
        return self._images[key]

    def _find_accelerator(self, arch: str, data_mib: int) -> str:
        if arch not in self._verdicts:
            self._verdicts[arch] = choose_accelerator(
                arch=arch,
                # Our own guest proves KVM for a machine of the user's too, which we could not tell from a hung one;
                # that has no documents, and so no size of them.
                files=lambda: self._image(arch, data_mib or DEFAULT_DATA_MIB),
                cache=self.cache,
                qemu_version=read_qemu_version(arch),
            )
        return self._verdicts[arch].accel

    def __call__(self, shape: HostShape, place: int, cores: tuple[int, ...]) -> LabMachine:
        """Make one VM; nothing is started yet."""
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
                seed_files=_build_seed_files(self.custom_machine),
                boot=self.custom_machine.boot if self.custom_machine else None,
                report_line=self.report_line,
            )
        )


def _build_seed_files(own: CustomMachine | None) -> tuple[tuple[str, bytes], ...]:
    if own is None or not own.driver:
        return ()
    return (
        ("meta-data", CLOUD_INIT_META_DATA.encode()),
        ("user-data", CLOUD_INIT_USER_DATA.encode()),
        ("driver", own.driver),
    )


def default_cache() -> Path:
    """Return the folder where images and KVM verdicts are kept.

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
    cache: Path,
    shapes: Sequence[HostShape] = HOST_SHAPES,
    progress: RecorderProgress | None = None,
    idle_wait_s: float = 600.0,
    accel: str = "",
    scripts: Mapping[str, str] | None = None,
    own: CustomMachine | None = None,
) -> RecordingSummary:
    """Record every slot of a plan that the store does not hold yet.

    Args:
        sessions: The plan.
        store: Folder that the bundles go to; made if absent, and locked meanwhile.
        cache: Folder of images and KVM verdicts.
        shapes: The hosts that the plan names.
        progress: Hears what goes on.
        idle_wait_s: How long at most to wait for an idle machine before each session.
        accel: ``kvm`` or ``tcg`` to insist on it.
        scripts: ``profile/sample/phase`` → shell text, of a workload of the user's own.
        own: A machine of the user's own, to play on instead of our guest image.

    Raises:
        BusyError: If another recorder writes into the store.
        MissingTool: If QEMU or what builds the image is not there, or QEMU is too old.
        MachineError: If a disk is full.
        UsageError: If the plan names a host that `shapes` does not.
    """
    by_id = {shape.host_id: shape for shape in shapes}
    for session in sessions:
        if session.host_id not in by_id:
            raise UsageError(
                f"session {session.session}: no host {session.host_id!r}; known: {', '.join(sorted(by_id))}"
            )
    for arch in sorted({by_id[session.host_id].arch for session in sessions}):
        read_qemu_version(arch)
    clock = HostClock()
    _make_cache(cache)
    store.mkdir(parents=True, exist_ok=True)
    with exit_on_signals(), atomic.lock(store), process.create_scratch_folder(process.find_scratch_parent()) as scratch:
        for folder in (store, *(store / host_id for host_id in sorted(by_id))):
            if folder.is_dir():  # where bundles are written; a receiver's folder is its own to sweep
                atomic.sweep_temporaries(folder)
        progress = progress or SilentProgress()
        factory = QemuFactory(
            cache=cache,
            scratch=scratch,
            clock=clock,
            accel=accel,
            scripts=scripts,
            custom_machine=own,
            report_line=progress.line,
        )
        if own is not None:
            progress.line(
                f"{own.shape.host_id}: booting {own.image.base_disk}; its driver has {own.boot.deadline_s:g} s for its first word"
            )
        for host_id in dict.fromkeys(session.host_id for session in sessions):
            factory.prepare(by_id[host_id])  # before the first VM: building an image is a load too
        recorder = PlanRecorder(
            store=DiskStore(store),
            shapes=by_id,
            machines=factory,
            clock=clock,
            progress=progress,
            idle_wait_s=idle_wait_s,
            cores=tuple(sorted(os.sched_getaffinity(0))),
            disk_folders=(store, scratch),
        )
        return asyncio.run(run_until_terminated(recorder.record(sessions)))


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end what is inside by an exception, so that machines are stopped and folders removed.

    A shell without job control starts `record … &` with SIGINT ignored, and Python leaves that so: a recorder that
    cannot be told to stop. A handler that somebody else has set is left alone, and outside the main thread all are.
    """
    told = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    before = {number: signal.getsignal(number) for number in told}
    plain = {number for number, handler in before.items() if handler in (signal.SIG_IGN, signal.SIG_DFL)}
    if threading.current_thread() is not threading.main_thread():
        plain = set()
    for number in plain:
        signal.signal(number, told[number])
    try:
        yield
    finally:
        for number in plain:
            signal.signal(number, before[number])


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


async def run_until_terminated(work: Coroutine[Any, Any, _T]) -> _T:
    """Do the work; SIGTERM ends it in order, as Ctrl-C does: machines stopped, folders removed."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    with suppress(ValueError, RuntimeError):  # not the main thread: whoever runs us there handles signals
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
