"""From bundles to a run: one odd bundle of one host is named, and costs nobody else anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.factories.bundles import T0, S, episode, episode_id
from tests.factories.stores import ACTIVE, put, write_store
from typer.testing import CliRunner, Result

from phasewatch.audit.checks import CheckOutcome
from phasewatch.audit.run import check_disjoint
from phasewatch.bundle.model import Episode
from phasewatch.cli import app

NEW = 900  # the number of the odd episode


def phasewatch(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def odd_episode(host_id: str = "evil", profile: str = "cryptomine", **changes: Any) -> Episode:
    made = episode(
        (("clean", 20.0), ("active", 25.0)), number=NEW, host_id=host_id, profile=profile, agent=False,
        rates_of={"active": {"out_bytes": 3e5, "cpu_user_ns": 7e8}}, t0_ns=T0 + NEW * 1000 * S,
    )  # fmt: skip
    return replace(made, manifest=msgspec.structs.replace(made.manifest, **changes))


def split_files(store: Path, run: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Build the splits of a store; return the files' digests and the command's result."""
    for command in (("validate", store, "--out", run, "--workers", 1), ("features", run, "--workers", 1)):
        done = phasewatch(*command)
        assert done.exit_code == 0, done.stderr
    done = phasewatch("split", run, "--json")
    assert done.exit_code == 0, done.stderr
    digests = {p.name: sha256(p.read_bytes()).hexdigest() for p in sorted((run / "splits").iterdir())}
    return digests, json.loads(done.stdout)["result"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sound")
    return split_files(write_store(folder / "store"), folder / "run")[0]


ODD: dict[str, tuple[Callable[[], Episode], str]] = {
    "a profile of its own": (lambda: odd_episode(profile="zzz-evil"), "profile-rare"),
    "a profile like a path": (lambda: odd_episode(profile="a/b"), "name-unusable"),
    "a huge profile": (lambda: odd_episode(profile="x" * 200), "name-unusable"),
    "a sample like a path": (lambda: odd_episode(sample_name="../../x"), "name-unusable"),
    "benign in capitals": (lambda: odd_episode(profile="Benign"), "profile-look-alike"),
    "the episode id of another host": (lambda: odd_episode(episode_id=episode_id(1)), "episode-id-taken"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_bundle_is_named_and_changes_no_split_file(kind: str, sound: dict[str, str], tmp_path: Path) -> None:
    make, code = ODD[kind]
    store = write_store(tmp_path / "store")
    put(store, make())

    digests, result = split_files(store, tmp_path / "run")

    assert [(a["host_id"], a["code"]) for a in result["set_aside"]] == [("evil", code)]
    assert digests == sound
    assert check_disjoint(tmp_path / "run", tmp_path / "run").fate is CheckOutcome.KEPT


def test_the_session_and_plan_seed_of_other_hosts_take_none_of_their_episodes(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    put(store, odd_episode(session="h0-s0", plan_seed=3))

    _, result = split_files(store, tmp_path / "run")
    folds = [json.loads(p.read_bytes()) for p in sorted((tmp_path / "run" / "splits").glob("held_out_host-*.json"))]

    assert result["set_aside"] == []
    assert [fold["fold"] for fold in folds] == ["evil", "h0", "h1", "h2"]
    assert not any(fold["embargoed"] for fold in folds)


def test_two_hosts_that_recorded_side_by_side_share_their_session(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_store(store)
    for host, number, other in (("h0", 900, 901), ("h1", 901, 900)):
        made = episode(
            (("clean", 20.0), ("active", 20.0)), number=number, host_id=host, session="both", agent=False,
            rates_of=ACTIVE, t0_ns=T0 + 900 * 1000 * S,
        )  # fmt: skip
        put(store, replace(made, manifest=msgspec.structs.replace(made.manifest, neighbours=(episode_id(other),))))

    split_files(store, tmp_path / "run")
    fold = json.loads((tmp_path / "run" / "splits" / "held_out_host-h0.json").read_bytes())

    assert fold["embargoed"] == {episode_id(901): "shares session both with the test set"}


def test_a_run_goes_on_without_an_odd_bundle_and_names_it_in_its_report(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    put(store, odd_episode(profile="zzz-evil"))

    done = phasewatch("run", store, "--out", tmp_path / "run", "--workers", 1, "--models", "majority", "--json")

    assert done.exit_code == 0, done.stderr
    assert [a["code"] for a in json.loads(done.stdout)["result"]["set_aside"]] == ["profile-rare"]
    assert "zzz-evil" in (tmp_path / "run" / "report.html").read_text()


def test_a_recipe_that_was_asked_for_and_leaves_nothing_to_train_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", hosts=1, sessions=6)

    done = phasewatch("run", store, "--out", tmp_path / "run", "--workers", 1, "--recipes", "held_out_sample")

    assert done.exit_code == 4, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_run_whose_headline_cannot_be_built_is_finished_and_exits_1(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", hosts=2, sessions=3)  # without one host, too few sessions to validate

    done = phasewatch("run", store, "--out", tmp_path / "run", "--workers", 1, "--models", "gbt", "--json")

    assert done.exit_code == 1, done.stderr
    assert json.loads(done.stdout)["result"]["cannot_be_built"].keys() == {"held_out_host"}
    assert (tmp_path / "run" / "report.html").is_file()
