"""The headline of a run, `headline.json`: the numbers that it is quoted by, and the line that prints them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from phasewatch import atomic
from phasewatch.artifacts import HEADLINE_FILE
from phasewatch.errors import RunError
from phasewatch.evaluation.detection import HEADLINE_TIME_S, STRIDE_SUFFIXES
from phasewatch.evaluation.leaderboard import ELAPSED_TIME, LOAD_ONLY
from phasewatch.evaluation.metric_table import (
    HEADLINE_RECIPES,
    HeadlineKey,
    MetricRow,
    MetricTable,
    NoteCode,
    select_headline,
    select_rows,
)
from phasewatch.models.alarm import AlarmKind
from phasewatch.models.smoothing import SMOOTHING_NONE
from phasewatch.splits import SINGLE_HOST_RECIPE

__all__ = [
    "Headline",
    "HeadlineBlock",
    "HeadlineNumber",
    "HeadlineVerdict",
    "build_headline",
    "read_headline",
    "read_verdict",
    "render_headline",
    "write_headline",
]

_RECIPE_WORDS = {
    "held_out_both": "unseen host and sample",
    "held_out_host": "unseen host",
    SINGLE_HOST_RECIPE: "later episodes of known hosts",
}
_BLOCK_RECIPES = (*HEADLINE_RECIPES, SINGLE_HOST_RECIPE)  # the headline quotes the first that was tested
_INFECTION = str(AlarmKind.INFECTION)
_UNTESTED = "untested"
_UNKNOWN = "unknown"
# What only hosts outside the training set can show.
_OTHER_HOST_NUMBERS = ("new_host_macro_f1_3class", "mean_of_hosts_macro_f1_3class")


class HeadlineNumber(msgspec.Struct, frozen=True, kw_only=True):
    """A number with its 95 % interval; what cannot be said is null, and `note` tells why.

    Attributes:
        code: The note's code (`NoteCode`).
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str | None = None
    code: NoteCode | None = None


