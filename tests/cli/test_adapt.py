"""`phasewatch adapt`: own clean hours are learnt, thresholds follow them, and unseen hosts may not get worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.binning.test_stream import readings_of
from tests.factories.bundles import MONO0, T0, S, episode
from tests.factories.stores import put, write_store
from typer.testing import CliRunner, Result

from phasewatch.binning.stream import LATENESS_NS
from phasewatch.bundle.model import Episode
from phasewatch.cli import app
from phasewatch.inference.edge_bundle import read_edge_bundle
from phasewatch.inference.model_selection import find_models
from phasewatch.inference.offline import choose_offline_model, predict_episode
from phasewatch.live.tracker import VmTracker
from phasewatch.pipeline import runner, stages
from phasewatch.pipeline.stages import RunSettings
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS
from phasewatch.validate.verdict import BundleLocation, validate_bundle

PHASES = (("clean", 25.0), ("infecting", 20.0), ("active", 35.0))
LIVELY = {"infecting": {"out_bytes": 3e5, "blk_wr_bytes": 4e6}, "active": {"cpu_user_ns": 8e8, "out_bytes": 1e5}}
# Like an infection of the corpus, but for what the machine receives.
OWN = {"out_bytes": 3e5, "blk_wr_bytes": 4e6, "in_bytes": 2e5}


def phasewatch(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def write_corpus(store: Path) -> Path:
    """Three hosts with four sessions of a benign machine beside a malicious one."""
    number = 0
    for h in range(3):
        for s in range(4):
            for profile, phases in (("benign", (("clean", 80.0),)), ("cryptomine", PHASES[:: -1 if s % 3 == 1 else 1])):
                number += 1
                put(
                    store,
                    episode(
                        phases, number=number, host_id=f"h{h}", profile=profile, session=f"h{h}-s{s}", agent=False,
                        rates_of=LIVELY, t0_ns=T0 + number * 1000 * S,
                    ),
                )  # fmt: skip
    return store


def site_episode(number: int, *, rates: dict[str, float] | None = OWN, **changes: Any) -> Episode:
    made: dict[str, Any] = {"phases": (("clean", 180.0),), "host_id": "own", "profile": "benign", "role": "soak"}
    return episode(
        number=500 + number, agent=False, rates=rates, t0_ns=T0 + (500 + number) * 1000 * S, **{**made, **changes}
    )


def write_site(store: Path, episodes: int = 4, **changes: Any) -> Path:
    for number in range(episodes):
        put(store, site_episode(number, **changes))
    return store


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the old model is of."""
    folder = tmp_path_factory.mktemp("corpus")
    settings = RunSettings(store=write_corpus(folder / "store"), run=folder / "run", workers=1, recipes=("deploy",))
    runner.prepare_run(settings)
    stages.train(settings)
    return folder / "run"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_site(tmp_path_factory.mktemp("site") / "store")


