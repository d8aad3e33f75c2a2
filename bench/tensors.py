"""Measure shuffled batches of windows against a DataLoader that fetches them one by one, and the disk against cut windows.

    python bench/tensors.py

CPU time on one thread, both from memory maps on a warm page cache, batches of 256.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from figures import Figure, say
from torch.utils.data import DataLoader, Dataset

from phasewatch.features.tensors import gather, window_rows, window_view

EPISODES, BINS, CHANNELS, BATCH = 1000, 360, 46, 256


class Cut(Dataset[torch.Tensor]):
    """Windows cut beforehand, one at a time: how a DataLoader is mostly fed."""

    def __init__(self, windows: np.ndarray) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, at: int) -> torch.Tensor:
        return torch.from_numpy(self._windows[at].copy())


def per_s(work: Callable[[], int]) -> float:
    """Give windows a second of CPU, the best of some rounds."""
    best = 0.0
    for _ in range(5):
        start = time.process_time()
        n = work()
        best = max(best, n / (time.process_time() - start))
    return best


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "grids.npy", rng.normal(size=(EPISODES * BINS, CHANNELS)).astype(np.float32))
        grids = np.load(folder / "grids.npy", mmap_mode="r")
        begins = np.concatenate([window_rows(e * BINS, BINS) for e in range(EPISODES)])
        cut = np.concatenate([window_view(grids[e * BINS : (e + 1) * BINS]) for e in range(EPISODES)])
        np.save(folder / "cut.npy", cut)
        windows = np.load(folder / "cut.npy", mmap_mode="r")
        assert np.array_equal(gather(grids, begins[:999]), cut[:999])
        order = rng.permutation(len(begins))

        def views() -> int:
            for at in range(0, len(order), BATCH):
                torch.from_numpy(gather(grids, begins[order[at : at + BATCH]]))
            return len(order)

        def loader() -> int:
            few = torch.utils.data.Subset(Cut(windows), order[:10_000].tolist())
            return sum(len(batch) for batch in DataLoader(few, batch_size=BATCH))

        say(Figure(what="shuffled batches of tensors against a per-item DataLoader", must="≥5", aim="≥10",
                   measured=per_s(views) / per_s(loader), note=f"({per_s(views) / 1e6:.2f} M windows/s)"))  # fmt: skip
        disk = (folder / "grids.npy").stat().st_size / (folder / "cut.npy").stat().st_size
        say(Figure(what="disk of grids against cut windows", must="≤0.55", aim="≤0.51", measured=disk))


if __name__ == "__main__":
    main()
