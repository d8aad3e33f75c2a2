"""Take a run's trained cells out of it: an edge bundle of all masks of a model, or the ONNX file of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phasewatch import atomic
from phasewatch.artifacts import FEATURE_SCHEMA_FILE as RUN_SCHEMA
from phasewatch.artifacts import read_run_episodes
from phasewatch.binning.storage import index_rows_by_id, open_bins
from phasewatch.channels import build_channel_mask
from phasewatch.dataset import load, read_fold
from phasewatch.dataset.split_files import read_folds
from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.inference.edge_bundle import (
    EDGE_CARD_FILE,
    EDGE_FORMAT,
    EDGE_SCHEMA_FILE,
    EdgeHeader,
    EdgeModel,
    TrainingOrigin,
    extract_rules,
    pack_edge_bundle,
    render_rules,
)
from phasewatch.inference.onnx_export import check_parity, to_onnx
from phasewatch.models import registry
from phasewatch.models.base import ModelInputs, PhaseModel
from phasewatch.models.checkpoint import CHECKPOINT_FILE, read_header
from phasewatch.splits import SplitPart
from phasewatch.training.experiment import MODELS_DIR, Experiment
from phasewatch.training.grids import DEPLOY_CHANNEL_SETS

PARITY_WINDOWS = 512
ORACLE_CHANNEL_SET = "oracle"
_TRAINED_PARTS = (SplitPart.TRAIN, SplitPart.VAL_A, SplitPart.VAL_B, SplitPart.DEALT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """Which cells: one model on one fold; every trained mask of it unless some are named. An edge bundle has no oracle."""

    model: str = "gbt"
    recipe: str = "deploy"
    fold: str = ""
    threats: tuple[str, ...] = ()
    table: str = "raw"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written: the masks, and the largest difference from the models on so many real windows."""

    path: Path
    bytes: int
    threats: tuple[str, ...]
    parity: float
    windows: int


def export_run(
    run: Path, out: Path, wanted: ExportRequest, *, quote: Callable[[str], str] = lambda threat: ""
) -> ExportResult:
    """Write ``out``, a .zip (edge bundle) or an .onnx (one model alone); nothing in the run is touched.

    Args:
        run: The run's folder.
        out: Where; a file of that name is replaced, whole or not at all.
        wanted: Which cells.
        quote: Threat → the line that its card shows for how well the model does on hosts that it never saw.

    Raises:
        UsageError: If the name says neither, lies inside the run, or leaves open which cell is meant.
        RunError: If there is no such cell.
        MismatchError: If an export differs from its model by more than 1e-5.
    """
    if out.suffix not in (".zip", ".onnx"):
        raise UsageError(f"{out}: name an edge bundle X.zip, or one model X.onnx")
    if run.resolve() in out.resolve().parents:
        raise UsageError(f"{out}: lies inside the run; nothing is ever added to one, name a place outside of {run}")
    names = [fold.fold for fold in read_folds(run, wanted.recipe)]
    if not wanted.fold and len(names) > 1:
        raise UsageError(
            f"--recipe {wanted.recipe}: has {len(names)} folds; choose one with --fold: {', '.join(names)}"
        )
    fold = wanted.fold or names[0]
    cells = _find_experiments(run, wanted, fold, one=out.suffix == ".onnx")
    graphs, worst, windows = [], 0.0, 0
    for cell in cells:
        model = registry.load(cell.folder(run))
        data = to_onnx(model)
        inputs = _sample_windows(run, cell, model)
        worst, windows = max(worst, check_parity(model, data, inputs)), windows + len(inputs)
        graphs.append((cell, model, data))
    whole = graphs[0][2] if out.suffix == ".onnx" else _build_edge_bundle(run, graphs, quote)
    atomic.make_folder(out.parent)
    atomic.write_atomic(out, whole)
    return ExportResult(
        path=out, bytes=len(whole), threats=tuple(cell.threat for cell in cells), parity=worst, windows=windows
    )


def _find_experiments(run: Path, wanted: ExportRequest, fold: str, *, one: bool) -> list[Experiment]:
    """Find the trained cells, largest mask first."""
    registry.find_model(wanted.model)

    def cell(threat: str) -> Experiment:
        return Experiment(
            recipe=wanted.recipe, fold=fold, threat=threat, model=wanted.model, table=wanted.table, seed=wanted.seed
        )

    parent = run / MODELS_DIR / wanted.recipe / fold
    there = [path.name for path in parent.glob("*") if (cell(path.name).folder(run) / CHECKPOINT_FILE).is_file()]
    if not one and ORACLE_CHANNEL_SET in wanted.threats:
        raise UsageError("--channels oracle: no watcher has the guest's channels; export it as X.onnx, or another mask")
    chosen = wanted.threats or tuple(threat for threat in there if one or threat != ORACLE_CHANNEL_SET)
    missing = [threat for threat in chosen if threat not in there]
    if missing or not chosen:
        raise RunError(
            f"{parent}: {wanted.model} was not trained for {missing[0] if missing else 'any mask'} on {wanted.recipe}/{fold}, "
            f"table {wanted.table}, seed {wanted.seed} (there: {', '.join(sorted(there)) or 'none'}); "
            f"train it with `{_render_train_command(run, wanted.model, wanted.recipe, missing or DEPLOY_CHANNEL_SETS, wanted.seed)}`"
        )
    if one and len(chosen) > 1:
        raise UsageError(f"an .onnx holds one model; choose one with --channels: {', '.join(sorted(chosen))}")
    return [cell(threat) for threat in sorted(chosen, key=lambda threat: (-sum(build_channel_mask(threat)), threat))]


