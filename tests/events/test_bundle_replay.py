"""A bundle with fresh predictions is replayed like an episode of a run."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.errors import RunError
from phasewatch.events.demo import predict_on_schedule
from phasewatch.events.from_replay import build_replay_episode, iter_replay_steps
from phasewatch.events.perf import ProcessMeter
from phasewatch.events.schema import PhaseEvent
from phasewatch.inference.edge_bundle import TrainingOrigin
from phasewatch.inference.offline import predict_episode
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.models.alarm import AlarmKind, AlarmRule
from phasewatch.models.base import InputKind, InputSpec, ModelInputs
from phasewatch.simulate import simulate
from phasewatch.store.local import DiskStore
from phasewatch.validate.verdict import BundleCheck, BundleLocation, validate_bundle


class AlwaysActive:
    """Model that predicts active for every window."""

    def predict_proba(self, inputs: ModelInputs) -> NDArray[np.float64]:
        p = np.full((len(inputs), 5), 0.05)
        p[:, 3] = 0.8
        return p


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleCheck:
    path = tmp_path_factory.mktemp("judged") / "store"
    simulate(path, hosts=1, episodes=1, seed=3, between_s=(60, 61))
    store = DiskStore(path)
    item = next(iter(store.walk()))
    place = BundleLocation(path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)
    return validate_bundle(store.read(item), place)


@pytest.fixture(scope="module")
def scorer() -> PhasePredictor:
    names = tuple(c.full_name for c in CHANNELS if c.in_deployment)
    spec = InputSpec(kind=InputKind.TENSOR, names=names, mask="realistic", schema_hash="s", behaviour_fingerprint="b")
    return PhasePredictor(
        model="cnn",
        threat="realistic",
        seed=0,
        spec=spec,
        estimator=AlwaysActive(),
        filter=None,
        alarms=(AlarmRule(kind=AlarmKind.ACTIVITY, stride_s=1, theta=0.5, k=3, n=4),),
        trained=TrainingOrigin(),
        where="a test",
    )


def test_replay_has_true_phase_alarm_and_caveat(bundle: BundleCheck, scorer: PhasePredictor) -> None:
    decisions, n_windows = predict_episode(bundle, scorer)
    recording = build_replay_episode(bundle, scorer, decisions, caveat="trained on this bundle")

    seen = [s.data for s in iter_replay_steps(recording, vm="m") if isinstance(s.data, PhaseEvent)]

    assert len(seen) == n_windows >= 11
    assert {s.decision for s in seen} == {"active"}
    assert {s.alarm for s in seen} == {None}
    assert [s.activity_alarm for s in seen[:4]] == [False, False, True, True]
    assert [s.alarm_changes for s in seen[:4]] == [(), (), ("activity",), ()]
    assert {s.caveat for s in seen} == {"trained on this bundle"}
    assert {s.truth for s in seen} <= {"clean", "armed", "infecting", "active", "dormant", None}
    assert (seen[0].model, seen[0].threat, seen[0].filter) == ("cnn", "realistic", "none")


def test_prediction_on_schedule_measures_every_window(bundle: BundleCheck, scorer: PhasePredictor) -> None:
    recording = build_replay_episode(bundle, scorer, predict_episode(bundle, scorer)[0])
    meter = ProcessMeter("test")

    asyncio.run(predict_on_schedule(recording, scorer, meter, speed=1e6))
    perf = meter.read()

    assert perf.windows == len(recording.predictions.p)
    assert perf.p50_ms is not None
    assert perf.rss_bytes > 10_000_000


def test_replay_without_decisions_is_an_error(bundle: BundleCheck, scorer: PhasePredictor) -> None:
    with pytest.raises(RunError, match="nothing to replay"):
        build_replay_episode(bundle, scorer, [])


def test_bundled_corpus_has_episodes_for_the_demo() -> None:
    from phasewatch.cli.folders import find_bundled_corpus
    from phasewatch.dashboard.players import MAX_DEMO_HOSTS, select_demo_episodes

    shown = select_demo_episodes(find_bundled_corpus())

    assert len(shown) == MAX_DEMO_HOSTS
    assert all(one.binned is not None for one in shown)
