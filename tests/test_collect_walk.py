"""The walk-through of docs/how-to/collect.md, run as it stands there: record, outbox, ship, receive, validate, run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.requirements import need_program, need_qemu

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "collect.md"
CORPUS = ROOT / "corpus" / "lab-v1"
RECORD = "phasewatch record --plan smoke --out outbox\n"
RUN = "phasewatch run my-store --out runs/mine\n"
WAIT = "for _ in $(seq 300); do curl -sf --noproxy '*' http://{at}/healthz && break; sleep 0.2; done\n"


def script(*, record: str, run: str) -> str:
    """Give the page's commands as one script, on a free port, stopping at the first that fails."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        at = f"127.0.0.1:{probe.getsockname()[1]}"
    text = "".join(re.findall(r"```sh\n(.*?)```", PAGE.read_text(), flags=re.S))
    assert RECORD in text
    assert RUN in text
    text = text.replace(RECORD, WAIT.format(at=at) + record).replace(RUN, run).replace("127.0.0.1:8470", at)
    return f"set -e -m\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{text}wait\n"


def walk(folder: Path, *, record: str = RECORD, run: str = RUN, timeout_s: float) -> subprocess.CompletedProcess[str]:
    need_program("curl", "curl")
    need_program("openssl", "openssl")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", script(record=record, run=run)], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip


def assert_arrived(folder: Path, done: subprocess.CompletedProcess[str]) -> int:
    """See that all that was recorded lies in sent/ and in the store, judged and validated; give how many."""
    assert done.returncode == 0, done.stdout + done.stderr
    stored, sent = (
        sorted(p.name for p in (folder / place).glob("*/*.tar.zst")) for place in ("my-store", "outbox/sent")
    )
    assert stored == sent
    bundles = len(stored)
    assert all((p.with_name(p.name.removesuffix(".tar.zst") + ".status.json")).is_file() for p in (folder / "my-store").glob("*/*.tar.zst"))  # fmt: skip
    assert f"{bundles} bundles sent" in done.stdout
    assert re.search(rf"bundles +{bundles}\b", done.stdout)
    return bundles


def test_the_walk_through_goes_through_with_what_was_recorded_before(tmp_path: Path) -> None:
    for host_id in ("pc", "q35-none", "microvm"):
        (tmp_path / "outbox" / host_id).mkdir(parents=True)
        for bundle in sorted((CORPUS / host_id).glob("*.tar.zst"))[:2]:
            shutil.copy(bundle, tmp_path / "outbox" / host_id)
            shutil.copy(bundle.with_name(bundle.name + ".sha256"), tmp_path / "outbox" / host_id)

    done = walk(tmp_path, record="", run="phasewatch features runs/mine\n", timeout_s=300)

    assert assert_arrived(tmp_path, done) == 6
    assert "windows of 6 episodes" in done.stdout


@pytest.mark.vm
def test_the_walk_through_goes_through_from_a_real_recording(tmp_path: Path) -> None:
    need_qemu()
    record = "phasewatch record --plan smoke --out outbox --hosts pc --limit 1 --idle-wait 0\n"

    done = walk(tmp_path, record=record, run="phasewatch features runs/mine\n", timeout_s=900)

    assert assert_arrived(tmp_path, done) >= 2, "a session has two; a crowded machine records a slot again"
