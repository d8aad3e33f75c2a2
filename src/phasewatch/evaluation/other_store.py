"""Score a trained model on a store that it was not trained on: the metrics of a run, with the model's own alarms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phasewatch.arrays import Float32Array
from phasewatch.artifacts import RunEpisode
from phasewatch.channels import CHANNELS
from phasewatch.dataset.split_files import compute_sample_group
from phasewatch.errors import MismatchError
from phasewatch.evaluation.alarms import EpisodeTimeline, PhaseSpans
from phasewatch.evaluation.bootstrap import N_RESAMPLES
from phasewatch.evaluation.comparisons import choose_agent_state
from phasewatch.evaluation.detection import IMPACT_METRICS, build_trained_alarm_rows
from phasewatch.evaluation.idle import build_idle_rows, build_load_rows
from phasewatch.evaluation.leaderboard import build_leaderboard_rows
from phasewatch.evaluation.metric_table import MetricNote, MetricRow, MetricTable, NoteCode
from phasewatch.evaluation.predictions import PredictionGroup, parse_prediction_groups
from phasewatch.evaluation.ranking import build_ranking_rows
from phasewatch.evaluation.scoring import EvaluationSettings, build_scoring_set, build_settings
from phasewatch.models.alarm import LIVE_STRIDE_S, RULE_STRIDE_S, AlarmRule
from phasewatch.splits import SplitEpisode, find_near_duplicates
from phasewatch.types import BIN_NS, PHASES, WINDOW_BINS, EpisodeRole

__all__ = ["OTHER_STORE", "StoreEpisode", "TrainingEpisodes", "score_other_store", "select_unseen_episodes"]

OTHER_STORE = "other_store"  # takes the place of a split recipe in the rows; no split is made
_FOLD = "all"
_ROLE_PARTS = {EpisodeRole.LAB: "test", EpisodeRole.SOAK: "soak", EpisodeRole.COMMISSION: "idle"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoreEpisode:
    """The facts of an episode of the other store that its scores need.

    Attributes:
        rates: ``(n, 4)`` float32 per second, in the order of `IMPACT_METRICS`; NaN where unknown.
        t0_ns: Start of the first bin on the wall clock.
        spans: Its label spans.
    """

    episode: RunEpisode
    spans: PhaseSpans
    t0_ns: int
    rates: Float32Array

    @classmethod
    def build(cls, episode: RunEpisode, spans: PhaseSpans, t0_ns: int, bins: Float32Array) -> StoreEpisode:
        """Build the facts from an episode's bins, ``(n, c)`` float32 of all channels."""
        names = [c.full_name for c in CHANNELS]
        columns = [names.index(name) for _, name, _ in IMPACT_METRICS]
        return cls(episode=episode, spans=spans, t0_ns=t0_ns, rates=bins[:, columns].copy())

    def build_timeline(self) -> EpisodeTimeline:
        """Return its ground truth over time."""
        e = self.episode
        group = compute_sample_group(e.profile, e.sample_name)
        return EpisodeTimeline(spans=self.spans, t0_ns=self.t0_ns, rates=self.rates, group=group)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEpisodes:
    """What is known of a model's training data.

    Attributes:
        hosts: Their hosts; empty if they are unknown.
        episodes: The episodes; None if only the hosts are known, as in an edge bundle.
    """

    hosts: frozenset[str]
    episodes: tuple[SplitEpisode, ...] | None = None


def select_unseen_episodes(
    found: Sequence[StoreEpisode], trained: TrainingEpisodes
) -> tuple[dict[str, StoreEpisode], tuple[MetricNote, ...]]:
    """Select the episodes that a model may be scored on, and describe what was left out.

    An episode of a host in the training data is not scored, nor one whose id or near-duplicate is in it.

    Args:
        found: Episodes of the store.
        trained: The model's training data.

    Raises:
        MismatchError: If no lab episode is left, or the hosts of the training data are unknown.
    """
    if not trained.hosts:
        raise MismatchError(
            "the hosts that the model was trained on are unknown, so leakage cannot be excluded; "
            "name the run or the edge bundle instead of a copied checkpoint"
        )
    twins: Mapping[str, str] = {}
    if trained.episodes is not None:
        asked = [_build_split_episode(one.episode) for one in found]
        ids = frozenset(e.episode_id for e in trained.episodes)
        asked_ids = [e.episode_id for e in asked if e.episode_id not in ids]
        near = find_near_duplicates([*trained.episodes, *(e for e in asked if e.episode_id not in ids)])
        twins = {**dict.fromkeys(ids & {e.episode_id for e in asked}, ""), **near.find_twins(asked_ids, ids)}
    left_out: Counter[str] = Counter()
    kept: dict[str, StoreEpisode] = {}
    for one in found:
        if one.episode.host_id in trained.hosts:
            left_out["of hosts that the model was trained on"] += 1
        elif one.episode.episode_id in twins:
            left_out["episodes that the model was trained on, or near-duplicates of them"] += 1
        else:
            kept[one.episode.episode_id] = one
    if not any(one.episode.role is EpisodeRole.LAB for one in kept.values()):
        reasons = "; ".join(f"{n} are {why}" for why, n in left_out.items()) or "the store has none"
        raise MismatchError(f"no lab episode can be scored: {reasons}; name a store of other hosts")
    texts = [f"{n} episodes are not scored, because they are {why}" for why, n in left_out.items()]
    if trained.episodes is None:
        texts.append("the model's training episodes are unknown; only hosts were compared")
    return kept, tuple(MetricNote(code=NoteCode.LEFT_OUT, text=text) for text in texts)


