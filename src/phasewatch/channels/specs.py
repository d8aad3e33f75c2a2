"""The rows of the channel tables: `RawFieldSpec`, `ChannelSpec`, and how a table is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phasewatch.types import ChannelGroup, ChannelKind, ChannelTrust, SourceKind

__all__ = ["Accelerator", "ChannelSpec", "RawFieldSpec", "build_channel", "parse_raw_fields"]

Accelerator = Literal["any", "tcg", "kvm"]

FieldNature = Literal["counter", "gauge", "tick"]  # never falls · level or share · count per tick


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFieldSpec:
    """One field of a source's rows, after `t_wall_ns`, `t_mono_ns` and `seq`; null stands for no reading.

    Attributes:
        nature: ``counter`` never falls; ``gauge`` is a level or share; ``tick`` counts one tick alone.
        about: What it counts, in one line.
        group: The group of channels that it came with.
    """

    source: SourceKind
    field: str
    type: Literal["int", "float"]
    unit: str
    nature: FieldNature
    about: str
    group: ChannelGroup = ChannelGroup.BASE


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSpec:
    """One column of the bins: its raw fields, and how they become a number in `unit`.

    Attributes:
        kind: How readings become the value of a bin.
        fields: One raw field, or two for a ratio.
        reads: The kernel file, monitor command or header that the sampler reads.
        scale: Factor from the raw field's unit to `unit`.
        accel, arch: Accelerator and architecture on which it exists.
        semantics: Version of its meaning; raised when the sampler changes, so that old models refuse new data.
        group: ``base``, or ``extended`` for the channels that joined later (docs/adr/0085).
    """

    name: str
    source: SourceKind
    kind: ChannelKind
    fields: tuple[str, ...]
    unit: str
    about: str
    reads: str
    scale: float = 1.0
    trust: ChannelTrust = ChannelTrust.HOST
    accel: Accelerator = "any"
    arch: Literal["any", "x86"] = "any"
    semantics: int = 1
    group: ChannelGroup = ChannelGroup.BASE

    @property
    def full_name(self) -> str:
        """Source and name, as in ``proc.cpu_user``."""
        return f"{self.source}.{self.name}"

    @property
    def in_deployment(self) -> bool:
        """Whether the host measures it, without trust in the guest."""
        return self.trust is ChannelTrust.HOST


def parse_raw_fields(
    source: SourceKind, rows: str, group: ChannelGroup = ChannelGroup.BASE
) -> tuple[RawFieldSpec, ...]:
    """Parse lines of ``field type unit nature about``."""
    specs = []
    for line in rows.strip().splitlines():
        field, kind, unit, nature, about = line.split(None, 4)
        specs.append(
            RawFieldSpec(source=source, field=field, type=kind, unit=unit, nature=nature, about=about, group=group)  # type: ignore[arg-type]
        )
    return tuple(specs)


def build_channel(
    source: SourceKind,
    name: str,
    kind: ChannelKind,
    fields: str | tuple[str, ...],
    unit: str,
    about: str,
    reads: str,
    scale: float = 1.0,
    trust: ChannelTrust | None = None,
    accel: Accelerator = "any",
    arch: Literal["any", "x86"] = "any",
    group: ChannelGroup = ChannelGroup.BASE,
) -> ChannelSpec:
    """Return a channel; the arguments are its attributes, and the trust follows from the source unless given."""
    return ChannelSpec(
        name=name,
        source=source,
        kind=kind,
        fields=(fields,) if isinstance(fields, str) else fields,
        unit=unit,
        about=about,
        reads=reads,
        scale=scale,
        trust=trust or (ChannelTrust.GUEST if source is SourceKind.GUEST else ChannelTrust.HOST),
        accel=accel,
        arch=arch,
        group=group,
    )
