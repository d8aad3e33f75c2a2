"""Find the trained models in a checkpoint, run or edge bundle, and choose the one that fits a VM's channels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from phasewatch.artifacts import MODELS_DIR, RUN_LOG_FILE
from phasewatch.channels import CHANNELS, build_channel_mask
from phasewatch.dataset import read_fold, read_split_episodes
from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.features.fingerprint import compute_column_digests
from phasewatch.features.normalise import HostBaseline
from phasewatch.inference.edge_bundle import (
    EdgeBundle,
    EdgeModel,
    OnnxModel,
    PostprocessingRules,
    TrainingOrigin,
    extract_rules,
    parse_rules,
    read_edge_bundle,
)
from phasewatch.inference.predictor import PhasePredictor, ProbabilityEstimator, check_columns, list_model_channels
from phasewatch.models.base import InputKind, InputSpec, InputVariant
from phasewatch.models.checkpoint import CHECKPOINT_FILE, CheckpointHeader, read_header
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE
from phasewatch.splits import TRAINING_PARTS, SplitEpisode, SplitPart
from phasewatch.training.grids import DEPLOY_RECIPE
from phasewatch.types import SourceKind

__all__ = [
    "ModelCandidate",
    "choose_model",
    "compute_preference",
    "filter_by_channel_set",
    "find_bundle_models",
    "find_models",
    "find_unavailable_channel_sets",
    "read_training_episodes",
]

_MODEL_PREFERENCE = ("gbt", "tcn", "cnn", "gru", "transformer", "lstm", "mlp")  # where no run says which is best
_SUGGESTED_CHANNEL_SETS = (
    "realistic",
    "portable",
    "libvirt+netflow",
    "proc+netflow",
    "libvirt",
    "libvirt-user",
    "proc+tap",
    "proc+qmp",
    "proc",
)
_QEMU_ARCHS = {"x86": "x86_64"}
_GUEST_CHANNELS = {c.full_name for c in CHANNELS if c.source is SourceKind.GUEST}
_CHANNEL_SPECS = {c.full_name: c for c in CHANNELS}


@dataclass(frozen=True, kw_only=True)
class ModelCandidate:
    """A trained model that is not loaded.

    Attributes:
        model, threat, seed: Key, channel set and seed of the model.
        spec: Its input.
        rules: Its phase filter and alarm rules.
        trained: Origin of its training data.
        where: Its file or folder, for messages.
        load: Function that loads it.
    """

    model: str
    threat: str
    seed: int
    spec: InputSpec
    rules: PostprocessingRules
    trained: TrainingOrigin
    where: str
    load: Callable[[], ProbabilityEstimator]

    def load_predictor(
        self, clean_day: HostBaseline | None = None, *, smoothing: str = SMOOTHING_NONE
    ) -> PhasePredictor:
        """Load the model.

        Args:
            clean_day: Baseline of the VM, for a model of values relative to it.
            smoothing: `SMOOTHING_PHASE` shows the phase after the phase filter, if one was fitted.
        """
        return PhasePredictor(
            model=self.model,
            threat=self.threat,
            seed=self.seed,
            spec=self.spec,
            estimator=self.load(),
            filter=self.rules.filter if smoothing == SMOOTHING_PHASE else None,
            alarms=self.rules.alarms,
            trained=self.trained,
            where=self.where,
            baseline=clean_day,
        )

    def find_missing_channels(self, available: Collection[str], arch: str) -> tuple[str, ...]:
        """Return the channels that the model needs and a VM lacks.

        A channel that the VM's architecture never has is not missing if the training data had this architecture.

        Args:
            available: Full names of the VM's channels.
            arch: Architecture of the guest, as QEMU names it.
        """
        return tuple(
            name
            for name in list_model_channels(self.spec)
            if name not in available
            and not (
                _CHANNEL_SPECS[name].arch != "any"
                and _QEMU_ARCHS[_CHANNEL_SPECS[name].arch] != arch
                and arch in self.trained.archs
            )
        )


def find_models(path: Path) -> tuple[ModelCandidate, ...]:
    """Find every model in an edge bundle or checkpoint, or of the recipe `deploy` in a run.

    Raises:
        RunError: If the path is none of these, or a run without a deployed model.
        MismatchError: If it was changed, or trained with other channels, stats or phases.
    """
    if path.is_file():
        return find_bundle_models(read_edge_bundle(path))
    if (path / CHECKPOINT_FILE).is_file():
        return (_build_checkpoint_candidate(path),)
    if path.is_dir():
        found = sorted((path / MODELS_DIR / DEPLOY_RECIPE).glob(f"*/*/*/*/{CHECKPOINT_FILE}"))
        if found:
            return tuple(_build_checkpoint_candidate(header.parent) for header in found)
        if (path / MODELS_DIR).is_dir() or (path / RUN_LOG_FILE).is_file():
            raise RunError(
                f"{path}: this run has no deployed model; train one: phasewatch train {path} --recipes {DEPLOY_RECIPE}"
            )
    if not path.exists():
        raise RunError(f"{path}: there is no such model; make one with `phasewatch export RUN --out X.zip`")
    raise RunError(
        f"{path}: not a checkpoint, run or edge bundle; make one with `phasewatch run` or `phasewatch export`"
    )


def choose_model(
    candidates: Sequence[ModelCandidate],
    available: Collection[str],
    *,
    arch: str,
    clean_day: HostBaseline | None = None,
    smoothing: str = SMOOTHING_NONE,
) -> PhasePredictor:
    """Load the model with the largest channel set that a VM has.

    Args:
        candidates: Models, from `find_models`.
        available: Full names of the VM's channels.
        arch: Architecture of the guest, as QEMU names it.
        clean_day: Baseline of the VM; with one, a model of values relative to a baseline is chosen.
        smoothing: As in `ModelCandidate.load_predictor`.

    Raises:
        MismatchError: If no model fits, naming what each lacks and what to train. Models with channels that the guest
            reports never fit.
    """
    kept, lines = [], []
    for candidate in sorted(candidates, key=compute_preference):
        lacks = candidate.find_missing_channels(available, arch)
        if any(name in _GUEST_CHANNELS for name in list_model_channels(candidate.spec)):
            lines.append(f"{candidate.threat} needs channels that the guest reports, which are not used on live VMs")
        elif lacks:
            lines.append(f"{candidate.threat} needs {_render_missing_channels(lacks)}")
        elif (candidate.spec.table is InputVariant.COMMISSIONED) != (clean_day is not None):
            kind = "values relative to a baseline (give one with --baseline)" if clean_day is None else "raw values"
            lines.append(f"{candidate.threat} was trained on {kind}")
        else:
            kept.append(candidate)
    if not kept:
        name = _suggest_channel_set(available)
        hint = (
            "It has too few channels for any registered channel set"
            if name is None
            else f"It has the channel set {name}: phasewatch train RUN --recipes {DEPLOY_RECIPE} --channels {name}"
        )
        where = candidates[0].where if candidates else "model"
        raise MismatchError(f"{where}: no model fits this VM: {'; '.join(dict.fromkeys(lines))}. {hint}")
    return kept[0].load_predictor(clean_day, smoothing=smoothing)


def find_unavailable_channel_sets(
    candidates: Sequence[ModelCandidate], available: Collection[str], *, arch: str, chosen: PhasePredictor
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the channel sets with more channels than the chosen one that a VM lacks, with the missing channels."""
    larger = [
        c for c in sorted(candidates, key=compute_preference) if len(list_model_channels(c.spec)) > len(chosen.channels)
    ]
    lacking = {c.threat: c.find_missing_channels(available, arch) for c in larger}
    return tuple((threat, lacks) for threat, lacks in lacking.items() if lacks and not _GUEST_CHANNELS & set(lacks))


