"""One watch from its door to its end: look, guard, attach, choose the model, watch, and leave the VM as it was."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

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
from phasewatch.live.attach import VmSurvey, attach, choose_jit_use, detach, explain_masked_channels, survey_vm
from phasewatch.live.cleanup import CleanupProcess
from phasewatch.live.discover import RunningVm
from phasewatch.live.outputs import Webhook
from phasewatch.live.recording import WatchRecorder, check_recording_folder
from phasewatch.live.tracker import TrackerStep
from phasewatch.live.watcher import VmWatcher, WatchCallbacks, WatchResult, is_vm_alive
from phasewatch.telemetry.base import AsyncClock, HostClock, TelemetrySource

GUARD_CHECK_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRequest:
    """What is to be watched, and how.

    Attributes:
        machine: From `find`.
        qmp: A socket that the user named; it must answer.
        models: What `choose_model` chooses from; empty only makes bins.
        channels: Channel set that the user named; empty lets `choose_model` choose. Only a named one that has
            translation counters makes QEMU count them.
        baseline: What is usual on it while it is known clean, from `phasewatch baseline`; None where nobody knows.
        save: Store that gets the readings; None keeps nothing.
        webhook: URL that alarms are posted to; empty for none.
        seconds: How long; 0 until the VM is gone or the watch is interrupted.
    """

    machine: RunningVm
    qmp: Path | None = None
    models: tuple[ModelCandidate, ...] = ()
    channels: str = ""
    baseline: HostBaseline | None = None
    save: Path | None = None
    webhook: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchReport:
    """What a watch came to, and how it was set up; `left_as_found` is False where something of ours may still stand in the VM."""

    watched: WatchResult
    model: str
    threat: str
    masked: tuple[str, ...]
    caveat: str
    left_as_found: bool
    posted: int
    not_posted: int


def run_watch(
    request: WatchRequest,
    emit: Callable[[EventEnvelope, bool], None],
    say: Callable[[str], None],
    *,
    clock: AsyncClock | None = None,
    on_step: Callable[[TrackerStep], None] | None = None,
) -> WatchReport:
    """Watch until the end, an interrupt included: SIGINT, SIGTERM and the terminal's end (SIGHUP) end it in order.

    Args:
        request: What.
        emit: Takes every event, and whether an alarm was raised or ended with it.
        say: Takes lines for people.
        clock: The host's, unless a test hands in another.
        on_step: Takes every closed bin.

    Raises:
        PhasewatchError: If it cannot begin; the VM is then as it was.
    """

    async def main() -> WatchReport:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it was told to outlive its terminal: nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            with suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread: who runs us cancels
                loop.add_signal_handler(number, task.cancel if task else lambda: None)
        return await watch_vm(request, emit, say, clock=clock or HostClock(), on_step=on_step)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:  # interrupted before the first window
        raise KeyboardInterrupt from None


async def watch_vm(
    request: WatchRequest,
    emit: Callable[[EventEnvelope, bool], None],
    say: Callable[[str], None],
    *,
    clock: AsyncClock,
    on_step: Callable[[TrackerStep], None] | None = None,
) -> WatchReport:
    """Watch until the end; see `run_watch`. Cancelling it ends it in order, with a report."""
    jit = choose_jit_use(request.channels)
    if request.channels:
        request = replace(request, models=filter_by_channel_set(request.models, request.channels))
    hook = Webhook(request.webhook, say) if request.webhook else None
    if request.save and (why := check_recording_folder(request.save)):
        say(f"--save {request.save}: nothing can be written now: {why}; the machine is watched all the same")
    found = await survey_vm(request.machine, qmp=request.qmp, clock=clock)
    found.jit = jit
    with ExitStack() as stack:
        guard = stack.enter_context(CleanupProcess(found.task))  # before anything in the VM is touched
        sources: Sequence[TelemetrySource] = ()
        watched = WatchResult()
        scorer: PhasePredictor | None = None
        left = True
        try:
            sources = await _attach_sources(found)
            scorer = _choose_model(request, found)
            _report_setup(request, found, scorer, say)
            keeping = asyncio.create_task(supervise_guard(guard, say))
            try:
                watched = await _run_watcher(request, found, sources, scorer, hook, emit, say, clock, on_step)
            finally:
                keeping.cancel()
        finally:
            left = await detach(found, sources) or not is_vm_alive(found)
            if left:
                guard.dismiss()
            if hook is not None:
                await hook.close()
    facts = found.facts
    return WatchReport(
        watched=watched, model=scorer.model if scorer else "", threat=scorer.threat if scorer else "",
        masked=tuple(found.masked), caveat=scorer.caveat(facts.accel, facts.arch) if scorer else "", left_as_found=left,
        posted=hook.sent if hook else 0, not_posted=hook.lost if hook else 0,
    )  # fmt: skip


async def supervise_guard(guard: CleanupProcess, say: Callable[[str], None]) -> None:
    """Start another guard when the one that there was is gone; what cannot be started now is tried again."""
    is_told = False
    while True:
        await asyncio.sleep(GUARD_CHECK_INTERVAL_S)
        try:
            if guard.restart_if_dead():
                say(f"the guard was gone, killed by somebody; process {guard.pid} takes its place")
                is_told = False
        except OSError as exc:
            if not is_told:
                is_told = True
                say(f"the guard is gone and no other can be started: {exc.strerror}; the watch goes on unguarded")


async def _attach_sources(found: VmSurvey) -> tuple[TelemetrySource, ...]:
    try:
        return await attach(found)
    except OSError as exc:
        raise MachineError(f"process {found.facts.pid}: its /proc cannot be read: {exc.strerror}") from exc


def _choose_model(request: WatchRequest, found: VmSurvey) -> PhasePredictor | None:
    if not request.models:
        return None
    try:
        return choose_model(request.models, found.available, arch=found.facts.arch, clean_day=request.baseline)
    except PhasewatchError as exc:
        lines = "; ".join(
            explain_masked_channels({n: w for n, w in found.masked.items() if not n.startswith("guest.")})
        )
        raise type(exc)(f"{exc}. Missing here: {lines or 'nothing'}") from exc


def _report_setup(
    request: WatchRequest, found: VmSurvey, scorer: PhasePredictor | None, say: Callable[[str], None]
) -> None:
    facts = found.facts
    say(
        f"watching {facts.name} (process {facts.pid}): {facts.arch} under {facts.accel or 'an unknown accelerator'}, "
        f"{facts.vcpus} vCPU, {len(found.available)} of 46 channels"
    )
    for line in (*explain_masked_channels(found.masked), *found.notes):
        say(f"  {line}")
    if scorer is not None:
        say(f"model {scorer.model}, mask {scorer.threat}, {scorer.where}")
        for threat, lacks in find_unavailable_channel_sets(
            request.models, found.available, arch=facts.arch, chosen=scorer
        ):
            more = f" and {len(lacks) - 4} more" if len(lacks) > 4 else ""
            say(f"  not the larger mask {threat}: this VM does not give {', '.join(lacks[:4])}{more}")
        if scorer.alarm is None:
            say("  this model was trained without an alarm: phases only")
        if caveat := scorer.caveat(facts.accel, facts.arch):
            say(f"  {caveat}")


async def _run_watcher(
    request: WatchRequest,
    found: VmSurvey,
    sources: Sequence[TelemetrySource],
    scorer: PhasePredictor | None,
    hook: Webhook | None,
    emit: Callable[[EventEnvelope, bool], None],
    say: Callable[[str], None],
    clock: AsyncClock,
    on_step: Callable[[TrackerStep], None] | None,
) -> WatchResult:
    saved: list[str] = []
    saver = (
        WatchRecorder(request.save, found, clock, lambda path: saved.append(str(path)), say) if request.save else None
    )

    def tell(event: EventEnvelope, news: bool) -> None:
        emit(event, news)
        if news and hook is not None:
            hook.post(event)

    outlets = WatchCallbacks(
        on_event=tell, on_message=say, on_row=saver.add_row if saver else None, on_step=on_step, backlog=hook.backlog if hook else lambda: 0
    )  # fmt: skip
    watcher = VmWatcher(found, sources, scorer, outlets, clock, host=found.facts.host_id)
    try:
        watched = await watcher.run(seconds=request.seconds)
    finally:
        if saver is not None:
            saver.close()
    if saver is None:
        return watched
    return replace(watched, saved=saved, not_saved=saver.lost, save_failure=saver.failure)
