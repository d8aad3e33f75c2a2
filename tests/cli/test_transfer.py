"""receive and ship as a user meets them: what is refused before anything starts, hashes, sizes, exit codes."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from tests.cli.conftest import Said

from phasewatch.cli.transfer import _parse_bytes
from phasewatch.errors import UsageError

Call = Callable[..., Said]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("pc-a: a-long-enough-token\n")
    path.chmod(0o600)
    return path


def test_hash_tokens_prints_hashes_and_keeps_the_file(phasewatch: Call, tokens: Path) -> None:
    before = tokens.read_bytes()

    done = phasewatch("receive", "--tokens", tokens, "--hash-tokens")

    assert done.out == f"pc-a: sha256:{sha256(b'a-long-enough-token').hexdigest()}\n"
    assert tokens.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 2, "needs a --store"),
        (("--store", "S", "--listen", "0.0.0.0:1"), 2, "unencrypted"),
        (("--store", "S", "--refuse", "errored"), 2, "needs --check"),
        (("--store", "S", "--check", "--refuse", "degraded"), 2, "rejected or errored"),
        (("--store", "S", "--quota", "lots"), 2, "500MB or 2GiB"),
        (("--store", "ftp://x"), 3, "s3://bucket/prefix"),
    ],
)
def test_a_wrong_call_of_receive_fails_before_the_port_is_bound(
    phasewatch: Call, tokens: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    done = phasewatch("receive", "--tokens", tokens, *options)

    assert (done.code, words in done.err) == (code, True)


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1:8470", "http://store.example", "http://[2001:db8::1]:1"], ids=["address", "name", "IPv6"]
)
def test_ship_refuses_clear_text_to_another_machine(phasewatch: Call, tokens: Path, tmp_path: Path, url: str) -> None:
    done = phasewatch("ship", "--outbox", tmp_path, "--to", url, "--tokens", tokens)

    assert (done.code, "in clear text" in done.err) == (2, True)


@pytest.mark.parametrize("url", ["store", "ftp://x", "http://", "https://[::"])
def test_ship_refuses_an_invalid_url(phasewatch: Call, tokens: Path, tmp_path: Path, url: str) -> None:
    done = phasewatch("ship", "--outbox", tmp_path, "--to", url, "--tokens", tokens)

    assert (done.code, "a URL such as https://store.example:8470 is needed" in done.err) == (2, True)


def test_nobody_listening_is_exit_5_and_a_missing_token_exit_3(phasewatch: Call, tokens: Path, tmp_path: Path) -> None:
    for host_id in ("pc-a", "pc-b"):
        outbox = tmp_path / host_id / host_id
        outbox.mkdir(parents=True)
        (outbox / "0199c82c-c000-7000-8000-000000000001.tar.zst").write_bytes(b"x")
    to = ("--to", "http://127.0.0.1:1", "--tokens", tokens, "--give-up-after", "0.1")

    away = phasewatch("ship", "--outbox", tmp_path / "pc-a", *to, "--json")
    unknown = phasewatch("ship", "--outbox", tmp_path / "pc-b", *to)

    assert (away.code, len(json.loads(away.out)["result"]["left"])) == (5, 1)
    assert (unknown.code, "add a line `pc-b: token`" in unknown.out) == (3, True)


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1 kb", 1000)])
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert _parse_bytes("--quota", text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5GB", "GB", "1XB"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--quota"):
        _parse_bytes("--quota", text)


@pytest.mark.parametrize("how", ["closed", "a pipe that nobody reads", "a pipe whose reader is gone"])
def test_receive_continues_when_its_log_cannot_be_written(tokens: Path, tmp_path: Path, how: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "phasewatch", "receive", "--store", tmp_path / "store", "--tokens", tokens,
               "--listen", f"127.0.0.1:{port}", "--min-free", "0"]  # fmt: skip
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    if how == "a pipe whose reader is gone":
        os.close(reading)
    shell = 'exec "$@" 2>&-' if how == "closed" else 'exec "$@"'
    process = subprocess.Popen(["sh", "-c", shell, "sh", *map(str, command)], stdout=subprocess.DEVNULL, stderr=writing)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            for _ in range(600):
                with suppress(httpx.ConnectError):
                    client.get("/healthz")
                    break
                time.sleep(0.1)
            path, data = "/v1/episodes/pc-a/0199c82c-c000-7000-8000-000000000000", b"a bundle's bytes" * 100
            digest = base64.b64encode(sha256(data).digest()).decode()
            headers = {"Authorization": "Bearer a-long-enough-token", "Content-Digest": f"sha-256=:{digest}:"}
            for _ in range(100):  # more lines than the pipe holds
                assert client.get(path, headers=headers).status_code == 404
            stored = client.put(path, content=data, headers=headers).status_code
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()
        os.close(writing)
        if how != "a pipe whose reader is gone":
            os.close(reading)

    assert (stored, code) == (201, 0)
