"""The model card belongs to the shipped edge bundle and scores each of its channel sets on unseen hosts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tools import model_card

from phasewatch.evaluation.metric_table import MetricRow
from phasewatch.inference.edge_bundle import read_edge_bundle

ROOT = Path(__file__).parents[1]


def test_card_is_of_the_shipped_edge_bundle() -> None:
    command = [sys.executable, "-m", "tools.model_card", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_every_shipped_channel_set_is_scored_on_unseen_hosts() -> None:
    page = model_card.PAGE.read_text(encoding="utf-8")
    shipped = {model.threat for model in read_edge_bundle(model_card.EDGE_BUNDLE).header.models}
    scored = set(re.findall(r"^\| `([a-z+-]+)` \| \d+ \| 0\.\d\d", page, re.MULTILINE))

    assert scored == shipped


def test_card_names_the_profiles_that_its_scored_episodes_lack() -> None:
    place = {
        "recipe": "held_out_host",
        "fold": "pooled",
        "channel_set": "realistic",
        "input": "raw",
        "smoothing": "none",
    }
    scored = MetricRow(metric="macro_f1", model="gbt", seed="mean", agent="off", value=0.5, n_episodes=9, **place)
    untested = [
        MetricRow(metric="untested_profile", model=None, agent=agent, profile=profile, **place)
        for agent, profile in (("off", "beacon-c2"), ("on", "cryptomine"))
    ]

    page = model_card.render([scored, *untested], read_edge_bundle(model_card.EDGE_BUNDLE), "0" * 64)

    assert "- untested: beacon-c2\n" in f"{page}\n"
