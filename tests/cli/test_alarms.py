"""alarms and check-config as an operator meets them: what they print, what they change, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli.conftest import Said
from tests.factories.alarms import T0_NS, life, raised
from tests.factories.http_receivers import run_receiver

from phasewatch.alarms.history import ALARMS_FILE, AlarmHistory, read_alarms, read_silences
from phasewatch.alarms.life import AlarmStatus
from phasewatch.cli.alarms import parse_duration_ns
from phasewatch.errors import UsageError

Run = Callable[..., Said]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with an open alarm of web01 and a resolved one of db01."""
    folder = tmp_path / "state"
    with AlarmHistory(folder) as history:
        history.record([raised(caveat="contention")])
        history.record(list(life(vm="db01", host="db01", alarm_since_ns=T0_NS - 1)))
    return folder


def test_list_shows_the_newest_alarm_first(phasewatch: Run, state: Path) -> None:
    said = phasewatch("alarms", "list", "--state", state)
    found = json.loads(phasewatch("alarms", "list", "--state", state, "--json").out)["result"]

    assert (said.code, len(said.lines)) == (0, 3)
    assert [(a["vm"], a["status"]) for a in found["alarms"]] == [("web01", "raised"), ("db01", "resolved")]
    assert found["alarms"][0]["raised_at"] == "2027-01-15T08:00:00.000Z"
    assert found["silences"] == []


def test_list_can_leave_resolved_alarms_out(phasewatch: Run, state: Path) -> None:
    found = json.loads(phasewatch("alarms", "list", "--open", "--state", state, "--json").out)["result"]

    assert [alarm["vm"] for alarm in found["alarms"]] == ["web01"]


def test_show_has_the_probabilities_and_the_life(phasewatch: Run, state: Path) -> None:
    alarm_id = read_alarms(state)[1].id

    found = json.loads(phasewatch("alarms", "show", alarm_id[:5], "--state", state, "--json").out)["result"]

    assert found["probabilities"]["infecting"] == 0.8
    assert [change["change"] for change in found["changes"]] == ["raised", "resolved"]
    assert alarm_id in phasewatch("alarms", "show", alarm_id, "--state", state).out


def test_ack_marks_an_alarm_with_user_and_note(phasewatch: Run, state: Path) -> None:
    alarm_id = read_alarms(state)[0].id

    said = phasewatch("alarms", "ack", alarm_id[:4], "--note", "reimaging", "--by", "ann", "--state", state)

    alarm = read_alarms(state)[0]
    assert said.code == 0
    assert (alarm.status, alarm.acknowledged_by, alarm.note) == (AlarmStatus.ACKNOWLEDGED, "ann", "reimaging")
    assert phasewatch("alarms", "ack", alarm_id, "--state", state).code == 2


def test_silence_covers_names_and_a_kind_for_a_time(phasewatch: Run, state: Path) -> None:
    words = ("--vm", "web*", "--kind", "activity", "--for", "2h", "--note", "backup", "--by", "ann", "--state", state)

    made = json.loads(phasewatch("alarms", "silence", *words, "--json").out)["result"]

    (silence,) = read_silences(state, now_ns=0)
    assert (silence.vm, silence.kind, silence.reason, silence.by) == ("web*", "activity", "backup", "ann")
    assert silence.until_ns - silence.from_ns == 7200 * 10**9
    assert made["id"] in phasewatch("alarms", "list", "--state", state).lines[-1]
    assert phasewatch("alarms", "silence", "--end", made["id"], "--state", state).code == 0
    assert "silence" not in phasewatch("alarms", "list", "--state", state).out


def test_a_listed_alarm_says_that_it_is_silenced(phasewatch: Run, state: Path) -> None:
    phasewatch("alarms", "silence", "--vm", "web*", "--for", "1d", "--state", state)

    found = json.loads(phasewatch("alarms", "list", "--state", state, "--json").out)["result"]

    assert [alarm["is_silenced"] for alarm in found["alarms"]] == [True, False]


def test_names_with_control_characters_do_not_reach_the_terminal(phasewatch: Run, state: Path) -> None:
    change = raised(host="evil")
    with AlarmHistory(state) as history:
        history.record([replace(change, alarm=replace(change.alarm, vm="a\x1b[31m\nb"))])

    assert "\x1b" not in phasewatch("alarms", "list", "--state", state).out


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("list", "3f9a", "--state", "."),
        ("list", "--state", "absent"),
        ("show", "--state", "."),
        ("show", "ffff", "--state", "."),
        ("ack", "--state", "."),
        ("ack", "ffff", "--state", "."),
        ("silence", "--state", "."),
        ("silence", "--for", "soon", "--state", "."),
        ("silence", "--end", "ffff", "--state", "."),
        ("forget", "--state", "."),
    ],
)
def test_what_cannot_be_done_is_a_usage_error(
    phasewatch: Run, state: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(state)

    assert phasewatch("alarms", *words).code == 2


def test_a_damaged_history_is_missing_data(phasewatch: Run, tmp_path: Path) -> None:
    (tmp_path / ALARMS_FILE).write_bytes(b"no database at all" * 100)

    said = phasewatch("alarms", "list", "--state", tmp_path)

    assert said.code == 3
    assert "move it away" in said.err


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86_400)])
def test_durations_are_parsed(text: str, seconds: int) -> None:
    assert parse_duration_ns(text) == seconds * 10**9


@pytest.mark.parametrize("text", ["", "2", "h", "-2h", "0s", "1.5h", "367d", "9999999h"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="a duration"):
        parse_duration_ns(text)


def test_check_config_shows_what_goes_where(phasewatch: Run, tmp_path: Path) -> None:
    file = tmp_path / "watch.toml"
    file.write_text('[outputs.webhook]\nurl = "https://pager.example/x"\n[outputs.metrics]\nport = 9177\n')

    found = json.loads(phasewatch("check-config", file, "--json").out)["result"]

    assert phasewatch("check-config", file).code == 0
    assert [row["name"] for row in found["outputs"]] == ["webhook", "metrics"]
    assert found["faults"] == []


def test_check_config_reports_every_fault_and_fails(phasewatch: Run, tmp_path: Path) -> None:
    file = tmp_path / "watch.toml"
    file.write_text('[wach]\n[outputs.webhook]\nurll = "https://pager.example/x"\n')

    said = phasewatch("check-config", file)

    assert said.code == 1
    assert [line.split(": ")[0] for line in said.lines] == [f"{file}:1", f"{file}:3", f"{file}:2"]


def test_check_config_reports_a_damaged_history(phasewatch: Run, tmp_path: Path) -> None:
    (tmp_path / ALARMS_FILE).write_bytes(b"no database at all" * 100)
    file = tmp_path / "watch.toml"
    file.write_text(f'[watch]\nstate = "{tmp_path}"\n')

    assert phasewatch("check-config", file).code == 1


def test_check_config_connects_only_on_request_and_sends_no_alarm(phasewatch: Run, tmp_path: Path) -> None:
    file = tmp_path / "watch.toml"
    with run_receiver() as server:
        file.write_text(f'[outputs.webhook]\nurl = "{server.url}"\n[outputs.syslog]\naddress = "tcp://127.0.0.1:9"\n')
        plain = phasewatch("check-config", file)
        found = json.loads(phasewatch("check-config", file, "--connect", "--json").out)["result"]

    assert plain.code == 0
    assert [(row["name"], row["is_reached"]) for row in found["connections"]] == [("webhook", True), ("syslog", False)]
    assert server.bodies == []
