"""What `channels --corpus` says of each channel."""

from __future__ import annotations

import numpy as np

from phasewatch.binning.storage import summarise_channels
from phasewatch.channels import CHANNELS


def test_range_share_and_movement_are_those_of_the_known_bins() -> None:
    first, second = (np.full((4, len(CHANNELS)), np.nan, np.float32) for _ in range(2))
    first[:, 0] = (1, 2, 3, 4)
    second[:2, 0] = 5
    seen = summarise_channels([first, second])[0]

    assert (seen.low, seen.median, seen.high) == (1, 3.5, 5)
    assert (seen.known_share, seen.varying_share) == (0.75, 0.5)
    assert not seen.is_constant


def test_a_channel_that_was_never_known_or_never_moved_is_constant() -> None:
    bins = np.full((4, len(CHANNELS)), np.nan, np.float32)
    bins[:, 1] = 7

    never, still = summarise_channels([bins])[:2]

    assert never.is_constant
    assert np.isnan(never.low)
    assert still.is_constant
    assert still.known_share == 1
