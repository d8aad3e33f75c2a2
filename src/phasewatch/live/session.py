"""One watch from its door to its end: look, guard, attach, choose the model, watch, and leave the VM as it was."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from phasewatch.errors import MachineError, PhasewatchError
from phasewatch.features.commission import Reference
from phasewatch.live.asking import jit_use
from phasewatch.live.attach import Survey, attach, detach, explain_masks, survey
from phasewatch.live.envelope import Event
from phasewatch.live.find import Running
from phasewatch.live.guard import Guard
from phasewatch.live.models import Candidate, choose_model, passed_over, with_channel_set
from phasewatch.live.save import Saver, check_folder
from phasewatch.live.scorer import Scorer
from phasewatch.live.tracker import Step
from phasewatch.live.watcher import Outlets, Watched, Watcher, is_alive
from phasewatch.live.webhook import Webhook
from phasewatch.record.base import Clock, HostClock, TelemetrySource

GUARD_LOOK_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be watched, and how.

    Attributes:
        machine: From `find`.
        qmp: A socket that the user named; it must answer.
        models: What `choose_model` chooses from; empty only makes bins.
        channels: Channel set that the user named; empty lets `choose_model` choose. Only a named one that has
            translation counters makes QEMU count them.
        clean_day: What is usual on it while it is known clean, from `phasewatch commission`; None where nobody knows.
        save: Store that gets the readings; None keeps nothing.
        webhook: URL that alarms are posted to; empty for none.
        seconds: How long; 0 until the VM is gone or the watch is interrupted.
    """

    machine: Running
    qmp: Path | None = None
    models: tuple[Candidate, ...] = ()
    channels: str = ""
    clean_day: Reference | None = None
    save: Path | None = None
    webhook: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a watch came to, and how it was set up; `left_as_found` is False where something of ours may still stand in the VM."""

    watched: Watched
    model: str
    threat: str
    masked: tuple[str, ...]
    caveat: str
    left_as_found: bool
    posted: int
    not_posted: int


def run_watch(
    request: Request,
    emit: Callable[[Event, bool], None],
    say: Callable[[str], None],
    *,
    clock: Clock | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Report:
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

    async def main() -> Report:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it was told to outlive its terminal: nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            with suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread: who runs us cancels
                loop.add_signal_handler(number, task.cancel if task else lambda: None)
        return await watch(request, emit, say, clock=clock or HostClock(), on_step=on_step)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:  # interrupted before the first window
        raise KeyboardInterrupt from None


async def watch(
    request: Request,
    emit: Callable[[Event, bool], None],
    say: Callable[[str], None],
    *,
    clock: Clock,
    on_step: Callable[[Step], None] | None = None,
) -> Report:
    """Watch until the end; see `run_watch`. Cancelling it ends it in order, with a report."""
    jit = jit_use(request.channels)
    if request.channels:
        request = replace(request, models=with_channel_set(request.models, request.channels))
    hook = Webhook(request.webhook, say) if request.webhook else None
    if request.save and (why := check_folder(request.save)):
        say(f"--save {request.save}: nothing can be written now: {why}; the machine is watched all the same")
    found = await survey(request.machine, qmp=request.qmp, clock=clock)
    found.jit = jit
    with ExitStack() as stack:
        guard = stack.enter_context(Guard(found.task))  # before anything in the VM is touched
        sources: Sequence[TelemetrySource] = ()
        watched = Watched()
        scorer: Scorer | None = None
        left = True
        try:
            sources = await _attach(found)
            scorer = _choose(request, found)
            _introduce(request, found, scorer, say)
            keeping = asyncio.create_task(keep_guard(guard, say))
            try:
                watched = await _watch(request, found, sources, scorer, hook, emit, say, clock, on_step)
            finally:
                keeping.cancel()
        finally:
            left = await detach(found, sources) or not is_alive(found)
            if left:
                guard.dismiss()
            if hook is not None:
                await hook.close()
    facts = found.facts
    return Report(
        watched=watched, model=scorer.model if scorer else "", threat=scorer.threat if scorer else "",
        masked=tuple(found.masked), caveat=scorer.caveat(facts.accel, facts.arch) if scorer else "", left_as_found=left,
        posted=hook.sent if hook else 0, not_posted=hook.lost if hook else 0,
    )  # fmt: skip


async def keep_guard(guard: Guard, say: Callable[[str], None]) -> None:
    """Start another guard when the one that there was is gone; what cannot be started now is tried again."""
    is_told = False
    while True:
        await asyncio.sleep(GUARD_LOOK_S)
        try:
            if guard.replace_if_dead():
                say(f"the guard was gone, killed by somebody; process {guard.pid} takes its place")
                is_told = False
        except OSError as exc:
            if not is_told:
                is_told = True
                say(f"the guard is gone and no other can be started: {exc.strerror}; the watch goes on unguarded")


async def _attach(found: Survey) -> tuple[TelemetrySource, ...]:
    try:
        return await attach(found)
    except OSError as exc:
        raise MachineError(f"process {found.facts.pid}: its /proc cannot be read: {exc.strerror}") from exc


def _choose(request: Request, found: Survey) -> Scorer | None:
    if not request.models:
        return None
    try:
        return choose_model(request.models, found.available, arch=found.facts.arch, clean_day=request.clean_day)
    except PhasewatchError as exc:
        lines = "; ".join(explain_masks({n: w for n, w in found.masked.items() if not n.startswith("guest.")}))
        raise type(exc)(f"{exc}. Missing here: {lines or 'nothing'}") from exc


def _introduce(request: Request, found: Survey, scorer: Scorer | None, say: Callable[[str], None]) -> None:
    facts = found.facts
    say(
        f"watching {facts.name} (process {facts.pid}): {facts.arch} under {facts.accel or 'an unknown accelerator'}, "
        f"{facts.vcpus} vCPU, {len(found.available)} of 46 channels"
    )
    for line in (*explain_masks(found.masked), *found.notes):
        say(f"  {line}")
    if scorer is not None:
        say(f"model {scorer.model}, mask {scorer.threat}, {scorer.where}")
        for threat, lacks in passed_over(request.models, found.available, arch=facts.arch, chosen=scorer):
            more = f" and {len(lacks) - 4} more" if len(lacks) > 4 else ""
            say(f"  not the larger mask {threat}: this VM does not give {', '.join(lacks[:4])}{more}")
        if scorer.alarm is None:
            say("  this model was trained without an alarm: phases only")
        if caveat := scorer.caveat(facts.accel, facts.arch):
            say(f"  {caveat}")


async def _watch(
    request: Request,
    found: Survey,
    sources: Sequence[TelemetrySource],
    scorer: Scorer | None,
    hook: Webhook | None,
    emit: Callable[[Event, bool], None],
    say: Callable[[str], None],
    clock: Clock,
    on_step: Callable[[Step], None] | None,
) -> Watched:
    saved: list[str] = []
    saver = Saver(request.save, found, clock, lambda path: saved.append(str(path)), say) if request.save else None

    def tell(event: Event, news: bool) -> None:
        emit(event, news)
        if news and hook is not None:
            hook.post(event)

    outlets = Outlets(
        emit=tell, say=say, keep=saver.keep if saver else None, on_step=on_step, backlog=hook.backlog if hook else lambda: 0
    )  # fmt: skip
    watcher = Watcher(found, sources, scorer, outlets, clock, host=found.facts.host_id)
    try:
        watched = await watcher.run(seconds=request.seconds)
    finally:
        if saver is not None:
            saver.close()
    if saver is None:
        return watched
    return replace(watched, saved=saved, not_saved=saver.lost, save_failure=saver.failure)
