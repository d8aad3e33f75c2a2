"""A fake run with bins and predictions, which can be replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tests.factories.report_runs import START_NS, Recipe, episodes_of, make_run

from phasewatch.binning.storage import BinIndexRow, write_bins
from phasewatch.channels import CHANNELS, LEVEL_CHANNELS

SMALL = Recipe(hosts=("a-host", "b-host", "c-host"), profiles=("benign", "cryptomine"), n_windows=6)


def playable(folder: Path, recipe: Recipe = SMALL) -> Path:
    """Write the run; bin i of an episode has the value i in every channel but the first, which is unknown."""
    run = make_run(folder, recipe)
    n_bins = 10 * (recipe.n_windows + 1)
    bins = np.repeat(np.arange(n_bins, dtype=np.float32)[:, None], len(CHANNELS), axis=1)
    bins[:, 0] = np.nan
    with write_bins(run / "grids") as grids:
        for e in sorted(episodes_of(recipe), key=lambda e: (e.host_id, e.episode_id)):
            row = BinIndexRow(
                episode_id=e.episode_id,
                host_id=e.host_id,
                offset=0,
                n_bins=n_bins,
                profile=e.profile,
                t0_ns=START_NS + e.number * 10**12,
                sample_name=recipe.sample,
                sample_kind="emulated",
                origin=recipe.origin,
                role="lab",
                session=e.session,
                agent=e.agent == "on",
                arch="x86_64",
                accel="tcg",
                spans=(),
                flagged=((3, 1),),
            )  # type: ignore[arg-type]
            grids.add(row, bins, np.zeros((n_bins, len(LEVEL_CHANNELS)), np.float32))
    return run
