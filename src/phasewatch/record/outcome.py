"""From what was read on a VM to the bytes of its episode bundle: pure."""

from __future__ import annotations

from phasewatch import __version__
from phasewatch.channels import CHANNELS, ChannelSpec, raw_fields
from phasewatch.episode.bundle import encode_labels, pack
from phasewatch.episode.model import FORMAT, Clocks, Host, Manifest, Recording
from phasewatch.episode.rows import encode_rows
from phasewatch.record.base import STAMPS, RowLog
from phasewatch.record.guest import NOMINAL_HZ as GUEST_HZ
from phasewatch.record.hosts import HostShape
from phasewatch.record.plan import Slot
from phasewatch.record.session import Take
from phasewatch.vocab import ClockBase, EpisodeId, Origin, Source


def absent_channels(take: Take, *, arch: str) -> dict[str, str]:
    """Say of each channel that this VM could not give, why."""
    absent = {}
    for channel in CHANNELS:
        why = _why_absent(channel, take, arch)
        if why:
            absent[channel.full_name] = why
    return absent


def _why_absent(channel: ChannelSpec, take: Take, arch: str) -> str | None:
    if channel.source is Source.GUEST and Source.GUEST not in take.logs:
        return "the agent was off"
    if channel.accel == "tcg" and take.facts.accel != "tcg":
        return f"only TCG counts it, this VM ran on {take.facts.accel}"
    if channel.arch == "x86" and arch != "x86_64":
        return f"the monitor shows no such flag on {arch}"
    if not all(_was_read(take.logs[channel.source], channel.source, field) for field in channel.fields):
        return "it could not be read once"
    return None


def _was_read(log: RowLog, source: Source, field: str) -> bool:
    at = STAMPS + [spec.field for spec in raw_fields(source)].index(field)
    return any(row[at] is not None for row in log.rows)


def build_bundle(
    take: Take, slot: Slot, shape: HostShape, *, session: str, episode_id: EpisodeId, neighbours: tuple[str, ...]
) -> bytes:
    """Make the bundle of one played slot.

    Raises:
        BundleError: If what was recorded breaks a rule of the format.
    """
    logs = {source: log for source, log in take.logs.items() if log.rows}
    members = {"labels.jsonl": encode_labels(take.marks)}
    members |= {f"{source}.jsonl": encode_rows(source, log.rows) for source, log in logs.items()}
    return pack(_manifest(take, slot, shape, session, episode_id, neighbours), members)


def _manifest(
    take: Take, slot: Slot, shape: HostShape, session: str, episode_id: EpisodeId, neighbours: tuple[str, ...]
) -> Manifest:
    facts, absent = take.facts, absent_channels(take, arch=shape.arch)
    throttle = f", {shape.iops} iops" if shape.iops else ""
    host = Host(
        host_id=shape.host_id,
        arch=shape.arch,
        accel=facts.accel,
        machine=shape.machine,
        cpu=shape.cpu,
        vcpus=shape.vcpus,
        mem_mib=shape.mem_mib,
        disk=f"virtio-blk, qcow2, cache={shape.cache}, {shape.data_mib} MiB of data{throttle}",
        nic=facts.nic,
        hypervisor=facts.hypervisor,
        guest_kernel=facts.guest_kernel,
        recorder=f"phasewatch {__version__}, guest image {facts.guest_image}, on {facts.processor}",
    )
    return Manifest(
        format=FORMAT,
        episode_id=episode_id,
        host=host,
        profile=slot.profile,
        sample_name=slot.sample_name,
        sample_kind=slot.sample_kind,
        origin=Origin.RECORDED,
        role=slot.role,
        started_wall_ns=take.marks[0].t_wall_ns,
        duration_s=round((take.marks[-1].t_wall_ns - take.marks[0].t_wall_ns) / 1e9, 3),
        session=session,
        neighbours=neighbours,
        plan_seed=slot.plan_seed,
        plan=slot.phases,
        agent=slot.agent,
        nominal_hz={source: GUEST_HZ if source is Source.GUEST else 2.0 for source in take.logs},
        rows_emitted={source: log.emitted for source, log in take.logs.items()},
        channels_available=tuple(c.full_name for c in CHANNELS if c.full_name not in absent),
        fields={source: tuple(spec.field for spec in raw_fields(source)) for source in take.logs},
        clocks=Clocks(base=dict.fromkeys(take.logs, ClockBase.UNIX), pairs=take.pairs),
        recording=Recording(
            boot_s=facts.boot_s,
            settle_s=take.settle_s,
            pinning=facts.pinning,
            knobs=dict(slot.knobs) | {f"background.{name}": value for name, value in slot.background_knobs},
            background=slot.background,
            absent=absent,
        ),
        members={},
    )
