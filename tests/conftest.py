"""Rows of the soak's tables: a test hands them over, `make soak` makes docs/soak.md of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, not whether it is right.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("few", settings.get_profile("patient"), max_examples=10)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-rows", type=Path, default=None, help="Append the rows of the soak's tables to this file.")


@pytest.fixture
def soak_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Give a function that takes a table's title and a row's columns; without ``--soak-rows`` it prints them."""
    path: Path | None = request.config.getoption("--soak-rows")

    def take(title: str, **columns: object) -> None:
        line = json.dumps({"table": title, "test": request.node.nodeid, "row": columns})
        if path is None:
            print(line)
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return take
