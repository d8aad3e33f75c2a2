"""The training loop of the neural networks: weighted loss, warm-up and cosine decay, clipping, early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor, nn

from phasewatch.metrics import confusion_counts, macro_f1

__all__ = ["LabelledArrays", "TrainConfig", "compute_scores", "fit_net", "make_reproducible"]

_PREDICT_BATCH = 4096  # windows
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Training settings; the same for all networks except the epochs (ADR 45).

    Attributes:
        epochs: Largest number of epochs.
        steps: Largest number of batches: a large train set gets fewer epochs, not more time.
        patience: Epochs without a better macro-F1 on validation A before training stops.
        batch: Windows in a batch.
        warm_up: Share of the steps in which the learning rate rises.
        mixed: Mixed precision; it is faster on CUDA only, and float32 is the reference.
        hide: Share of the channels that are hidden of each train window, as another host may lack them.
    """

    epochs: Annotated[int, Meta(ge=1, le=100_000)] = 60
    steps: Annotated[int, Meta(ge=1, le=10_000_000)] = 1500
    patience: Annotated[int, Meta(ge=1, le=100_000)] = 10
    batch: Annotated[int, Meta(ge=1, le=1_000_000)] = 128
    learning_rate: Annotated[float, Meta(gt=0.0, le=10.0)] = 2e-3
    weight_decay: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.02
    warm_up: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1
    mixed: bool = False
    hide: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.15


@dataclass(frozen=True, slots=True, eq=False)
class LabelledArrays:
    """Scaled inputs with labels.

    Attributes:
        x: ``(n, 2f)`` or ``(n, 2c, t)`` float32.
        y: ``(n,)`` int64 phase codes.
        weights: ``(n,)`` float64 weights in the loss; None for windows that are not trained on.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    weights: NDArray[np.float64] | None = None


@contextmanager
def make_reproducible(seed: int) -> Iterator[None]:
    """Run torch on one thread, seeded and deterministic, in the block; restore its settings afterwards."""
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # a debugging aid; nothing here reads uninitialised memory
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = fills
            torch.use_deterministic_algorithms(before)
            torch.set_num_threads(threads)


def fit_net(
    net: nn.Module,
    train: LabelledArrays,
    val: LabelledArrays | None,
    *,
    config: TrainConfig,
    seed: int,
) -> dict[str, tuple[float, ...]]:
    """Train a network in place, and leave it with the weights of its best epoch on validation A.

    Args:
        net: The network, with weights initialised by the caller.
        train: Train windows with their weights; without, all weigh the same.
        val: Windows of validation A; None trains for all epochs and keeps the last weights.
        config: Training settings.
        seed: Seed of the shuffling and of the hidden channels.

    Returns:
        ``train_loss``, and with `val` also ``val_a_macro_f1`` → one number per epoch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device)
    x, y = torch.from_numpy(train.x).to(device), torch.from_numpy(train.y).to(device)
    weights = np.ones(len(train.y)) if train.weights is None else train.weights
    w = torch.from_numpy(weights.astype(np.float32)).to(device)
    loss_of = nn.CrossEntropyLoss(reduction="none")
    learnt = list(net.parameters())  # once: walking the modules again costs each step of the mlp a twentieth (measured)
    optimiser = torch.optim.AdamW(learnt, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    batches = math.ceil(len(x) / config.batch)
    epochs = max(1, min(config.epochs, config.steps // batches))
    steps = epochs * batches
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    guard = torch.amp.GradScaler(device.type, enabled=config.mixed and device.type == "cuda")
    shuffle = np.random.default_rng(seed)
    best, best_at, kept = -1.0, 0, copy.deepcopy(net.state_dict())
    losses: list[float] = []
    scores: list[float] = []
    step = 0
    for epoch in range(epochs):
        net.train()
        total = 0.0
        order = torch.from_numpy(shuffle.permutation(len(x))).to(device)
        for rows in torch.split(order, config.batch):
            for group in optimiser.param_groups:  # by hand: a scheduler costs the mlp a tenth of its step (measured)
                group["lr"] = config.learning_rate * _compute_rate_factor(step, steps, config.warm_up)
            step += 1
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=half, enabled=config.mixed):
                losses_of_rows = loss_of(
                    net(_hide_channels(x.index_select(0, rows), config.hide, shuffle)), y.index_select(0, rows)
                )
                w_of_rows = w.index_select(0, rows)
                loss = (losses_of_rows * w_of_rows).sum() / w_of_rows.sum()
            guard.scale(loss).backward()
            guard.unscale_(optimiser)
            nn.utils.clip_grad_norm_(learnt, _MAX_GRADIENT_NORM)
            guard.step(optimiser)
            guard.update()
            total += float(loss.detach()) * len(rows)
        losses.append(round(total / len(x), 6))
        if val is None:
            continue
        score = _compute_val_score(net, val)
        scores.append(round(score, 6))
        if score > best:
            best, best_at, kept = score, epoch, copy.deepcopy(net.state_dict())
        elif epoch - best_at >= config.patience:
            break
    if val is not None:
        net.load_state_dict(kept)
    net.to("cpu")
    return {"train_loss": tuple(losses), **({} if val is None else {"val_a_macro_f1": tuple(scores)})}


def compute_scores(net: nn.Module, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute the five scores of each window, in batches that bound the memory.

    Args:
        net: A fitted network.
        x: ``(n, 2f)`` or ``(n, 2c, t)`` float32 scaled inputs.

    Returns:
        ``(n, 5)`` float64.
    """
    net.eval()
    device = next(net.parameters()).device
    with torch.inference_mode():
        parts: list[Tensor] = [
            net(torch.from_numpy(x[start : start + _PREDICT_BATCH]).to(device)).float().cpu()
            for start in range(0, len(x), _PREDICT_BATCH)
        ]
    joined: NDArray[np.float64] = torch.cat(parts).numpy().astype(np.float64)
    return joined


def _compute_val_score(net: nn.Module, val: LabelledArrays) -> float:
    """Compute macro-F1 over the phases in validation A."""
    return float(macro_f1(confusion_counts(val.y, compute_scores(net, val.x).argmax(axis=1))))


def _hide_channels(x: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """Mark random channels of each window as missing, in place, as `AsinhScaler.apply` does: value 0, mark 1."""
    half = x.shape[1] // 2
    # One byte each, and arithmetic for masks: torch's own draws and masked_fill_ cost a tenth of the MLP's step
    # (measured).
    drawn = np.frombuffer(rng.bytes(len(x) * half), np.uint8) < round(256 * share)
    gone = torch.from_numpy(drawn.astype(np.float32)).to(x.device).view(len(x), half, *([1] * (x.ndim - 2)))
    x[:, :half].mul_(1.0 - gone)
    torch.maximum(x[:, half:], gone, out=x[:, half:])
    return x


def _compute_rate_factor(step: int, steps: int, warm_up: float) -> float:
    """Compute the factor of the learning rate: a linear rise, then a cosine decay to zero."""
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