class HeadlineBlock(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one split recipe.

    Attributes:
        recipe: The split recipe that was tested.
        new_host_macro_f1_3class: `value` is the mean of the tested hosts, the interval the range for one more host.
        mean_of_hosts_macro_f1_3class: The interval for the mean of new hosts.
        time_only, load_only: Macro-F1 over five phases of the two baselines that use no telemetry.
        n_onsets: Infections after which 30 s were recorded.
        soak_hours: Quiet VM-hours of soak on the tested hosts; null without soak.
    """

    recipe: str
    infection_recall_30s: HeadlineNumber
    false_alarms_per_vm_hour: HeadlineNumber
    median_delay_s: HeadlineNumber
    macro_f1_3class: HeadlineNumber
    macro_f1: HeadlineNumber
    new_host_macro_f1_3class: HeadlineNumber
    mean_of_hosts_macro_f1_3class: HeadlineNumber
    idle_called_clean: HeadlineNumber
    time_only: HeadlineNumber
    load_only: HeadlineNumber
    n_episodes: int
    n_hosts: int
    n_onsets: int
    n_profiles_tested: int
    n_profiles: int
    n_seeds: int
    soak_hours: float | None


class HeadlineVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The audit's verdict on a run.

    Attributes:
        passes: Whether no check failed.
        failed: Names of the checks that failed.
        withdraws_five_phases: Whether the five-phase scores are withdrawn: too few windows of idle clean machines are
            called clean, so armed and dormant cannot be told from clean.
    """

    passes: bool
    failed: tuple[str, ...] = ()
    withdraws_five_phases: bool = False


class Headline(HeadlineBlock, frozen=True, kw_only=True):
    """The content of `headline.json`: the numbers of the hardest recipe that was tested, and those on unseen hosts.

    Attributes:
        corpus: Name of the store; null if it is unknown.
        origin_is_simulated: Whether test episodes are simulated.
        unseen_host: The same numbers for `held_out_host`; null if it was not tested.
        is_single_host: Whether the store has one host: then the numbers are of `held_out_time`, and what only other
            hosts can show is null with the code `one_host`.
        audit: The audit's verdict; null until the run was audited.
    """

    model: str
    channels: str
    input: str
    corpus: str | None
    origin_is_simulated: bool
    unseen_host: HeadlineBlock | None
    is_single_host: bool = False
    audit: HeadlineVerdict | None = None


def build_headline(metrics: MetricTable, key: HeadlineKey | None = None, *, corpus: str | None = None) -> Headline:
    """Collect the numbers of the headline from the rows of a run.

    Args:
        metrics: All rows of the run.
        key: Channel set, model, input and agent; None selects the run's own (`select_headline`).
        corpus: Name of the store.
    """
    key = select_headline(metrics.metrics) if key is None else key
    own = metrics.select(
        overall=True,
        fold="pooled",
        channel_set=key.channel_set,
        input=key.input,
        smoothing=SMOOTHING_NONE,
        agent=key.agent,
        compared_to=None,
        bin=None,
    )
    blocks = {recipe: _build_block(own, key, recipe) for recipe in _BLOCK_RECIPES}
    tested = [recipe for recipe in _BLOCK_RECIPES if blocks[recipe].macro_f1.value is not None]
    one_host = next(iter(metrics.select("note", code=NoteCode.ONE_HOST)), None)
    recipe = tested[0] if tested else HEADLINE_RECIPES[-1] if one_host is None else SINGLE_HOST_RECIPE
    fields = {name: getattr(blocks[recipe], name) for name in HeadlineBlock.__struct_fields__}
    if one_host is not None:
        fields |= {name: _build_number(one_host) for name in _OTHER_HOST_NUMBERS}
    return Headline(
        **fields,
        model=key.model,
        channels=key.channel_set,
        input=key.input,
        corpus=corpus,
        origin_is_simulated=bool(metrics.select("origin", profile=None, code=NoteCode.SIMULATED, recipe=recipe)),
        unseen_host=blocks["held_out_host"] if "held_out_host" in tested else None,
        is_single_host=one_host is not None,
    )


def render_headline(headline: Headline, verdict: HeadlineVerdict | None = None) -> str:
    """Render the line that a run is quoted by.

    Args:
        headline: The numbers.
        verdict: The audit's verdict; None takes the one that the headline holds. A run that failed its audit has no
            numbers, only the names of the failed checks.
    """
    verdict = headline.audit if verdict is None else verdict
    if verdict is not None and not verdict.passes:
        return f"no headline: this run failed its audit ({', '.join(verdict.failed) or 'no check is named'})"
    h, where = headline, _RECIPE_WORDS[headline.recipe]
    if h.is_single_host:
        where = "the same host (one host: other hosts unknown)"
    elif h.recipe != HEADLINE_RECIPES[0]:
        where += f" ({_RECIPE_WORDS[HEADLINE_RECIPES[0]]} not tested)"
    new_host = h.new_host_macro_f1_3class
    has_range = new_host.low is not None and new_host.high is not None
    new = f"{new_host.low:.2f} to {new_host.high:.2f}" if has_range else _UNKNOWN if h.is_single_host else _UNTESTED
    counts = ", ".join(
        (
            _render_count(h.n_episodes, "episode"),
            _render_count(h.n_hosts, "host"),
            f"{h.n_profiles_tested} of {h.n_profiles} profiles",
            _render_count(h.n_seeds, "seed"),
        )
    )
    five = _render_number(h.macro_f1)
    if verdict is not None and verdict.withdraws_five_phases:
        five = "withdrawn (armed and dormant cannot be told from clean idle machines)"
    parts = (
        f"infections alarmed within {HEADLINE_TIME_S} s, {where}: {_render_number(h.infection_recall_30s)} at "
        f"{_render_number(h.false_alarms_per_vm_hour)} false alarms per VM-hour",
        f"macro-F1 3 classes {_render_number(h.macro_f1_3class)}, 5 phases {five}",
        f"a new host {new}",
        f"idle called clean {_render_value(h.idle_called_clean)}",
        f"time alone {_render_value(h.time_only)}, load alone {_render_value(h.load_only)} ({counts})",
    )
    return "; ".join(parts) + (" [simulated]" if h.origin_is_simulated else "")


def write_headline(run: Path, headline: Headline) -> None:
    """Write `headline.json`; the same headline gives the same bytes."""
    data = msgspec.json.format(msgspec.json.encode(headline, order="sorted"), indent=1)
    atomic.write_atomic(run / HEADLINE_FILE, data + b"\n")


def read_headline(run: Path) -> Headline:
    """Read `headline.json`.

    Raises:
        RunError: If it is absent or not a headline.
    """
    path = run / HEADLINE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Headline)
    except FileNotFoundError as exc:
        raise RunError(f"{path}: absent; make it with `phasewatch evaluate {run}`") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RunError(f"{path}: not a headline: {exc}; make it again with `phasewatch evaluate {run}`") from exc


