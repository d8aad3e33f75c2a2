"""Access control: local host names, same origin, a cookie to view and a token to send events."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewatch.dashboard.auth import (
    AccessControl,
    AccessRequest,
    compute_cookie,
    ensure_token,
    find_token_path,
    read_token,
)
from phasewatch.errors import MachineError

TOKEN = "correct-horse-battery-staple"
ACCESS = AccessControl(token=TOKEN)
LOOK = AccessRequest(method="GET", path="/", query="", host="127.0.0.1:8765", origin="", cookie="", authorization="")
SEND = replace(LOOK, method="POST", path="/events")
COOKIE = f"phasewatch={compute_cookie(TOKEN)}"


def status_of(request: AccessRequest, access: AccessControl = ACCESS) -> int | None:
    refusal = access.find_refusal(request)
    return None if refusal is None else refusal.status


def test_viewing_needs_the_cookie() -> None:
    assert status_of(LOOK) == 401
    assert status_of(replace(LOOK, cookie=COOKIE)) is None
    assert status_of(replace(LOOK, cookie=f"other=1; {COOKIE}")) is None
    assert status_of(replace(LOOK, cookie="phasewatch=" + "0" * 64)) == 401


@pytest.mark.parametrize("other", ['prefs={"a":1}', "a b=c", 'x="unterminated', "n=é", "=", "phasewatch", "a=1;;"])
def test_cookies_of_other_programs_do_not_hide_the_cookie(other: str) -> None:
    # Browsers keep cookies by name and address, not by port: whatever runs on 127.0.0.1 shares them.
    assert status_of(replace(LOOK, cookie=f"{other}; {COOKIE}")) is None
    assert status_of(replace(LOOK, cookie=f"{COOKIE}; {other}")) is None
    assert status_of(replace(LOOK, cookie=other)) == 401


def test_query_with_many_fields_is_no_login() -> None:
    assert not ACCESS.is_login(replace(LOOK, query="&".join("abcdefghijk")))


def test_token_is_not_accepted_as_cookie_and_cookie_not_as_token() -> None:
    assert status_of(replace(LOOK, cookie=f"phasewatch={TOKEN}")) == 401
    assert status_of(replace(SEND, authorization=f"Bearer {compute_cookie(TOKEN)}")) == 401


def test_sending_needs_the_token_as_bearer() -> None:
    assert status_of(SEND) == 401
    assert status_of(replace(SEND, cookie=COOKIE)) == 401
    assert status_of(replace(SEND, authorization=f"Bearer {TOKEN}x")) == 401
    assert status_of(replace(SEND, authorization=f"Basic {TOKEN}")) == 401
    assert status_of(replace(SEND, authorization=f"bearer {TOKEN}")) is None


def test_open_access_allows_viewing_but_not_sending() -> None:
    access = AccessControl(token=TOKEN, is_open=True)

    assert status_of(LOOK, access) is None
    assert status_of(replace(LOOK, path="/events"), access) is None
    assert status_of(SEND, access) == 401
    assert status_of(replace(LOOK, host="evil.example"), access) == 421
    assert status_of(replace(LOOK, origin="https://evil.example"), access) == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "10.0.0.1:8765", "[::2]:80", "@127.0.0.1:x"]
)
def test_foreign_host_names_are_refused(host: str) -> None:
    assert status_of(replace(LOOK, host=host, cookie=COOKIE)) == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:9000", "LOCALHOST", "[::1]:8765"])
def test_local_host_names_are_accepted_with_any_port(host: str) -> None:
    assert status_of(replace(LOOK, host=host, cookie=COOKIE)) is None


def test_other_origin_is_refused_even_with_the_token() -> None:
    bearer = replace(SEND, authorization=f"Bearer {TOKEN}")

    assert status_of(replace(bearer, origin="http://127.0.0.1:8765")) is None
    assert status_of(replace(bearer, origin="http://127.0.0.1:1")) == 403
    assert status_of(replace(bearer, origin="null")) == 403


def test_only_the_start_address_accepts_a_token_in_the_query() -> None:
    assert ACCESS.is_login(replace(LOOK, query=f"token={TOKEN}"))
    assert not ACCESS.is_login(replace(LOOK, query="token=wrong"))
    assert not ACCESS.is_login(replace(LOOK, query="token="))
    assert not ACCESS.is_login(replace(LOOK, path="/events", query=f"token={TOKEN}"))
    assert not ACCESS.is_login(replace(SEND, path="/", query=f"token={TOKEN}"))


@given(
    st.builds(
        replace,
        st.just(LOOK),
        query=st.text(max_size=300),
        host=st.text(max_size=60),
        origin=st.text(max_size=60),
        cookie=st.text(max_size=300),
        authorization=st.text(max_size=60),
        method=st.sampled_from(["GET", "POST", "PUT"]),
    )
)
def test_random_requests_are_refused(request: AccessRequest) -> None:
    assert status_of(request) in (401, 403, 421)
    assert not ACCESS.is_login(request)


def test_token_is_created_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "token"

    first = ensure_token(path)

    assert len(first) >= 40
    assert ensure_token(path) == read_token(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_token(tmp_path / "other") != first


def test_token_readable_by_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    ensure_token(path)
    path.chmod(0o640)

    with pytest.raises(MachineError, match=r"\(mode 640\); `chmod 600"):
        ensure_token(path)


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff" * 40, b"x" * 600, b"two words \x00 and a null"])
def test_file_without_a_token_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(MachineError, match="holds no token"):
        read_token(path)


def test_default_token_path_is_in_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    assert find_token_path() == tmp_path / "phasewatch" / "dashboard.token"
    with pytest.raises(MachineError, match="start `phasewatch dashboard` once"):
        read_token(find_token_path())
