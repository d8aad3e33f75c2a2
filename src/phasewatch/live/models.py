"""Find the trained models behind `--model`, a checkpoint, a run or an edge bundle, and choose the one that fits a VM."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from phasewatch.channels import CHANNELS, mask_of
from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.export.edge import EdgeModel, Trained
from phasewatch.export.rules import Rules, parse_rules, rules_of
from phasewatch.features.commission import Reference
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import schema_hash
from phasewatch.live.edge import EdgeBundle, OnnxModel, read_edge
from phasewatch.live.scorer import Predictor, Scorer, channels_of, check_columns
from phasewatch.models.base import InputKind, InputSpec, Table
from phasewatch.models.checkpoint import HEADER, Header, read_header
from phasewatch.vocab import Source

DEPLOY = "deploy"
PREFERRED = ("gbt", "cnn", "gru", "transformer", "lstm", "mlp")
SUGGESTED = ("realistic", "portable", "proc+netflow", "proc+tap", "proc+qmp", "proc")
_ARCH_OF = {"x86": "x86_64"}
_GUEST = {c.full_name for c in CHANNELS if c.source is Source.GUEST}
_SPECS = {c.full_name: c for c in CHANNELS}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One trained model that was found, not loaded yet."""

    model: str
    threat: str
    seed: int
    spec: InputSpec
    rules: Rules
    trained: Trained
    where: str
    load: Callable[[], Predictor]

    def scorer(self, clean_day: Reference | None = None) -> Scorer:
        """Load it; `clean_day` is for a model of commissioned numbers."""
        return Scorer(
            model=self.model, threat=self.threat, seed=self.seed, spec=self.spec,
            predictor=self.load(), filter=self.rules.filter, alarm=self.rules.alarm, trained=self.trained,
            where=self.where, clean_day=clean_day,
        )  # fmt: skip

    def lacks(self, available: Collection[str], arch: str) -> tuple[str, ...]:
        """Name the channels that it reads and a VM cannot give.

        What this architecture never has is no obstacle where training saw the architecture, and so the gap.
        """
        return tuple(
            name
            for name in channels_of(self.spec)
            if name not in available
            and not (
                _SPECS[name].arch != "any"
                and _ARCH_OF[_SPECS[name].arch] != arch
                and arch in self.trained.archs
            )
        )  # fmt: skip


def find_models(path: Path) -> tuple[Candidate, ...]:
    """Give every model behind a path: of a run its `deploy` cells.

    Raises:
        RunError: If it is none of the three, or a run without a `deploy` cell.
        MismatchError: If it was changed, or made for other channels, stats or phases.
    """
    if path.is_file():
        return _of_bundle(read_edge(path))
    if (path / HEADER).is_file():
        return (_of_checkpoint(path),)
    if path.is_dir():
        found = sorted((path / "models" / DEPLOY).glob(f"*/*/*/*/{HEADER}"))
        if found:
            return tuple(_of_checkpoint(header.parent) for header in found)
        if (path / "models").is_dir() or (path / "run.json").is_file():
            raise RunError(
                f"{path}: this run has no deployed model; train one: phasewatch train {path} --recipes {DEPLOY}"
            )
    raise RunError(
        f"{path}: no checkpoint, run or edge bundle is here; make one with `phasewatch run` or `phasewatch export`"
    )


def choose_model(
    candidates: Sequence[Candidate], available: Collection[str], *, arch: str, clean_day: Reference | None = None
) -> Scorer:
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
    for candidate in sorted(candidates, key=_order):
        lacks = candidate.lacks(available, arch)
        if any(name in _GUEST for name in channels_of(candidate.spec)):
            lines.append(f"{candidate.threat} needs the guest's own word, which no watcher has")
        elif lacks:
            lines.append(f"{candidate.threat} needs {_some(lacks)}")
        elif (candidate.spec.table is Table.COMMISSIONED) != (clean_day is not None):
            kind = "numbers of a clean day (give one with --commission)" if clean_day is None else "raw numbers"
            lines.append(f"{candidate.threat} learnt from {kind}")
        else:
            kept.append(candidate)
    if not kept:
        fits = suggest_mask(available)
        raise MismatchError(
            f"{candidates[0].where if candidates else 'model'}: no model fits this VM: {'; '.join(dict.fromkeys(lines))}. "
            + (
                f"Its channels make the mask {fits}: phasewatch train RUN --recipes {DEPLOY} --threats {fits}"
                if fits
                else "It gives too little for any registered mask"
            )
        )
    return kept[0].scorer(clean_day)


