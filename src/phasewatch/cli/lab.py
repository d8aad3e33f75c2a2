"""Commands of the laboratory: doctor, channels, record, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from phasewatch.cli import base

if TYPE_CHECKING:
    from phasewatch.record.plan import Session


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (doctor, channels, record, simulate):
        app.command(epilog=base.CODES)(command)


def doctor(as_json: bool = typer.Option(False, "--json", help="One JSON document.")) -> None:
    """Say what this machine has of what phasewatch needs, and how to get the rest.

    Example: phasewatch doctor
    """
    from dataclasses import asdict

    from phasewatch.record.doctor import examine

    checks = examine()
    rows = [
        ("ok" if c.ok else "--", c.name, c.found, "" if c.ok else f"for {c.needed_for}: {c.remedy}") for c in checks
    ]
    missing = sum(not c.ok for c in checks)
    words = "everything is here" if not missing else f"{missing} of {len(checks)} are missing"
    base.answer({"checks": [asdict(c) for c in checks]}, as_json=as_json, lines=[*base.table(rows), words])
    if missing:
        raise typer.Exit(1)


def channels(as_json: bool = typer.Option(False, "--json", help="One JSON document.")) -> None:
    """List the 46 channels: source, kind, unit, who is trusted, and which counter each reads.

    Example: phasewatch channels --json
    """
    from dataclasses import asdict

    from phasewatch.channels import CHANNELS

    rows = [
        (
            c.full_name,
            c.kind,
            c.unit,
            f"trust {c.trust}",
            c.accel if c.arch == "any" else f"{c.accel}, {c.arch}",
            c.about,
        )
        for c in CHANNELS
    ]
    result = {"channels": [asdict(c) | {"in_deployment": c.in_deployment} for c in CHANNELS]}
    base.answer(result, as_json=as_json, lines=base.table(rows))


def record(
    plan: str = typer.Option(..., help="A built-in plan (smoke, lab-v1) or a TOML file."),
    out: Path = typer.Option(..., help="The store that the bundles go to."),
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
    """
    from dataclasses import asdict

    from phasewatch.errors import UsageError
    from phasewatch.record.campaign import default_cache, record_plan
    from phasewatch.record.plan import build_sessions, check_elapsed_time
    from phasewatch.record.plans import read_plan
    from phasewatch.record.progress import Bar, Silence
    from phasewatch.vocab import Role

    if accel not in ("", "kvm", "tcg"):
        raise UsageError(f"--accel {accel}: kvm or tcg")
    if role and role not in list(Role):
        raise UsageError(f"--role {role}: one of {', '.join(Role)}")
    spec = read_plan(plan)
    alone = check_elapsed_time(spec, force=force or dry_run)
    wanted = set(filter(None, hosts.split(",")))
    sessions = [
        s for s in build_sessions(spec)
        if (not wanted or s.host_id in wanted) and (not role or all(slot.role == role for slot in s.slots))
    ]  # fmt: skip
    if not sessions:
        raise UsageError(f"--hosts {hosts} --role {role}: plan {spec.name} has no such session")
    sessions = sessions[: limit or None]
    if dry_run:
        lines = [*base.table(_plan_rows(sessions)), f"elapsed time alone scores macro-F1 {alone:.2f} on this plan"]
        listed = [asdict(s) for s in sessions]
        base.answer({"elapsed_time": alone, "sessions": listed}, as_json=as_json, lines=lines)
        return
    if not resume and out.is_dir() and any(out.glob("*/*.tar.zst")):
        raise UsageError(f"{out}: holds bundles already; leave out --no-resume to continue, or name a new folder")
    if as_json:
        done = record_plan(
            sessions, store=out, cache=default_cache(), progress=Silence(), idle_wait_s=idle_wait, accel=accel
        )
    else:
        with Bar() as bar:
            done = record_plan(
                sessions, store=out, cache=default_cache(), progress=bar, idle_wait_s=idle_wait, accel=accel
            )
    words = f"{done.recorded} episodes recorded ({done.crowded} of them crowded), {done.present} were there, {len(done.failed)} given up"
    base.answer(asdict(done) | {"store": str(out)}, as_json=as_json, lines=[*done.failed, words, str(out)])
    if done.failed:
        raise typer.Exit(1)


def _plan_rows(sessions: list[Session]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for number, session in enumerate(sessions):
        for slot in session.slots:
            phases = " ".join(f"{phase}:{seconds:.0f}" for phase, seconds in slot.phases)
            agent = "agent" if slot.agent else ""
            load = f"+{slot.background}" if slot.background else ""
            rows.append((str(number), slot.host_id, str(slot.role), f"{slot.profile}/{slot.sample_name}{load}", agent, f"{slot.duration_s:.0f} s", phases))  # fmt: skip
    return rows


def simulate(
    out: Path = typer.Option(..., help="A folder that does not exist yet."),
    hosts: int = typer.Option(6, min=1, help="How many hosts."),
    episodes: int = typer.Option(240, min=1, help="How many episodes in all, dealt over the hosts."),
    seed: int = typer.Option(0, help="Same seed, same bytes."),
    faults: float = typer.Option(0.0, min=0, max=1, help="Share of episodes that get a fault."),
    workers: int = typer.Option(2, min=1, help="Processes."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Make a store of make-believe episodes, marked simulated, and beside it the truth about each.

    Example: phasewatch simulate --hosts 4 --episodes 80 --seed 1 --faults 0.1 --out made-up
    """
    from phasewatch.simulate import simulate as make

    with base.progress(quiet=as_json) as tell:
        made = make(
            out, hosts=hosts, episodes=episodes, seed=seed, faults=faults, workers=workers,
            on_progress=lambda n: tell("simulate", n, episodes, ""),
        )  # fmt: skip
    result = {"store": str(made.store), "truth": str(made.truth), "episodes": made.episodes, "faulty": made.faulty}
    lines = [
        f"{made.episodes} simulated episodes, {made.faulty} with a fault; the truth is in {made.truth}",
        str(made.store),
    ]
    base.answer(result, as_json=as_json, lines=lines)
