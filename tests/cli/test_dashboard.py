"""The commands that show what happens, given what cannot be: one clear line and the right exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Said
from tests.factories.event_runs import playable

from phasewatch.events.schema import parse_event

Call = Callable[..., Said]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return playable(tmp_path_factory.mktemp("show") / "run")


def test_publish_writes_events_to_stdout_or_to_a_file(phasewatch: Call, run: Path, tmp_path: Path) -> None:
    piped = phasewatch("publish", "metrics", run)
    filed = phasewatch("publish", "replay", run, "--to", tmp_path / "events.jsonl", "--json")

    assert [parse_event(line.encode()).type for line in piped.lines] == ["score", "confusion"]
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert {parse_event(line).type for line in lines} == {"telemetry", "phase"}
    assert json.loads(filed.out)["result"] == {"events": len(lines), "to": str(tmp_path / "events.jsonl")}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        pytest.param(["publish", "rumours", "RUN"], 2, "rumours", id="no such producer"),
        pytest.param(["publish", "metrics", "nowhere"], 3, "nowhere: there is no such run", id="no run"),
        pytest.param(
            ["publish", "replay", "RUN", "--episode", "x"], 3, "no test predictions of episode x", id="no such episode"
        ),
        pytest.param(
            ["publish", "replay", "RUN", "--model", "cnn"], 3, "no test predictions by cnn", id="no such model"
        ),
        pytest.param(["publish", "perf", "RUN"], 3, "there is no such model", id="no checkpoint"),
        pytest.param(["publish", "metrics", "RUN", "--json"], 2, "name a file", id="two things on one output"),
        pytest.param(
            ["publish", "metrics", "RUN", "--to", "http://127.0.0.1:9", "--token-file", "none"],
            5,
            "none: there is no token",
            id="no token",
        ),
        pytest.param(["dashboard"], 2, "a run to play", id="nothing to show"),
        pytest.param(["dashboard", "nowhere"], 3, "nowhere: there is no such run", id="no run to show"),
        pytest.param(
            ["dashboard", "RUN", "--episode", "x"], 3, "no test predictions of episode x", id="no such episode to show"
        ),
        pytest.param(["dashboard", "RUN", "--port", "99999"], 2, "65535", id="no such port"),
    ],
)
def test_a_wrong_call_of_publish_or_dashboard_is_one_line_with_its_code(
    phasewatch: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)

    done = phasewatch(*[str(run) if word == "RUN" else word for word in words])

    assert done.code == code
    assert said in done.err
    if code != 2:
        assert len(done.err.splitlines()) == 1
    assert done.out == ""


def test_demo_live_without_run_and_model_is_an_error(
    phasewatch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab-v1").mkdir()
    monkeypatch.setenv("PHASEWATCH_CORPUS", str(tmp_path / "lab-v1"))

    done = phasewatch("demo", "--live", "--out", tmp_path / "none")

    assert done.code == 3
    assert "lab-v1.edge.zip, the bundled model, is absent" in done.err
    assert "`phasewatch demo --out" in done.err
