"""A small simulated store and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phasewatch.cli import app
from phasewatch.simulate import simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture
def phasewatch() -> Callable[..., Said]:
    def call(*arguments: str | Path) -> Said:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        return Said(code=done.exit_code, out=done.stdout, err=done.stderr)

    return call


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "store"
    simulate(path, hosts=3, episodes=9, seed=5, between_s=(60, 70))
    return path
