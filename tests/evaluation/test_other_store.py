"""A model is scored on another store by its own rules, on hosts and episodes that its training never saw."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from phasewatch.artifacts import RunEpisode
from phasewatch.errors import MismatchError
from phasewatch.evaluation.metric_table import MetricTable, NoteCode
from phasewatch.evaluation.other_store import (
    OTHER_STORE,
    StoreEpisode,
    TrainingEpisodes,
    score_other_store,
    select_unseen_episodes,
)
from phasewatch.inference.offline import build_prediction_schema
from phasewatch.models.alarm import AlarmKind, AlarmRule
from phasewatch.splits import SplitEpisode
from phasewatch.training.predictions import PROBABILITY_COLUMNS
from phasewatch.types import PHASES, EpisodeOrigin, EpisodeRole, Phase, SampleKind

SECOND = 10**9
LENGTH_S = 90
ONSET_S = 40


def build_episode(
    number: int, *, host: str = "far", role: EpisodeRole = EpisodeRole.LAB, sketch: tuple[int, ...] = ()
) -> StoreEpisode:
    """Build an episode that is clean for 40 s and then infecting; soak stays clean."""
    t0_ns = number * 1000 * SECOND
    is_soak = role is EpisodeRole.SOAK
    middle_ns, end_ns = t0_ns + ONSET_S * SECOND, t0_ns + LENGTH_S * SECOND
    spans = [(Phase.CLEAN, t0_ns, end_ns if is_soak else middle_ns)]
    spans += [] if is_soak else [(Phase.INFECTING, middle_ns, end_ns)]
    return StoreEpisode(
        episode=RunEpisode(
            episode_id=f"e{number:02}",
            host_id=host,
            profile="benign" if is_soak else "cryptomine",
            sample_name="idle" if is_soak else "full",
            sample_kind=SampleKind.BENIGN if is_soak else SampleKind.EMULATED,
            origin=EpisodeOrigin.RECORDED,
            role=role,
            session=f"s{number}",
            agent=False,
            plan_seed=number,
            proc_sketch=sketch,
            started_wall_ns=t0_ns,
            duration_s=LENGTH_S,
            background="",
        ),
        spans=spans,
        t0_ns=t0_ns,
        rates=np.zeros((2 * LENGTH_S, 4), np.float32),
    )


def predict_perfectly(one: StoreEpisode) -> pa.Table:
    """Return the rows of a model that knows each window's phase, every second."""
    rows = []
    for j in range(LENGTH_S - 9):
        centre_ns = one.t0_ns + (j + 5) * SECOND
        phase = next(phase for phase, begin, end in one.spans if begin <= centre_ns < end)
        p = np.eye(5)[phase.code] * 0.8 + 0.04
        rows.append(
            {
                **{"threat": "realistic", "model": "gbt", "table": "raw", "filter": "none", "part": "predict"},
                **{"role": str(one.episode.role), "agent": "off", "episode_id": one.episode.episode_id},
                **{"session": one.episode.session, "host_id": one.episode.host_id, "profile": one.episode.profile},
                **{"sample_name": one.episode.sample_name, "sample_kind": str(one.episode.sample_kind)},
                **{"origin": "recorded", "seed": 0, "t_center_ns": centre_ns, "purity": 1.0, "flags": 0},
                **{"y_true": phase.code, "y_pred": phase.code, "known": 1.0, "alarm": False, "activity_alarm": False},
                **dict(zip(PROBABILITY_COLUMNS, p.tolist(), strict=True)),
            }
        )
    return pa.Table.from_pylist(rows, schema=build_prediction_schema())


def score(episodes: list[StoreEpisode], *rules: AlarmRule) -> MetricTable:
    table = pa.concat_tables([predict_perfectly(one) for one in episodes])
    return score_other_store(table, {o.episode.episode_id: o for o in episodes}, rules, stride_s=1, resamples=500)


def test_alarms_follow_the_rule_of_the_model_and_scores_use_a_window_every_five_seconds() -> None:
    episodes = [build_episode(n) for n in range(1, 9)] + [build_episode(9, role=EpisodeRole.SOAK)]
    reachable = AlarmRule(kind=AlarmKind.INFECTION, stride_s=1, theta=0.5, k=4, n=6)
    unreachable = AlarmRule(kind=AlarmKind.ACTIVITY, stride_s=1, theta=0.99, k=4, n=6)

    table = score(episodes, reachable, unreachable)

    whole = table.select("macro_f1", overall=True, seed="mean")[0]
    assert (whole.recipe, whole.value, whole.n_episodes) == (OTHER_STORE, 1.0, 8)
    assert whole.n_windows == 8 * 17
    assert table.select("infection_recall_30s", overall=True)[0].value == 1.0
    assert table.select("activity_recall_30s", overall=True)[0].value == 0.0
    assert table.select("infection_soak_false_alarms_per_vm_hour", overall=True)[0].value == 0.0
    assert table.select("idle_called_clean", overall=True)[0].value == 1.0


def test_windows_of_other_episodes_are_not_scored() -> None:
    episodes = [build_episode(n) for n in range(1, 5)]
    table = pa.concat_tables([predict_perfectly(one) for one in episodes])

    scored = score_other_store(table, {"e01": episodes[0]}, (), stride_s=1, resamples=100)

    assert {r.n_episodes for r in scored.select("macro_f1", overall=True)} == {1}


def trained(host: str, *, episode: str = "t1", sketch: tuple[int, ...] = ()) -> TrainingEpisodes:
    learnt = SplitEpisode(
        episode_id=episode,
        host_id=host,
        profile="benign",
        sample_name="idle",
        sample_group=0,
        session="s",
        role=EpisodeRole.LAB,
        agent=False,
        plan_seed=77,
        proc_sketch=sketch,
        started_wall_ns=0,
        phases=PHASES,
    )
    return TrainingEpisodes(hosts=frozenset({host}), episodes=(learnt,))


def test_hosts_ids_and_near_duplicates_of_the_training_are_left_out() -> None:
    found = [
        build_episode(1, host="seen"),
        build_episode(2),
        build_episode(3, sketch=(1, 2, 3, 4)),
        build_episode(4, sketch=(5, 6, 7, 8)),
    ]

    kept, notes = select_unseen_episodes(found, trained("seen", episode="e02", sketch=(1, 2, 3, 9)))

    assert list(kept) == ["e04"]
    assert [note.code for note in notes] == [NoteCode.LEFT_OUT] * 2


def test_a_model_of_unknown_training_is_not_scored() -> None:
    with pytest.raises(MismatchError, match="unknown"):
        select_unseen_episodes([build_episode(1)], TrainingEpisodes(hosts=frozenset()))


def test_a_store_of_seen_hosts_is_refused() -> None:
    with pytest.raises(MismatchError, match="hosts"):
        select_unseen_episodes([build_episode(1, host="seen")], trained("seen"))


def test_an_edge_bundle_is_compared_by_hosts_alone_and_says_so() -> None:
    kept, notes = select_unseen_episodes([build_episode(1)], TrainingEpisodes(hosts=frozenset({"seen"})))

    assert list(kept) == ["e01"]
    assert "only hosts" in notes[0].text
