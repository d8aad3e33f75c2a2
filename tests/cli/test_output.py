"""What stands on stdout and what on stderr, how fast help answers, and what an interrupt looks like."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Said
from tests.factories.bundles import episode, with_rows
from tests.factories.stores import put

from phasewatch.errors import MachineError
from phasewatch.pipeline import runner
from phasewatch.pipeline.stages import RunSettings
from phasewatch.types import SourceKind

Call = Callable[..., Said]
COMMAND = (sys.executable, "-m", "phasewatch")


def test_json_prints_one_document_and_nothing_else(phasewatch: Call, store: Path, tmp_path: Path) -> None:
    for arguments in (
        ("channels",), ("doctor",), ("inspect", next(store.glob("*/*.tar.zst"))), ("validate", "--explain", "rate"),
        ("simulate", "--hosts", "1", "--episodes", "1", "--workers", "1", "--out", tmp_path / "s"),
        ("validate", store, "--out", tmp_path / "r", "--workers", "1"), ("features", tmp_path / "r"),
        ("record", "--plan", "smoke", "--out", tmp_path / "x", "--dry-run"),
    ):  # fmt: skip
        said = phasewatch(*arguments, "--json")

        assert list(json.loads(said.out)) == ["result"]


def test_nan_is_null_in_json(phasewatch: Call, tmp_path: Path) -> None:
    put(tmp_path / "store", with_rows(episode(), without=[SourceKind.NETFLOW]))

    said = phasewatch("channels", "--corpus", "--store", tmp_path / "store", "--json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    channels = json.loads(said.out, parse_constant=refuse)["result"]["channels"]
    seen = {c["source"] + "." + c["name"]: c["observed"] for c in channels}
    assert seen["netflow.out_pkts"] == {
        "known": 0.0,
        "moving": 0.0,
        "low": None,
        "median": None,
        "p95": None,
        "high": None,
    }
    assert seen["proc.cpu_user"]["median"] is not None


def test_the_last_line_is_the_path_of_the_result(phasewatch: Call, store: Path, tmp_path: Path) -> None:
    said = phasewatch("validate", store, "--out", tmp_path / "r", "--workers", "1")

    assert Path(said.lines[-1]).is_file()
    assert any(line.startswith("slowest: ") for line in said.lines)


def test_limit_selects_the_same_sample_each_time(phasewatch: Call, store: Path, tmp_path: Path) -> None:
    for run in ("a", "b"):
        phasewatch("validate", store, "--out", tmp_path / run, "--workers", "1", "--limit", "4")

    index = "validation_v1.parquet"
    assert (tmp_path / "a" / index).read_bytes() == (tmp_path / "b" / index).read_bytes()
    said = phasewatch("validate", store, "--out", tmp_path / "a", "--workers", "1", "--limit", "4", "--json")
    assert json.loads(said.out)["result"]["in"] == 4


def test_help_is_fast() -> None:
    began_s = time.process_time()
    children = os.times().children_user + os.times().children_system
    subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)

    # A ratio: what Python itself needs to start and to import the option parser.
    used_s = os.times().children_user + os.times().children_system - children
    subprocess.run([sys.executable, "-c", "import typer.main"], check=True, capture_output=True)
    bare_s = os.times().children_user + os.times().children_system - children - used_s
    assert used_s < 3 * bare_s + 0.05
    assert time.process_time() - began_s < 5


def test_an_interrupt_ends_quietly_with_130(store: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "simulate", "--hosts", "2", "--episodes", "4000", "--workers", "1", "--out", str(tmp_path / "s")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background is born deaf to it
    )  # fmt: skip
    while not list((tmp_path / "s").glob("*/*.zst")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in out + err


def test_a_closed_pipe_is_not_an_error() -> None:
    process = subprocess.Popen([*COMMAND, "channels"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()

    assert process.wait(60) == 0
    assert err == b""


def test_a_full_disk_is_one_line_with_exit_code_5(
    phasewatch: Call, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(settings: RunSettings, **_: object) -> runner.PipelineResult:
        raise OSError(28, "No space left on device", str(tmp_path / "r" / "grids.npy"))

    monkeypatch.setattr(runner, "run_pipeline", full)

    said = phasewatch("run", store, "--out", tmp_path / "r")

    assert said.code == 5
    assert said.err.splitlines()[-1].startswith(f"error: {tmp_path}/r/grids.npy: No space left on device")


def test_control_characters_of_an_error_are_escaped(
    phasewatch: Call, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: RunSettings, **_: object) -> runner.PipelineResult:
        raise MachineError("bad \x1b]0;title\x07 name")

    monkeypatch.setattr(runner, "run_pipeline", broken)

    said = phasewatch("run", store, "--out", tmp_path / "r")

    assert said.err.splitlines()[-1] == "error: bad \\x1b]0;title\\x07 name"
