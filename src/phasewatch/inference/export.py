"""Export trained models of a run: an edge bundle with all channel sets of a model, or one ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phasewatch import atomic
from phasewatch.artifacts import BINS_DIR, EXPERIMENT_PREDICTIONS_FILE, MODELS_DIR, read_run_episodes
from phasewatch.artifacts import FEATURE_SCHEMA_FILE as RUN_SCHEMA
from phasewatch.binning.storage import index_rows_by_id, open_bins
from phasewatch.channels import build_channel_mask
from phasewatch.dataset import load, read_fold
from phasewatch.dataset.split_files import read_folds
from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.features.fingerprint import compute_column_digests
from phasewatch.inference.edge_bundle import (
    EDGE_CARD_FILE,
    EDGE_FORMAT,
    EDGE_SCHEMA_FILE,
    EdgeHeader,
    EdgeModel,
    PostprocessingRules,
    TrainingOrigin,
    pack_edge_bundle,
    render_rules,
)
from phasewatch.inference.onnx_export import MAX_PARITY_ERROR, check_parity, to_onnx
from phasewatch.models import registry
from phasewatch.models.base import ModelInputs, PhaseModel
from phasewatch.models.checkpoint import CHECKPOINT_FILE, read_checkpoint, read_header
from phasewatch.splits import TRAINING_PARTS, SplitPart
from phasewatch.training.experiment import Experiment
from phasewatch.training.grids import DEPLOY_CHANNEL_SETS
from phasewatch.training.predictions import PROBABILITY_COLUMNS, build_predictions_table, read_predictions
from phasewatch.training.train import fit_and_predict, read_experiment_data
from phasewatch.types import PHASES

__all__ = [
    "PARITY_WINDOWS",
    "ExportRequest",
    "ExportResult",
    "ExportedModel",
    "export_run",
    "pack_models",
    "read_training_origin",
    "render_card",
]

PARITY_WINDOWS = 512
_ORACLE_CHANNEL_SET = "oracle"
_TRAINED_PARTS = (*TRAINING_PARTS, SplitPart.DEALT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """The experiments to export: one model on one fold.

    Attributes:
        fold: Name of the fold; empty if the recipe has one fold.
        threats: Channel sets; empty for every trained one. An edge bundle has no oracle.
    """

    model: str = "gbt"
    recipe: str = "deploy"
    fold: str = ""
    threats: tuple[str, ...] = ()
    table: str = "raw"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """The result of an export.

    Attributes:
        path, bytes: The file and its size.
        threats: Channel sets in the file.
        parity: Largest difference of a probability between the models and their exports.
        windows: Number of windows compared.
    """

    path: Path
    bytes: int
    threats: tuple[str, ...]
    parity: float
    windows: int


def export_run(
    run: Path, out: Path, wanted: ExportRequest, *, quote: Callable[[str], str] = lambda threat: ""
) -> ExportResult:
    """Write an edge bundle (.zip) or one model (.onnx); the run is not changed.

    Args:
        run: Folder of the run.
        out: File to write; an existing file is replaced atomically.
        wanted: The experiments to export.
        quote: Channel set → the score on unseen hosts for the model card; empty if it was never scored.

    Raises:
        UsageError: If `out` has another suffix or is in the run, or the request is ambiguous.
        RunError: If there is no such experiment.
        MismatchError: If an export differs from its model by more than 1e-5.
    """
    if out.suffix not in (".zip", ".onnx"):
        raise UsageError(f"{out}: name an edge bundle X.zip, or one model X.onnx")
    if run.resolve() in out.resolve().parents:
        raise UsageError(f"{out}: is in the run, which an export does not change; name a file outside of {run}")
    names = [fold.fold for fold in read_folds(run, wanted.recipe)]
    if not wanted.fold and len(names) > 1:
        raise UsageError(
            f"--recipe {wanted.recipe}: has {len(names)} folds; choose one with --fold: {', '.join(names)}"
        )
    fold = wanted.fold or names[0]
    cells = _find_experiments(run, wanted, fold, one=out.suffix == ".onnx")
    graphs, worst, windows = [], 0.0, 0
    for cell in cells:
        model = _load_model(run, cell)
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
    """Find the trained experiments, the largest channel set first."""
    registry.find_model(wanted.model)

    def cell(threat: str) -> Experiment:
        return Experiment(
            recipe=wanted.recipe, fold=fold, threat=threat, model=wanted.model, table=wanted.table, seed=wanted.seed
        )

    parent = run / MODELS_DIR / wanted.recipe / fold
    trained = [path.name for path in parent.glob("*") if (cell(path.name).folder(run) / CHECKPOINT_FILE).is_file()]
    if not one and _ORACLE_CHANNEL_SET in wanted.threats:
        raise UsageError(
            "channel set oracle: an edge bundle cannot use the guest's channels; export X.onnx, or choose another set"
        )
    chosen = wanted.threats or tuple(threat for threat in trained if one or threat != _ORACLE_CHANNEL_SET)
    missing = [threat for threat in chosen if threat not in trained]
    if missing or not chosen:
        command = _render_train_command(run, wanted.model, wanted.recipe, missing or DEPLOY_CHANNEL_SETS, wanted.seed)
        raise RunError(
            f"{parent}: {wanted.model} was not trained with {missing[0] if missing else 'any channel set'} on "
            f"{wanted.recipe}/{fold}, table {wanted.table}, seed {wanted.seed} "
            f"(trained: {', '.join(sorted(trained)) or 'none'}); train it with `{command}`"
        )
    if one and len(chosen) > 1:
        raise UsageError(f"an .onnx holds one model; choose one channel set: {', '.join(sorted(chosen))}")
    return [cell(threat) for threat in sorted(chosen, key=lambda threat: (-sum(build_channel_mask(threat)), threat))]


def _load_model(run: Path, cell: Experiment) -> PhaseModel:
    """Load a trained model; one that stores no weights is fitted again, and must answer as it did.

    The class of a ``module:Class`` model is imported, because the user named it in the request.

    Raises:
        RunError: If the checkpoint is invalid, or the second fit predicts something else than the run has.
    """
    folder = cell.folder(run)
    if registry.find_model(cell.model).persist == "none":
        return _fit_again(run, cell)
    if ":" in cell.model:
        header, files = read_checkpoint(folder)
        return registry.load_model_class(cell.model).restore(header, files, where=str(folder))
    return registry.load(folder)


def _fit_again(run: Path, cell: Experiment) -> PhaseModel:
    folder = cell.folder(run)
    header = read_header(folder)
    fresh = registry.create(cell.model, seed=cell.seed, settings=header.config)
    model, parts = fit_and_predict(fresh, read_experiment_data(run, cell))
    found, kept = (
        np.column_stack([table[name].to_numpy() for name in PROBABILITY_COLUMNS])
        for table in (build_predictions_table(cell, parts), read_predictions(folder / EXPERIMENT_PREDICTIONS_FILE))
    )
    if found.shape != kept.shape or not np.abs(found - kept).max(initial=0.0) <= MAX_PARITY_ERROR:
        raise RunError(
            f"{folder}: {cell.model} stores no weights, and fitted again it predicts something else than in the run; "
            "make it depend on its seed alone (`random_state=seed`), train it again, then export it"
        )
    return model


def _render_train_command(run: Path, model: str, recipe: str, threats: Sequence[str], seed: int) -> str:
    """Return the command that trains the missing experiments."""
    option = "--models" if model in {row.key for row in registry.BUILTIN_MODELS} else "--add-model"
    line = f"phasewatch train {run} {option} {model} --recipes {recipe} --channels {','.join(threats)}"
    return f"{line} --seed {seed}" if seed else line


def _sample_windows(run: Path, cell: Experiment, model: PhaseModel) -> ModelInputs:
    """Return evenly spaced train windows of an experiment, for the comparison with its export.

    Raises:
        RunError: If the run has other train windows now than the model was fitted to; the card would be wrong.
    """
    kind = registry.find_model(cell.model).kind
    train = load(run, cell.recipe, cell.fold, cell.threat, kind, cell.table).train
    if model.trained_on.get("train") != train.examples.sha256():
        raise RunError(
            f"{cell.folder(run)}: was trained on other windows than the run has now; train it again with "
            f"`{_render_train_command(run, cell.model, cell.recipe, [cell.threat], cell.seed)}`"
        )
    inputs = train.inputs
    rows = np.unique(np.linspace(0, len(inputs) - 1, min(len(inputs), PARITY_WINDOWS)).astype(np.int64))
    return ModelInputs(x=np.ascontiguousarray(inputs.x[rows]), spec=inputs.spec)


def read_training_origin(run: Path, recipe: str, fold: str) -> TrainingOrigin:
    """Return the origin of the training data of a fold: its train and validation sets."""
    cut = read_fold(run, recipe, fold)
    ids = {episode for episode, part in cut.episodes.items() if part in _TRAINED_PARTS}
    rows = [row for episode, row in index_rows_by_id(open_bins(run / BINS_DIR)).items() if episode in ids]
    known = read_run_episodes(run, only=ids)
    return TrainingOrigin(
        hosts=tuple(sorted({e.host_id for e in known})),
        accels=tuple(sorted({row.accel for row in rows})),
        archs=tuple(sorted({row.arch for row in rows})),
        origins=tuple(sorted({str(e.origin) for e in known})),
        profiles=tuple(sorted({e.profile for e in known})),
        episodes=len(known),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportedModel:
    """A fitted model for an edge bundle.

    Attributes:
        cell: Its experiment, which names the channel set and the input.
        onnx: Its graph.
        versions: Versions of the libraries that it was fitted with.
    """

    cell: Experiment
    model: PhaseModel
    onnx: bytes
    versions: Mapping[str, str]


def _build_edge_bundle(
    run: Path, graphs: Sequence[tuple[Experiment, PhaseModel, bytes]], quote: Callable[[str], str]
) -> bytes:
    """Render the edge bundle of trained experiments and their ONNX graphs."""
    first = graphs[0][0]
    trained = read_training_origin(run, first.recipe, first.fold)
    exported = [
        ExportedModel(cell=cell, model=model, onnx=data, versions=read_header(cell.folder(run)).versions)
        for cell, model, data in graphs
    ]
    card = render_card(exported, trained, quote)
    return pack_models(exported, trained, schema=(run / RUN_SCHEMA).read_bytes(), card=card)


def pack_models(exported: Sequence[ExportedModel], trained: TrainingOrigin, *, schema: bytes, card: str) -> bytes:
    """Render the edge bundle of fitted models; the same models give the same bytes.

    Args:
        exported: The models, the largest channel set first; all of one recipe and fold.
        trained: Origin of their training data.
        schema: The feature schema of the run.
        card: The model card.

    Raises:
        MismatchError: If a model is not fitted.
    """
    first = exported[0].cell
    members = {EDGE_SCHEMA_FILE: schema, EDGE_CARD_FILE: card.encode()}
    models = []
    versions: dict[str, str] = {}
    for one in exported:
        cell, model = one.cell, one.model
        if model.spec is None:
            raise MismatchError(f"{cell.model} for {cell.threat}: the model is not fitted")
        member = f"{cell.threat}.onnx"
        members[member] = one.onnx
        versions |= one.versions
        models.append(
            EdgeModel(
                member=member,
                model=cell.model,
                threat=cell.threat,
                table=cell.table,
                seed=cell.seed,
                input_kind=model.spec.kind,
                columns=model.spec.names,
                rules=render_rules(PostprocessingRules(filter=model.filter, alarms=model.alarms)),
                floors=dict(model.spec.floors),
            )
        )
    digests = compute_column_digests(name for model in models for name in model.columns)
    edge_header = EdgeHeader(
        format=EDGE_FORMAT,
        recipe=first.recipe,
        fold=first.fold,
        schema_hash=digests.schema_hash,
        behaviour_fingerprint=digests.behaviour_fingerprint,
        classes=tuple(map(str, PHASES)),
        trained=trained,
        models=tuple(models),
        versions=versions,
        members={},
    )
    return pack_edge_bundle(edge_header, members)


def render_card(exported: Sequence[ExportedModel], trained: TrainingOrigin, quote: Callable[[str], str]) -> str:
    """Render the model card: content, training data, scores on unseen hosts, and limits.

    Args:
        exported: The models, all of one recipe and fold.
        trained: Origin of their training data.
        quote: Channel set → the score on unseen hosts; empty if it was never scored.
    """
    cell = exported[0].cell
    specs = [(one.cell, one.model.spec) for one in exported if one.model.spec is not None]

    def join(names: Sequence[str]) -> str:
        return ", ".join(names) or "unknown"

    quotes = [(c.threat, quote(c.threat) or "never scored") for c, _ in specs]
    return "\n".join(
        [
            f"# {cell.model} for `phasewatch watch`, trained on {cell.recipe}/{cell.fold}, seed {cell.seed}",
            "",
            f"Trained on {trained.episodes} {join(trained.origins)} episodes of the hosts {join(trained.hosts)}",
            f"under {join(trained.accels)} on {join(trained.archs)}; profiles {join(trained.profiles)}.",
            "The profiles are emulations. On another accelerator the results are unreliable.",
            "",
            *(
                f"- channel set `{c.threat}`: {len(spec.names)} columns, {c.table} table, file {c.threat}.onnx"
                for c, spec in specs
            ),
            "",
            "Scores of the same model on unseen hosts (`deploy` itself is never scored):",
            "",
            *(f"- `{threat}`: {score}" for threat, score in quotes),
            "",
        ]
    )