def read_verdict(run: Path) -> HeadlineVerdict | None:
    """Read the audit's verdict on a run; return None if it was not audited since its last evaluation.

    Raises:
        RunError: If `headline.json` is not a headline.
    """
    return read_headline(run).audit if (run / HEADLINE_FILE).is_file() else None


def _build_block(own: Sequence[MetricRow], key: HeadlineKey, recipe: str) -> HeadlineBlock:
    def rows(metric: str, model: str = key.model, recipe: str = recipe) -> tuple[MetricRow, ...]:
        return select_rows(own, metric, recipe=recipe, model=model)

    def find(metric: str, model: str = key.model, recipe: str = recipe) -> MetricRow | None:
        return next((r for r in rows(metric, model, recipe) if r.seed == "mean"), None)

    def find_alarm(*names: str) -> MetricRow | None:
        """Return the first row with a value, at the stride of a live watcher before the slower one."""
        candidates = [find(f"{_INFECTION}_{name}{suffix}") for name in names for suffix in STRIDE_SUFFIXES.values()]
        known = [row for row in candidates if row is not None]
        return next((row for row in known if row.value is not None), next(iter(known), None))

    def find_baseline(model: str) -> HeadlineNumber:
        """Return a baseline's score under this recipe, or under another one with a note."""
        for other in (recipe, *HEADLINE_RECIPES):
            if (row := find("macro_f1", model, other)) is not None and row.value is not None:
                number = _build_number(row)
                if other == recipe:
                    return number
                note = f"measured on {_RECIPE_WORDS[other]}"
                return msgspec.structs.replace(number, note=note, code=NoteCode.OTHER_RECIPE)
        return _build_number(None)

    five, recall = find("macro_f1"), find_alarm(f"recall_{HEADLINE_TIME_S}s")
    soak = find_alarm("soak_vm_hours")
    return HeadlineBlock(
        recipe=recipe,
        infection_recall_30s=_build_alarm_number(recall),
        false_alarms_per_vm_hour=_build_alarm_number(
            find_alarm("soak_false_alarms_per_vm_hour", "false_alarms_per_vm_hour")
        ),
        median_delay_s=_build_alarm_number(find_alarm("delay_s")),
        macro_f1_3class=_build_number(find("macro_f1_3class")),
        macro_f1=_build_number(five),
        new_host_macro_f1_3class=_build_number(find("macro_f1_3class_new_host")),
        mean_of_hosts_macro_f1_3class=_build_number(find("macro_f1_3class_mean_of_hosts")),
        idle_called_clean=_build_number(find("idle_called_clean")),
        time_only=find_baseline(ELAPSED_TIME),
        load_only=find_baseline(LOAD_ONLY),
        n_episodes=0 if five is None else five.n_episodes,
        n_hosts=0 if five is None else five.n_hosts,
        n_onsets=0 if recall is None else recall.n_episodes,
        n_profiles_tested=0 if five is None else five.n_profiles_tested or 0,
        n_profiles=0 if five is None else five.n_profiles or 0,
        n_seeds=sum(isinstance(r.seed, int) for r in rows("macro_f1")),
        soak_hours=None if soak is None else soak.value,
    )


def _build_number(row: MetricRow | None) -> HeadlineNumber:
    if row is None:
        return HeadlineNumber(note="not measured in this run", code=NoteCode.NOT_SCORED)
    return HeadlineNumber(value=row.value, low=row.low, high=row.high, note=row.note, code=row.code)


def _build_alarm_number(row: MetricRow | None) -> HeadlineNumber:
    """Return the number of an alarm row, and say so where it is not that of a live watcher's stride."""
    number = _build_number(row)
    slower = [suffix for suffix in STRIDE_SUFFIXES.values() if suffix]
    if row is None or number.value is None or not row.metric.endswith(tuple(slower)):
        return number
    text = "; ".join(["measured at the training stride, not at that of a live watcher", *filter(None, [row.note])])
    return msgspec.structs.replace(number, note=text, code=NoteCode.OTHER_STRIDE)


def _render_number(number: HeadlineNumber) -> str:
    if number.value is None:
        return _UNTESTED
    if number.low is None or number.high is None:
        return f"{number.value:.2f} [no interval: {number.note}]"
    return f"{number.value:.2f} [{number.low:.2f}, {number.high:.2f}]"


def _render_value(number: HeadlineNumber) -> str:
    return _UNTESTED if number.value is None else f"{number.value:.2f}"


def _render_count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
