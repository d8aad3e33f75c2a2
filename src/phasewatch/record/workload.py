"""A workload of the user's own: a TOML file → a profile with the scripts that play it, and the sessions to record (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from phasewatch.errors import PlanError
from phasewatch.profiles import PROFILES, Bounds, Knob, Profile, Sample, draw_knobs
from phasewatch.record.deal import BENIGN
from phasewatch.record.hosts import host_shape
from phasewatch.record.plan import IDLE, Session, Slot, draw_phases, log_uniform, purpose_rng, slot_seed
from phasewatch.record.spec import PlanHost, PlanSpec, check_plan
from phasewatch.record.spelling import parse_toml
from phasewatch.vocab import PHASES, Phase, Role, SampleKind
from phasewatch.walk import EPISODE_S, PHASE_S, draw_length

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")  # the guest's driver keeps 31 characters
KNOB_NAME = re.compile(r"[a-z][a-z0-9_]{0,22}")  # becomes a variable of the shell
MOST_KNOBS = 16  # the guest's driver keeps 24, and its line has 1 KiB
MOST_SAMPLES = 64
MOST_EPISODES = 10_000
TAKEN = ("seed", "phase", "sample")  # variables that every script has
SCRIPT_BYTES = 64 << 10


class OwnSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sample of a profile file.

    Attributes:
        knobs: Name → lowest and highest; drawn log-uniform for each episode, handed to the scripts as variables.
        phases: Phase → what the guest's shell runs when it begins. A phase without a script is quiet.
    """

    name: str
    about: str = ""
    knobs: dict[str, tuple[float, float]] = {}
    phases: dict[Phase, str] = {}


