"""Measure what one window costs each net's trainer, against a plain PyTorch loop over the same net and batches.

    python bench/nets.py

Ratios of CPU time in one process on one thread, the two taken in turns. The plain loop has the loss, AdamW and the
batches, and nothing else: no clipping, no schedule, no hidden channels; neither scores validation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from phasewatch.measures import N_CLASSES
from phasewatch.models import registry
from phasewatch.models.base import InputKind, InputSpec
from phasewatch.models.trainer import Labelled, TrainConfig, fit_net, reproducible
from phasewatch.vocab import WINDOW_BINS

NETS = ("mlp", "cnn", "gru", "lstm", "transformer")
CHANNELS, BATCH, EPOCHS, WINDOWS = 35, 128, 3, 2048


def make(key: str) -> tuple[nn.Module, Labelled]:
    """Give a net that is not trained, and scaled windows of its kind."""
    kind = registry.row_of(key).kind
    width = CHANNELS * (5 if kind is InputKind.TABLE else 1)
    model = registry.create(key)
    names = tuple(f"c{i}" for i in range(width))
    model.spec = InputSpec(kind=kind, names=names, mask="realistic", schema_hash="", behaviour_fingerprint="")
    rng = np.random.default_rng(0)
    shape = (WINDOWS, 2 * width, *((WINDOW_BINS,) if kind is InputKind.TENSOR else ()))
    x = rng.normal(size=shape).astype(np.float32)
    torch.manual_seed(0)
    net: nn.Module = model._make()  # type: ignore[attr-defined]
    return net, Labelled(x, rng.integers(0, N_CLASSES, WINDOWS))


def plain(net: nn.Module, train: Labelled) -> None:
    """Train as a first page of a tutorial does."""
    x, y = torch.from_numpy(train.x), torch.from_numpy(train.y)
    optimiser, loss_of = torch.optim.AdamW(net.parameters(), lr=2e-3), nn.CrossEntropyLoss()
    net.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(x))
        for start in range(0, len(x), BATCH):
            rows = order[start : start + BATCH]
            optimiser.zero_grad()
            loss_of(net(x[rows]), y[rows]).backward()
            optimiser.step()


def ours(net: nn.Module, train: Labelled) -> None:
    """Train by phasewatch's trainer; a validation set of one window costs next to nothing."""
    one = Labelled(train.x[:1], train.y[:1])
    config = TrainConfig(epochs=EPOCHS, patience=EPOCHS, batch=BATCH)
    fit_net(net, train, one, weights=np.ones(N_CLASSES), config=config, seed=0)


def seconds(work: Callable[[nn.Module, Labelled], None], key: str) -> float:
    """Give the CPU time of one training."""
    net, train = make(key)
    with reproducible(0):
        began = time.process_time()
        work(net, train)
        return time.process_time() - began


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| net | µs a window, plain | µs a window, ours | ours/plain |\n| --- | --- | --- | --- |")
    for key in NETS:
        seconds(plain, key)  # warm up
        taken = [(seconds(plain, key), seconds(ours, key)) for _ in range(rounds)]
        one, other = (float(np.min(column)) * 1e6 / (EPOCHS * WINDOWS) for column in np.array(taken).T)
        print(f"| {key} | {one:.0f} | {other:.0f} | {other / one:.2f} |")


if __name__ == "__main__":
    main()
