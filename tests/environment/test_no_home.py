"""A user without a home folder, as in a container with `--user`: what needs one says what to set, the rest works."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.environment.commands import call

from phasewatch.dashboard.auth import ensure_token, find_token_path
from phasewatch.errors import MachineError
from phasewatch.user_folders import cache_folder, user_folder


@pytest.fixture
def _homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without an entry in /etc/passwd


@pytest.mark.usefixtures("_homeless")
@pytest.mark.parametrize(
    ("folder", "remedies"), [(find_token_path, ("XDG_STATE_HOME", "--token-file")), (cache_folder, ("XDG_CACHE_HOME",))]
)
def test_without_a_home_the_error_names_what_to_set(folder: object, remedies: tuple[str, ...]) -> None:
    with pytest.raises(MachineError) as caught:
        folder()  # type: ignore[operator]

    assert all(remedy in str(caught.value) for remedy in remedies)


@pytest.mark.parametrize(
    ("home", "state", "expected"),
    [
        ("/home/a", "", "/home/a/.local/state/phasewatch"),
        ("/home/a", "/state", "/state/phasewatch"),
        ("/home/a", "relative", "/home/a/.local/state/phasewatch"),
        ("", "/state", "/state/phasewatch"),
    ],
)
def test_the_users_folder_follows_the_xdg_specification(
    monkeypatch: pytest.MonkeyPatch, home: str, state: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XDG_STATE_HOME", state)

    assert user_folder("XDG_STATE_HOME", ".local/state", otherwise="") == Path(expected)


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null", "relative"])
@pytest.mark.parametrize(
    "words",
    [
        ("dashboard", "--no-produce", "--port", "0"),
        ("record", "--plan", "smoke", "--limit", "1", "--out", "recorded"),
        ("demo", "--live", "--port", "0"),
    ],
    ids=lambda words: words[0],
)
def test_a_home_that_cannot_be_written_to_is_one_line(words: tuple[str, ...], home: str, tmp_path: Path) -> None:
    done = call(words, env={"HOME": home}, cwd=tmp_path)

    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith(b"error: ")
    assert b"Traceback" not in done.stderr
    assert b"XDG_" in done.stderr


def test_a_token_is_its_owners_alone_under_any_umask(tmp_path: Path) -> None:
    done = call(
        ["dashboard", "nothing", "--token-file", "folder/token"], cwd=tmp_path,
        before=("sh", "-c", 'umask 0; exec "$@"', "sh"),
    )  # fmt: skip

    assert done.returncode == 3
    assert ensure_token(tmp_path / "token")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
