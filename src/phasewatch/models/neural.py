"""Six neural networks: an MLP over the table; a CNN, GRU, LSTM, transformer and TCN over the bins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from phasewatch.models.base import InputKind, LabelledExamples, PhaseModel
from phasewatch.models.checkpoint import WEIGHTS_FILE
from phasewatch.models.foreign import foreign_errors
from phasewatch.models.probabilities import mask_unseen_phases, softmax
from phasewatch.models.training_loop import LabelledArrays, TrainConfig, compute_scores, fit_net, make_reproducible
from phasewatch.types import WINDOW_BINS

__all__ = [
    "MAX_WIDTH",
    "NET_PREFIX",
    "SCALER_LIMIT",
    "SCALER_SIZE_NAME",
    "AsinhScaler",
    "CnnModule",
    "CnnNet",
    "GruNet",
    "LstmNet",
    "MlpModule",
    "MlpNet",
    "NetConfig",
    "NeuralNetModel",
    "RecurrentModule",
    "ShortNetConfig",
    "TcnModule",
    "TcnNet",
    "TransformerModule",
    "TransformerNet",
]

SCALER_LIMIT = 10.0  # of a scaled value: asinh(10,000) = 9.9


@dataclass(frozen=True, slots=True, eq=False)
class AsinhScaler:
    """Scale by ``asinh(x / size)``: a logarithm for large values that is defined at zero and below.

    Attributes:
        size: ``(f,)`` float64, median absolute nonzero value of each column or channel of train; 1 if none.
    """

    size: NDArray[np.float64]

    @classmethod
    def fit(cls, x: Float32Array) -> AsinhScaler:
        """Compute the sizes from train.

        Args:
            x: ``(n, f)`` or ``(n, c, t)`` float32; NaN is missing.
        """
        columns = np.moveaxis(np.abs(x.astype(np.float64)), 1, 0).reshape(x.shape[1], -1)
        size = np.ones(len(columns))
        for i, column in enumerate(columns):
            known = column[np.isfinite(column) & (column > 0)]
            if len(known):
                size[i] = np.median(known)
        return cls(size)

    @classmethod
    def from_sizes(cls, size: NDArray[np.float64], *, place: str) -> AsinhScaler:
        """Return the scaler of a checkpoint.

        Args:
            size: ``(f,)`` float64.
            place: File of the checkpoint, for the message.

        Raises:
            RunError: If a size is not above 0 or not finite.
        """
        if not (np.isfinite(size) & (size > 0.0)).all():
            raise RunError(f"{place}: a scale is not a finite number above 0; train the model again")
        return cls(size)

    def apply(self, x: Float32Array) -> Float32Array:
        """Scale and clip the values, set missing ones to 0, and append marks of the missing ones.

        Args:
            x: ``(n, f)`` or ``(n, c, t)`` float32; NaN is missing.

        Returns:
            ``(n, 2f)`` or ``(n, 2c, t)`` float32: scaled values, then 1 for each missing one and 0 elsewhere.
        """
        size = self.size.reshape(-1, *([1] * (x.ndim - 2)))
        missing = ~np.isfinite(x)
        scaled = np.arcsinh(np.where(missing, 0.0, x.astype(np.float64)) / size).clip(-SCALER_LIMIT, SCALER_LIMIT)
        return np.concatenate([scaled.astype(np.float32), missing.astype(np.float32)], axis=1)


SCALER_SIZE_NAME = "scaler.size"
NET_PREFIX = "net."
_NO_STEP_LIMIT = 10_000_000  # the chosen epochs are within the limit already
MAX_WIDTH = 1024  # the largest network of this width has 67 MB of weights


@dataclass(frozen=True, slots=True, kw_only=True)
class NetConfig(TrainConfig):
    """Size of a network, and its training settings."""

    width: Annotated[int, Meta(ge=1, le=MAX_WIDTH)] = 64
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortNetConfig(NetConfig):
    """Settings of the CNN, transformer and TCN, whose steps cost most and which gain nothing from more (ADR 45).

    The width is divided among four groups or heads.
    """

    epochs: Annotated[int, Meta(ge=1, le=100_000)] = 24
    patience: Annotated[int, Meta(ge=1, le=100_000)] = 6
    width: Annotated[int, Meta(ge=4, le=MAX_WIDTH, multiple_of=4)] = 64


class NeuralNetModel(PhaseModel):
    """The common part of the networks; a subclass writes `_build_module`."""

    Config = NetConfig
    kind: ClassVar[InputKind] = InputKind.TENSOR

    @property
    def net(self) -> Any:
        """The fitted torch module, from scaled inputs to ``(n, 5)`` scores; `phasewatch export` traces it."""
        return self._net

    @property
    def scaler(self) -> AsinhScaler:
        """The fitted scaler of the inputs."""
        return self._scaler

    def _build_module(self, width_in: int) -> Any:
        raise NotImplementedError

    def _build_net(self) -> Any:
        if self.spec is None:
            raise RuntimeError("a network is built after its columns are known")
        return self._build_module(2 * len(self.spec.names))

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        self.history = self._train(train, val, self.config)

    def _refit(self, everything: LabelledExamples) -> None:
        """Train anew for the number of epochs that was best on validation A."""
        chosen = int(np.argmax(self.history["val_a_macro_f1"])) + 1
        self._train(everything, None, replace(self.config, epochs=chosen, steps=_NO_STEP_LIMIT))

    def _train(
        self, train: LabelledExamples, val: LabelledExamples | None, config: NetConfig
    ) -> dict[str, tuple[float, ...]]:
        self._scaler = AsinhScaler.fit(train.inputs.x)
        own = LabelledArrays(self._scaler.apply(train.inputs.x), train.y, train.compute_weights())
        other = None if val is None else LabelledArrays(self._scaler.apply(val.inputs.x), val.y)
        with make_reproducible(self.seed):
            self._net = self._build_net()
            return fit_net(self._net, own, other, config=config, seed=self.seed)

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        with make_reproducible(self.seed):
            scores = compute_scores(self._net, self._scaler.apply(x))
        return softmax(mask_unseen_phases(scores, self.seen))

    def _files(self) -> Mapping[str, bytes]:
        arrays = {NET_PREFIX + name: value.detach().cpu().numpy() for name, value in self._net.state_dict().items()}
        return {WEIGHTS_FILE: checkpoint.pack_weights({**arrays, SCALER_SIZE_NAME: self._scaler.size})}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        n = len(self.spec.names) if self.spec else 0
        # On the meta device a network has shapes alone: no memory is used before they match the file.
        with torch.device("meta"), make_reproducible(self.seed):
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
        return MlpModule(width_in, width=self.config.width, dropout=self.config.dropout)


class CnnNet(NeuralNetModel):
    """A 1-D residual convolutional network over the bins."""

    key = "cnn"
    Config = ShortNetConfig

    def _build_module(self, width_in: int) -> Any:
        return CnnModule(width_in, width=self.config.width, dropout=self.config.dropout)


class GruNet(NeuralNetModel):
    """A gated recurrent network over the bins."""

    key = "gru"

    def _build_module(self, width_in: int) -> Any:
        return RecurrentModule(width_in, cell=nn.GRU, width=self.config.width, dropout=self.config.dropout)


class LstmNet(NeuralNetModel):
    """A long short-term memory network over the bins."""

    key = "lstm"

    def _build_module(self, width_in: int) -> Any:
        return RecurrentModule(width_in, cell=nn.LSTM, width=self.config.width, dropout=self.config.dropout)


class TransformerNet(NeuralNetModel):
    """Two attention layers over the bins."""

    key = "transformer"
    Config = ShortNetConfig

    def _build_module(self, width_in: int) -> Any:
        return TransformerModule(width_in, width=self.config.width, dropout=self.config.dropout)


class TcnNet(NeuralNetModel):
    """A temporal convolutional network over two minutes of bins."""

    key = "tcn"
    Config = ShortNetConfig

    def _build_module(self, width_in: int) -> Any:
        return TcnModule(width_in, width=self.config.width, dropout=self.config.dropout)


class MlpModule(nn.Module):
    """Two hidden layers over the summary columns."""

    def __init__(self, width_in: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width_in, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, N_CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores: ``(n, 2f)`` float32 → ``(n, 5)`` float32."""
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
    """1-D residual network; mean and maximum over time, so that a burst counts as much as a level."""

    def __init__(self, width_in: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv1d(width_in, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_ResidualBlock(width, dropout) for _ in range(2)))
        self.head = nn.Linear(2 * width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores: ``(n, 2c, t)`` float32 → ``(n, 5)`` float32."""
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
        """Compute scores: ``(n, 2c, t)`` float32 → ``(n, 5)`` float32."""
        states, _ = self.cell(torch.nn.functional.gelu(self.stem(x.transpose(1, 2))))
        return self.head(self.drop(torch.cat([states.mean(dim=1), states[:, -1]], dim=1)))  # type: ignore[no-any-return]


class _AttentionBlock(nn.Module):
    """Explicit attention: on 20 steps it costs half of what `nn.MultiheadAttention` does (measured)."""

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
    """Two attention layers over the bins with learnt positions in the window, and the mean over time."""

    def __init__(self, width_in: int, *, width: int, dropout: float, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(width_in, width)
        self.place = nn.Parameter(torch.randn(1, WINDOW_BINS, width) * 0.02)
        self.blocks = nn.Sequential(*(_AttentionBlock(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores: ``(n, 2c, 20)`` float32 → ``(n, 5)`` float32."""
        h = self.blocks(self.stem(x.transpose(1, 2)) + self.place)
        return self.head(self.norm(h.mean(dim=1)))  # type: ignore[no-any-return]


class _CausalBlock(nn.Module):
    """A residual block with one dilated convolution; step t sees the steps t, t - d and t - 2d of its input."""

    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.past = 2 * dilation
        self.conv = nn.Conv1d(width, width, 3, padding=self.past, dilation=dilation)
        self.norm = nn.GroupNorm(4, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv(torch.nn.functional.gelu(self.norm(x)))[:, :, : -self.past]
        return x + self.drop(inner)  # type: ignore[no-any-return]


class TcnModule(nn.Module):
    """Mean and maximum of every 2.5 s, four dilated causal convolutions, and the steps of the newest window.

    The newest step sees 31 steps, 77.5 s; the normalisation sees all of the input. Source: Bai et al. 2018, "An
    empirical evaluation of generic convolutional and recurrent networks for sequence modeling".
    """

    def __init__(self, width_in: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2 * width_in, width, 1)
        self.blocks = nn.Sequential(*(_CausalBlock(width, d, dropout) for d in _TCN_DILATIONS))
        self.head = nn.Linear(2 * width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores: ``(n, 2c, t)`` float32, t a multiple of 5 → ``(n, 5)`` float32."""
        steps = x.reshape(x.shape[0], x.shape[1], x.shape[2] // _TCN_POOL_BINS, _TCN_POOL_BINS)
        h = self.blocks(self.stem(torch.cat([steps.mean(dim=3), steps.amax(dim=3)], dim=1)))
        newest = h[:, :, -(WINDOW_BINS // _TCN_POOL_BINS) :]
        return self.head(torch.cat([newest.mean(dim=2), newest.amax(dim=2)], dim=1))  # type: ignore[no-any-return]


_TCN_POOL_BINS = 5  # 2.5 s
_TCN_DILATIONS = (1, 2, 4, 8)
