"""The tour names files that are there, and passes through every room of the house."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "phasewatch"
TOUR = (ROOT / "docs" / "tour.md").read_text()
NAMED = sorted(set(re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*(?:\.py|/))`", TOUR)))

# Rooms off the way of a recorded window, each with where it is told instead.
ELSEWHERE = {
    "simulate": "makes episodes up", "live": "docs/formats/events.md", "export": "docs/how-to/own-model.md",
    "produce": "docs/formats/events.md", "dashboard": "docs/formats/events.md", "http_server": "docs/how-to/collect.md",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_named_file_is_there(name: str) -> None:
    if name.startswith("src/"):
        name = name.removeprefix("src/phasewatch/")
    assert (SRC / name).exists() or (ROOT / name).exists() or name == "grids/"


def test_every_room_is_passed_or_said_to_lie_elsewhere() -> None:
    rooms = {path.name for path in SRC.iterdir() if path.is_dir() and path.name != "__pycache__"}
    passed = {name.split("/")[0] for name in NAMED}

    assert not rooms - passed - set(ELSEWHERE)


def test_the_files_of_a_run_are_those_that_the_format_page_lists() -> None:
    from phasewatch.artifacts import (
        ACCOUNTING_FILE,
        BINS_PATHS,
        FEATURE_FILES,
        METRICS_FILE,
        PREDICTIONS_FILE,
        REPORT_FILE,
        VALIDATION_FILE,
    )

    page = (ROOT / "docs" / "formats" / "run.md").read_text()

    for name in (
        *FEATURE_FILES,
        *BINS_PATHS,
        METRICS_FILE,
        PREDICTIONS_FILE,
        REPORT_FILE,
        VALIDATION_FILE,
        ACCOUNTING_FILE,
    ):
        assert f"`{name}`" in page


def test_the_columns_of_predictions_are_those_that_the_format_page_explains() -> None:
    from phasewatch.inference import offline
    from phasewatch.training import predictions

    page = (ROOT / "docs" / "formats" / "run.md").read_text()

    assert not {
        name
        for name in (*predictions.build_predictions_schema().names, *offline.build_prediction_schema().names)
        if f"`{name}`" not in page
    }


def test_the_fields_of_a_manifest_are_those_that_the_format_page_lists() -> None:
    from phasewatch.bundle.model import HostMetadata, Manifest

    page = (ROOT / "docs" / "formats" / "bundle.md").read_text()
    listed = next(line for line in page.splitlines() if line.startswith("Fields of the manifest"))

    assert not {
        field for field in (*Manifest.__struct_fields__, *HostMetadata.__struct_fields__) if f"`{field}`" not in listed
    }


def test_the_fields_of_a_checkpoint_are_those_that_the_format_page_explains() -> None:
    from phasewatch.models.checkpoint import CHECKPOINT_FILE, CHECKPOINT_FORMAT, CheckpointHeader

    page = (ROOT / "docs" / "formats" / "checkpoint.md").read_text()

    assert CHECKPOINT_FORMAT in page
    assert CHECKPOINT_FILE in page
    assert not {field for field in CheckpointHeader.__struct_fields__ if f"`{field}`" not in page}