@pytest.fixture(scope="module")
def adapted(corpus: Path, site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The adapted edge bundle and the command's result."""
    out = tmp_path_factory.mktemp("adapted") / "site.zip"
    done = phasewatch(
        "adapt", "--benign", site, "--model", corpus, "--out", out, "--yes", "--force", "--workers", 1, "--json"
    )
    assert done.exit_code == 0, done.stderr
    return out, json.loads(done.stdout)["result"]


def test_alarms_in_hours_that_are_labelled_clean_are_listed_and_nothing_is_written(
    corpus: Path, site: Path, tmp_path: Path
) -> None:
    done = phasewatch("adapt", "--benign", site, "--model", corpus, "--out", tmp_path / "site.zip", "--workers", 1)

    assert done.exit_code == 1
    assert "own/" in done.stderr
    assert "--yes" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_held_back_hours_have_fewer_false_alarms_after(adapted: tuple[Path, dict[str, Any]]) -> None:
    _, result = adapted

    assert result["before"]["count"] > result["after"]["count"] == 0
    assert result["after"]["more_hours"] == pytest.approx(3.689 / 0.25 - result["after"]["hours"], abs=0.01)
    assert any(alarm["kind"] == "infection" for alarm in result["alarms"])


def test_the_change_on_unseen_hosts_is_measured(adapted: tuple[Path, dict[str, Any]]) -> None:
    change = adapted[1]["change"]

    assert (change["n_hosts"], change["n_onsets"]) == (3, 12)
    assert 0.0 < change["macro_f1_3class"]["after"] <= 1.0


def test_the_bundle_names_the_site_among_its_training_hosts(adapted: tuple[Path, dict[str, Any]]) -> None:
    bundle = read_edge_bundle(adapted[0])

    assert bundle.header.trained.hosts == ("h0", "h1", "h2", "own")
    assert {m.threat for m in bundle.header.models} == {"realistic", "portable"}
    assert "Adapted to a site" in bundle.card


def test_predict_takes_the_adapted_bundle(adapted: tuple[Path, dict[str, Any]], site: Path, tmp_path: Path) -> None:
    done = phasewatch("predict", site, "--model", adapted[0], "--out", tmp_path / "p.parquet", "--json")

    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["result"]["alarms"] == 0


def test_live_decisions_of_the_adapted_model_equal_offline_ones(
    adapted: tuple[Path, dict[str, Any]], site: Path
) -> None:
    predictor = choose_offline_model(find_models(adapted[0]))
    path = sorted(site.rglob("*.tar.zst"))[0]
    place = BundleLocation(path=path.name, host_id="own", episode_id=path.name.split(".")[0], receipt=None)
    found = validate_bundle(path.read_bytes(), place)
    assert found.episode is not None
    whole = found.episode
    offline, _ = predict_episode(found, predictor, stride_bins=LIVE_STRIDE_BINS)

    tracker = VmTracker(predictor, stride_bins=LIVE_STRIDE_BINS)
    tracker.begin_at(whole.t0_ns)
    steps = []
    for t_ns, source, row in sorted((r for r in readings_of(whole) if r[0] < whole.t_end_ns), key=lambda r: r[0]):
        tracker.add(source, row)
        steps += tracker.advance(t_ns, t_ns - whole.t0_ns + MONO0)
    end_ns = whole.t0_ns + whole.n_bins * BIN_NS + LATENESS_NS
    steps += tracker.advance(end_ns, end_ns - whole.t0_ns + MONO0)
    live = [step.decision for step in steps if step.decision is not None]

    assert [(d.t_start_ns, d.alarm, d.activity_alarm) for d in live] == [
        (d.t_start_ns, d.alarm, d.activity_alarm) for d in offline
    ]
    assert np.allclose([d.p for d in live], [d.p for d in offline], atol=1e-6)


def test_the_same_hours_give_the_same_bytes(
    adapted: tuple[Path, dict[str, Any]], corpus: Path, site: Path, tmp_path: Path
) -> None:
    again = phasewatch(
        "adapt", "--benign", site, "--model", corpus, "--out", tmp_path / "site.zip", "--yes", "--force", "--workers", 2
    )

    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "site.zip").read_bytes() == adapted[0].read_bytes()


def test_an_episode_that_is_not_clean_throughout_is_named(corpus: Path, tmp_path: Path) -> None:
    store = write_site(tmp_path / "store")
    odd = site_episode(9, phases=(("clean", 100.0), ("active", 80.0)), profile="cryptomine", role="lab")
    put(store, odd)

    done = phasewatch("adapt", "--benign", store, "--model", corpus, "--out", tmp_path / "site.zip", "--workers", 1)

    assert done.exit_code == 3
    assert f"own/{odd.manifest.episode_id}: has the label active" in done.stderr
    assert not (tmp_path / "site.zip").exists()


def test_too_few_clean_minutes_are_refused(corpus: Path, tmp_path: Path) -> None:
    store = write_site(tmp_path / "store", episodes=2)

    done = phasewatch("adapt", "--benign", store, "--model", corpus, "--out", tmp_path / "site.zip", "--workers", 1)

    assert done.exit_code == 3
    assert "at least 10" in done.stderr


def test_an_episode_of_the_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    store = write_site(tmp_path / "store", rates=None)
    number = 1  # the first benign episode of the corpus
    put(store, episode((("clean", 80.0),), number=number, host_id="h0", profile="benign", agent=False, t0_ns=T0))

    done = phasewatch(
        "adapt", "--benign", store, "--model", corpus, "--out", tmp_path / "site.zip", "--yes", "--workers", 1
    )

    assert done.exit_code == 3
    assert "is in the corpus too" in done.stderr


def test_another_corpus_than_the_models_is_refused(corpus: Path, site: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", hosts=2, sessions=6)

    done = phasewatch(
        "adapt", "--benign", site, "--model", corpus, "--corpus", other, "--out", tmp_path / "site.zip", "--yes",
        "--workers", 1,
    )  # fmt: skip

    assert done.exit_code == 4
    assert "was trained on the hosts h0, h1, h2" in done.stderr
