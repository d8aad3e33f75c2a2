"""Recordings of other programs, made up: tables, and CIS490 episodes in that project's layout (none of its data)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from backports.zstd import compress

START_NS = 1_700_000_000 * 10**9
ULID = "01HF7YAT00" + "0123456789ABCDEF"
AHEAD_NS = START_NS - 5 * 10**9  # wall minus the episode's clock


def build_map(tables: str, *, episode: str = 'host = { text = "alpha" }', top: str = "", tail: str = "") -> str:
    """A map with the given tables; `top` are keys before the first table, `tail` what follows."""
    return f'format = "phasewatch-import/1"\nname = "made"\n{top}\n[episode]\n{episode}\n{tail}\n{tables}'


def table_text(
    files: str, fields: str, *, form: str = "csv", source: str = "proc", clock: str = "", more: str = ""
) -> str:
    """One table of a map with a Unix clock in ns in the column `t`."""
    clock = clock or '{ kind = "unix", column = "t", unit = "ns" }'
    return f"""
[[table]]
files = "{files}"
format = "{form}"
source = "{source}"
clock = {clock}
{more}
{fields}
"""


def field_text(column: str, to: str, kind: str, unit: str) -> str:
    return f'[[table.field]]\ncolumn = "{column}"\nto = "{to}"\nkind = "{kind}"\nunit = "{unit}"\n'


def write_csv(path: Path, header: str, rows: Iterable[Iterable[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*([header] if header else []), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build_cis490(ulid: str = ULID, *, seconds: int = 30, start_ns: int = START_NS) -> dict[str, Any]:
    """The members of a made-up episode: clean for 10 s, infecting for 5 s, then infected_running, as a schedule says.

    The netflow rows have a monotonic clock of another origin, as that project's rows do.
    """
    ahead = start_ns - 5 * 10**9

    def stamps(i: int, hz: int, origin: int = 0) -> dict[str, int]:
        wall = start_ns + i * 10**9 // hz
        return {"t_wall_ns": wall, "t_mono_ns": wall - ahead + origin}

    def label(at_s: int, phase: str, prev: str | None) -> dict[str, Any]:
        wall = start_ns + at_s * 10**9
        row = {"t_wall_ns": wall, "t_mono_ns": wall - ahead, "phase": phase, "prev": prev}
        return row | {"reason": "scheduled"}

    return {
        "meta.json": {
            "episode_id": ulid,
            "schema_version": 1,
            "started_at_wall": "2023-11-14T22:13:20Z",
            "ended_at_wall": "2023-11-14T22:14:00Z",
            "code_version": {"commit": "c42bf03" + "0" * 33, "dirty": True},
            "host_fingerprint": {"kernel": "6.1", "qemu_version": "8.2.0", "cpu_model": "x", "smt_off": False},
            "vm": {"image_name": "alpine", "vcpus": 1, "ram_mib": 512, "cgroup_cpu_cap": "800ms/1s"},
            "sample": {"name": "made-up", "profile": "scan-and-dial", "kind": "mimic", "sha256": None},
            "result": {"rows_proc": seconds * 10 + 1},
        },
        "labels.jsonl": [label(0, "clean", None), label(10, "infecting", "clean"),
                         label(15, "infected_running", "infecting")],
        "events.jsonl": [{"t_mono_ns": 15 * 10**9 + 5, "name": "exploit_fire"}],
        "telemetry-proc.jsonl": [
            stamps(i, 10) | {"utime": 3 * i, "stime": i, "voluntary_ctxsw": 7 * i, "write_bytes": 4096 * i, "nice": 0}
            for i in range(seconds * 10 + 1)
        ],
        "telemetry-qmp.jsonl": [stamps(i, 1) | {"wr_bytes": 512 * i, "rd_bytes": 0} for i in range(seconds + 1)],
        "netflow.jsonl": [
            stamps(i * 10, 10, 10**15) | {"out_pkts": 2, "out_bytes": 120} for i in range(1, seconds // 5)
        ],
        "done.marker": "",
    }  # fmt: skip


def write_cis490(store: Path, members: dict[str, Any], *, host: str = "lab-2", as_archive: bool = False) -> Path:
    """Write an episode as the folder ``<host>/<ULID>/``, or as ``<host>/<ULID>.tar.zst``."""
    ulid = members["meta.json"]["episode_id"] if isinstance(members["meta.json"], dict) else ULID
    folder = store / host / ulid
    texts = {name: _encode(content) for name, content in members.items()}
    if not as_archive:
        folder.mkdir(parents=True)
        for name, data in texts.items():
            (folder / name).write_bytes(data)
        return folder
    return write_archive(folder.with_name(f"{ulid}.tar.zst"), {f"{ulid}/{n}": d for n, d in texts.items()})


def write_archive(
    path: Path, members: dict[str, bytes], *, change: Callable[[tarfile.TarInfo], None] | None = None
) -> Path:
    """Write a .tar.zst; `change` may turn members into links or anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change is not None:
                change(info)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(compress(made.getvalue()))
    return path


def _encode(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, list):
        return "".join(json.dumps(row) + "\n" for row in content).encode()
    return json.dumps(content).encode()
