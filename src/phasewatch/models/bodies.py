"""The five nets' layers, from ``(n, 2f)`` or ``(n, 2c, t)`` scaled inputs to five scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from phasewatch.measures import N_CLASSES
from phasewatch.vocab import WINDOW_BINS


class Mlp(nn.Module):
    """Two hidden layers over the summary columns."""

    def __init__(self, width_in: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width_in, 2 * width), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(2 * width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, N_CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 2f)`` → ``(n, 5)``."""
        return self.layers(x)  # type: ignore[no-any-return]


class _Residual(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.nn.functional.gelu(self.one(self.norm(x)))
        return x + self.drop(self.two(inner))  # type: ignore[no-any-return]


class Cnn(nn.Module):
    """1-D residual net; mean and maximum over time, so that a burst counts as much as a level."""

    def __init__(self, width_in: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv1d(width_in, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Residual(width, dropout) for _ in range(2)))
        self.head = nn.Linear(2 * width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 2c, t)`` → ``(n, 5)``."""
        h = self.blocks(self.stem(x))
        return self.head(torch.cat([h.mean(dim=2), h.amax(dim=2)], dim=1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A projection, one recurrent layer, its mean and last state."""

    def __init__(self, width_in: int, *, cell: Callable[..., nn.Module], width: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Linear(width_in, width)
        self.cell = cell(width, width, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 2c, t)`` → ``(n, 5)``."""
        states, _ = self.cell(torch.nn.functional.gelu(self.stem(x.transpose(1, 2))))
        return self.head(self.drop(torch.cat([states.mean(dim=1), states[:, -1]], dim=1)))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Attention written out: on 20 steps it costs half of what the stock layer does (measured)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1.0 / math.sqrt(width // heads)
        self.norm_one, self.norm_two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        parts = self.mix(self.norm_one(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        weights = torch.softmax(query @ key.transpose(2, 3) * self.scale, dim=3)
        x = x + self.drop(self.out((weights @ value).transpose(1, 2).reshape(n, t, width)))
        return x + self.drop(self.wide(self.norm_two(x)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Two attention layers over the bins with learnt positions inside the window, mean over time."""

    def __init__(self, width_in: int, *, width: int, dropout: float, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(width_in, width)
        self.place = nn.Parameter(torch.randn(1, WINDOW_BINS, width) * 0.02)
        self.blocks = nn.Sequential(*(_Attention(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 2c, t)`` with t = 20 → ``(n, 5)``."""
        h = self.blocks(self.stem(x.transpose(1, 2)) + self.place)
        return self.head(self.norm(h.mean(dim=1)))  # type: ignore[no-any-return]