def _build_split_episode(e: RunEpisode) -> SplitEpisode:
    return SplitEpisode(
        episode_id=e.episode_id,
        host_id=e.host_id,
        profile=e.profile,
        sample_name=e.sample_name,
        sample_group=0,
        session=e.session,
        role=e.role,
        agent=e.agent,
        plan_seed=e.plan_seed,
        proc_sketch=e.proc_sketch,
        started_wall_ns=e.started_wall_ns,
        phases=PHASES,
    )


def score_other_store(
    table: Any,
    episodes: Mapping[str, StoreEpisode],
    alarms: Sequence[AlarmRule],
    *,
    stride_s: int,
    notes: Sequence[MetricNote] = (),
    inputs: Mapping[str, str] | None = None,
    resamples: int = N_RESAMPLES,
) -> MetricTable:
    """Score the predictions of one model on a store; thresholds, scaling and temperature are the model's own.

    Args:
        table: Arrow table of `phasewatch predict`.
        episodes: Episode id → facts; windows of other episodes are not scored.
        alarms: The model's alarm rules.
        stride_s: Seconds between two windows of the table. Scores use a window every 5 s, as those of a run.
        notes: Remarks for the rows of metric `note`.
        inputs: File → digest, for the metric table.
        resamples: Resamples of the bootstrap.

    Returns:
        Rows of the recipe `OTHER_STORE`.

    Raises:
        MismatchError: If no window of known phase is left.
    """
    rules = build_settings(resamples=resamples)
    prepared = _build_run_table(table, {i: one.t0_ns for i, one in episodes.items()})
    groups = _parse_groups(prepared, "test")
    if not groups:
        raise MismatchError(
            "no labelled window of a lab episode can be scored; name a store with labels, or leave out --metrics"
        )
    rows: list[MetricRow] = []
    metadata = {i: one.episode for i, one in episodes.items()}
    timelines = {i: one.build_timeline() for i, one in episodes.items()}
    for key, group in groups.items():
        rows += _score_group(group, prepared, metadata, rules)
        agent = choose_agent_state(group.threat)
        endings = {RULE_STRIDE_S: ""} | ({LIVE_STRIDE_S: f"_{LIVE_STRIDE_S}s"} if stride_s == LIVE_STRIDE_S else {})
        for at_s, ending in endings.items():
            tests, soaks = (_parse_groups(prepared, f"{part}{ending}").get(key) for part in ("test", "soak"))
            if tests is not None:
                own = [rule for rule in alarms if rule.stride_s == at_s]
                rows += build_trained_alarm_rows(tests, soaks, timelines, rules, own, agent=agent)
        rows += [group.build_metric_key(agent=agent).row(metric="note", model=None, note=note) for note in notes]
    return MetricTable(inputs=dict(inputs or {}), metrics=tuple(rows))


def _score_group(
    group: PredictionGroup, table: Any, episodes: Mapping[str, RunEpisode], rules: EvaluationSettings
) -> Iterator[MetricRow]:
    own = choose_agent_state(group.threat)
    pooled = group.pool()
    chosen = None if pooled is None else pooled.select_agent(own)
    key = group.build_metric_key(agent=own)
    if chosen is None:
        text = f"no test episode with the agent {own}"
        yield key.row(metric="note", model=None, note=MetricNote(code=NoteCode.NOT_SCORED, text=text))
        return
    yield from build_leaderboard_rows(key, chosen, rules, parts=True)
    scope = build_scoring_set(chosen, rules)
    yield from build_ranking_rows(key, scope)
    yield from build_load_rows(key, scope, episodes)
    others = [found for part in ("soak", "idle") if (found := _parse_groups(table, part).get(group.key)) is not None]
    yield from build_idle_rows(group, others, episodes, rules, agent=own)


def _parse_groups(table: Any, part: str) -> dict[tuple[str, str, str, str], PredictionGroup]:
    return {group.key: group for group in parse_prediction_groups(table, {}, part=part)}


def _build_run_table(table: Any, starts_ns: Mapping[str, int]) -> Any:
    """Return the rows of known phase and unsmoothed probabilities as a run's table has them.

    Windows of every second go to the parts ``test_1s`` and ``soak_1s``, those of every 5 s to the plain parts, too.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    ids = pa.array(sorted(starts_ns), pa.string())
    is_kept = pc.and_(pc.is_in(table["episode_id"], ids), pc.equal(table["filter"], "none"))
    table = table.filter(pc.and_(is_kept, pc.greater_equal(table["y_true"], 0)))
    episode = np.array(table["episode_id"].to_pylist(), dtype=object)
    began = np.array([starts_ns[i] for i in episode], np.int64)
    offset = table["t_center_ns"].to_numpy() - began - WINDOW_BINS * BIN_NS // 2
    is_coarse = offset % (RULE_STRIDE_S * 10**9) < BIN_NS // 2
    parts = np.array([_ROLE_PARTS.get(EpisodeRole(role), "") for role in table["role"].to_pylist()], dtype=object)
    for name, value in (("recipe", OTHER_STORE), ("fold", _FOLD)):
        if name in table.schema.names:
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array([value] * len(table), pa.string()))
    live = np.array([f"{part}_{LIVE_STRIDE_S}s" for part in parts], dtype=object)
    at = table.schema.names.index("part")
    plain = table.set_column(at, "part", pa.array(parts, pa.string())).filter(pa.array(is_coarse))
    return pa.concat_tables([plain, table.set_column(at, "part", pa.array(live, pa.string()))])