def passed_over(
    candidates: Sequence[Candidate], available: Collection[str], *, arch: str, chosen: Scorer
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the channel sets with more channels than the chosen one that a VM cannot give, and what each lacks."""
    larger = [c for c in sorted(candidates, key=_order) if len(channels_of(c.spec)) > len(chosen.channels)]
    lacking = {c.threat: c.lacks(available, arch) for c in larger}
    return tuple((threat, lacks) for threat, lacks in lacking.items() if lacks and not _GUEST & set(lacks))


def with_channel_set(candidates: Sequence[Candidate], name: str) -> tuple[Candidate, ...]:
    """Return the models of one channel set.

    Raises:
        UsageError: If there is none.
    """
    kept = tuple(candidate for candidate in candidates if candidate.threat == name)
    if not kept:
        there = ", ".join(sorted({candidate.threat for candidate in candidates})) or "none"
        raise UsageError(
            f"--channel-set {name}: no model of it is in {candidates[0].where if candidates else 'the bundle'}; there: {there}"
        )
    return kept


def suggest_mask(available: Collection[str]) -> str:
    """Name the largest usual mask that a VM can give; empty if there is none."""
    for name in SUGGESTED:
        if all(c.full_name in available for c, on in zip(CHANNELS, mask_of(name), strict=True) if on):
            return name
    return ""


def _order(candidate: Candidate) -> tuple[int, int, int, int]:
    place = PREFERRED.index(candidate.model) if candidate.model in PREFERRED else len(PREFERRED)
    tables = (Table.COMMISSIONED, Table.CONTEXT, Table.RAW)
    return -len(channels_of(candidate.spec)), place, tables.index(candidate.spec.table), candidate.seed


def _of_bundle(bundle: EdgeBundle) -> tuple[Candidate, ...]:
    def made(model: EdgeModel) -> Candidate:
        spec = bundle.spec_of(model)
        where = f"{bundle.file}: {model.member}"
        check_columns(spec, where=where)
        return Candidate(
            model=model.model, threat=model.threat, seed=model.seed, spec=spec,
            rules=parse_rules(model.rules, file=where), trained=bundle.header.trained, where=bundle.file,
            load=lambda: OnnxModel(bundle.onnx[model.member], spec, file=where),
        )  # fmt: skip

    return tuple(made(model) for model in bundle.header.models)


def _of_checkpoint(folder: Path) -> Candidate:
    header = read_header(folder)
    spec = _spec_of(header, folder)
    check_columns(spec, where=str(folder))
    run, recipe, fold = _place_of(folder)

    def load() -> Predictor:
        from phasewatch.models import registry

        return registry.load(folder)

    return Candidate(
        model=header.model, threat=header.mask, seed=header.seed, spec=spec, rules=rules_of(header),
        trained=_trained(run, recipe, fold), where=str(folder), load=load,
    )  # fmt: skip


def _spec_of(header: Header, folder: Path) -> InputSpec:
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
        behaviour_fingerprint=header.behaviour_fingerprint, table=Table(header.table),
        floors=tuple(header.floors.items()),
    )  # fmt: skip


def _place_of(folder: Path) -> tuple[Path | None, str, str]:
    """Read run, recipe and fold off a cell's place: models/<recipe>/<fold>/<threat>/<model>/<table>-s<seed>."""
    parts = folder.resolve().parts
    if len(parts) < 7 or parts[-6] != "models":
        return None, "", ""
    return folder.resolve().parents[5], parts[-5], parts[-4]


def _trained(run: Path | None, recipe: str, fold: str) -> Trained:
    """Say who the models of a fold learnt from; nothing is known of a checkpoint that left its run."""
    if run is None:
        return Trained()
    from phasewatch.export.run import trained_on

    try:
        return trained_on(run, recipe, fold)
    except RunError:
        return Trained()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}, which it cannot give"
