"""The bundled edge bundle with thresholds near zero, so that both alarms are raised by the first windows of any VM."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import msgspec

from phasewatch.inference.edge_bundle import EdgeHeader, add_edge_digest

EDGE = Path(__file__).parents[2] / "corpus" / "lab-v1.edge.zip"


def write_jumpy_model(path: Path) -> Path:
    """Write such a bundle; the models and their probabilities are those of the bundled one."""
    with zipfile.ZipFile(EDGE) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename == "edge.json":
                plain = json.loads(data)
                for model in plain["models"]:
                    model["rules"]["alarms"] = [rule | {"theta": 1e-6} for rule in model["rules"]["alarms"]]
                data = msgspec.json.encode(add_edge_digest(msgspec.convert(plain, EdgeHeader)), order="sorted")
            new.writestr(member.filename, data)
    return path
