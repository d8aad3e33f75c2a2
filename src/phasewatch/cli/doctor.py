"""Commands of the laboratory: doctor, channels, simulate; `record` has a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from phasewatch.cli import common
from phasewatch.cli.record import record
from phasewatch.profiles import EPISODE_RANGE_S

if TYPE_CHECKING:
    from phasewatch.binning.storage import ChannelSummary


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (doctor, channels, record, simulate):
        app.command(epilog=common.EXIT_CODES_HELP)(command)


def doctor(as_json: bool = typer.Option(False, "--json", help="One JSON document.")) -> None:
    """Say what is installed here and what this machine lacks of what phasewatch needs; a bug report wants all of it.

    What is missing for one task alone (an extra, QEMU) is named with its remedy; only what everything needs is exit 1.

    Example: phasewatch doctor
    """
    from dataclasses import asdict

    from phasewatch.diagnostics import describe_installation, has_blocking_problem, hide_home, inspect_system
    from phasewatch.errors import StoreError

    here, checks = describe_installation(), inspect_system()
    try:
        corpus = hide_home(str(common.find_bundled_corpus()))
    except StoreError:
        corpus = "not here"
    about = [
        ("phasewatch", f"{here.version}, {here.place}"), ("Python", here.python), ("system", here.system),
        ("machine", here.machine), ("corpus", corpus),
        *(("extra " + extra, state) for extra, state in here.extras.items()),
        ("packages", " ".join(f"{p.name}={p.version}" for p in {p.name: p for p in here.packages if p.version}.values())),
        *((name, value) for name, value in here.settings.items()),
    ]  # fmt: skip
    rows = [
        ("ok" if c.ok else "--", c.name, c.found, "" if c.ok else f"for {c.needed_for}: {c.remedy}") for c in checks
    ]
    missing = sum(not c.ok for c in checks)
    broken = has_blocking_problem(checks)
    without = [extra for extra, state in here.extras.items() if state != "installed"]
    words = (
        "everything is here"
        + (f" but {', '.join(without)}: pip install 'phasewatch[{','.join(without)}]'" if without else "")
        if not missing
        else f"{missing} of {len(checks)} are missing, each only for what its line says"
    )
    if broken:
        words = "phasewatch cannot work here, see the lines for all"
    result = {
        "checks": [asdict(c) for c in checks], "corpus": corpus, "installation": asdict(here) | {"extras": here.extras},
    }  # fmt: skip
    common.print_result(
        result, as_json=as_json, lines=[*common.render_table(about), "", *common.render_table(rows), words]
    )
    if broken:
        raise typer.Exit(1)


def channels(
    corpus: bool = typer.Option(False, "--corpus", help="Also the values that each took in the bundled recordings."),
    store: Path = typer.Option(None, help="With --corpus: another store than the bundled one."),
    extra: Path = typer.Option(None, "--channels", metavar="TOML", help=common.CHANNELS_HELP),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """List the 46 channels: source, kind, unit, who is trusted, and which counter each reads.

    Example: phasewatch channels --json

    The observed range of each: phasewatch channels --corpus
    """
    from dataclasses import asdict

    from phasewatch.channels import CHANNELS

    common.check_option_pair("--store", "--corpus", alone=store is not None and not corpus)
    listed: list[dict[str, object]] = [asdict(c) | {"in_deployment": c.in_deployment} for c in CHANNELS]
    if not corpus:
        rows = [
            (c.full_name, c.kind, c.unit, f"trust {c.trust}", c.accel if c.arch == "any" else f"{c.accel}, {c.arch}", c.about, c.reads)
            for c in CHANNELS
        ]  # fmt: skip
        common.print_result({"channels": listed}, as_json=as_json, lines=common.render_table(rows))
        return
    where = store or common.find_bundled_corpus()
    seen = _measure_observed_values(where)
    for row, found in zip(listed, seen, strict=True):
        row["observed"] = {n: getattr(found, n) for n in ("known", "moving", "low", "median", "p95", "high")}
    lines: list[tuple[str, ...]] = [("channel", "unit", "lowest", "median", "95 %", "highest", "known", "moves in")]
    lines += [
        (o.channel.full_name, o.channel.unit, *(f"{v:.4g}" for v in (o.low, o.median, o.p95, o.high)), f"{o.known_share:.0%}", f"{o.varying_share:.0%}")
        for o in seen
    ]  # fmt: skip
    common.print_result(
        {"channels": listed, "store": str(where)}, as_json=as_json, lines=[*common.render_table(lines), str(where)]
    )


def _measure_observed_values(store: Path) -> tuple[ChannelSummary, ...]:
    """Sweep a store into a folder that goes again, and look at its bins."""
    import tempfile

    from phasewatch.binning.storage import open_bins, summarise_channels
    from phasewatch.validate.sweep import sweep

    with tempfile.TemporaryDirectory(prefix="phasewatch-channels-") as folder:
        sweep(store, Path(folder), workers=2)
        grids = open_bins(Path(folder) / "grids")
        return summarise_channels([grids.episode_bins(row) for row in grids.rows])


def simulate(
    out: Path = typer.Option(..., help="A folder that does not exist yet."),
    hosts: int = typer.Option(6, min=1, help="How many hosts."),
    episodes: int = typer.Option(
        240, min=1, help="How many in all, dealt over the hosts; far fewer leave some splits unbuilt."
    ),
    seed: int = typer.Option(0, help="Same seed, same bytes."),
    faults: float = typer.Option(0.0, min=0, max=1, help="Share of episodes that get a fault."),
    kinds: str = typer.Option("", help="Only these faults, separated by commas, as the truth file spells them."),
    seconds: tuple[float, float] = typer.Option(
        EPISODE_RANGE_S, metavar="SHORTEST LONGEST", help="Shortest and longest lab episode: --seconds 100 180."
    ),
    days: float = typer.Option(10.0, min=0, help="Over how many days at least the episodes are spread."),
    host_effect: float = typer.Option(
        0.20, min=0, help="How far hosts lie apart, in standard deviations of a logarithm."
    ),
    episode_effect: float = typer.Option(
        0.25, min=0, help="How far episodes of one host lie apart: what makes windows of an episode alike."
    ),
    drift: float = typer.Option(0.05, min=0, help="How far a host moves in a week."),
    noise: float = typer.Option(0.50, min=0, help="How far an activity moves from tick to tick."),
    malware_intensity: float = typer.Option(
        1.0, min=0, help="Factor on everything that malware does; above 1 it is easier to tell."
    ),
    workers: int = typer.Option(2, min=1, help="Processes."),
    quiet: bool = typer.Option(False, "--quiet", help="Show no progress."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Make a store of make-believe episodes, marked simulated, and beside it the truth about each.

    Example: phasewatch simulate --hosts 4 --episodes 80 --seed 1 --faults 0.1 --out made-up

    Only two kinds of fault: add --kinds gap,missing-netflow
    """
    from phasewatch.simulate import SimulationSettings
    from phasewatch.simulate import simulate as make

    common.check_option_pair("--kinds", "--faults", alone=bool(kinds) and faults == 0)
    knobs = SimulationSettings(
        host_effect=host_effect, episode_effect=episode_effect, tick_noise=noise, drift_per_week=drift,
        malware_intensity=malware_intensity,
    )  # fmt: skip
    with common.show_progress(quiet=as_json or quiet) as tell:
        made = make(
            out, hosts=hosts, episodes=episodes, seed=seed, faults=faults, workers=workers,
            between_s=seconds, days=days, knobs=knobs, kinds=tuple(filter(None, kinds.split(","))),
            on_progress=lambda n: tell("simulate", n, episodes, ""),
        )  # fmt: skip
    result = {"store": str(made.store), "truth": str(made.truth), "episodes": made.episodes, "faulty": made.faulty}
    lines = [
        f"{made.episodes} simulated episodes, {made.faulty} with a fault; the truth is in {made.truth}",
        str(made.store),
    ]
    common.print_result(result, as_json=as_json, lines=lines)
