"""Options and arguments that several commands share: one idea has one name and one help text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AsJson",
    "ChannelSets",
    "CustomChannels",
    "Engine",
    "Episodes",
    "IncludeDegraded",
    "Limit",
    "ModelPath",
    "OptionalStore",
    "RayAddress",
    "RunFolder",
    "RunOut",
    "Smoothing",
    "SmoothingOption",
    "Speed",
    "TokenFile",
    "VmName",
    "VmPid",
    "VmQmp",
    "Workers",
]


class Smoothing(StrEnum):
    """The smoothing of displayed phases, by its name in `phasewatch.models.smoothing`."""

    NONE = "none"
    PHASE = "phase"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ChannelSets = Annotated[
    str, typer.Option("--channels", metavar="NAMES", help="Only these channel sets, such as realistic,portable.")
]
CustomChannels = Annotated[
    Path | None,
    typer.Option("--custom-channels", metavar="TOML", help="TOML file with additional channels; kept in the run."),
]
Engine = Annotated[str, typer.Option(help="How bundles are processed: in `local` processes or with `ray`.")]
Episodes = Annotated[list[str], typer.Option(help="Episode to replay; may be repeated.")]
IncludeDegraded = Annotated[bool, typer.Option(help="Use episodes with missing or repaired data.")]
Limit = Annotated[
    int,
    typer.Option(min=0, help="Use only N bundles, chosen at random but evenly over hosts and profiles; 0 takes all."),
]
ModelPath = Annotated[
    Path | None, typer.Option(help="Checkpoint, run (its deploy model) or edge bundle; default: the bundled model.")
]
OptionalStore = Annotated[
    str | None, typer.Argument(help="Store: a folder or s3://bucket/prefix; default: the bundled recordings.")
]
RayAddress = Annotated[
    str, typer.Option(help="With --engine ray: address of a running cluster; default: a local cluster.")
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of the run.")]
RunOut = Annotated[Path, typer.Option(help="Folder of the run.")]
SmoothingOption = Annotated[
    Smoothing, typer.Option(help="Show phases of each window alone, or after the phase filter; alarms do not change.")
]
Speed = Annotated[float, typer.Option(min=0.1, max=1000, help="Playback speed (1 = real time).")]
TokenFile = Annotated[Path | None, typer.Option(help="File with the dashboard's token; created on first start.")]
VmName = Annotated[str | None, typer.Option(help="Name of the VM.")]
VmPid = Annotated[int | None, typer.Option(help="Process id of QEMU.")]
VmQmp = Annotated[Path | None, typer.Option(help="QMP socket of the VM; must answer if given.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes.")]
