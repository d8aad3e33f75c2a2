"""Which of several trained models is taken, live and for recordings, when no one is named."""

from __future__ import annotations

from typing import Any

from phasewatch.inference.edge_bundle import PostprocessingRules, TrainingOrigin
from phasewatch.inference.model_selection import ModelCandidate, compute_preference
from phasewatch.models.base import InputKind, InputSpec, InputVariant


def build_candidate(
    model: str, table: InputVariant, names: tuple[str, ...] = ("proc.cpu_user.mean",)
) -> ModelCandidate:
    spec = InputSpec(
        kind=InputKind.TABLE, names=names, mask="proc", schema_hash="s", behaviour_fingerprint="b", table=table
    )
    return ModelCandidate(
        model=model,
        threat="proc",
        seed=0,
        spec=spec,
        rules=PostprocessingRules(),
        trained=TrainingOrigin(),
        where="test",
        load=lambda: _refuse(),
    )


def _refuse() -> Any:
    raise AssertionError("nothing is loaded to choose")


def test_a_model_with_context_is_taken_only_where_no_other_fits() -> None:
    raw, context = build_candidate("gbt", InputVariant.RAW), build_candidate("gbt", InputVariant.CONTEXT)

    assert min([context, raw], key=compute_preference) is raw


def test_more_channels_count_more_than_the_model() -> None:
    wide = build_candidate("cnn", InputVariant.RAW, ("proc.cpu_user.mean", "proc.cpu_sys.mean"))

    assert min([build_candidate("gbt", InputVariant.RAW), wide], key=compute_preference) is wide
