"""Run one whole watch: survey the VM, start the cleanup process, attach, choose a model, watch, detach."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from phasewatch.channels import CHANNELS
from phasewatch.errors import MachineError, PhasewatchError
from phasewatch.events.schema import EventEnvelope, PhaseEvent
from phasewatch.features.normalise import HostBaseline
from phasewatch.inference.model_selection import (
    ModelCandidate,
    choose_model,
    filter_by_channel_set,
    find_unavailable_channel_sets,
)
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.live.attach import attach, detach
from phasewatch.live.cleanup import CleanupProcess
from phasewatch.live.discover import RunningVm, VmIdentity, identify_vms
from phasewatch.live.recording import WatchRecorder, check_recording_folder
from phasewatch.live.state import WatchState
from phasewatch.live.survey import VmSurvey, choose_jit_use, choose_sensor_use, explain_masked_channels, survey_vm
from phasewatch.live.watch_loop import WatchLoop
from phasewatch.live.watcher import VmWatcher, WatchCallbacks, WatchResult
from phasewatch.models.alarm import AlarmKind
from phasewatch.models.smoothing import SMOOTHING_NONE
from phasewatch.telemetry.base import AsyncClock, HostClock, TelemetrySource
from phasewatch.telemetry.libvirt import LibvirtHypervisor
from phasewatch.telemetry.process import PROC_ROOT
from phasewatch.types import LIVE_STRIDE_BINS

__all__ = [
    "AttachedVm",
    "VmWatch",
    "WatchReport",
    "WatchRequest",
    "attach_vm",
    "check_save_folder",
    "run_until_interrupted",
    "run_watch",
    "select_models",
    "supervise_cleanup_process",
    "watch_vm",
]

logger = logging.getLogger(__name__)
T = TypeVar("T")

CLEANUP_CHECK_INTERVAL_S = 2.0
_MAX_MISSING_SHOWN = 4  # channels named for each channel set that the VM cannot provide


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRequest:
    """What to watch, and how.

    Attributes:
        machine: The VM, from `phasewatch.live.discover`.
        qmp: QMP socket that the user named, which must answer; None tries the VM's own sockets.
        models: Candidates for `choose_model`; empty makes bins without decisions.
        channels: Channel set that the user named; empty lets `choose_model` choose. QEMU's translation counters are
            used only for a named channel set that contains them.
        baseline: The VM's baseline, measured while it was known clean; None if there is none.
        save: Store to save the readings in; None saves nothing.
        smoothing: `SMOOTHING_PHASE` shows phases after the phase filter.
        seconds: Maximum duration; 0 watches until the VM is gone or the watch is interrupted.
        state: Folder that keeps the alarms over restarts of the watcher; None keeps nothing.
    """

    machine: RunningVm
    qmp: Path | None = None
    models: tuple[ModelCandidate, ...] = ()
    channels: str = ""
    baseline: HostBaseline | None = None
    save: Path | None = None
    smoothing: str = SMOOTHING_NONE
    seconds: float = 0.0
    state: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchReport:
    """Result and setup of one watch.

    Attributes:
        watched: Counts and states.
        model, threat: Name of the model and of its channel set; empty without a model.
        masked: Channels that the VM cannot provide.
        caveat: Why the model's decisions are less certain on this VM; empty if there is no reason.
        left_as_found: False if something that the watch added may still be in the VM.
        posted, not_posted: Alarms that the webhook received, and those it did not.
    """

    watched: WatchResult
    model: str
    threat: str
    masked: tuple[str, ...]
    caveat: str
    left_as_found: bool
    posted: int = 0
    not_posted: int = 0


class AttachedVm:
    """A VM whose sources are open, and the model that fits it; `close` restores the VM.

    Attributes:
        request: What to watch, and how.
        survey: The VM.
        sources: Its open telemetry sources.
        predictor: The model; None without models.
    """

    def __init__(self, request: WatchRequest, survey: VmSurvey, cleanup: CleanupProcess) -> None:
        self.request, self.survey = request, survey
        self.sources: tuple[TelemetrySource, ...] = ()
        self.predictor: PhasePredictor | None = None
        self._cleanup = cleanup
        self._cleanup_key = cleanup.add(survey.task)  # before anything in the VM is changed

    async def close(self) -> bool:
        """Close the sources and restore the VM; return False if something that was added may still be in it.

        The cleanup process then keeps trying once this process has ended.
        """
        is_clean = await detach(self.survey, self.sources) or not self.survey.is_alive
        if is_clean:
            self._cleanup.dismiss(self._cleanup_key)
        if self.survey.process is not None:
            self.survey.process.close()
        return is_clean

    def dismiss_cleanup(self) -> None:
        """Declare that what `close` left in the VM was removed by a later attempt."""
        self._cleanup.dismiss(self._cleanup_key)


async def attach_vm(
    request: WatchRequest,
    cleanup: CleanupProcess,
    *,
    clock: AsyncClock,
    proc: Path = PROC_ROOT,
    hypervisor: LibvirtHypervisor | None = None,
) -> AttachedVm:
    """Survey a VM, open its sources and choose a model; if that fails, the VM is restored.

    Raises:
        PhasewatchError: If the VM cannot be watched, or no model fits.
        OSError: If the cleanup process cannot be started.
    """
    survey = await survey_vm(request.machine, qmp=request.qmp, clock=clock, proc=proc, hypervisor=hypervisor)
    survey.jit = choose_jit_use(request.channels)
    if choose_sensor_use(request.channels, is_saved=request.save is not None):
        survey.enable_sensors()
    try:
        vm = AttachedVm(request, survey, cleanup)
    except OSError:
        if survey.monitor is not None:
            await survey.monitor.close()
        if survey.domain is not None:
            await survey.domain.close()
        raise
    try:
        vm.sources = await _attach_sources(survey)
        vm.predictor = _choose_model(request, survey)
    except BaseException:
        await vm.close()
        raise
    return vm


def run_watch(
    request: WatchRequest, callbacks: WatchCallbacks | None = None, *, clock: AsyncClock | None = None
) -> WatchReport:
    """Watch a VM until the end; SIGINT, SIGTERM and SIGHUP end the watch in order.

    Args:
        request: What to watch, and how.
        callbacks: Receivers of events and bins. `on_row` and `count_backlog` are set by the watch itself.
        clock: Clock of the host; a test passes its own.

    Raises:
        PhasewatchError: If the watch cannot begin; the VM is then unchanged.
        KeyboardInterrupt: If it was interrupted before the first window.
    """

    return run_until_interrupted(watch_vm(request, callbacks or WatchCallbacks(), clock=clock or HostClock()))


def run_until_interrupted(watch: Coroutine[Any, Any, T]) -> T:
    """Run a watch in an event loop; SIGINT, SIGTERM and SIGHUP cancel it, so that it ends in order.

    Raises:
        KeyboardInterrupt: If it was interrupted before it began.
    """

    async def main() -> T:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup, which must stay so
            numbers.append(signal.SIGHUP)
        for number in numbers:
            with suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread: the caller cancels
                loop.add_signal_handler(number, task.cancel if task else lambda: None)
        return await watch

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def watch_vm(request: WatchRequest, callbacks: WatchCallbacks, *, clock: AsyncClock) -> WatchReport:
    """Watch a VM until the end, as `run_watch` does; cancelling the task ends the watch in order, with a report."""
    request = replace(request, models=select_models(request.models, request.channels))
    check_save_folder(request.save)
    identity = identify_vms((request.machine,))[request.machine.pid]
    hypervisor = LibvirtHypervisor(clock)
    with WatchState(request.state) as state, CleanupProcess() as cleanup, closing(hypervisor):
        watched, is_clean = WatchResult(), True
        vm = await attach_vm(request, cleanup, clock=clock, hypervisor=hypervisor)
        try:
            _log_setup(vm)
            supervision = asyncio.create_task(supervise_cleanup_process(cleanup))
            try:
                watch = VmWatch(vm, callbacks, clock=clock, state=state, identity=identity)
                watched = await watch.run(seconds=request.seconds)
            finally:
                supervision.cancel()
        finally:
            is_clean = await vm.close()
    survey, predictor = vm.survey, vm.predictor
    return WatchReport(
        watched=watched,
        model=predictor.model if predictor else "",
        threat=predictor.threat if predictor else "",
        masked=tuple(survey.masked),
        caveat=predictor.caveat(survey.facts.accel, survey.facts.arch) if predictor else "",
        left_as_found=is_clean,
    )


def select_models(models: tuple[ModelCandidate, ...], channels: str) -> tuple[ModelCandidate, ...]:
    """Return the models of a channel set; all if `channels` is empty.

    Raises:
        UsageError: If there is no such channel set, or no model for it.
    """
    choose_jit_use(channels)
    return filter_by_channel_set(models, channels) if channels else models


def check_save_folder(folder: Path | None) -> None:
    """Warn if nothing can be written into a store now.

    Raises:
        MachineError: If it can never be written.
    """
    if folder is not None and (error := check_recording_folder(folder)):
        logger.warning(
            "--save %s: nothing can be written now: %s; the watch goes on all the same",
            folder,
            error.strerror or error,
        )


async def supervise_cleanup_process(cleanup: CleanupProcess) -> None:
    """Restart the cleanup process whenever it is gone, until cancelled; a failed restart is tried again."""
    is_failure_logged = False
    while True:
        await asyncio.sleep(CLEANUP_CHECK_INTERVAL_S)
        try:
            if cleanup.restart_if_dead():
                logger.warning("the cleanup process was killed; process %d replaces it", cleanup.pid)
                is_failure_logged = False
        except OSError as exc:
            if not is_failure_logged:
                is_failure_logged = True
                logger.warning(
                    "the cleanup process is gone and cannot be started again: %s; the watch goes on without it",
                    exc.strerror,
                )


async def _attach_sources(survey: VmSurvey) -> tuple[TelemetrySource, ...]:
    try:
        return await attach(survey)
    except OSError as exc:
        raise MachineError(f"process {survey.facts.pid}: its /proc cannot be read: {exc.strerror}") from exc


def _choose_model(request: WatchRequest, survey: VmSurvey) -> PhasePredictor | None:
    if not request.models:
        return None
    try:
        return choose_model(
            request.models,
            survey.available,
            arch=survey.facts.arch,
            clean_day=request.baseline,
            smoothing=request.smoothing,
        )
    except PhasewatchError as exc:
        masked = {name: reason for name, reason in survey.masked.items() if not name.startswith("guest.")}
        missing = "; ".join(explain_masked_channels(masked)) or "nothing"
        raise type(exc)(f"{exc}. Missing here: {missing}") from exc


def _log_setup(vm: AttachedVm) -> None:
    request, survey, predictor = vm.request, vm.survey, vm.predictor
    facts = survey.facts
    logger.info(
        "watching %s (process %d): %s under %s, %d vCPU, %d of %d channels",
        facts.name,
        facts.pid,
        facts.arch,
        facts.accel or "an unknown accelerator",
        facts.vcpus,
        len(survey.available),
        len(CHANNELS),
    )
    for line in (*explain_masked_channels(survey.masked), *survey.notes):
        logger.info("  %s", line)
    if predictor is None:
        return
    logger.info("model %s, channel set %s, %s", predictor.model, predictor.threat, predictor.where)
    for name, missing in find_unavailable_channel_sets(
        request.models, survey.available, arch=facts.arch, chosen=predictor
    ):
        n_more = len(missing) - _MAX_MISSING_SHOWN
        more = f" and {n_more} more" if n_more > 0 else ""
        shown = ", ".join(missing[:_MAX_MISSING_SHOWN])
        logger.info("  not the larger channel set %s: this VM does not provide %s%s", name, shown, more)
    if predictor.find_rule(AlarmKind.INFECTION, LIVE_STRIDE_BINS) is None:
        logger.info("  this model was trained without an alarm: phases only")
    if caveat := predictor.caveat(facts.accel, facts.arch):
        logger.info("  %s", caveat)


class VmWatch:
    """One watch of an attached VM: its watcher, its recorder, and its alarms in the state.

    Args:
        vm: The VM.
        callbacks: Receivers of its events.
        clock: Clock of the host.
        state: Alarms of an earlier watch, and place of the new ones.
        identity: What tells the VM from others in the state.
        first_event, grid_bins: As in `VmWatcher`.
        writer: As in `WatchRecorder`.
    """

    def __init__(
        self,
        vm: AttachedVm,
        callbacks: WatchCallbacks,
        *,
        clock: AsyncClock,
        state: WatchState,
        identity: VmIdentity,
        first_event: int = 1,
        grid_bins: int = 1,
        writer: ThreadPoolExecutor | None = None,
    ) -> None:
        self._vm, self._callbacks, self._clock = vm, callbacks, clock
        self._state, self._identity = state, identity
        save = vm.request.save
        self._recorder = WatchRecorder(save, vm.survey, clock, writer) if save else None
        callbacks = replace(callbacks, on_event=self._send_event)
        if self._recorder is not None:
            callbacks = replace(callbacks, on_row=self._recorder.add_row)
        self.watcher = VmWatcher(
            vm.survey,
            vm.sources,
            vm.predictor,
            callbacks,
            clock,
            host=vm.survey.facts.host_id,
            memory=state.find_alarms(identity, clock.wall_ns()),
            first_event=first_event,
            grid_bins=grid_bins,
        )

    async def run(self, *, seconds: float = 0.0, loop: WatchLoop | None = None) -> WatchResult:
        """Watch until the end, as `VmWatcher.run`."""
        try:
            return await self.watcher.run(seconds=seconds, loop=loop)
        finally:
            if self._recorder is not None:
                await asyncio.to_thread(self._recorder.close)  # waits for the disk
                result = self.watcher.result
                result.saved = [str(path) for path in self._recorder.saved]
                result.not_saved, result.save_failure = self._recorder.lost, self._recorder.failure

    def _send_event(self, event: EventEnvelope, is_alarm_change: bool) -> None:
        self._callbacks.on_event(event, is_alarm_change)
        if isinstance(event.data, PhaseEvent):  # after it was sent: an alarm twice is better than none
            self._state.update(self._identity, self._vm.survey.facts.name, self.watcher.alarms, self._clock.wall_ns())
