"""The dashboard for Grafana asks for metrics and labels that exist, and its panels neither overlap nor repeat an id."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from phasewatch.alarms.metrics import METRIC_NAMES

DASHBOARD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "grafana" / "phasewatch.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
LABELS = {"vm", "vm_id", "kind", "phase", "output", "version"}


def test_it_has_what_grafana_needs_to_import_it() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert {"title", "uid", "templating", "time", "panels"} <= DASHBOARD.keys()
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert all({"type", "title", "gridPos", "datasource", "targets", "description"} <= panel.keys() for panel in PANELS)


def test_no_data_source_of_another_installation_is_named() -> None:
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    assert {target["datasource"]["uid"] for target in TARGETS} == {"${datasource}"}


@pytest.mark.parametrize("expression", [target["expr"] for target in TARGETS])
def test_an_expression_asks_for_what_the_watch_serves(expression: str) -> None:
    assert set(re.findall(r"phasewatch_\w+", expression)) <= set(METRIC_NAMES)
    assert set(re.findall(r"(\w+)=~?\"", expression)) <= LABELS


def test_panels_do_not_overlap() -> None:
    def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
        return (
            a["x"] < b["x"] + b["w"]
            and b["x"] < a["x"] + a["w"]
            and a["y"] < b["y"] + b["h"]
            and b["y"] < a["y"] + a["h"]
        )

    places = [panel["gridPos"] for panel in PANELS]
    assert not [pair for pair in combinations(places, 2) if overlap(*pair)]
    assert all(place["x"] + place["w"] <= 24 for place in places)
