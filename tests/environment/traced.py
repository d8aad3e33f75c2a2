"""Run a command without a network, under strace, and return whom it spoke to and what it made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.environment.commands import PATH, PROGRAM
from tests.requirements import need_program

CALLS = (
    "connect,sendto,sendmsg,sendmmsg,open,openat,creat,mkdir,mkdirat,link,linkat,symlink,symlinkat,rename,renameat,"
    "renameat2,mknod,mknodat"
)
_ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
_PATHS = re.compile(r'"((?:[^"\\]|\\.)*)"')
_MAKERS = re.compile(r"^(creat|mkdir|mkdirat|link|linkat|symlink|symlinkat|rename|renameat|renameat2|mknod|mknodat)\(")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What a command did.

    Attributes:
        code: Its exit code.
        output: What it wrote, both streams.
        addresses: Internet addresses that it or a child of it spoke to, or tried to.
        is_name_asked: Whether any of them read how names are looked up.
        outside: Paths that were made outside its folder.
        left: Files below its home and its folder of temporary files, at its end.
    """

    code: int
    output: str
    addresses: frozenset[str]
    is_name_asked: bool
    outside: frozenset[str]
    left: tuple[str, ...]


def need_tracing() -> None:
    """Skip where no process may be traced in a network namespace of its own."""
    need_program("strace", "strace")
    need_program("ip", "iproute2")
    probe = ["unshare", "--net", "strace", "-qq", "-e", "trace=none", "true"]
    if os.geteuid() or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs root, a network namespace and ptrace")


def trace(
    folder: Path, arguments: Sequence[str | Path], *, before: Sequence[str] = (), timeout_s: float = 400
) -> Traced:
    """Run phasewatch in a folder, with an empty home and nothing else in its environment."""
    home, temporary, traces = (folder / name for name in ("home", "temporary", "traces"))
    for each in (home, temporary, traces):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir()
    env = {"PATH": PATH, "HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    tracer = [
        "strace",
        "-ff",
        "-qq",
        "--seccomp-bpf",
        "-y",
        "-s",
        "4096",
        "-e",
        f"trace={CALLS}",
        "-o",
        str(traces / "t"),
    ]
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *tracer, *before, *PROGRAM]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout_s
    )
    lines = [line for path in sorted(traces.iterdir()) for line in path.read_text(errors="replace").splitlines()]
    shutil.rmtree(traces)
    return Traced(
        code=done.returncode,
        output=done.stdout + done.stderr,
        addresses=frozenset(a or b for line in lines for a, b in _ADDRESS.findall(line)),
        is_name_asked=any('"/etc/resolv.conf"' in line or '"/etc/hosts"' in line for line in lines),
        outside=frozenset(made for line in lines if (made := _made(line, folder)) and not _is_below(made, folder)),
        left=tuple(str(path.relative_to(folder)) for each in (home, temporary) for path in sorted(each.rglob("*"))),
    )


def _made(line: str, folder: Path) -> str:
    """Return the path that a system call made, or nothing: it made none, or failed."""
    if "= -1 " in line or not (_MAKERS.match(line) or "O_CREAT" in line):
        return ""
    paths = _PATHS.findall(line)
    where = re.search(r"\d+<([^>]*)>", line)
    base = Path(where[1]) if where and "AT_FDCWD" not in line else folder
    return str(base / paths[-1]) if paths else ""


def _is_below(path: str, folder: Path) -> bool:
    return os.path.normpath(path).startswith(f"{folder}/")
