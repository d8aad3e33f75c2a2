"""Find the trained models behind `--model`, a checkpoint, a run or an edge bundle, and choose the one that fits a VM."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from phasewatch.channels import CHANNELS, build_channel_mask
from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.normalise import HostBaseline
from phasewatch.features.schema import schema_hash
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
from phasewatch.types import SourceKind

DEPLOY_RECIPE = "deploy"
MODEL_PREFERENCE = ("gbt", "cnn", "gru", "transformer", "lstm", "mlp")
SUGGESTED_CHANNEL_SETS = ("realistic", "portable", "proc+netflow", "proc+tap", "proc+qmp", "proc")
_QEMU_ARCHS = {"x86": "x86_64"}
_GUEST_CHANNELS = {c.full_name for c in CHANNELS if c.source is SourceKind.GUEST}
_CHANNEL_SPECS = {c.full_name: c for c in CHANNELS}


@dataclass(frozen=True, kw_only=True)
class ModelCandidate:
    """One trained model that was found, not loaded yet."""

    model: str
    threat: str
    seed: int
    spec: InputSpec
    rules: PostprocessingRules
    trained: TrainingOrigin
    where: str
    load: Callable[[], ProbabilityEstimator]

    def load_predictor(self, clean_day: HostBaseline | None = None) -> PhasePredictor:
        """Load it; `clean_day` is for a model of commissioned numbers."""
        return PhasePredictor(
            model=self.model, threat=self.threat, seed=self.seed, spec=self.spec,
            estimator=self.load(), filter=self.rules.filter, alarm=self.rules.alarm, trained=self.trained,
            where=self.where, baseline=clean_day,
        )  # fmt: skip

    def find_missing_channels(self, available: Collection[str], arch: str) -> tuple[str, ...]:
        """Name the channels that it reads and a VM cannot give.

        What this architecture never has is no obstacle where training saw the architecture, and so the gap.
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
        )  # fmt: skip


def find_models(path: Path) -> tuple[ModelCandidate, ...]:
    """Give every model behind a path: of a run its `deploy` cells.

    Raises:
        RunError: If it is none of the three, or a run without a `deploy` cell.
        MismatchError: If it was changed, or made for other channels, stats or phases.
    """
    if path.is_file():
        return _build_bundle_candidates(read_edge_bundle(path))
    if (path / CHECKPOINT_FILE).is_file():
        return (_build_checkpoint_candidate(path),)
    if path.is_dir():
        found = sorted((path / "models" / DEPLOY_RECIPE).glob(f"*/*/*/*/{CHECKPOINT_FILE}"))
        if found:
            return tuple(_build_checkpoint_candidate(header.parent) for header in found)
        if (path / "models").is_dir() or (path / "run.json").is_file():
            raise RunError(
                f"{path}: this run has no deployed model; train one: phasewatch train {path} --recipes {DEPLOY_RECIPE}"
            )
    raise RunError(
        f"{path}: no checkpoint, run or edge bundle is here; make one with `phasewatch run` or `phasewatch export`"
    )


def choose_model(
    candidates: Sequence[ModelCandidate],
    available: Collection[str],
    *,
    arch: str,
    clean_day: HostBaseline | None = None,
) -> PhasePredictor:
    """Load the model with the largest mask that a VM can give.

    Args:
        candidates: From `find_models`.
        available: Full names of the channels that it can give.
        arch: Of the guest.
        clean_day: Of the VM, if it is known; then a model that learnt from commissioned numbers is taken.

    Raises:
        MismatchError: If none fits; says what each lacks and what to train. The guest's word is never taken.
    """
    kept, lines = [], []
    for candidate in sorted(candidates, key=_preference_key):
        lacks = candidate.find_missing_channels(available, arch)
        if any(name in _GUEST_CHANNELS for name in list_model_channels(candidate.spec)):
            lines.append(f"{candidate.threat} needs the guest's own word, which no watcher has")
        elif lacks:
            lines.append(f"{candidate.threat} needs {_render_missing_channels(lacks)}")
        elif (candidate.spec.table is InputVariant.COMMISSIONED) != (clean_day is not None):
            kind = "numbers of a clean day (give one with --baseline)" if clean_day is None else "raw numbers"
            lines.append(f"{candidate.threat} learnt from {kind}")
        else:
            kept.append(candidate)
    if not kept:
        fits = _suggest_channel_set(available)
        raise MismatchError(
            f"{candidates[0].where if candidates else 'model'}: no model fits this VM: {'; '.join(dict.fromkeys(lines))}. "
            + (
                f"Its channels make the mask {fits}: phasewatch train RUN --recipes {DEPLOY_RECIPE} --channels {fits}"
                if fits
                else "It gives too little for any registered mask"
            )
        )
    return kept[0].load_predictor(clean_day)


