"""The bundled recordings: every channel lives or says why not, and the datasheet is of these bundles."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from tools import datasheet_tables

from phasewatch.binning.align import bin_episode
from phasewatch.binning.storage import summarise_channels
from phasewatch.bundle.archive import unpack_bundle, unpack_manifest
from phasewatch.bundle.model import Episode
from phasewatch.channels import BASE_CHANNELS, CHANNELS
from phasewatch.lab.plan import build_sessions
from phasewatch.lab.plans import read_plan
from phasewatch.types import EpisodeOrigin, SourceKind

CORPUS = Path(__file__).parents[2] / "corpus" / "lab-v1"
BUNDLES = sorted(CORPUS.glob("*/*.tar.zst"))
EACH = max(1, len(BUNDLES) // 40)  # forty of them, over all hosts


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return [unpack_bundle(path.read_bytes(), file=path.name) for path in BUNDLES[::EACH]]


def test_every_channel_moves_somewhere(episodes: list[Episode]) -> None:
    seen = summarise_channels([bin_episode(e).bins for e in episodes])

    assert [o.channel.full_name for o in seen if o.is_constant and o.channel in BASE_CHANNELS] == []
    assert [o.channel for o in seen] == list(CHANNELS)


def test_a_channel_that_an_episode_lacks_is_absent_with_its_reason(episodes: list[Episode]) -> None:
    for episode in episodes:
        manifest = episode.manifest
        assert manifest.recording is not None
        lacks = {c.full_name for c in BASE_CHANNELS} - set(manifest.channels_available)

        assert set(manifest.recording.absent) == lacks, manifest.episode_id
        assert all(manifest.recording.absent.values())


def test_a_channel_that_an_episode_says_it_has_is_known_in_it(episodes: list[Episode]) -> None:
    for episode in episodes:
        bins = bin_episode(episode).bins
        is_known = np.isfinite(bins[:, : len(BASE_CHANNELS)]).any(axis=0)
        known = {c.full_name for c, some in zip(BASE_CHANNELS, is_known, strict=True) if some}

        assert set(episode.manifest.channels_available) == known, episode.manifest.episode_id


def test_everything_in_it_is_recorded_and_the_agent_is_a_coin_flip(episodes: list[Episode]) -> None:
    assert {e.manifest.origin for e in episodes} == {EpisodeOrigin.RECORDED}
    assert all((SourceKind.GUEST in e.rows) == e.manifest.agent for e in episodes)


def test_the_plan_still_deals_what_was_recorded() -> None:
    dealt = {(slot.host_id, slot.plan_seed): slot for s in build_sessions(read_plan("lab-v1")) for slot in s.slots}

    for path in BUNDLES:
        manifest = unpack_manifest(path.read_bytes(), file=path.name)
        slot = dealt[manifest.host.host_id, manifest.plan_seed]
        assert manifest.recording is not None
        said = (manifest.profile, manifest.sample_name, manifest.role, manifest.agent, manifest.plan)
        assert said == (slot.profile, slot.sample_name, slot.role, slot.agent, slot.phases), path.name
        assert manifest.recording.background == slot.background
        own = {name: value for name, value in manifest.recording.knobs.items() if "." not in name}
        assert own == pytest.approx(dict(slot.knobs))


def test_the_datasheet_is_of_these_bundles() -> None:
    sheet = runpy.run_path(str(CORPUS.parents[1] / "tools" / "datasheet.py"))

    stated = datasheet_tables.parse_bundles_digest((CORPUS / "README.md").read_text(encoding="utf-8"))

    assert stated == sheet["compute_corpus_digest"](CORPUS), "stale: run `make datasheet`"


def test_one_bundle_more_or_less_makes_the_datasheet_stale() -> None:
    bundles = [("a/1.tar.zst", "aa"), ("b/2.tar.zst", "bb")]
    whole = datasheet_tables.compute_bundles_digest(bundles)

    assert datasheet_tables.compute_bundles_digest(reversed(bundles)) == whole
    assert datasheet_tables.compute_bundles_digest(bundles[:1]) != whole
    assert datasheet_tables.compute_bundles_digest([("a/1.tar.zst", "ab"), bundles[1]]) != whole