def filter_by_channel_set(candidates: Sequence[ModelCandidate], name: str) -> tuple[ModelCandidate, ...]:
    """Return the models of one channel set.

    Raises:
        UsageError: If there is none.
    """
    kept = tuple(candidate for candidate in candidates if candidate.threat == name)
    if not kept:
        known = ", ".join(sorted({candidate.threat for candidate in candidates})) or "none"
        where = candidates[0].where if candidates else "the bundle"
        raise UsageError(f"no model for channel set {name!r} in {where}; there are models for: {known}")
    return kept


def _suggest_channel_set(available: Collection[str]) -> str | None:
    """Return the largest common channel set that a VM has, or None."""
    for name in _SUGGESTED_CHANNEL_SETS:
        if all(c.full_name in available for c, on in zip(CHANNELS, build_channel_mask(name), strict=True) if on):
            return name
    return None


def compute_preference(candidate: ModelCandidate) -> tuple[int, int, int, int]:
    """Return the sort key of a candidate, the preferred one first: most channels, then model, input and seed.

    Context comes last: only an audit of the run can tell whether such a model goes by the duration of activity.
    """
    models = (*_MODEL_PREFERENCE, candidate.model)
    tables = (InputVariant.COMMISSIONED, InputVariant.RAW, InputVariant.CONTEXT)
    n_channels = len(list_model_channels(candidate.spec))
    return -n_channels, models.index(candidate.model), tables.index(candidate.spec.table), candidate.seed


