"""A dashboard that cannot serve exits with an error and prints no address."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from phasewatch.cli import app


def start(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["dashboard", "--token-file", str(folder / "token"), *arguments])


def check_refused(done: Result, code: int) -> None:
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


def test_port_in_use_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check_refused(start(tmp_path, "--no-produce", "--port", str(taken.getsockname()[1])), 5)


@pytest.mark.parametrize("module", ["uvicorn", "starlette", "sse_starlette", "plotly"])
def test_missing_extra_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
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
    """Import finder that hides one module, as if it were not installed."""

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == self._module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_machine_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    check_refused(start(tmp_path, "--watch", "no-such-machine", "--port", "0"), 5)
    check_refused(start(tmp_path, "--watch", "1", "--port", "0"), 5)


def test_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    check_refused(start(tmp_path, str(tmp_path), "--port", "0"), 3)


def test_token_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    check_refused(start(tmp_path / "file", "--no-produce", "--port", "0"), 5)
