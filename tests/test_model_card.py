"""The model card is of the bundle that is shipped, and its numbers are rows of the run that made it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

from phasewatch.evaluation.metric_table import MetricRow
from phasewatch.inference.edge_bundle import read_edge_bundle

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "model-card.md").read_text(encoding="utf-8")


def test_it_is_of_the_edge_bundle_that_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.model_card", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr


def test_it_says_what_a_model_is_for_what_it_does_not_know_and_how_well_it_does() -> None:
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)

    for wanted in ("What it is for", "What it does not know", "By machine", "By profile", "As an alarm", "To be said"):
        assert any(title.startswith(wanted) for title in titles), wanted


def test_every_mask_that_is_shipped_was_scored_on_machines_that_it_never_saw() -> None:
    rows = re.findall(r"^\| `([a-z+]+)` \| \d+ \| (\S+)", PAGE, re.MULTILINE)

    assert {mask for mask, _ in rows} == {"realistic", "portable", "proc+netflow", "proc+tap", "proc"}
    assert all(re.fullmatch(r"0\.\d\d", score) for _, score in rows), rows


def test_the_front_page_and_the_datasheet_lead_to_it() -> None:
    for page in ("README.md", "docs/honesty.md", "docs/how-to/watch-a-vm.md", "corpus/lab-v1/README.md"):
        assert "model-card.md" in (ROOT / page).read_text(encoding="utf-8"), page


def test_untested_is_what_the_episodes_behind_its_scores_lack() -> None:
    card = importlib.import_module("tools.model_card")
    place = {
        "recipe": "held_out_host",
        "fold": "pooled",
        "channel_set": "realistic",
        "input": "raw",
        "smoothing": "none",
    }
    scored = MetricRow(metric="macro_f1", model="gbt", seed="mean", agent="off", value=0.5, n_episodes=9, **place)
    lacks = [
        MetricRow(metric="untested_profile", model=None, agent=agent, profile=profile, **place)
        for agent, profile in (("off", "beacon-c2"), ("on", "cryptomine"))
    ]

    page = card.render([scored, *lacks], read_edge_bundle(card.EDGE), "0" * 64)

    assert "- untested: beacon-c2\n" in f"{page}\n"
