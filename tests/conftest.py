"""Options and fixtures that all tests share: hypothesis profiles, and the rows of the soak tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The duration of an example depends on the load of the machine, not on whether the code is right.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("few", settings.get_profile("patient"), max_examples=10)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-rows", type=Path, default=None, help="Append the rows of the soak tables to this file.")


@pytest.fixture
def soak_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that records one row of a soak table; without ``--soak-rows`` it prints the row."""
    path: Path | None = request.config.getoption("--soak-rows")

    def record(title: str, **columns: object) -> None:
        line = json.dumps({"table": title, "test": request.node.nodeid, "row": columns})
        if path is None:
            print(line)
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return record
