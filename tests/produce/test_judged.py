"""A bundle that a model judged just now is replayed like an episode of a run, and says what it is."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.errors import RunError
from phasewatch.export.edge import Trained
from phasewatch.live.events import PhaseSeen
from phasewatch.live.scorer import Scorer
from phasewatch.models.alarm import AlarmRule
from phasewatch.models.base import InputKind, Inputs, InputSpec
from phasewatch.predict import judge
from phasewatch.produce.judged import recording_of
from phasewatch.produce.loop import judge_in_time
from phasewatch.produce.perf import Meter
from phasewatch.produce.replay import play
from phasewatch.simulate import simulate
from phasewatch.store.disk import DiskStore
from phasewatch.validate.verdict import Examined, Place, examine


class Busy:
    """Calls every window active, the surer the busier the vCPU."""

    def predict_proba(self, inputs: Inputs) -> NDArray[np.float64]:
        p = np.full((len(inputs), 5), 0.05)
        p[:, 3] = 0.8
        return p


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Examined:
    path = tmp_path_factory.mktemp("judged") / "store"
    simulate(path, hosts=1, episodes=1, seed=3, between_s=(60, 61))
    store = DiskStore(path)
    item = next(iter(store.walk()))
    place = Place(path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)
    return examine(store.read(item), place)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    names = tuple(c.full_name for c in CHANNELS if c.in_deployment)
    spec = InputSpec(kind=InputKind.TENSOR, names=names, mask="realistic", schema_hash="s", behaviour_fingerprint="b")
    return Scorer(
        model="cnn", threat="realistic", seed=0, spec=spec, predictor=Busy(), filter=None, alarm=AlarmRule(theta=0.5),
        trained=Trained(), where="a test",
    )  # fmt: skip


def test_it_is_replayed_with_its_truth_its_alarm_and_its_caveat(found: Examined, scorer: Scorer) -> None:
    said, of = judge(found, scorer)
    recording = recording_of(found, scorer, said, caveat="it learnt from this")

    seen = [s.data for s in play(recording, vm="m") if isinstance(s.data, PhaseSeen)]

    assert len(seen) == of >= 11
    assert {s.decision for s in seen} == {"active"}
    assert [s.alarm for s in seen[:3]] == [False, True, True]
    assert {s.caveat for s in seen} == {"it learnt from this"}
    assert {s.truth for s in seen} <= {"clean", "armed", "infecting", "active", "dormant", "unknown"}
    assert (seen[0].model, seen[0].threat, seen[0].filter) == ("cnn", "realistic", "none")


def test_judging_it_in_time_measures_every_window(found: Examined, scorer: Scorer) -> None:
    recording = recording_of(found, scorer, judge(found, scorer)[0])
    meter = Meter("test")

    asyncio.run(judge_in_time(recording, scorer, meter, speed=1e6))
    perf = meter.read()

    assert perf.windows == len(recording.judged.p)
    assert perf.p50_ms is not None
    assert perf.rss_bytes > 10_000_000


def test_nothing_to_replay_is_said(found: Examined, scorer: Scorer) -> None:
    with pytest.raises(RunError, match="nothing to replay: shorter than a window"):
        recording_of(found, scorer, [])


def test_the_bundled_corpus_has_something_to_show() -> None:
    from phasewatch.cli.base import bundled_corpus
    from phasewatch.cli.page import MOST_DEMO, _bundled_episodes

    shown = _bundled_episodes(bundled_corpus())

    assert len(shown) == MOST_DEMO
    assert all(one.grid is not None for one in shown)
