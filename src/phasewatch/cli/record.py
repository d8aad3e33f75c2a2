"""Commands that make episodes: record real virtual machines, or simulate their telemetry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from phasewatch.cli import common
from phasewatch.cli.options import AsJson, Workers
from phasewatch.cli.progress import show_progress
from phasewatch.errors import PlanError, UsageError, suggest_names
from phasewatch.lab import campaign
from phasewatch.lab.custom_workload import (
    CustomMachine,
    CustomMachineOptions,
    CustomWorkload,
    build_custom_sessions,
    build_unscripted_workload,
    parse_workload,
    read_custom_machine,
)
from phasewatch.lab.guest_image import DEFAULT_DATA_MIB
from phasewatch.lab.plan import (
    MAX_PARALLEL_VMS,
    PlanSpec,
    RecordingSession,
    build_sessions,
    list_plan_hosts,
    select_sessions,
)
from phasewatch.lab.plan_checks import PlanBaselines, check_plan, refuse_leaky_plan
from phasewatch.lab.plans import read_plan
from phasewatch.lab.walks import list_load_kinds
from phasewatch.naming import make_profile_name
from phasewatch.profiles import EPISODE_RANGE_S
from phasewatch.simulate import SimulationSettings
from phasewatch.simulate import simulate as simulate_store
from phasewatch.types import EpisodeRole

__all__ = ["image", "record", "simulate"]


def record(
    out: Annotated[Path, typer.Option(help="Store for the bundles.")],
    plan: Annotated[str, typer.Option(help="Built-in plan (smoke, lab-v1, lab-v2, lab-v2-pilot) or a TOML file.")] = "",
    profile_file: Annotated[
        Path | None, typer.Option(help="Instead of a plan: TOML file of your own workload.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Instead of the built-in guest: your own bootable qcow2 image.")
    ] = None,
    driver: Annotated[
        Path | None, typer.Option(help="With --image: script that speaks the driver protocol in it.")
    ] = None,
    host_id: Annotated[
        str, typer.Option(help="With --image: host id in the store; default: the image's file name.")
    ] = "",
    machine: Annotated[str | None, typer.Option(help="With --image: pc (default) or q35.")] = None,
    mem: Annotated[int | None, typer.Option(help="With --image: memory in MiB; default 1024.")] = None,
    vcpus: Annotated[int | None, typer.Option(help="With --image: number of vCPUs; default 1.")] = None,
    boot_deadline: Annotated[
        float | None, typer.Option(help="With --image: seconds to wait for the driver's first message; default 300.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only print the plan and its baselines: what time, load and durations alone tell."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Record although a baseline of the plan is above its limit.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Continue a plan of which the store has a part.")] = True,
    hosts: Annotated[str, typer.Option(help="Only these hosts, separated by commas.")] = "",
    role: Annotated[str, typer.Option(help="Only lab, commission or soak episodes.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Maximum number of sessions; 0 records all.")] = 0,
    idle_wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for an idle machine before a session.")
    ] = 600.0,
    parallel: Annotated[
        int | None, typer.Option(min=1, max=MAX_PARALLEL_VMS, help="VMs at a time; default: as the plan says.")
    ] = None,
    accel: Annotated[str, typer.Option(help="Require kvm or tcg; default: KVM where it works.")] = "",
    as_json: AsJson = False,
) -> None:
    """Record episodes in real VMs and write one bundle per episode.

    The guests play harmless profiles: no malware is used.

    Example: phasewatch record --plan smoke --out my-store
    """
    if accel not in ("", "kvm", "tcg"):
        raise UsageError(f"--accel {accel}: expected kvm or tcg")
    if role and role not in list(EpisodeRole):
        raise UsageError(f"--role {role}: expected one of {', '.join(EpisodeRole)}")
    common.check_option_pair("--driver", "--image", is_partner_missing=driver is not None and image is None)
    shape = {"host_id": host_id or None, "machine": machine, "mem_mib": mem, "vcpus": vcpus, "boot_s": boot_deadline}
    own = _read_machine(image, driver, {name: value for name, value in shape.items() if value is not None})
    task = _build_task(plan, profile_file, own, default_name=(driver or image or Path()).stem)
    baselines = check_plan(task.spec, task.sessions, force=force or dry_run)
    sessions = select_sessions(
        task.sessions, plan=task.spec.name, hosts=common.parse_names(hosts), role=role, limit=limit
    )
    if dry_run:
        lines = [
            *common.render_table(_render_plan_rows(sessions)),
            *_render_baselines(baselines),
        ]
        result = {
            "elapsed_time": baselines[0].value,
            "baselines": [asdict(row) for row in baselines],
            "sessions": [asdict(s) for s in sessions],
        }
        common.print_result(result, as_json=as_json, lines=lines)
        if not force:
            refuse_leaky_plan(task.spec, baselines)
        return
    if not resume and out.is_dir() and any(out.glob("*/*.tar.zst")):
        raise UsageError(f"{out}: has bundles already; leave out --no-resume to continue, or name a new folder")
    with show_progress(quiet=as_json) as progress:
        done = campaign.record_plan(
            list(sessions),
            store=out,
            options=campaign.RecordingOptions(
                cache=campaign.default_cache(),
                shapes=(own.shape,) if own else tuple(shape for shape, _ in list_plan_hosts(task.spec)),
                idle_wait_s=idle_wait,
                accel=accel,
                scripts=task.scripts,
                custom_machine=own,
                parallel_vms=parallel or task.spec.parallel_vms,
            ),
            progress=progress,
        )
    summary = (
        f"{done.recorded} episodes recorded, {done.crowded} of them with CPU contention; {done.present} skipped "
        f"(already in the store), {len(done.failed)} failed; {done.episodes_per_hour:.0f} episodes an hour"
    )
    skipped = [
        f"{host.host_id}: {host.episodes} episodes skipped ({host.code}): {host.reason}" for host in done.skipped_hosts
    ]
    lines = [*done.failed, *skipped, summary, str(out)]
    if done.failed_workloads:
        lines.insert(-2, f"{done.failed_workloads} attempts discarded because a workload failed in the guest")
    common.print_result(asdict(done) | {"store": str(out)}, as_json=as_json, lines=lines)
    if done.failed or done.skipped_hosts:
        raise typer.Exit(1)


# Option → argument of `read_custom_machine`.
_MACHINE_OPTIONS = {
    "--host-id": "host_id",
    "--machine": "machine",
    "--mem": "mem_mib",
    "--vcpus": "vcpus",
    "--boot-deadline": "boot_s",
}


def _read_machine(image: Path | None, driver: Path | None, shape: dict[str, Any]) -> CustomMachine | None:
    for option, name in _MACHINE_OPTIONS.items():
        common.check_option_pair(option, "--image", is_partner_missing=name in shape and image is None)
    return read_custom_machine(image, driver, CustomMachineOptions(**shape)) if image is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _RecordingTask:
    """What is recorded; `scripts` only where the built-in guest plays a user's own workload."""

    spec: PlanSpec
    sessions: tuple[RecordingSession, ...]
    scripts: dict[str, str] | None = None


