"""Shared fixtures: one trained run, and no private folder that stays in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.factories.trained_runs import write_trained_run

from phasewatch.live import ownership


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(autouse=True)
def _no_folder_is_left_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Who surveys without a guard has nobody to remove the folder that a filter's dump would lie in.
    monkeypatch.setattr(ownership, "MEMORY_DIRS", (tmp_path,))
