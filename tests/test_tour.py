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
    from phasewatch.stages import FEATURE_FILES, GRID_FILES, METRICS, PREDICTIONS, REPORT
    from phasewatch.validate.index import INDEX
    from phasewatch.validate.sweep import LEDGER

    page = (ROOT / "docs" / "formats" / "run.md").read_text()

    for name in (*FEATURE_FILES, *GRID_FILES, METRICS, PREDICTIONS, REPORT, INDEX, LEDGER):
        assert f"`{name}`" in page


def test_the_columns_of_predictions_are_those_that_the_format_page_explains() -> None:
    from phasewatch import predict
    from phasewatch.train import predictions

    page = (ROOT / "docs" / "formats" / "run.md").read_text()

    assert not {name for name in (*predictions.schema().names, *predict.schema().names) if f"`{name}`" not in page}


def test_the_fields_of_a_manifest_are_those_that_the_format_page_lists() -> None:
    from phasewatch.episode.model import Host, Manifest

    page = (ROOT / "docs" / "formats" / "bundle.md").read_text()
    listed = next(line for line in page.splitlines() if line.startswith("Fields of the manifest"))

    assert not {field for field in (*Manifest.__struct_fields__, *Host.__struct_fields__) if f"`{field}`" not in listed}


def test_the_fields_of_a_checkpoint_are_those_that_the_format_page_explains() -> None:
    from phasewatch.models.checkpoint import FORMAT, HEADER, Header

    page = (ROOT / "docs" / "formats" / "checkpoint.md").read_text()

    assert FORMAT in page
    assert HEADER in page
    assert not {field for field in Header.__struct_fields__ if f"`{field}`" not in page}