def find_unavailable_channel_sets(
    candidates: Sequence[ModelCandidate], available: Collection[str], *, arch: str, chosen: PhasePredictor
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the channel sets with more channels than the chosen one that a VM cannot give, and what each lacks."""
    larger = [
        c for c in sorted(candidates, key=_preference_key) if len(list_model_channels(c.spec)) > len(chosen.channels)
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
        there = ", ".join(sorted({candidate.threat for candidate in candidates})) or "none"
        raise UsageError(
            f"--channels {name}: no model of it is in {candidates[0].where if candidates else 'the bundle'}; there: {there}"
        )
    return kept


def _suggest_channel_set(available: Collection[str]) -> str:
    """Name the largest usual mask that a VM can give; empty if there is none."""
    for name in SUGGESTED_CHANNEL_SETS:
        if all(c.full_name in available for c, on in zip(CHANNELS, build_channel_mask(name), strict=True) if on):
            return name
    return ""


def _preference_key(candidate: ModelCandidate) -> tuple[int, int, int, int]:
    place = MODEL_PREFERENCE.index(candidate.model) if candidate.model in MODEL_PREFERENCE else len(MODEL_PREFERENCE)
    tables = (InputVariant.COMMISSIONED, InputVariant.CONTEXT, InputVariant.RAW)
    return -len(list_model_channels(candidate.spec)), place, tables.index(candidate.spec.table), candidate.seed


def _build_bundle_candidates(bundle: EdgeBundle) -> tuple[ModelCandidate, ...]:
    def made(model: EdgeModel) -> ModelCandidate:
        spec = bundle.build_input_spec(model)
        where = f"{bundle.file}: {model.member}"
        check_columns(spec, where=where)
        return ModelCandidate(
            model=model.model, threat=model.threat, seed=model.seed, spec=spec,
            rules=parse_rules(model.rules, file=where), trained=bundle.header.trained, where=bundle.file,
            load=lambda: OnnxModel(bundle.onnx[model.member], spec, file=where),
        )  # fmt: skip

    return tuple(made(model) for model in bundle.header.models)


def _build_checkpoint_candidate(folder: Path) -> ModelCandidate:
    header = read_header(folder)
    spec = _build_input_spec(header, folder)
    check_columns(spec, where=str(folder))
    run, recipe, fold = _parse_checkpoint_path(folder)

    def load() -> ProbabilityEstimator:
        from phasewatch.models import registry

        return registry.load(folder)

    return ModelCandidate(
        model=header.model, threat=header.mask, seed=header.seed, spec=spec, rules=extract_rules(header),
        trained=_read_training_origin(run, recipe, fold), where=str(folder), load=load,
    )  # fmt: skip


def _build_input_spec(header: CheckpointHeader, folder: Path) -> InputSpec:
    for what, theirs, ours in (
        ("feature schema", header.schema_hash, schema_hash()),
        ("behaviour fingerprint", header.behaviour_fingerprint, behaviour_fingerprint()),
    ):
        if theirs != ours:
            raise MismatchError(
                f"{folder}: {what} {theirs[:16]}, this version makes {ours[:16]}: it was trained on other numbers; "
                "make the features again and train again"
            )
    if header.input_kind not in (InputKind.TABLE, InputKind.TENSOR):
        raise MismatchError(
            f"{folder}: {header.model} looks at {header.input_kind} alone; a watcher has use for telemetry only"
        )
    return InputSpec(
        kind=InputKind(header.input_kind), names=header.columns, mask=header.mask, schema_hash=header.schema_hash,
        behaviour_fingerprint=header.behaviour_fingerprint, table=InputVariant(header.table),
        floors=tuple(header.floors.items()),
    )  # fmt: skip


def _parse_checkpoint_path(folder: Path) -> tuple[Path | None, str, str]:
    """Read run, recipe and fold off a cell's place: models/<recipe>/<fold>/<threat>/<model>/<table>-s<seed>."""
    parts = folder.resolve().parts
    if len(parts) < 7 or parts[-6] != "models":
        return None, "", ""
    return folder.resolve().parents[5], parts[-5], parts[-4]


def _read_training_origin(run: Path | None, recipe: str, fold: str) -> TrainingOrigin:
    """Say who the models of a fold learnt from; nothing is known of a checkpoint that left its run."""
    if run is None:
        return TrainingOrigin()
    from phasewatch.inference.export import read_training_origin

    try:
        return read_training_origin(run, recipe, fold)
    except RunError:
        return TrainingOrigin()


def _render_missing_channels(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}, which it cannot give"
