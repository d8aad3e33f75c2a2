"""Five nets behind the models' interface: mlp over the table, cnn, gru, lstm and transformer over the bins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor, nn

from phasewatch.arrays import Float32Array, FloatArray
from phasewatch.errors import RunError
from phasewatch.metrics import N_CLASSES
from phasewatch.models import checkpoint
from phasewatch.models.base import InputKind, LabelledExamples, PhaseModel, compute_class_weights
from phasewatch.models.checkpoint import WEIGHTS_FILE
from phasewatch.models.foreign import foreign_errors
from phasewatch.models.training_loop import LabelledArrays, TrainConfig, compute_scores, fit_net, make_reproducible
from phasewatch.types import WINDOW_BINS

SCALER_LIMIT = 10.0  # of a scaled value: a rate a thousand times its usual size still has a place


@dataclass(frozen=True, slots=True, eq=False)
class AsinhScaler:
    """``asinh(x / size)``, a logarithm that has room for zero and for falls, with the median absolute size of train.

    Attributes:
        size: ``(f,)`` float64 per column or channel; 1 where train has no value other than 0.
    """

    size: NDArray[np.float64]

    @classmethod
    def fit(cls, x: Float32Array) -> AsinhScaler:
        """Learn the sizes from train.

        Args:
            x: ``(n, f)`` or ``(n, c, t)`` float32; NaN is missing.
        """
        columns = np.moveaxis(np.abs(x.astype(np.float64)), 1, 0).reshape(x.shape[1], -1)
        size = np.ones(len(columns))
        for i, column in enumerate(columns):
            told = column[np.isfinite(column) & (column > 0)]
            if len(told):
                size[i] = np.median(told)
        return cls(size)

    @classmethod
    def from_sizes(cls, size: NDArray[np.float64], *, place: str) -> AsinhScaler:
        """Return the scaler of a checkpoint.

        Raises:
            RunError: If a size is not above 0 or not finite.
        """
        if not (np.isfinite(size) & (size > 0.0)).all():
            raise RunError(f"{place}: a scale is not a finite number above 0; train the model again")
        return cls(size)

    def apply(self, x: Float32Array) -> Float32Array:
        """Scale, clip, put 0 for what is missing, and append where it was: ``(n, f, …)`` → ``(n, 2f, …)`` float32."""
        size = self.size.reshape(-1, *([1] * (x.ndim - 2)))
        missing = ~np.isfinite(x)
        scaled = np.arcsinh(np.where(missing, 0.0, x.astype(np.float64)) / size).clip(-SCALER_LIMIT, SCALER_LIMIT)
        return np.concatenate([scaled.astype(np.float32), missing.astype(np.float32)], axis=1)


SCALER_SIZE_NAME = "scaler.size"
NET_PREFIX = "net."
MAX_WIDTH = 1024  # the largest net of it has 67 MB of weights


@dataclass(frozen=True, slots=True, kw_only=True)
class NetConfig(TrainConfig):
    """Size of a net beside how it is trained."""

    width: Annotated[int, Meta(ge=1, le=MAX_WIDTH)] = 64
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortNetConfig(NetConfig):
    """Of the two nets whose steps cost most, and which gain nothing from more (ADR 45).

    Both part their width among four groups or heads.
    """

    epochs: Annotated[int, Meta(ge=1, le=100_000)] = 24
    patience: Annotated[int, Meta(ge=1, le=100_000)] = 6
    width: Annotated[int, Meta(ge=4, le=MAX_WIDTH, multiple_of=4)] = 64


class NeuralNetModel(PhaseModel):
    """What the five share; a body is made by `_build_module`."""

    Config = NetConfig
    kind: ClassVar[InputKind] = InputKind.TENSOR

    @property
    def net(self) -> Any:
        """The fitted torch module, from scaled inputs to five scores; `phasewatch export` traces it."""
        return self._net

    @property
    def scaler(self) -> AsinhScaler:
        """What scales its inputs."""
        return self._scaler

    def _build_module(self, width_in: int) -> Any:
        raise NotImplementedError

    def _build_net(self) -> Any:
        if self.spec is None:
            raise RuntimeError("a net is made after its columns are known")
        return self._build_module(2 * len(self.spec.names))

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        self._scaler = AsinhScaler.fit(train.inputs.x)
        sets = [LabelledArrays(self._scaler.apply(part.inputs.x), part.y) for part in (train, val)]
        with make_reproducible(self.seed):
            self._net = self._build_net()
            self.history = fit_net(
                self._net, *sets, weights=compute_class_weights(train.y), config=self.config, seed=self.seed
            )

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        with make_reproducible(self.seed):
            scores = compute_scores(self._net, self._scaler.apply(x))
        never = np.setdiff1d(np.arange(scores.shape[1]), self.seen)
        scores[:, never] = -np.inf
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares: FloatArray = powers / powers.sum(axis=1, keepdims=True)
        return shares

    def _files(self) -> Mapping[str, bytes]:
        arrays = {NET_PREFIX + name: value.detach().cpu().numpy() for name, value in self._net.state_dict().items()}
        return {WEIGHTS_FILE: checkpoint.pack_weights({**arrays, SCALER_SIZE_NAME: self._scaler.size})}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        import torch

        n = len(self.spec.names) if self.spec else 0
        with (
            torch.device("meta"),
            make_reproducible(self.seed),
        ):  # shapes alone: nothing is taken before they fit the file
            expected = {
                NET_PREFIX + name: ("F32", tuple(v.shape)) for name, v in self._build_net().state_dict().items()
            }
        arrays = checkpoint.unpack_weights(
            files, WEIGHTS_FILE, {**expected, SCALER_SIZE_NAME: ("F64", (n,))}, model=self.key
        )
        self._scaler = AsinhScaler.from_sizes(
            arrays[SCALER_SIZE_NAME], place=f"checkpoint of {self.key}: {WEIGHTS_FILE}"
        )
        with make_reproducible(self.seed):
            self._net = self._build_net()
        with foreign_errors(f"checkpoint of {self.key}: {WEIGHTS_FILE}", "torch refuses it"):
            self._net.load_state_dict(
                {name: torch.from_numpy(arrays[NET_PREFIX + name]) for name in self._net.state_dict()}
            )
        self._net.eval()

    def _libraries(self) -> tuple[str, ...]:
        return ("numpy", "torch", "safetensors")


class MlpNet(NeuralNetModel):
    """Two hidden layers over the five stats of each channel."""

    key = "mlp"
    kind = InputKind.TABLE

    def _build_module(self, width_in: int) -> Any:
        pass  # own

        return MlpModule(width_in, width=self.config.width, dropout=self.config.dropout)


class CnnNet(NeuralNetModel):
    """A 1-D residual net over the bins."""

    key = "cnn"
    Config = ShortNetConfig

    def _build_module(self, width_in: int) -> Any:
        pass  # own

        return CnnModule(width_in, width=self.config.width, dropout=self.config.dropout)


class GruNet(NeuralNetModel):
    """A gated recurrent net over the bins."""

    key = "gru"

    def _build_module(self, width_in: int) -> Any:
        from torch.nn import GRU

        pass  # own

        return RecurrentModule(width_in, cell=GRU, width=self.config.width, dropout=self.config.dropout)


class LstmNet(NeuralNetModel):
    """A long short-term memory over the bins."""

    key = "lstm"

    def _build_module(self, width_in: int) -> Any:
        from torch.nn import LSTM

        pass  # own

        return RecurrentModule(width_in, cell=LSTM, width=self.config.width, dropout=self.config.dropout)


class TransformerNet(NeuralNetModel):
    """Two attention layers over the bins."""

    key = "transformer"
    Config = ShortNetConfig

    def _build_module(self, width_in: int) -> Any:
        pass  # own

        return TransformerModule(width_in, width=self.config.width, dropout=self.config.dropout)


class MlpModule(nn.Module):
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


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.nn.functional.gelu(self.one(self.norm(x)))
        return x + self.drop(self.two(inner))  # type: ignore[no-any-return]


class CnnModule(nn.Module):
    """1-D residual net; mean and maximum over time, so that a burst counts as much as a level."""

    def __init__(self, width_in: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv1d(width_in, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_ResidualBlock(width, dropout) for _ in range(2)))
        self.head = nn.Linear(2 * width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 2c, t)`` → ``(n, 5)``."""
        h = self.blocks(self.stem(x))
        return self.head(torch.cat([h.mean(dim=2), h.amax(dim=2)], dim=1))  # type: ignore[no-any-return]


class RecurrentModule(nn.Module):
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


class _AttentionBlock(nn.Module):
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


class TransformerModule(nn.Module):
    """Two attention layers over the bins with learnt positions inside the window, mean over time."""

    def __init__(self, width_in: int, *, width: int, dropout: float, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(width_in, width)
        self.place = nn.Parameter(torch.randn(1, WINDOW_BINS, width) * 0.02)
        self.blocks = nn.Sequential(*(_AttentionBlock(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 2c, t)`` with t = 20 → ``(n, 5)``."""
        h = self.blocks(self.stem(x.transpose(1, 2)) + self.place)
        return self.head(self.norm(h.mean(dim=1)))  # type: ignore[no-any-return]
