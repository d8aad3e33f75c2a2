"""Run one whole watch: survey the VM, start the cleanup process, attach, choose a model, watch, detach."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from phasewatch.channels import CHANNELS
from phasewatch.errors import MachineError, PhasewatchError
from phasewatch.events.schema import EventEnvelope
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
from phasewatch.live.discover import RunningVm
from phasewatch.live.outputs import Webhook
from phasewatch.live.recording import WatchRecorder, check_recording_folder
from phasewatch.live.survey import VmSurvey, choose_jit_use, choose_sensor_use, explain_masked_channels, survey_vm
from phasewatch.live.watcher import VmWatcher, WatchCallbacks, WatchResult, is_vm_alive
from phasewatch.models.alarm import AlarmKind
from phasewatch.models.smoothing import SMOOTHING_NONE
from phasewatch.telemetry.base import AsyncClock, HostClock, TelemetrySource
from phasewatch.types import LIVE_STRIDE_BINS

__all__ = ["WatchReport", "WatchRequest", "run_watch", "supervise_cleanup_process", "watch_vm"]

logger = logging.getLogger(__name__)

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
        webhook: URL to post alarms to; empty for none.
        smoothing: `SMOOTHING_PHASE` shows phases after the phase filter.
        seconds: Maximum duration; 0 watches until the VM is gone or the watch is interrupted.
    """

    machine: RunningVm
    qmp: Path | None = None
    models: tuple[ModelCandidate, ...] = ()
    channels: str = ""
    baseline: HostBaseline | None = None
    save: Path | None = None
    webhook: str = ""
    smoothing: str = SMOOTHING_NONE
    seconds: float = 0.0


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
    posted: int
    not_posted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _AttachedWatch:
    """Everything that a watch of an attached VM needs."""

    request: WatchRequest
    survey: VmSurvey
    sources: Sequence[TelemetrySource]
    predictor: PhasePredictor | None
    webhook: Webhook | None
    callbacks: WatchCallbacks
    clock: AsyncClock


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

    async def main() -> WatchReport:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup, which must stay so
            numbers.append(signal.SIGHUP)
        for number in numbers:
            with suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread: the caller cancels
                loop.add_signal_handler(number, task.cancel if task else lambda: None)
        return await watch_vm(request, callbacks or WatchCallbacks(), clock=clock or HostClock())

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:  # interrupted before the first window
        raise KeyboardInterrupt from None


async def watch_vm(request: WatchRequest, callbacks: WatchCallbacks, *, clock: AsyncClock) -> WatchReport:
    """Watch a VM until the end, as `run_watch` does; cancelling the task ends the watch in order, with a report."""
    jit = choose_jit_use(request.channels)
    has_sensors = choose_sensor_use(request.channels, is_saved=request.save is not None)
    if request.channels:
        request = replace(request, models=filter_by_channel_set(request.models, request.channels))
    webhook = Webhook(request.webhook) if request.webhook else None
    if request.save and (error := check_recording_folder(request.save)):
        logger.warning(
            "--save %s: nothing can be written now: %s; the VM is watched all the same",
            request.save,
            error.strerror or error,
        )
    survey = await survey_vm(request.machine, qmp=request.qmp, clock=clock)
    survey.jit = jit
    if has_sensors:
        survey.enable_sensors()
    with ExitStack() as stack:
        cleanup = stack.enter_context(CleanupProcess())
        key = cleanup.add(survey.task)  # before anything in the VM is changed
        sources: Sequence[TelemetrySource] = ()
        watched = WatchResult()
        predictor: PhasePredictor | None = None
        is_clean = True
        try:
            sources = await _attach_sources(survey)
            predictor = _choose_model(request, survey)
            _log_setup(request, survey, predictor)
            supervision = asyncio.create_task(supervise_cleanup_process(cleanup))
            try:
                watched = await _watch(
                    _AttachedWatch(
                        request=request,
                        survey=survey,
                        sources=sources,
                        predictor=predictor,
                        webhook=webhook,
                        callbacks=callbacks,
                        clock=clock,
                    )
                )
            finally:
                supervision.cancel()
        finally:
            is_clean = await detach(survey, sources) or not is_vm_alive(survey)
            if is_clean:
                cleanup.dismiss(key)
            if webhook is not None:
                await webhook.close()
    facts = survey.facts
    return WatchReport(
        watched=watched,
        model=predictor.model if predictor else "",
        threat=predictor.threat if predictor else "",
        masked=tuple(survey.masked),
        caveat=predictor.caveat(facts.accel, facts.arch) if predictor else "",
        left_as_found=is_clean,
        posted=webhook.sent if webhook else 0,
        not_posted=webhook.lost if webhook else 0,
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


def _log_setup(request: WatchRequest, survey: VmSurvey, predictor: PhasePredictor | None) -> None:
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


async def _watch(watch: _AttachedWatch) -> WatchResult:
    request, webhook = watch.request, watch.webhook
    recorder = WatchRecorder(request.save, watch.survey, watch.clock) if request.save else None

    def send_event(event: EventEnvelope, is_alarm_change: bool) -> None:
        watch.callbacks.on_event(event, is_alarm_change)
        if is_alarm_change and webhook is not None:
            webhook.post(event)

    callbacks = replace(watch.callbacks, on_event=send_event)
    if recorder is not None:
        callbacks = replace(callbacks, on_row=recorder.add_row)
    if webhook is not None:
        callbacks = replace(callbacks, count_backlog=webhook.count_backlog)
    watcher = VmWatcher(
        watch.survey, watch.sources, watch.predictor, callbacks, watch.clock, host=watch.survey.facts.host_id
    )
    try:
        watched = await watcher.run(seconds=request.seconds)
    finally:
        if recorder is not None:
            recorder.close()
    if recorder is None:
        return watched
    return replace(
        watched,
        saved=[str(path) for path in recorder.saved],
        not_saved=recorder.lost,
        save_failure=recorder.failure,
    )
