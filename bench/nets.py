"""Measure training against a plain PyTorch loop, and prediction of one window by torch against onnxruntime."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from timing import Part, Row, in_turns, rows_of

from phasewatch.models import registry
from phasewatch.models.base import InputKind, InputSpec, LabelledExamples, ModelInputs
from phasewatch.models.probabilities import compute_class_weights

CHANNELS, WINDOWS = 35, 2000


def _examples(seed: int) -> LabelledExamples:
    rng = np.random.default_rng(seed)
    names = tuple(f"proc.channel_{i}" for i in range(CHANNELS))
    spec = InputSpec(
        kind=InputKind.TENSOR, names=names, mask="realistic", schema_hash="0" * 64, behaviour_fingerprint="0" * 64
    )
    y = rng.integers(0, 5, WINDOWS)
    x = rng.normal(size=(WINDOWS, CHANNELS, 20)).astype(np.float32) + y[:, None, None].astype(np.float32)
    return LabelledExamples(inputs=ModelInputs(x=x, spec=spec), y=y)


def training(*, repeats: int = 3, epochs: int = 2) -> Part:
    """Measure cnn and gru for some epochs, with our training loop and with that of PyTorch's tutorial."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    train, val = _examples(0), _examples(1)
    few = LabelledExamples(inputs=ModelInputs(x=val.inputs.x[:50], spec=val.inputs.spec), y=val.y[:50])
    works: dict[str, Any] = {}
    for key in ("cnn", "gru"):
        model = registry.create(key, settings={"epochs": epochs, "patience": epochs}).fit(train, few)
        x = torch.from_numpy(model.scaler.apply(train.inputs.x))  # type: ignore[attr-defined]
        y, body = torch.from_numpy(train.y), model.net  # type: ignore[attr-defined]

        def plain(body: Any = body, x: Any = x, y: Any = y) -> None:
            net = copy.deepcopy(body)
            net.train()
            optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
            loss_of = nn.CrossEntropyLoss(weight=torch.tensor(compute_class_weights(train.y), dtype=torch.float32))
            for _ in range(epochs):
                for rows in torch.randperm(len(x)).split(128):
                    optimiser.zero_grad()
                    loss_of(net(x[rows]), y[rows]).backward()
                    optimiser.step()

        def ours(key: str = key) -> None:
            registry.create(key, settings={"epochs": epochs, "patience": epochs}).fit(train, few)

        works |= {f"phasewatch {key}": ours, f"plain PyTorch loop, {key}": plain}
    times = in_turns(works, repeats=repeats)
    rows = rows_of(times, repeats=repeats, per="window and epoch", over=WINDOWS * epochs)
    about = (
        f"{WINDOWS:,} windows of {CHANNELS} channels by 20 bins, batches of 128, {epochs} epochs, one thread, the "
        "same architectures. The loop of phasewatch also scales inputs, drops channels, clips gradients, "
        "schedules the learning rate and scores validation after each epoch."
    )
    return Part(title="Training loop", about=about, rows=rows)


def live(*, repeats: int = 200) -> Part:
    """Measure one prediction with torch and with the exported graph."""
    from phasewatch.inference.onnx_check import ONNX_INPUT, ONNX_OUTPUT
    from phasewatch.inference.onnx_export import to_onnx
    from phasewatch.inference.onnx_session import open_session

    train = _examples(0)
    rows: list[Row] = []
    for key in ("cnn", "gru"):
        model = registry.create(key, settings={"epochs": 1}).fit(train, train)
        one = ModelInputs(x=train.inputs.x[:1], spec=train.inputs.spec)
        session = open_session(to_onnx(model))

        def eager(model: Any = model, one: Any = one) -> np.ndarray:
            return np.asarray(model.predict_proba(one))

        def graph(session: Any = session, one: Any = one) -> np.ndarray:
            return np.asarray(session.run([ONNX_OUTPUT], {ONNX_INPUT: one.x})[0])

        if np.abs(eager() - graph()).max() > 1e-5:
            raise SystemExit(f"{key}: the graph says something else than the model")
        times = in_turns(
            {f"torch eager, {key}": eager, f"phasewatch, exported {key} on onnxruntime": graph}, repeats=repeats
        )
        rows += rows_of(times, repeats=repeats, per="window")
    about = "One window, from raw bins to calibrated probabilities, one thread; both agree to 1e-5."
    return Part(title="Live", about=about, rows=tuple(rows))
