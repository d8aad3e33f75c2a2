"""What `metrics_v1.json` is made of: one flat row a number; and the one line that is drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from phasewatch.errors import RunError

SELECTION_METRIC = "val_b_macro_f1"  # by which the headline's model is chosen, before a test prediction is read


class MetricRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number; each field that is null is "over all".

    Attributes:
        fold: A fold's name, or ``pooled``.
        seed: A model's seed, or ``mean`` over them.
        agent: Whether the guest's agent ran in the episodes, ``on`` or ``off``.
        compared_to: The other model of a paired gap; the row's value is this model's less the other's.
        bin: Abscissa of a curve; for `confusion` the code of the decided phase.
        note: Why there is no interval, or in rows named `note` what is to be said.
    """

    metric: str
    recipe: str
    fold: str
    channel_set: str
    model: str | None
    input: str
    smoothing: str
    seed: int | str | None = None
    agent: str | None = None
    phase: str | None = msgspec.field(default=None, name="class")
    profile: str | None = None
    host_id: str | None = None
    sample_name: str | None = None
    compared_to: str | None = None
    p: float | None = None
    p_holm: float | None = None
    bin: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str | None = None
    unit: str = "1"
    n_windows: int = 0
    n_episodes: int = 0
    n_sessions: int = 0
    n_hosts: int = 0


class MetricTable(msgspec.Struct, frozen=True, kw_only=True):
    """`metrics_v1.json`: the digests of what it was made from, and the rows."""

    inputs: dict[str, str]
    metrics: tuple[MetricRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadlineKey:
    """Where the headline stands (DESIGN section 9)."""

    recipe: str = "held_out_host"
    channel_set: str = "realistic"
    model: str = "gbt"
    input: str = "raw"
    agent: str = "off"


def render_metrics(metrics: MetricTable) -> bytes:
    """Give the bytes of the file, one row a line."""
    inputs = msgspec.json.encode(metrics.inputs, order="sorted")
    rows = b",\n".join(msgspec.json.encode(row) for row in metrics.metrics)
    return b'{"inputs":' + inputs + b',\n"metrics":[\n' + rows + b"\n]}\n"


def parse_metrics(data: bytes, *, file: str) -> MetricTable:
    """Read the file.

    Raises:
        RunError: If it is not one.
    """
    try:
        return msgspec.json.decode(data, type=MetricTable)
    except msgspec.DecodeError as exc:
        raise RunError(f"{file}: not a metrics file: {exc}; make it again with `phasewatch evaluate`") from exc


def select_headline(metrics: Sequence[MetricRow]) -> HeadlineKey:
    """Return the headline's place: its model is the best one on validation B, `gbt` on a tie or without a choice."""
    place = HeadlineKey()
    there = (place.recipe, place.channel_set, place.input)
    rows = [
        r for r in metrics if r.metric == SELECTION_METRIC and (r.recipe, r.channel_set, r.input) == there and r.model
    ]
    if not rows:
        return place
    best = max(rows, key=lambda r: (r.value or 0.0, r.model == place.model))
    return replace(place, model=str(best.model))


def render_headline(metrics: MetricTable, place: HeadlineKey | None = None) -> str:
    """Give the one line that a run is quoted by (DESIGN section 16), or the words why there is none."""
    place = select_headline(metrics.metrics) if place is None else place
    five = _find_headline_row(metrics, place, "macro_f1@", place.model)
    three = _find_headline_row(metrics, place, "macro_f1_3class@", place.model)
    time = _find_headline_row(metrics, place, "macro_f1@", "elapsed_time")
    opening = f"macro-F1 of phase, unseen host, {place.channel_set}, {place.model}: "
    if five is None or three is None:
        return opening + f"untested, no test episode with the agent {place.agent}"
    tested, of = five.metric.removeprefix("macro_f1@").split("of")
    seeds = sum(
        _matches_headline(r, place, "macro_f1@", place.model) and isinstance(r.seed, int) for r in metrics.metrics
    )
    alone = "untested" if time is None or time.value is None else f"{time.value:.2f}"
    counts = ", ".join(
        (
            _render_count(five.n_episodes, "episode"),
            _render_count(five.n_hosts, "host"),
            f"{tested} of {of} profiles tested",
            _render_count(seeds, "seed"),
        )
    )
    simulated = any(
        r.metric == "origin" and r.profile is None and r.note == "simulated" and r.recipe == place.recipe
        for r in metrics.metrics
    )
    line = f"{opening}{_render_score(five)}; 3 states {_render_score(three)}; elapsed time alone {alone} ({counts})"
    return line + " [simulated]" if simulated else line


def _find_headline_row(metrics: MetricTable, place: HeadlineKey, prefix: str, model: str) -> MetricRow | None:
    return next((r for r in metrics.metrics if _matches_headline(r, place, prefix, model) and r.seed == "mean"), None)


def _matches_headline(row: MetricRow, place: HeadlineKey, prefix: str, model: str) -> bool:
    over_all: Sequence[object] = (row.phase, row.profile, row.host_id, row.sample_name, row.compared_to)
    return (
        row.metric.startswith(prefix)
        and row.fold == "pooled"
        and (row.recipe, row.channel_set, row.input, row.smoothing)
        == (place.recipe, place.channel_set, place.input, "none")
        and row.agent == place.agent
        and row.model == model
        and all(part is None for part in over_all)
    )


def _render_score(row: MetricRow) -> str:
    if row.low is None or row.high is None:
        return f"{row.value:.2f} [no interval: {row.note}]"
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


def _render_count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


DEFAULT_HEADLINE = HeadlineKey()  # the recipe, threat model, table and agent that the page is about


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfusionMatrix:
    """Windows by truth (rows) and decision (columns), over the union of labels; means over seeds, so maybe fractions."""

    labels: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]