class OwnRecording(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a profile file wants to be recorded; the words mean what they mean in a plan."""

    episodes: int = 12
    seed: int = 1
    hosts: tuple[str, ...] = ("pc",)
    benign_share: float = 1 / 3
    agent_share: float = 0.5
    settle_s: tuple[float, float] = (40.0, 80.0)
    episode_s: tuple[float, float] = EPISODE_S
    phase_s: tuple[float, float] = PHASE_S
    chatter_s: tuple[float, float] = (6.0, 30.0)


class OwnProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A profile file as its author writes it."""

    name: str
    samples: tuple[OwnSample, ...]
    kind: SampleKind = SampleKind.EMULATED
    about: str = ""
    attack: tuple[str, ...] = ()
    recording: OwnRecording = OwnRecording()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A profile that is in no table.

    Attributes:
        scripts: ``(sample, phase)`` → shell text.
        spec: The plan that its sessions are drawn by.
    """

    profile: Profile
    scripts: Mapping[tuple[str, Phase], str]
    spec: PlanSpec


def parse_workload(text: str, *, where: str) -> Workload:
    """Read a profile file.

    Args:
        text: TOML.
        where: Its file, for messages.

    Raises:
        PlanError: If it is not TOML, has unknown or missing keys, or asks for the impossible.
    """
    own = parse_toml(text, OwnProfile, where=where)
    for words in _faults(own):
        raise PlanError(f"{where}: {words}")
    asked = own.recording
    spec = PlanSpec(
        name=own.name, seed=asked.seed, hosts=tuple(PlanHost(host_id=host) for host in asked.hosts),
        lab_per_host=asked.episodes, benign_share=1.0 if own.kind is SampleKind.BENIGN else asked.benign_share,
        agent_share=asked.agent_share, settle_s=asked.settle_s, episode_s=asked.episode_s, phase_s=asked.phase_s,
        chatter_s=asked.chatter_s,
    )  # fmt: skip
    try:
        check_plan(spec)
    except PlanError as exc:
        raise PlanError(f"{where}: recording: {exc}") from exc
    return Workload(
        profile=Profile(
            name=own.name, kind=own.kind, about=own.about, attack=own.attack,
            samples=tuple(
                Sample(
                    name=s.name, about=s.about,
                    knobs=tuple(Knob(name=k, low=low, high=high, unit="1") for k, (low, high) in s.knobs.items()),
                )
                for s in own.samples
            ),
            # Not tested as ours are: what an own workload does is its author's promise.
            bounds=Bounds(written_bytes=0, sent_bytes=0, processes=0),
        ),
        scripts={(s.name, phase): script for s in own.samples for phase, script in s.phases.items()},
        spec=spec,
    )  # fmt: skip


def unscripted(name: str) -> Workload:
    """Give the workload of an own machine whose driver does everything: a live profile of one sample, by the usual plan.

    Raises:
        PlanError: If the name can be none.
    """
    text = f'name = "{name}"\nkind = "live"\n[[samples]]\nname = "{name}"\n[recording]\nagent_share = 0\n'
    return parse_workload(text, where="the driver's name")


def _faults(own: OwnProfile) -> Iterator[str]:
    known = [row.name for row in PROFILES]
    if not NAME.fullmatch(own.name):
        yield f"name {own.name!r}: letters a-z, digits and dash, 1 to 31 of them"
    if own.name in known:
        yield f"name {own.name!r}: a profile of phasewatch; choose another name"
    if not 1 <= len(own.samples) <= MOST_SAMPLES or len({s.name for s in own.samples}) != len(own.samples):
        yield f"samples: 1 to {MOST_SAMPLES}, and none twice"
    if not 1 <= own.recording.episodes <= MOST_EPISODES:
        yield f"recording: episodes: {own.recording.episodes}, expected 1 to {MOST_EPISODES}"
    if not own.recording.hosts:
        yield "recording: hosts: at least one"
    for s in own.samples:
        if not NAME.fullmatch(s.name):
            yield f"sample {s.name!r}: letters a-z, digits and dash, 1 to 31 of them"
        if len(s.knobs) > MOST_KNOBS:
            yield f"sample {s.name}: {len(s.knobs)} knobs; at most {MOST_KNOBS}"
        for knob, (low, high) in s.knobs.items():
            if not KNOB_NAME.fullmatch(knob):
                yield f"sample {s.name}: knob {knob!r}: a-z, digits and underscore, 1 to 23 of them, a letter first"
            if knob in TAKEN:
                yield f"sample {s.name}: knob {knob!r}: a variable of that name is set already; choose another"
            if not 0 < low <= high < 1e12:
                yield f"sample {s.name}: knob {knob}: {low:g} to {high:g}; expected 0 < lowest <= highest"
        for phase, script in s.phases.items():
            if phase not in PHASES or (own.kind is SampleKind.BENIGN and phase is not Phase.CLEAN):
                allowed = "clean, because it is benign" if own.kind is SampleKind.BENIGN else ", ".join(PHASES)
                yield f"sample {s.name}: phases: {phase}: only {allowed}"
            if len(script.encode()) > SCRIPT_BYTES or "\0" in script:
                yield f"sample {s.name}: phases: {phase}: a script has at most {SCRIPT_BYTES >> 10} KiB and no NUL"


def build_own_sessions(work: Workload, *, hosts: tuple[str, ...] = (), alone: bool = False) -> tuple[Session, ...]:
    """Lay out the episodes of a workload: samples in turn, pairs of one sample, benign ones strewn in.

    Args:
        work: The profile and its plan.
        hosts: Instead of the plan's; they need not be of the table where `alone` is set.
        alone: One VM at a time, as on a machine of the user's own.
    """
    sessions: list[Session] = []
    for host_id in hosts or tuple(host.host_id for host in work.spec.hosts):
        single = alone or host_shape(host_id).is_alone
        slots = [_slot(work, host_id, index) for index in range(work.spec.lab_per_host)]
        while slots:
            first = slots.pop(0)
            # Beside a sample only the same sample: else none could be held out.
            twin = next((s for s in slots if (s.profile, s.sample_name) == (first.profile, first.sample_name)), None)
            pair = (first,) if single or twin is None else (first, twin)
            slots = [slot for slot in slots if slot not in pair]
            sessions.append(
                Session(session=f"{work.spec.name}-{len(sessions):04d}", host_id=host_id, slots=pair)
            )  # fmt: skip
    return tuple(sessions)


def _slot(work: Workload, host_id: str, index: int) -> Slot:
    spec, own = work.spec, work.profile
    seed = slot_seed(spec.name, spec.seed, host_id, index)
    # Spread evenly: the n-th episode is benign where the share's running total passes a whole number.
    beside = own.kind is not SampleKind.BENIGN
    before, after = int(index * spec.benign_share), int((index + 1) * spec.benign_share)
    is_idle = beside and after > before
    played = own.samples[(index - before if beside else index) % len(own.samples)]
    duration_s = draw_length(purpose_rng(seed, "length"), between_s=spec.episode_s)
    is_clean = is_idle or own.kind is SampleKind.BENIGN
    return Slot(
        index=index, host_id=host_id, role=Role.LAB,
        profile=BENIGN if is_idle else own.name,
        sample_name=IDLE if is_idle else played.name,
        sample_kind=SampleKind.BENIGN if is_idle else own.kind,
        plan_seed=seed,
        agent=bool(purpose_rng(seed, "agent").random() < spec.agent_share),
        settle_s=round(float(purpose_rng(seed, "settle").uniform(*spec.settle_s)), 3),
        duration_s=duration_s,
        phases=((Phase.CLEAN, duration_s),) if is_clean else draw_phases(spec, purpose_rng(seed, "walk"), duration_s),
        knobs=() if is_idle else tuple(draw_knobs(played, purpose_rng(seed, "knobs")).items()),
        background="", background_knobs=(),
        chatter_s=round(log_uniform(purpose_rng(seed, "chatter"), spec.chatter_s), 3),
    )  # fmt: skip
