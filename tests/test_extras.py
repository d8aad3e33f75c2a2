"""Channels of a user's own pass through registry, bundles, grid, features, schema and hash; a wrong file is refused
by row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phasewatch.channels import MAX_CHANNELS_FILE_BYTES, parse_custom_channels
from phasewatch.errors import UsageError
from phasewatch.features.schema import schema_hash
from phasewatch.types import CHANNELS_VARIABLE, ChannelKind, SourceKind

GOOD = """
[[raw]]
source = "proc"
field = "fds"
type = "int"
unit = "1"
nature = "gauge"
about = "open file descriptors"

[[channel]]
name = "fds_delta"
source = "proc"
kind = "delta"
fields = ["fds"]
unit = "1/s"
about = "Growth of the number of open files."
reads = "/proc/P/fd"
"""

ROOT = Path(__file__).parents[1]

WORLD = """
import sys
from pathlib import Path
from tests.factories.bundles import episode
from tests.factories.stores import put
store = Path(sys.argv[1])
for number in (1, 2):
    put(store, episode((("clean", 20), ("active", 20)), number=number, rates_of={"active": {"fds": 700.0}}))
"""


def call(*arguments: str | Path, extra: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: the tables are made once a process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({CHANNELS_VARIABLE: str(extra)} if extra else {})
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def phasewatch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return call("-m", "phasewatch", *arguments)


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("extra") / "extra.toml"
    path.write_text(GOOD)
    return path


@pytest.fixture(scope="module")
def store(extra: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extra") / "store"
    made = call("-c", WORLD, folder, extra=extra)
    assert made.returncode == 0, made.stderr
    return folder


def test_a_channel_of_ones_own_goes_the_whole_way(extra: Path, store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    swept = phasewatch("validate", store, "--out", run, "--custom-channels", extra, "--json")
    assert swept.returncode == 0, swept.stderr
    made = phasewatch("features", run)  # the run remembers its channels
    assert made.returncode == 0, made.stderr

    import numpy as np
    import pyarrow.parquet as pq

    schema = json.loads((run / "feature_schema_v2.json").read_text())
    grids = np.load(run / "grids" / "grids.npy")
    table = pq.read_table(run / "features_window_v2.parquet")

    assert json.loads(swept.stdout)["result"]["accepted"] == 2
    assert grids.shape[1] == 74
    assert schema["feature_names"][73 * 5 : 74 * 5] == [
        f"proc.fds_delta.{s}" for s in ("mean", "std", "p50", "p95", "slope")
    ]
    assert schema["channels"][-1] == {
        "name": "fds_delta",
        "source": "proc",
        "kind": "delta",
        "unit": "1/s",
        "trust": "host",
        "in_deployment": True,
        "group": "base",
    }
    assert schema["in_deployment_mask"][-5:] == [True] * 5
    assert schema["schema_hash"] != schema_hash()
    assert table.num_columns == 12 + 74 * 5 + 83
    assert np.isfinite(grids[:, 73]).all()
    assert (run / "channels.toml").read_text() == GOOD


def test_a_bundle_with_rows_that_the_registry_lacks_is_refused_without_the_file(store: Path, tmp_path: Path) -> None:
    swept = phasewatch("validate", store, "--out", tmp_path / "run", "--json")

    assert json.loads(swept.stdout)["result"]["reasons"] == {"manifest-fields": 2}


def test_a_bundle_without_the_new_rows_has_the_channel_unknown(extra: Path, tmp_path: Path) -> None:
    import numpy as np

    made = call("-c", WORLD.replace('"fds": 700.0', '"threads": 9.0'), tmp_path / "store")
    assert made.returncode == 0, made.stderr

    swept = phasewatch("validate", tmp_path / "store", "--out", tmp_path / "run", "--custom-channels", extra, "--json")
    grids = np.load(tmp_path / "run" / "grids" / "grids.npy")

    assert json.loads(swept.stdout)["result"]["accepted"] == 2
    assert np.isnan(grids[:, 73]).all()
    assert np.isfinite(grids[:, 0]).all()


def test_a_run_made_with_other_channels_is_not_mixed_with_these(extra: Path, store: Path, tmp_path: Path) -> None:
    phasewatch("validate", store, "--out", tmp_path / "run", "--custom-channels", extra)
    other = tmp_path / "other.toml"
    other.write_text(GOOD.replace("fds_delta", "files_delta"))

    again = phasewatch("validate", store, "--out", tmp_path / "run", "--custom-channels", other)

    assert again.returncode == 2
    assert "other channels" in again.stderr


def test_the_list_of_channels_shows_it(extra: Path) -> None:
    listed = phasewatch("channels", "--custom-channels", extra, "--json")
    rows = json.loads(listed.stdout)["result"]["channels"]

    assert (len(rows), rows[-1]["name"]) == (74, "fds_delta")


def test_a_file_becomes_rows_with_what_it_leaves_out_filled_in() -> None:
    extras = parse_custom_channels(GOOD.encode(), file="extra.toml")

    assert extras.raw[0]["source"] is SourceKind.PROC
    assert (extras.channels[0]["kind"], extras.channels[0]["scale"]) == (ChannelKind.DELTA, 1.0)
    assert len(extras.digest) == 12


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        pytest.param('"fds_delta"', '"Fds-Delta"', "channel 1: name", id="a name with a capital and a dash"),
        pytest.param('"delta"', '"level"', "one of rate, delta", id="an unknown kind"),
        pytest.param('source = "proc"\nkind', 'source = "disk"\nkind', "one of proc", id="an unknown source"),
        pytest.param('fields = ["fds"]', "fields = []\ncolour = 1", "unknown key 'colour'", id="an unknown key"),
        pytest.param('about = "Growth', 'abuot = "Growth', "unknown key 'abuot'", id="a misspelled key"),
        pytest.param('fields = ["fds"]\n', "", "lacks fields", id="a missing key"),
        pytest.param('fields = ["fds"]', 'fields = "fds"', "no list of raw fields", id="a text for a list"),
        pytest.param('reads = "/proc/P/fd"', 'reads = "/proc/P/fd"\nscale = -1', "scale", id="a negative scale"),
        pytest.param('"1/s"', '"1/s\\u001b[2J"', "printable ASCII", id="an escape in a unit"),
        pytest.param("[[raw]]", "[[raws]]", "no table is called", id="an unknown table"),
        pytest.param("[[channel]]", "[channel]", "no list", id="a table for a list"),
        pytest.param("[[raw]]", "[[raw", "not TOML", id="no TOML"),
        pytest.param("[[raw]]", "x = " + "9" * 5000 + "\n[[raw]]", "not TOML", id="a number too long to be one"),
    ],
)
def test_a_wrong_file_is_refused_by_row_and_key(old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(UsageError, match=r"extra\.toml") as refused:
        parse_custom_channels(GOOD.replace(old, new, 1).encode(), file="extra.toml")

    assert words in str(refused.value)


def test_a_file_without_end_is_not_read() -> None:
    with pytest.raises(UsageError, match="larger than"):
        parse_custom_channels(b"#" * (MAX_CHANNELS_FILE_BYTES + 1), file="extra.toml")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        pytest.param('kind = "delta"', 'kind = "gauge"\n#', "", id="a gauge of a gauge is one"),
        pytest.param('nature = "gauge"', 'nature = "counter"', "made of a gauge", id="a total as a level"),
        pytest.param('fields = ["fds"]', 'fields = ["nothing"]', "no raw field", id="a field that is not there"),
        pytest.param('name = "fds_delta"', 'name = "cpu_user"', "is listed twice", id="a name that is taken"),
    ],
)
def test_rows_that_contradict_the_tables_are_refused_before_anything_is_read(
    old: str, new: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "extra.toml"
    path.write_text(GOOD.replace(old, new, 1))

    said = phasewatch("channels", "--custom-channels", path)

    assert said.returncode == (2 if words else 0)
    assert words in said.stderr