def find_bundle_models(bundle: EdgeBundle) -> tuple[ModelCandidate, ...]:
    """Return every model of a parsed edge bundle."""
    return tuple(_build_bundle_candidate(bundle, model) for model in bundle.header.models)


def _build_bundle_candidate(bundle: EdgeBundle, model: EdgeModel) -> ModelCandidate:
    spec = bundle.build_input_spec(model)
    where = f"{bundle.file}: {model.member}"
    check_columns(spec, where=where)
    return ModelCandidate(
        model=model.model,
        threat=model.threat,
        seed=model.seed,
        spec=spec,
        rules=parse_rules(model.rules, file=where),
        trained=bundle.header.trained,
        where=bundle.file,
        load=lambda: OnnxModel(bundle.onnx[model.member], spec, file=where),
    )


def _build_checkpoint_candidate(folder: Path) -> ModelCandidate:
    header = read_header(folder)
    spec = _build_input_spec(header, folder)
    check_columns(spec, where=str(folder))
    run, recipe, fold = _parse_checkpoint_path(folder)

    def load() -> ProbabilityEstimator:
        from phasewatch.models import registry

        return registry.load(folder)

    return ModelCandidate(
        model=header.model,
        threat=header.mask,
        seed=header.seed,
        spec=spec,
        rules=extract_rules(header),
        trained=_read_training_origin(run, recipe, fold),
        where=str(folder),
        load=load,
    )


def _build_input_spec(header: CheckpointHeader, folder: Path) -> InputSpec:
    digests = compute_column_digests(header.columns)
    for what, theirs, ours in (
        ("feature schema", header.schema_hash, digests.schema_hash),
        ("behaviour fingerprint", header.behaviour_fingerprint, digests.behaviour_fingerprint),
    ):
        if theirs != ours:
            raise MismatchError(
                f"{folder}: {what} {theirs[:16]}, this version makes {ours[:16]}: it was trained on other numbers; "
                "make the features again and train again"
            )
    if header.input_kind not in (InputKind.TABLE, InputKind.TENSOR):
        raise MismatchError(
            f"{folder}: {header.model} is a baseline without telemetry (input {header.input_kind}); choose another"
        )
    return InputSpec.from_header(header)


def read_training_episodes(where: str) -> tuple[SplitEpisode, ...] | None:
    """Read the episodes that a checkpoint in a run was trained on; None for a model outside a run.

    Args:
        where: The checkpoint's folder, or the edge bundle's file (`PhasePredictor.where`).
    """
    folder = Path(where)
    if not (folder / CHECKPOINT_FILE).is_file():
        return None
    run, recipe, name = _parse_checkpoint_path(folder)
    if run is None:
        return None
    fold = read_fold(run, recipe, name)
    ids = {i for part in (*TRAINING_PARTS, SplitPart.DEALT) for i in fold.ids(part)}
    return tuple(e for e in read_split_episodes(run) if e.episode_id in ids)


def _parse_checkpoint_path(folder: Path) -> tuple[Path | None, str, str]:
    """Return run, recipe and fold of a checkpoint in models/<recipe>/<fold>/<threat>/<model>/<table>-s<seed>."""
    parts = folder.resolve().parts
    if len(parts) < 7 or parts[-6] != MODELS_DIR:
        return None, "", ""
    return folder.resolve().parents[5], parts[-5], parts[-4]


def _read_training_origin(run: Path | None, recipe: str, fold: str) -> TrainingOrigin:
    """Return the origin of the training data of a fold; empty for a checkpoint outside a run."""
    if run is None:
        return TrainingOrigin()
    from phasewatch.inference.export import read_training_origin

    try:
        return read_training_origin(run, recipe, fold)
    except RunError:
        return TrainingOrigin()


def _render_missing_channels(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}, which it lacks"
