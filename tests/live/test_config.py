"""The configuration file of a watch: every fault is found at once, with its line and the nearest key."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewatch.errors import UsageError
from phasewatch.live.config import WatchConfig, find_config_faults, read_example, read_watch_config
from phasewatch.toml_config import parse_toml

GOOD = """
[watch]
match = ["web*"]
state = "state"

[outputs.webhook]
url = "https://pager.example/hook"
kinds = ["infection"]

[outputs.alertmanager]
urls = ["http://127.0.0.1:9093"]
labels = { site = "north" }

[outputs.syslog]
address = "tcp://127.0.0.1:6514"

[outputs.ecs]
file = "-"

[outputs.metrics]
port = 9177

[outputs.command]
command = ["true", "an argument with spaces"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "watch.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_configuration_is_read(tmp_path: Path) -> None:
    config = read_watch_config(write(tmp_path, GOOD))

    assert config.watch.match == ("web*",)
    assert config.outputs.alertmanager is not None
    assert config.outputs.alertmanager.labels == {"site": "north"}
    assert config.outputs.command is not None
    assert config.outputs.command.command == ("true", "an argument with spaces")


def test_an_empty_file_uses_no_output(tmp_path: Path) -> None:
    assert read_watch_config(write(tmp_path, "")) == WatchConfig()


def test_every_wrong_key_is_reported_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    text = '[watch]\nmach = []\nstate = 3\n[outputs.webhok]\nurl = "https://x"\n[outputs.webhook]\nkinds = ["worm"]\n'
    path = write(tmp_path, text)

    config, faults = find_config_faults(path)

    assert config is None
    assert [fault.split(": ")[0] for fault in faults] == [f"{path}:{n}" for n in (2, 3, 4, 7, 6)]
    assert "did you mean match?" in faults[0]
    assert "did you mean webhook?" in faults[2]


@pytest.mark.parametrize(
    "text",
    [
        '[outputs.webhook]\nurl = "ftp://x"',
        '[outputs.webhook]\nurl = "http://192.0.2.1/"\ntoken_file = "token"',
        '[outputs.webhook]\nurl = "https://x/"\ntoken_file = "absent"',
        '[outputs.alertmanager]\nurls = ["http://x"]\nlabels = { kind = "mine" }',
        "[outputs.alertmanager]\nurls = []",
        '[outputs.syslog]\naddress = "192.0.2.1:514"',
        '[outputs.syslog]\naddress = "udp://x"\nfacility = "local9"',
        '[outputs.ecs]\nfile = "absent/alarms.json"',
        "[outputs.metrics]\nport = 70000",
        '[outputs.command]\ncommand = "no-such-program-at-all"',
        '[outputs.command]\ncommand = "true \'unclosed"',
        "[outputs.command]\ncommand = []",
        '[watch]\nsmoothing = "much"',
        '[watch]\nmodel = "absent.zip"',
        "not toml",
    ],
)
def test_a_value_that_cannot_be_used_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("secret\n")

    _, faults = find_config_faults(write(tmp_path, text))

    assert len(faults) == 1
    with pytest.raises(UsageError, match=r"watch\.toml"):
        read_watch_config(tmp_path / "watch.toml")


def test_the_example_is_valid_and_has_every_table_and_key(tmp_path: Path) -> None:
    config, faults = find_config_faults(write(tmp_path, read_example()))
    whole = re.sub(r"^# (?=\[|[a-z_]+ = )", "", read_example(), flags=re.M)
    full = parse_toml(whole, WatchConfig, where="example")

    assert config is not None
    assert faults == ()
    outputs = full.outputs
    assert None not in msgspec.structs.astuple(outputs)
    for table in (full.watch, *msgspec.structs.astuple(outputs)):
        missing = {name for name in table.__struct_fields__ if not re.search(rf"^{name} = ", whole, flags=re.M)}
        assert missing == set()


@given(st.text())
def test_no_text_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("config") / "watch.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))

    config, faults = find_config_faults(path)

    assert (config is not None) != bool(faults) or faults


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"\xff\xfe")])
def test_what_is_no_text_file_is_refused(tmp_path: Path, make: object) -> None:
    path = tmp_path / "watch.toml"
    make(path)  # type: ignore[operator]

    with pytest.raises(UsageError, match=r"watch\.toml"):
        read_watch_config(path)
