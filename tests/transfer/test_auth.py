"""The tokens file: who may send what, read strictly, compared in constant time, never shown."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from phasewatch.errors import DataError
from phasewatch.transfer.auth import find_host, parse_tokens, read_tokens, render_hashed_lines

TEXT = "# hosts\n\npc-a: a-long-enough-token\npc-b: sha256:" + sha256(b"another-token").hexdigest() + "\n"


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_line_gives_a_host_its_token_plain_or_hashed(tmp_path: Path) -> None:
    tokens = read_tokens(write(tmp_path / "tokens", TEXT))

    assert find_host(tokens, "Bearer a-long-enough-token") == "pc-a"
    assert find_host(tokens, "bearer another-token") == "pc-b"
    assert [
        find_host(tokens, wrong) for wrong in ("", "Bearer", "Bearer x", "a-long-enough-token", "Bearer \udcff")
    ] == [None] * 5


def test_a_hash_is_no_token(tmp_path: Path) -> None:
    tokens = read_tokens(write(tmp_path / "tokens", TEXT))

    assert find_host(tokens, f"Bearer sha256:{sha256(b'another-token').hexdigest()}") is None


def test_hashed_lines_let_the_same_tokens_in(tmp_path: Path) -> None:
    tokens = parse_tokens(TEXT, file="x")

    again = parse_tokens("\n".join(render_hashed_lines(tokens)), file="y")

    assert [token.digest for token in again] == [token.digest for token in tokens]
    assert "a-long-enough-token" not in str(render_hashed_lines(tokens))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602])
def test_a_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(DataError, match=r"others can read or change the tokens; run `chmod 600"):
        read_tokens(write(tmp_path / "tokens", TEXT, mode))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("secret-token-alone", "does not begin with a host_id"),
        ("../x: secret-token", "does not begin with a host_id"),
        ("pc-a: secret token", "1 to 256 printable"),
        ("pc-a:", "1 to 256 printable"),
        ("pc-a: sha256:secret", "not 64 hex digits"),
        ("pc-a: secret-1\npc-b: secret-1", "another line again"),
        ("# nothing", "it has no token"),
        ("pc-a: secret-ü", "not plain ASCII"),
    ],
)
def test_a_line_of_another_form_is_named_and_never_quoted(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as refused:
        read_tokens(write(tmp_path / "tokens", line + "\n"))

    assert "secret" not in str(refused.value)


def test_a_file_that_is_not_there_or_too_large_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="write a tokens file"):
        read_tokens(tmp_path / "nowhere")
    with pytest.raises(DataError, match="too large"):
        read_tokens(write(tmp_path / "large", "#" * (1 << 21)))


def test_a_token_does_not_show_itself() -> None:
    assert "enough" not in repr(parse_tokens(TEXT, file="x"))
