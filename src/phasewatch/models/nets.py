"""Five nets behind the models' interface: mlp over the table, cnn, gru, lstm and transformer over the bins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from phasewatch.models import weights
from phasewatch.models.base import Examples, Floats, InputKind, PhaseModel, class_weights
from phasewatch.models.foreign import foreign_errors
from phasewatch.models.scaler import Scaler
from phasewatch.models.trainer import Labelled, TrainConfig, fit_net, reproducible, scores_of

FILE = "weights.safetensors"
SIZE = "scaler.size"
NET = "net."
MAX_WIDTH = 1024  # the largest net of it has 67 MB of weights


@dataclass(frozen=True, slots=True, kw_only=True)
class NetConfig(TrainConfig):
    """Size of a net beside how it is trained."""

    width: Annotated[int, Meta(ge=1, le=MAX_WIDTH)] = 64
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class FewerEpochs(NetConfig):
    """Of the two nets whose steps cost most, and which gain nothing from more (ADR 45).

    Both part their width among four groups or heads.
    """

    epochs: Annotated[int, Meta(ge=1, le=100_000)] = 24
    patience: Annotated[int, Meta(ge=1, le=100_000)] = 6
    width: Annotated[int, Meta(ge=4, le=MAX_WIDTH, multiple_of=4)] = 64


class Net(PhaseModel):
    """What the five share; a body is made by `_body`."""

    Config = NetConfig
    kind: ClassVar[InputKind] = InputKind.TENSOR

    @property
    def net(self) -> Any:
        """The fitted torch module, from scaled inputs to five scores; `phasewatch export` traces it."""
        return self._net

    @property
    def scaler(self) -> Scaler:
        """What scales its inputs."""
        return self._scaler

    def _body(self, width_in: int) -> Any:
        raise NotImplementedError

    def _make(self) -> Any:
        if self.spec is None:
            raise RuntimeError("a net is made after its columns are known")
        return self._body(2 * len(self.spec.names))

    def _fit(self, train: Examples, val: Examples) -> None:
        self._scaler = Scaler.fit(train.inputs.x)
        sets = [Labelled(self._scaler.apply(part.inputs.x), part.y) for part in (train, val)]
        with reproducible(self.seed):
            self._net = self._make()
            self.history = fit_net(self._net, *sets, weights=class_weights(train.y), config=self.config, seed=self.seed)

    def _predict_proba(self, x: NDArray[np.float32]) -> Floats:
        with reproducible(self.seed):
            scores = scores_of(self._net, self._scaler.apply(x))
        never = np.setdiff1d(np.arange(scores.shape[1]), self.seen)
        scores[:, never] = -np.inf
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares: Floats = powers / powers.sum(axis=1, keepdims=True)
        return shares

    def _files(self) -> Mapping[str, bytes]:
        arrays = {NET + name: value.detach().cpu().numpy() for name, value in self._net.state_dict().items()}
        return {FILE: weights.pack({**arrays, SIZE: self._scaler.size})}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        import torch

        n = len(self.spec.names) if self.spec else 0
        with torch.device("meta"), reproducible(self.seed):  # shapes alone: nothing is taken before they fit the file
            expected = {NET + name: ("F32", tuple(v.shape)) for name, v in self._make().state_dict().items()}
        arrays = weights.unpack(files, FILE, {**expected, SIZE: ("F64", (n,))}, model=self.key)
        self._scaler = Scaler.of(arrays[SIZE], place=f"checkpoint of {self.key}: {FILE}")
        with reproducible(self.seed):
            self._net = self._make()
        with foreign_errors(f"checkpoint of {self.key}: {FILE}", "torch refuses it"):
            self._net.load_state_dict({name: torch.from_numpy(arrays[NET + name]) for name in self._net.state_dict()})
        self._net.eval()

    def _libraries(self) -> tuple[str, ...]:
        return ("numpy", "torch", "safetensors")


class MlpNet(Net):
    """Two hidden layers over the five stats of each channel."""

    key = "mlp"
    kind = InputKind.TABLE

    def _body(self, width_in: int) -> Any:
        from phasewatch.models.bodies import Mlp

        return Mlp(width_in, width=self.config.width, dropout=self.config.dropout)


class CnnNet(Net):
    """A 1-D residual net over the bins."""

    key = "cnn"
    Config = FewerEpochs

    def _body(self, width_in: int) -> Any:
        from phasewatch.models.bodies import Cnn

        return Cnn(width_in, width=self.config.width, dropout=self.config.dropout)


class GruNet(Net):
    """A gated recurrent net over the bins."""

    key = "gru"

    def _body(self, width_in: int) -> Any:
        from torch.nn import GRU

        from phasewatch.models.bodies import Recurrent

        return Recurrent(width_in, cell=GRU, width=self.config.width, dropout=self.config.dropout)


class LstmNet(Net):
    """A long short-term memory over the bins."""

    key = "lstm"

    def _body(self, width_in: int) -> Any:
        from torch.nn import LSTM

        from phasewatch.models.bodies import Recurrent

        return Recurrent(width_in, cell=LSTM, width=self.config.width, dropout=self.config.dropout)


class TransformerNet(Net):
    """Two attention layers over the bins."""

    key = "transformer"
    Config = FewerEpochs

    def _body(self, width_in: int) -> Any:
        from phasewatch.models.bodies import Transformer

        return Transformer(width_in, width=self.config.width, dropout=self.config.dropout)
