"""The command `record`: a plan, or a workload or a machine of the user's own, becomes a store of bundles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from phasewatch.cli import common
from phasewatch.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from phasewatch.lab.custom_workload import CustomMachine, CustomWorkload
    from phasewatch.lab.plan import PlanSpec, RecordingSession


def record(
    plan: str = typer.Option("", help="A built-in plan (smoke, lab-v1) or a TOML file."),
    out: Path = typer.Option(..., help="The store that the bundles go to."),
    profile_file: Path = typer.Option(None, help="Instead of a plan: a workload of your own, a TOML file."),
    image: Path = typer.Option(None, help="Instead of our guest: a qcow2 image of your own that boots by itself."),
    driver: Path = typer.Option(None, help="The script that speaks the driver's protocol in that image."),
    host_id: str = typer.Option("", help="With --image: the host's name in the store; the image's name if absent."),
    machine: str = typer.Option(None, help="With --image: pc or q35; pc if absent."),
    mem: int = typer.Option(None, help="With --image: MiB of memory; 1024 if absent."),
    vcpus: int = typer.Option(None, help="With --image: how many CPUs; 1 if absent."),
    boot_deadline: float = typer.Option(
        None, help="With --image: seconds until its driver's first word; 300 if absent."
    ),
    dry_run: bool = typer.Option(False, help="Only show the plan, and what elapsed time alone would score on it."),
    force: bool = typer.Option(False, help="Record a plan though elapsed time alone tells its phases."),
    resume: bool = typer.Option(True, help="Continue a plan that the store holds part of."),
    hosts: str = typer.Option("", help="Only these hosts, separated by commas."),
    role: str = typer.Option("", help="Only lab, commission or soak episodes."),
    limit: int = typer.Option(0, min=0, help="At most so many sessions; 0 for all."),
    idle_wait: float = typer.Option(600.0, min=0, help="Seconds to wait for an idle machine before each session."),
    accel: str = typer.Option("", help="Insist on kvm or tcg; otherwise KVM where a real kernel boots on it."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Boot real virtual machines, play harmless profiles in them, and write one bundle an episode.

    Example: phasewatch record --plan smoke --out my-store

    A workload of your own: phasewatch record --profile-file mine.toml --out my-store

    A machine of your own: phasewatch record --image disk.qcow2 --driver driver.sh --out my-store
    """
    from dataclasses import asdict

    from phasewatch.errors import UsageError, suggest_names
    from phasewatch.lab.campaign import RecordingOptions, default_cache, record_plan
    from phasewatch.lab.custom_workload import CustomMachineOptions, read_custom_machine
    from phasewatch.lab.plan import check_elapsed_time
    from phasewatch.lab.qemu_command import HOST_SHAPES
    from phasewatch.types import EpisodeRole

    if accel not in ("", "kvm", "tcg"):
        raise UsageError(f"--accel {accel}: kvm or tcg")
    if role and role not in list(EpisodeRole):
        raise UsageError(f"--role {role}: one of {', '.join(EpisodeRole)}")
    if driver is not None and image is None:
        raise UsageError("--driver goes with --image; our own guest brings its driver")
    shape: dict[str, Any] = {
        "host_id": host_id or None, "machine": machine, "mem_mib": mem, "vcpus": vcpus, "boot_s": boot_deadline,
    }  # fmt: skip
    shape = {name: value for name, value in shape.items() if value is not None}
    for option, name in _MACHINE_OPTIONS.items():
        common.check_option_pair(option, "--image", alone=name in shape and image is None)
    own = read_custom_machine(image, driver, CustomMachineOptions(**shape)) if image is not None else None
    task = _build_task(plan, profile_file, own, named=(driver or image or Path()).stem)
    alone = check_elapsed_time(task.spec, force=force or dry_run)
    wanted, there = common.parse_names(hosts), {s.host_id for s in task.sessions}
    for host in wanted:
        if host not in there:
            raise UsageError(f"--hosts: plan {task.spec.name} has no host {host!r}; {suggest_names(host, there)}")
    sessions = [
        s for s in task.sessions
        if (not wanted or s.host_id in wanted) and (not role or all(slot.role == role for slot in s.slots))
    ]  # fmt: skip
    if not sessions:
        asked = " ".join([f"--role {role}"] * bool(role) + [f"--hosts {hosts}"] * bool(wanted))
        raise UsageError(f"{asked or task.spec.name}: plan {task.spec.name} has no such session")
    sessions = sessions[: limit or None]
    if dry_run:
        lines = [
            *common.render_table(_render_plan_rows(sessions)),
            f"elapsed time alone scores macro-F1 {alone:.2f} on this plan",
        ]
        listed = [asdict(s) for s in sessions]
        common.print_result({"elapsed_time": alone, "sessions": listed}, as_json=as_json, lines=lines)
        return
    if not resume and out.is_dir() and any(out.glob("*/*.tar.zst")):
        raise UsageError(f"{out}: holds bundles already; leave out --no-resume to continue, or name a new folder")
    options = RecordingOptions(
        cache=default_cache(),
        shapes=(own.shape,) if own else HOST_SHAPES,
        idle_wait_s=idle_wait,
        accel=accel,
        scripts=task.scripts,
        custom_machine=own,
    )
    shown: AbstractContextManager[Progress] = nullcontext(NO_PROGRESS) if as_json else ProgressBar()
    with shown as progress:
        done = record_plan(sessions, store=out, options=options, progress=progress)
    words = f"{done.recorded} episodes recorded ({done.crowded} of them crowded), {done.present} were there, {len(done.failed)} given up"
    common.print_result(asdict(done) | {"store": str(out)}, as_json=as_json, lines=[*done.failed, words, str(out)])
    if done.failed:
        raise typer.Exit(1)


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """A progress bar on stderr; hidden where stderr is not a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        console = Console(stderr=True, markup=False, highlight=False)
        self._bar = RichProgress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=1,  # it shares the machine with the VMs that are measured
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Move the bar."""
        self._bar.update(self._task, description=detail, completed=done, total=total)