def _build_task(
    plan: str, profile_file: Path | None, own: CustomMachine | None, *, default_name: str
) -> _RecordingTask:
    if plan and (profile_file is not None or own is not None):
        raise UsageError("--plan uses built-in profiles and guests; leave it out with --profile-file or --image")
    if profile_file is not None:
        work = _read_workload(profile_file)
    elif own is not None:
        work = build_unscripted_workload(make_profile_name(default_name))
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
    # The guest must know a sample of which no phase has a script, too.
    scripts |= {f"{work.profile.name}/{sample.name}/about": sample.about for sample in work.profile.samples}
    return _RecordingTask(spec=work.spec, sessions=build_custom_sessions(work), scripts=scripts)


def _read_workload(path: Path) -> CustomWorkload:
    try:
        text = path.read_text("utf-8")
    except OSError as exc:
        raise PlanError(f"{path}: {exc.strerror}; --profile-file names a TOML file with a workload") from exc
    except UnicodeDecodeError as exc:
        raise PlanError(f"{path}: not UTF-8 text; --profile-file names a TOML file with a workload") from exc
    return parse_workload(text, where=str(path))


def _render_plan_rows(sessions: tuple[RecordingSession, ...]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for number, session in enumerate(sessions):
        for slot in session.slots:
            kinds = list_load_kinds(slot.loads)
            load = f"+{','.join(kinds)}" if kinds else ""
            load += f" by {slot.routine}" if slot.routine else ""
            rows.append(
                (
                    str(number),
                    slot.host_id,
                    str(slot.role),
                    f"{slot.profile}/{slot.sample_name}{load}",
                    "agent" if slot.agent else "",
                    f"{slot.duration_s:.0f} s",
                    " ".join(f"{phase}:{seconds:.0f}" for phase, seconds in slot.phases),
                )
            )
    return rows


def image(
    name: Annotated[str, typer.Argument(help="busybox or debian.")],
    data: Annotated[
        int, typer.Option(min=1, help="Size of the documents on its data disk, in MiB.")
    ] = DEFAULT_DATA_MIB,
    as_json: AsJson = False,
) -> None:
    """Build a guest image now, so that recording needs no network.

    `record` builds a missing image by itself. The debian image needs root, debootstrap and 3 GB of free disk, once.

    Example: phasewatch image debian
    """
    if name not in campaign.IMAGE_BUILDERS:
        raise UsageError(f"no guest image {name!r}; {suggest_names(name, campaign.IMAGE_BUILDERS)}")
    built = campaign.build_image(name, data_mib=data)
    result = {name: str(value) for name, value in asdict(built).items() if value is not None}
    common.print_result(result, as_json=as_json, lines=common.render_table(list(result.items())))


def _render_baselines(baselines: PlanBaselines) -> list[str]:
    return [
        f"{row.about}: {row.value:.2f}"
        + (f" (the drawn episodes: {row.drawn:.2f})" if row.drawn is not None else "")
        + f"; accepted {row.low:.2f} to {row.high:.2f}"
        for row in baselines
    ]


def simulate(
    out: Annotated[Path, typer.Option(help="New folder for the store.")],
    hosts: Annotated[int, typer.Option(min=1, help="Number of hosts.")] = 6,
    episodes: Annotated[
        int, typer.Option(min=1, help="Number of episodes on all hosts; some splits need about 80 or more.")
    ] = 240,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same bytes.")] = 0,
    faults: Annotated[float, typer.Option(min=0, max=1, help="Share of episodes with a fault.")] = 0.0,
    fault_kinds: Annotated[
        str, typer.Option(help="Only these faults, separated by commas, named as in the ground-truth file.")
    ] = "",
    seconds: Annotated[
        tuple[float, float], typer.Option(metavar="MIN MAX", help="Shortest and longest lab episode in seconds.")
    ] = EPISODE_RANGE_S,
    days: Annotated[float, typer.Option(min=0, help="Minimum number of days that the episodes span.")] = 10.0,
    host_effect: Annotated[
        float, typer.Option(min=0, help="Spread between hosts, as a standard deviation of log rates.")
    ] = 0.20,
    episode_effect: Annotated[
        float, typer.Option(min=0, help="Spread between episodes of one host; correlates the windows of an episode.")
    ] = 0.25,
    drift: Annotated[float, typer.Option(min=0, help="Drift of a host per week.")] = 0.05,
    noise: Annotated[float, typer.Option(min=0, help="Noise from tick to tick.")] = 0.50,
    malware_intensity: Annotated[
        float, typer.Option(min=0, help="Factor on all malware activity; above 1 it is easier to detect.")
    ] = 1.0,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Generate a store of simulated episodes and a ground-truth file.

    The episodes are marked as simulated. The ground truth lists the fault of each faulty episode.

    Example: phasewatch simulate --hosts 4 --episodes 80 --faults 0.1 --out simulated
    """
    common.check_option_pair("--fault-kinds", "--faults", is_partner_missing=bool(fault_kinds) and faults == 0)
    knobs = SimulationSettings(
        host_effect=host_effect,
        episode_effect=episode_effect,
        tick_noise=noise,
        drift_per_week=drift,
        malware_intensity=malware_intensity,
    )
    with show_progress(quiet=as_json) as progress:
        made = simulate_store(
            out,
            hosts=hosts,
            episodes=episodes,
            seed=seed,
            faults=faults,
            workers=workers,
            between_s=seconds,
            days=days,
            settings=knobs,
            kinds=common.parse_names(fault_kinds),
            progress=progress,
        )
    result = {"store": str(made.store), "truth": str(made.truth), "episodes": made.episodes, "faulty": made.faulty}
    lines = [
        f"{made.episodes} simulated episodes, {made.faulty} with a fault; ground truth: {made.truth}",
        str(made.store),
    ]
    common.print_result(result, as_json=as_json, lines=lines)
