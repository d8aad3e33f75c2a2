"""A dashboard that cannot serve says why before it prints an address, and its exit code is not 0."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from phasewatch.cli import app


def start(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["dashboard", "--token-file", str(folder / "token"), *words])


def check_refused(done: Result, code: int) -> None:
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


def test_a_port_that_is_taken_is_said_before_an_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check_refused(start(tmp_path, "--no-produce", "--port", str(taken.getsockname()[1])), 5)


@pytest.mark.parametrize("module", ["uvicorn", "starlette", "sse_starlette", "plotly"])
def test_an_extra_that_is_missing_is_said_before_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for name in [
        name
        for name in sys.modules
        if name.split(".")[0] in (module, "phasewatch") and ("dashboard" in name or name.startswith(module))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(module), *sys.meta_path])

    done = start(tmp_path, "--no-produce", "--port", "0")

    check_refused(done, 5)
    assert "phasewatch[serve]" in done.stderr


class Without:
    """Finds nothing of one module, as where it is not installed."""

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == self._module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_machine_that_does_not_run_is_said_before_an_address(tmp_path: Path) -> None:
    check_refused(start(tmp_path, "--watch", "no-such-machine", "--port", "0"), 5)
    check_refused(start(tmp_path, "--watch", "1", "--port", "0"), 5)


def test_a_folder_that_is_no_run_is_said_before_an_address(tmp_path: Path) -> None:
    check_refused(start(tmp_path, str(tmp_path), "--port", "0"), 3)


def test_a_token_that_can_be_kept_nowhere_is_said_before_an_address(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    check_refused(start(tmp_path / "file", "--no-produce", "--port", "0"), 5)
