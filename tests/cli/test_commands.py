"""What a user of the command line sees: help, answers, exit codes, one clear line for each thing that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Said

from phasewatch.channels import CHANNELS
from phasewatch.cli.groups import COMMANDS, load_command

Call = Callable[..., Said]


def bundles(store: Path) -> list[Path]:
    return sorted(store.glob("*/*.tar.zst"))


@pytest.fixture
def one(store: Path, tmp_path: Path) -> Path:
    """A store of one good bundle."""
    first = bundles(store)[0]
    (tmp_path / "one" / first.parent.name).mkdir(parents=True)
    copy = tmp_path / "one" / first.parent.name / first.name
    shutil.copy(first, copy)
    shutil.copy(first.with_name(first.name + ".sha256"), copy.with_name(copy.name + ".sha256"))
    return tmp_path / "one"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_summary_and_an_example(phasewatch: Call, command: str) -> None:
    help_text = load_command(command).help

    assert help_text.splitlines()[0] == COMMANDS[command].summary
    assert f"Example: phasewatch {command}" in help_text
    assert phasewatch(command, "--help").code == 0


def test_help_at_80_columns_shows_every_summary_in_full_and_the_exit_codes_once(phasewatch: Call) -> None:
    lines = phasewatch("--help").lines
    width = max(map(len, COMMANDS))

    for name, spec in COMMANDS.items():
        assert f"  {name:<{width}}  {spec.summary}" in lines
    assert all(len(line) <= 80 for line in lines)
    assert [line.strip() for line in lines].count("Exit codes:") == 1


def test_a_misspelt_command_is_corrected(phasewatch: Call) -> None:
    assert "Did you mean 'simulate'?" in phasewatch("simulat").err


def test_version_is_printed(phasewatch: Call) -> None:
    assert phasewatch("--version").out == "phasewatch 0.1.0\n"


def test_an_unknown_command_is_a_usage_error(phasewatch: Call) -> None:
    assert phasewatch("wathc").code == 2


@pytest.mark.parametrize(
    ("words", "option", "partner"),
    [
        (("channels", "--store", "a"), "--store", "--corpus"),
        (("simulate", "--out", "new", "--fault-kinds", "gap"), "--fault-kinds", "--faults"),
        (("validate", "a", "--out", "new", "--ray-address", "b"), "--ray-address", "--engine ray"),
        (("run", "a", "--out", "new", "--ray-address", "b"), "--ray-address", "--engine ray"),
        (("record", "--plan", "smoke", "--out", "new", "--host-id", "a"), "--host-id", "--image"),
    ],
    ids=["channels", "simulate", "validate", "run", "record"],
)
def test_an_option_without_its_partner_is_refused_not_ignored(
    phasewatch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], option: str, partner: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = phasewatch(*words)

    assert (said.code, said.out) == (2, "")
    assert f"error: {option} needs {partner}; add it, or leave out {option}" in said.err
    assert list(tmp_path.iterdir()) == []


def test_channels_lists_every_field_in_order(phasewatch: Call) -> None:
    rows = json.loads(phasewatch("channels", "--json").out)["result"]["channels"]

    assert [row["name"] for row in rows] == [c.name for c in CHANNELS]
    assert [row["in_deployment"] for row in rows] == [c.in_deployment for c in CHANNELS]
    assert (rows[0]["name"], rows[0]["source"], rows[0]["kind"]) == ("cpu_user", "proc", "rate")
    assert {"fields", "scale", "unit", "trust", "accel", "arch", "semantics", "about", "reads"} <= set(rows[0])


def test_channels_corpus_lists_observed_ranges(phasewatch: Call, store: Path) -> None:
    said = phasewatch("channels", "--corpus", "--store", store)
    told = phasewatch("channels", "--corpus", "--store", store, "--json")

    assert said.lines[0].split()[:3] == ["channel", "unit", "min"]
    assert len(said.lines) == len(CHANNELS) + 2
    assert said.lines[-1] == str(store)
    assert json.loads(told.out)["result"]["channels"][0]["observed"]["known"] > 0.9


def test_record_dry_run_prints_the_plan_and_the_score_of_elapsed_time(phasewatch: Call, tmp_path: Path) -> None:
    said = phasewatch("record", "--plan", "smoke", "--out", tmp_path / "s", "--dry-run")

    assert said.code == 0
    assert "macro-F1 of the phase from the time since the first label: 0." in said.lines[-1]
    assert not (tmp_path / "s").exists()


def test_an_unknown_plan_is_refused_with_the_known_plans(phasewatch: Call, tmp_path: Path) -> None:
    said = phasewatch("record", "--plan", "lab-v9", "--out", tmp_path / "s")

    assert said.code == 3
    assert "lab-v1, lab-v2" in said.err


def test_simulate_writes_a_ground_truth_file(phasewatch: Call, tmp_path: Path) -> None:
    said = phasewatch("simulate", "--hosts", "2", "--episodes", "4", "--out", tmp_path / "s", "--workers", "1")

    assert said.code == 0
    assert said.lines[-1] == str(tmp_path / "s")
    assert len((tmp_path / "s.truth.jsonl").read_text().splitlines()) == 4


def test_inspect_prints_labels_rows_and_sparklines(phasewatch: Call, store: Path) -> None:
    said = phasewatch("inspect", bundles(store)[0])

    assert said.code == 0
    assert "status     accepted" in said.out
    assert any(line.startswith("proc.vcpu_run ") for line in said.lines)


def test_control_characters_are_escaped() -> None:
    from phasewatch.cli.streams import escape_for_terminal

    assert escape_for_terminal("a\x1b[2Jb") == "a\\x1b[2Jb"


def test_validate_prints_statuses_reasons_and_the_path_of_the_index(
    phasewatch: Call, store: Path, tmp_path: Path
) -> None:
    said = phasewatch("validate", store, "--out", tmp_path / "r", "--json")

    result = json.loads(said.out)["result"]
    assert said.code == 0
    assert (result["in"], result["accepted"]) == (9, 9)
    assert result["index"] == str(tmp_path / "r" / "validation_v1.parquet")


def test_validate_explains_a_code(phasewatch: Call) -> None:
    assert "more than 10 s" in phasewatch("validate", "--explain", "missing:qmp").out
    assert phasewatch("validate", "--explain", "receipt").out.startswith("receipt (rejected): ")


def test_a_run_that_cannot_be_split_is_reported(phasewatch: Call, one: Path, tmp_path: Path) -> None:
    said = phasewatch("run", one, "--out", tmp_path / "r")

    assert said.code == 4
    assert "held_out_host" in said.err.splitlines()[-1]
    assert (tmp_path / "r" / "report.html").is_file()


def test_features_works_without_a_run(phasewatch: Call, store: Path, tmp_path: Path) -> None:
    phasewatch("validate", store, "--out", tmp_path / "v")

    said = phasewatch(
        "features",
        "--validation",
        tmp_path / "v" / "validation_v1.parquet",
        "--store",
        store,
        "--out-dir",
        tmp_path / "f",
        "--workers",
        "1",
        "--limit",
        "3",
        "--no-include-degraded",
    )

    assert said.code == 0
    assert said.lines[-1] == str(tmp_path / "f" / "features_window_v2.parquet")
    assert said.lines[-2].endswith("windows of 3 episodes")


def test_a_missing_run_is_an_error(phasewatch: Call, tmp_path: Path) -> None:
    for command in ("features", "split", "train", "evaluate", "audit", "report"):
        said = phasewatch(command, tmp_path / "nowhere")

        assert said.code == 3
        assert "phasewatch run STORE --out" in said.err
        assert not (tmp_path / "nowhere").exists()


def test_validate_refuses_a_locked_run(phasewatch: Call, store: Path, tmp_path: Path) -> None:
    from phasewatch import atomic

    with atomic.lock(tmp_path / "r"):
        said = phasewatch("validate", store, "--out", tmp_path / "r")

    assert said.code == 5
    assert "another process" in said.err


def test_a_missing_bundled_model_is_an_error_that_names_the_option(
    phasewatch: Call, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHASEWATCH_CORPUS", raising=False)
    monkeypatch.setattr("phasewatch.cli.folders.BUNDLED_CORPUS_DIR", Path("nowhere") / "lab-v1")

    said = phasewatch("predict", store, "--out", tmp_path / "said.parquet")

    assert said.code == 3
    assert "name one with --model" in said.err


def test_a_missing_bundled_corpus_is_an_error_that_names_the_variable(
    phasewatch: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PHASEWATCH_CORPUS", str(tmp_path / "nowhere"))

    said = phasewatch("demo", "--out", tmp_path / "r")

    assert said.code == 3
    assert "PHASEWATCH_CORPUS" in said.err


def test_every_command_shows_its_help_without_any_extra() -> None:
    probe = (
        "import sys\n"
        "from phasewatch.cli.groups import COMMANDS, load_command\n"
        "extras = {'torch', 'lightgbm', 'sklearn', 'scipy', 'plotly', 'onnx', 'onnxruntime', 'starlette', "
        "'uvicorn', 'qemu'}\n"
        "sys.modules.update(dict.fromkeys(extras))\n"
        "failed = []\n"
        "for name in COMMANDS:\n"
        "    try:\n"
        "        load_command(name)\n"
        "    except ModuleNotFoundError:\n"
        "        failed.append(name)\n"
        "print(*failed)\n"
    )

    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []
