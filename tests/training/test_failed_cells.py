"""A failing experiment is reported, does not stop the others, and is tried again by the next call."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.factories.synthetic_runs import World, write_run
from typer.testing import CliRunner

from phasewatch.cli import app
from phasewatch.dataset import read_fold, write_splits
from phasewatch.models import registry
from phasewatch.splits import Fold
from phasewatch.training.experiment import Experiment, plan_experiments
from phasewatch.training.train import InputDigestCache, compute_run_digests, train_experiments

OWN = """
import sys
from pathlib import Path

import numpy as np

from phasewatch.models.adapters import TableAdapter


class Guess:
    def fit(self, x, y):
        self.classes_ = np.unique(y)

    def predict_proba(self, x):
        return np.full((len(x), len(self.classes_)), 1.0)


class _Own(TableAdapter):
    key = "own"

    def make(self, seed):
        return Guess()


class Good(_Own):
    pass


class Raises(_Own):
    def make(self, seed):
        raise ZeroDivisionError("first line\\nsecond line " + "x" * 1000)


class Leaves(_Own):
    def make(self, seed):
        sys.exit(0)


class Files(_Own):
    def make(self, seed):
        return open("/no/such/file")


class Shape(_Own):
    def make(self, seed):
        class Odd(Guess):
            def predict_proba(self, x):
                return np.ones((len(x), 2))

        return Odd()


class Dies(_Own):
    def make(self, seed):
        import os

        os._exit(3)


class Later(_Own):
    def make(self, seed):
        if not Path(__file__).with_name("ready").exists():
            raise RuntimeError("not yet")
        return Guess()


def square(n):
    return n * n


class Parallel(_Own):
    def make(self, seed):
        import multiprocessing

        class Spread(Guess):
            def fit(self, x, y):
                with multiprocessing.get_context("fork").Pool(2) as pool:
                    assert pool.map(square, [1, 2]) == [1, 4]
                super().fit(x, y)

        return Spread()
"""
FAILING = ("Raises", "Leaves", "Files", "Shape")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module with models of a user, on the path of this process and of its workers."""
    (tmp_path / "learn_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    sys.modules.pop("learn_own", None)
    yield tmp_path
    sys.modules.pop("learn_own", None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = write_run(tmp_path / "run", World(hosts=3, sessions=4, windows=8, soaks=0))
    write_splits(made, "held_out_host")
    return made


def cells(*names: str) -> list[Experiment]:
    return [Experiment(recipe="held_out_host", fold="host-0", threat="realistic", model=name) for name in names]


def owned(*names: str) -> list[Experiment]:
    return cells(*(f"learn_own:{name}" for name in names))


def test_every_failure_of_a_users_model_is_one_line_and_the_others_are_trained(own: Path, run: Path) -> None:
    report = train_experiments(run, [*owned(*FAILING, "Good"), *cells("majority")], workers=1)

    assert {c.model for c in report.trained} == {"learn_own:Good", "majority"}
    assert {f.cell.model for f in report.failed} == {f"learn_own:{name}" for name in FAILING}
    assert report.merged == 2
    for failed in report.failed:
        assert failed.failure.exit_code == 3
        assert "\n" not in failed.failure.words
        assert len(failed.failure.words) < 600


def test_dead_worker_loses_one_experiment_and_workers_may_start_processes(own: Path, run: Path) -> None:
    report = train_experiments(run, [*owned("Dies", "Parallel"), *cells("majority")], workers=2)

    assert {c.model for c in report.trained} == {"learn_own:Parallel", "majority"}
    assert [(f.cell.model, f.failure.exit_code) for f in report.failed] == [("learn_own:Dies", 5)]


def test_failed_experiment_is_tried_again_and_the_others_are_kept(own: Path, run: Path) -> None:
    wanted = [*owned("Later"), *cells("majority")]
    first = train_experiments(run, wanted, workers=1)
    (own / "ready").touch()

    again = train_experiments(run, wanted, workers=1)

    assert [f.cell for f in first.failed] == owned("Later")
    assert (again.trained, again.kept, again.failed) == (tuple(owned("Later")), tuple(cells("majority")), ())


def test_the_command_lists_what_failed_and_does_not_exit_0(own: Path, run: Path) -> None:
    arguments = ["train", str(run), "--workers", "1", "--recipes", "held_out_host", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--add-model", "learn_own:Raises", "--add-model", "learn_own:Good"])

    result = json.loads(done.stdout)["result"]
    assert done.exit_code == 3, done.stderr
    assert {failed["model"] for failed in result["failed"]} == {"learn_own:Raises"}
    assert result["trained"] == 3


def test_bug_in_phasewatch_is_not_reported_as_a_failed_experiment(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(registry, "create", broken)

    with pytest.raises(ZeroDivisionError):
        train_experiments(run, cells("majority"), workers=1)


def test_each_fold_file_is_read_once_for_all_experiments(run: Path) -> None:
    reads: Counter[tuple[str, str]] = Counter()

    def read(recipe: str, fold: str) -> Fold:
        reads[recipe, fold] += 1
        return read_fold(run, recipe, fold)

    folds = [read_fold(run, "held_out_host", f"host-{n}") for n in range(3)]
    digests = InputDigestCache(compute_run_digests(run), read)
    many = plan_experiments(folds, models=("gbt", "majority"), threats=("realistic", "oracle"), seeds=range(50))
    found = [digests.get_inputs(cell) for cell in many]

    assert len(found) == 600
    assert reads == {("held_out_host", f"host-{n}"): 1 for n in range(3)}