# Option → field of `CustomMachineOptions`.
_MACHINE_OPTIONS = {"--host-id": "host_id", "--machine": "machine", "--mem": "mem_mib", "--vcpus": "vcpus", "--boot-deadline": "boot_s"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _RecordingTask:
    """What is to be recorded; `scripts` only where our guest plays a workload that is not ours."""

    spec: PlanSpec
    sessions: tuple[RecordingSession, ...]
    scripts: dict[str, str] | None = None


def _build_task(plan: str, profile_file: Path | None, own: CustomMachine | None, *, named: str) -> _RecordingTask:
    from phasewatch.errors import UsageError
    from phasewatch.lab.custom_workload import build_custom_sessions, build_unscripted_workload
    from phasewatch.lab.plan import build_sessions
    from phasewatch.lab.plans import read_plan
    from phasewatch.naming import make_profile_name

    if plan and (profile_file is not None or own is not None):
        raise UsageError("--plan plays our profiles on our guest; leave it out beside --profile-file or --image")
    if profile_file is not None:
        work = _read_workload(profile_file)
    elif own is not None:
        work = build_unscripted_workload(make_profile_name(named))
    elif plan:
        spec = read_plan(plan)
        return _RecordingTask(spec=spec, sessions=build_sessions(spec))
    else:
        raise UsageError("name what to record: --plan smoke, --profile-file FILE or --image DISK --driver SCRIPT")
    if own is not None:
        return _RecordingTask(
            spec=work.spec, sessions=build_custom_sessions(work, hosts=(own.shape.host_id,), alone=True)
        )
    scripts = {f"{work.profile.name}/{sample}/{phase}": text for (sample, phase), text in work.scripts.items()}
    # A sample of which no phase has a script is still one that the guest must know.
    scripts |= {f"{work.profile.name}/{sample.name}/about": sample.about for sample in work.profile.samples}
    return _RecordingTask(spec=work.spec, sessions=build_custom_sessions(work), scripts=scripts)


def _read_workload(path: Path) -> CustomWorkload:
    from phasewatch.errors import PlanError
    from phasewatch.lab.custom_workload import parse_workload

    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise PlanError(f"{path}: not a readable file: {exc}") from exc
    return parse_workload(text, where=str(path))


def _render_plan_rows(sessions: list[RecordingSession]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for number, session in enumerate(sessions):
        for slot in session.slots:
            phases = " ".join(f"{phase}:{seconds:.0f}" for phase, seconds in slot.phases)
            agent = "agent" if slot.agent else ""
            load = f"+{slot.background}" if slot.background else ""
            rows.append((str(number), slot.host_id, str(slot.role), f"{slot.profile}/{slot.sample_name}{load}", agent, f"{slot.duration_s:.0f} s", phases))  # fmt: skip
    return rows
