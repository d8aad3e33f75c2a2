"""Measure shuffled batches against a DataLoader that fetches windows one by one, and the disk space of both.

CPU time on one thread, both from memory maps on a warm page cache, batches of 256.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from timing import Figure, Part, in_turns, rows_of
from torch.utils.data import DataLoader, Dataset

from phasewatch.features.windows import build_window_view, compute_window_rows, gather_windows

EPISODES, BINS, CHANNELS, BATCH = 1000, 360, 46, 256
FEW = 10_000  # of the windows, for who is slow


class Cut(Dataset[torch.Tensor]):
    """Materialised windows, one at a time: the usual data set of a DataLoader."""

    def __init__(self, windows: np.ndarray) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, at: int) -> torch.Tensor:
        return torch.from_numpy(self._windows[at].copy())


class CutBatched(Cut):
    """The same, a batch at a time: what `__getitems__` is for."""

    def __getitems__(self, at: list[int]) -> torch.Tensor:
        return torch.from_numpy(self._windows[at])


def measure(*, repeats: int = 5) -> Part:
    """Go once through shuffled windows, in batches."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "grids.npy", rng.normal(size=(EPISODES * BINS, CHANNELS)).astype(np.float32))
        grids = np.load(folder / "grids.npy", mmap_mode="r")
        begins = np.concatenate([compute_window_rows(e * BINS, BINS) for e in range(EPISODES)])
        cut = np.concatenate([build_window_view(grids[e * BINS : (e + 1) * BINS]) for e in range(EPISODES)])
        np.save(folder / "cut.npy", cut)
        windows = np.load(folder / "cut.npy", mmap_mode="r")
        order = rng.permutation(len(begins))

        def views() -> torch.Tensor:
            for at in range(0, len(order), BATCH):
                batch = torch.from_numpy(gather_windows(grids, begins[order[at : at + BATCH]]))
                if at == 0:
                    first = batch
            return first

        def loader(data: Cut, n: int, **settings: object) -> torch.Tensor:
            few = torch.utils.data.Subset(data, order[:n].tolist())
            batches = list(DataLoader(few, batch_size=BATCH, **settings))
            return batches[0]

        works = {
            "phasewatch, views of the bins": views,
            "DataLoader, one item at a time": lambda: loader(Cut(windows), FEW),
            "DataLoader, `__getitems__`": lambda: loader(CutBatched(windows), FEW, collate_fn=lambda batch: batch),
        }
        truth = views()
        for work in works.values():
            assert torch.equal(work(), truth)
        times = in_turns(works, repeats=repeats)
        disk = (folder / "grids.npy").stat().st_size / (folder / "cut.npy").stat().st_size
    rows = rows_of(times, repeats=repeats, per="window", over=dict(zip(works, (len(order), FEW, FEW), strict=True)))
    least = [row.min_s for row in rows]
    return Part(
        title="Batches of tensors",
        about=(
            f"{len(order):,} windows in random order, {BATCH} per batch, from memory maps in a warm page cache; "
            "all give the same first batch. The loaders read materialised windows, phasewatch reads the bins."
        ),
        rows=rows,
        figures=(
            Figure(
                what="shuffled batches, against a DataLoader per item",
                must="≥5",
                aim="≥10",
                measured=least[1] / least[0],
            ),
            Figure(
                what="the same against a DataLoader with `__getitems__`", must="", aim="", measured=least[2] / least[0]
            ),
            Figure(what="disk space of bins, against materialised windows", must="≤0.55", aim="≤0.51", measured=disk),
        ),
    )
