"""Who may come in: this machine's own name, the page's own origin, the cookie to look, the token to send."""

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
GATE = AccessControl(token=TOKEN)
LOOK = AccessRequest(method="GET", path="/", query="", host="127.0.0.1:8765", origin="", cookie="", authorization="")
SEND = replace(LOOK, method="POST", path="/events")
COOKIE = f"phasewatch={compute_cookie(TOKEN)}"


def status_of(asked: AccessRequest, gate: AccessControl = GATE) -> int | None:
    refusal = gate.find_refusal(asked)
    return None if refusal is None else refusal.status


def test_a_viewer_needs_the_cookie() -> None:
    assert status_of(LOOK) == 401
    assert status_of(replace(LOOK, cookie=COOKIE)) is None
    assert status_of(replace(LOOK, cookie=f"other=1; {COOKIE}")) is None
    assert status_of(replace(LOOK, cookie="phasewatch=" + "0" * 64)) == 401


@pytest.mark.parametrize("other", ['prefs={"a":1}', "a b=c", 'x="unterminated', "n=é", "=", "phasewatch", "a=1;;"])
def test_what_another_program_of_this_machine_set_does_not_hide_the_cookie(other: str) -> None:
    # Browsers keep cookies by name and address, not by port: whatever runs on 127.0.0.1 shares them.
    assert status_of(replace(LOOK, cookie=f"{other}; {COOKIE}")) is None
    assert status_of(replace(LOOK, cookie=f"{COOKIE}; {other}")) is None
    assert status_of(replace(LOOK, cookie=other)) == 401


def test_a_query_of_many_fields_holds_no_token_and_breaks_nothing() -> None:
    assert not GATE.is_login(replace(LOOK, query="&".join("abcdefghijk")))


def test_the_token_itself_is_no_cookie_and_the_cookie_no_token() -> None:
    assert status_of(replace(LOOK, cookie=f"phasewatch={TOKEN}")) == 401
    assert status_of(replace(SEND, authorization=f"Bearer {compute_cookie(TOKEN)}")) == 401


def test_a_producer_needs_the_token_as_bearer() -> None:
    assert status_of(SEND) == 401
    assert status_of(replace(SEND, cookie=COOKIE)) == 401
    assert status_of(replace(SEND, authorization=f"Bearer {TOKEN}x")) == 401
    assert status_of(replace(SEND, authorization=f"Basic {TOKEN}")) == 401
    assert status_of(replace(SEND, authorization=f"bearer {TOKEN}")) is None


def test_an_open_gate_lets_everybody_of_this_machine_look_and_nobody_send() -> None:
    gate = AccessControl(token=TOKEN, is_open=True)

    assert status_of(LOOK, gate) is None
    assert status_of(replace(LOOK, path="/events"), gate) is None
    assert status_of(SEND, gate) == 401
    assert status_of(replace(LOOK, host="evil.example"), gate) == 421
    assert status_of(replace(LOOK, origin="https://evil.example"), gate) == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "10.0.0.1:8765", "[::2]:80", "@127.0.0.1:x"]
)
def test_another_name_for_this_address_is_refused(host: str) -> None:
    assert status_of(replace(LOOK, host=host, cookie=COOKIE)) == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:9000", "LOCALHOST", "[::1]:8765"])
def test_any_port_of_this_machine_is_right_for_tunnels_change_it(host: str) -> None:
    assert status_of(replace(LOOK, host=host, cookie=COOKIE)) is None


def test_another_origin_is_refused_even_with_the_token() -> None:
    bearer = replace(SEND, authorization=f"Bearer {TOKEN}")

    assert status_of(replace(bearer, origin="http://127.0.0.1:8765")) is None
    assert status_of(replace(bearer, origin="http://127.0.0.1:1")) == 403
    assert status_of(replace(bearer, origin="null")) == 403


def test_only_the_start_address_takes_a_token() -> None:
    assert GATE.is_login(replace(LOOK, query=f"token={TOKEN}"))
    assert not GATE.is_login(replace(LOOK, query="token=wrong"))
    assert not GATE.is_login(replace(LOOK, query="token="))
    assert not GATE.is_login(replace(LOOK, path="/events", query=f"token={TOKEN}"))
    assert not GATE.is_login(replace(SEND, path="/", query=f"token={TOKEN}"))


@given(st.builds(replace, st.just(LOOK), query=st.text(max_size=300), host=st.text(max_size=60), origin=st.text(max_size=60),
                 cookie=st.text(max_size=300), authorization=st.text(max_size=60), method=st.sampled_from(["GET", "POST", "PUT"])))  # fmt: skip
def test_noise_never_comes_in_and_never_breaks_the_gate(asked: AccessRequest) -> None:
    assert status_of(asked) in (401, 403, 421)
    assert not GATE.is_login(asked)


def test_a_token_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "token"

    first = ensure_token(path)

    assert len(first) >= 40
    assert ensure_token(path) == read_token(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_token(tmp_path / "other") != first


def test_a_token_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "token"
    ensure_token(path)
    path.chmod(0o640)

    with pytest.raises(MachineError, match=r"others may read it \(mode 640\); `chmod 600"):
        ensure_token(path)


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff" * 40, b"x" * 600, b"two words \x00 and a null"])
def test_a_file_that_holds_no_token_is_said_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(MachineError, match="holds no token"):
        read_token(path)


def test_the_token_lies_in_the_users_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    assert find_token_path() == tmp_path / "phasewatch" / "dashboard.token"
    with pytest.raises(MachineError, match="start `phasewatch dashboard` once"):
        read_token(find_token_path())
