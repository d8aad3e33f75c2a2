"""The program of `--on-alarm`: facts by environment, no shell, bounded time and number, killed with its children."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.factories.alarms import life, raised

from phasewatch.alarms.command import CommandOutput, build_environment
from phasewatch.alarms.config import CommandConfig, parse_command
from phasewatch.alarms.life import AlarmChange
from phasewatch.errors import UsageError


def run(command: str | tuple[str, ...], *changes: AlarmChange, **settings: Any) -> CommandOutput:
    async def main() -> CommandOutput:
        output = CommandOutput(CommandConfig(command=command, **settings), host="hv1")
        for change in changes:
            output.put(change)
        while output.counters.backlog:
            await asyncio.sleep(0.01)
        await output.close()
        return output

    return asyncio.run(main())


def script(folder: Path, text: str) -> Path:
    path = folder / "hook.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_program_gets_the_facts_by_its_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook = script(
        tmp_path, f'env | grep ^PHASEWATCH | sort > {tmp_path}/$PHASEWATCH_STATE; echo "$@" >> {tmp_path}/args'
    )
    first, last = life(caveat="contention")

    output = run((str(hook), "one argument", "$HOME", "; touch x"), first, last)

    facts = dict(line.split("=", 1) for line in (tmp_path / "raised").read_text().splitlines())
    assert facts == build_environment(first, host="hv1")
    assert facts["PHASEWATCH_VM"] == "web01"
    assert facts["PHASEWATCH_P_INFECTING"] == "0.8000"
    assert "PHASEWATCH_STATE=resolved" in (tmp_path / "resolved").read_text()
    assert (tmp_path / "args").read_text().splitlines()[0] == "one argument $HOME ; touch x"
    assert (output.sent, output.lost, caplog.records) == (2, 0, [])


def test_only_a_few_variables_of_the_watcher_reach_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_WATCHER", "x")
    hook = script(tmp_path, f"env > {tmp_path}/env")

    run(str(hook), raised())

    assert "SECRET" not in (tmp_path / "env").read_text()


def test_a_failing_program_is_logged_with_its_status_and_its_last_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = run(str(script(tmp_path, "echo first >&2; echo no route >&2; exit 3")), raised())

    assert (output.sent, output.lost, output.counters.is_failing) == (0, 1, True)
    assert "exit status 3: no route" in caplog.text


def test_a_hung_program_is_killed_with_its_children(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook = script(
        tmp_path, f"trap '' TERM; sleep 1000 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/pid; wait; wait"
    )

    output = run(str(hook), raised(), timeout_s=1.0)

    pids = [int((tmp_path / name).read_text()) for name in ("pid", "child")]
    assert (output.sent, output.lost) == (0, 1)
    assert "killed after 1 s" in caplog.text
    assert not any(is_running(pid) for pid in pids)


def test_at_most_so_many_run_at_a_time_and_all_have_their_turn(tmp_path: Path) -> None:
    hook = script(tmp_path, f"echo + >> {tmp_path}/log; sleep 0.1; echo - >> {tmp_path}/log")

    output = run(str(hook), *(raised(host=f"vm{n}") for n in range(6)), max_running=2)

    n_running, most = 0, 0
    for line in (tmp_path / "log").read_text().splitlines():
        n_running += 1 if line == "+" else -1
        most = max(most, n_running)
    assert (output.sent, most) == (6, 2)


def test_the_end_of_the_watch_does_not_wait_for_a_hung_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phasewatch.alarms.command._FLUSH_S", 0.2)
    hook = script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 1000")

    async def main() -> CommandOutput:
        output = CommandOutput(CommandConfig(command=str(hook), max_running=1), host="hv1")
        for number in range(3):
            output.put(raised(host=f"vm{number}"))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.01)
        await output.close()
        return output

    output = asyncio.run(main())

    assert output.lost == 3
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_program_that_leaves_a_child_behind_has_ended(tmp_path: Path) -> None:
    output = run(str(script(tmp_path, f"sleep 5 & echo $! > {tmp_path}/child")), raised())

    assert output.sent == 1
    os.kill(int((tmp_path / "child").read_text()), 9)


def test_a_text_is_split_once_as_a_shell_would() -> None:
    assert parse_command(f"{sys.executable} -c 'a b' \"c d\" e\\ f") == (sys.executable, "-c", "a b", "c d", "e f")


@pytest.mark.parametrize("command", ["", " ", "no-such-program-at-all x", "'unclosed", (), ("",), ("true", "a\0b")])
def test_a_command_that_cannot_be_run_is_refused(command: str | tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        parse_command(command)
