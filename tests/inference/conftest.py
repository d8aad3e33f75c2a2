"""One trained run for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.factories.trained_runs import write_trained_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("export") / "run")
