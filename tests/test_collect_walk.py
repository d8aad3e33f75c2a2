"""The walk-through of docs/how-to/collect.md, run as it stands there: record, outbox, ship, receive, validate, run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.requirements import need_program, need_qemu

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "collect.md"
CORPUS = ROOT / "corpus" / "lab-v1"
RECORD = "phasewatch record --plan smoke --out outbox\n"
RUN = "phasewatch run my-store --out runs/mine\n"
WAIT = "for _ in $(seq 300); do curl -sf --noproxy '*' http://{at}/healthz && break; sleep 0.2; done\n"


def script(*, record: str, run: str) -> str:
    """Return the page's commands as one script, on a free port, stopping at the first that fails."""
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
        ["bash", "-c", script(record=record, run=run)],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def assert_arrived(folder: Path, done: subprocess.CompletedProcess[str]) -> int:
    """See that all that was recorded lies in sent/ and in the store, judged and validated; give how many."""
    assert done.returncode == 0, done.stdout + done.stderr
    stored, sent = (
        sorted(p.name for p in (folder / place).glob("*/*.tar.zst")) for place in ("my-store", "outbox/sent")
    )
    assert stored == sent
    bundles = len(stored)
    assert all(
        (p.with_name(p.name.removesuffix(".tar.zst") + ".status.json")).is_file()
        for p in (folder / "my-store").glob("*/*.tar.zst")
    )
    assert f"{bundles} bundles sent" in done.stdout
    assert re.search(rf"bundles +{bundles}\b", done.stdout)
    return bundles


def recorded(hosts: Sequence[str], profiles: Sequence[str], many: int) -> list[Path]:
    """Return so many lab bundles of each kind from each host, as the corpus' index knows them."""
    rows = pq.read_table(CORPUS / "validation_v1.parquet", columns=["path", "host_id", "profile", "role"]).to_pylist()
    kinds = product(hosts, profiles)
    return [
        CORPUS / path
        for kind in kinds
        for path in [r["path"] for r in rows if (r["host_id"], r["profile"]) == kind and r["role"] == "lab"][:many]
    ]


def test_the_walk_through_goes_through_with_what_was_recorded_before(tmp_path: Path) -> None:
    for bundle in recorded(("pc", "q35-none", "microvm"), ("benign", "cryptomine"), 2):
        folder = tmp_path / "outbox" / bundle.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle, folder)
        shutil.copy(bundle.with_name(bundle.name + ".sha256"), folder)

    one_model = RUN.replace("\n", " --models gbt --recipes held_out_host\n")
    done = walk(tmp_path, record="", run=one_model, timeout_s=300)

    assert assert_arrived(tmp_path, done) == 12
    assert "infections alarmed within 30 s, unseen host (unseen host and sample not tested): " in done.stdout
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


@pytest.mark.vm
def test_the_walk_through_goes_through_from_a_real_recording(tmp_path: Path) -> None:
    need_qemu()
    record = "phasewatch record --plan smoke --out outbox --hosts pc --limit 1 --idle-wait 0\n"

    done = walk(tmp_path, record=record, run="phasewatch features runs/mine\n", timeout_s=900)  # one host: no split

    assert assert_arrived(tmp_path, done) >= 2, "a session has two; a crowded machine records a slot again"