def _render_train_command(run: Path, model: str, recipe: str, threats: Sequence[str], seed: int) -> str:
    """Give the line that trains what is missing."""
    line = f"phasewatch train {run} --models {model} --recipes {recipe} --channels {','.join(threats)}"
    return f"{line} --seed {seed}" if seed else line


def _sample_windows(run: Path, cell: Experiment, model: PhaseModel) -> ModelInputs:
    """Give some real windows of those that the cell learnt from, evenly spread.

    Raises:
        RunError: If they are not those that it learnt from: the card would name others.
    """
    kind = registry.find_model(cell.model).kind
    train = load(run, cell.recipe, cell.fold, cell.threat, kind, cell.table).train
    if model.trained_on.get("train") != train.examples.sha256():
        raise RunError(
            f"{cell.folder(run)}: learnt from other windows than the run has now; train it again with "
            f"`{_render_train_command(run, cell.model, cell.recipe, [cell.threat], cell.seed)}`"
        )
    inputs = train.inputs
    rows = np.unique(np.linspace(0, len(inputs) - 1, min(len(inputs), PARITY_WINDOWS)).astype(np.int64))
    return ModelInputs(x=np.ascontiguousarray(inputs.x[rows]), spec=inputs.spec)


def read_training_origin(run: Path, recipe: str, fold: str) -> TrainingOrigin:
    """Say who the models of a fold learnt from: train and validation."""
    cut = read_fold(run, recipe, fold)
    ids = {episode for episode, part in cut.episodes.items() if part in _TRAINED_PARTS}
    rows = [row for episode, row in index_rows_by_id(open_bins(run / "grids")).items() if episode in ids]
    known = read_run_episodes(run, only=ids)
    return TrainingOrigin(
        hosts=tuple(sorted({e.host_id for e in known})),
        accels=tuple(sorted({row.accel for row in rows})),
        archs=tuple(sorted({row.arch for row in rows})),
        origins=tuple(sorted({str(e.origin) for e in known})),
        profiles=tuple(sorted({e.profile for e in known})),
        episodes=len(known),
    )


def _build_edge_bundle(
    run: Path, graphs: Sequence[tuple[Experiment, PhaseModel, bytes]], quote: Callable[[str], str]
) -> bytes:  # the .zip
    first = graphs[0][0]
    trained = read_training_origin(run, first.recipe, first.fold)
    members = {EDGE_SCHEMA_FILE: (run / RUN_SCHEMA).read_bytes()}
    models = []
    versions: dict[str, str] = {}
    for cell, model, data in graphs:
        if model.spec is None:
            raise MismatchError(f"{cell.folder(run)}: the model is not fitted")
        member = f"{cell.threat}.onnx"
        members[member] = data
        header = read_header(cell.folder(run))
        versions |= header.versions
        models.append(
            EdgeModel(
                member=member,
                model=cell.model,
                threat=cell.threat,
                table=cell.table,
                seed=cell.seed,
                input_kind=model.spec.kind,
                columns=model.spec.names,
                rules=render_rules(extract_rules(header)),
                floors=dict(model.spec.floors),
            )
        )
    members[EDGE_CARD_FILE] = _render_card(models, trained, first, quote).encode()
    spec = graphs[0][1].spec
    header_of = EdgeHeader(
        format=EDGE_FORMAT, recipe=first.recipe, fold=first.fold, schema_hash=spec.schema_hash if spec else "",
        behaviour_fingerprint=spec.behaviour_fingerprint if spec else "", classes=read_header(first.folder(run)).classes,
        trained=trained, models=tuple(models), versions=versions, members={},
    )  # fmt: skip
    return pack_edge_bundle(header_of, members)


def _render_card(
    models: Sequence[EdgeModel], trained: TrainingOrigin, cell: Experiment, quote: Callable[[str], str]
) -> str:
    """Say in words what the bundle is, who it learnt from, how well it does, and what it is not."""

    def some(names: Sequence[str]) -> str:
        return ", ".join(names) or "not known"

    quotes = [(m.threat, quote(m.threat) or "never scored") for m in models]
    return "\n".join(
        [
            f"# {cell.model} for `phasewatch watch`, trained on {cell.recipe}/{cell.fold}, seed {cell.seed}",
            "",
            f"Learnt from {trained.episodes} {some(trained.origins)} episodes of the hosts {some(trained.hosts)}",
            f"under {some(trained.accels)} on {some(trained.archs)}; profiles {some(trained.profiles)}.",
            "The profiles are emulations. On another accelerator its word is a guess.",
            "",
            *(f"- mask `{m.threat}`: {len(m.columns)} columns, {m.table} table, file {m.member}" for m in models),
            "",
            "How the same model does on hosts that it never saw (`deploy` itself is never scored):",
            "",
            *(f"- `{threat}`: {words}" for threat, words in quotes),
            "",
        ]
    )
