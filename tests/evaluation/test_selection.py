"""How many variants were tried, and whether the choice among them holds on the other half of the hosts."""

from __future__ import annotations

import pyarrow as pa
from tests.factories.predictions import Shape, make_tables

from phasewatch.evaluation.metric_table import MetricRow
from phasewatch.evaluation.predictions import parse_prediction_groups
from phasewatch.evaluation.selection import build_selection_rows


def rows_of(shape: Shape, trials: dict[tuple[str, str, str], int] | None = None) -> list[MetricRow]:
    test = pa.concat_tables(make_tables(shape))
    at = test.schema.get_field_index("part")
    val_b = test.set_column(at, test.schema.field(at), pa.array(["val_b"] * test.num_rows, test.schema.field(at).type))
    groups = list(parse_prediction_groups(test, {}))
    found = {g.key: g for g in parse_prediction_groups(val_b, {}, part="val_b")}
    return list(build_selection_rows(groups, found, trials or {}))


def test_variants_are_models_and_seeds_times_the_settings_tried_without_baselines() -> None:
    shape = Shape(hosts=4, skill=(("gbt", 0.8), ("cnn", 0.4), ("majority", 0.0)), seeds=(0, 1))

    (row,) = [r for r in rows_of(shape, {("held_out_host", "cnn", "raw"): 5}) if r.metric == "variants_tried"]

    assert row.value == 2 * 1 + 2 * 5


def test_choice_of_each_half_of_the_hosts_is_scored_on_the_other() -> None:
    rows = [r for r in rows_of(Shape(hosts=4, skill=(("gbt", 0.9), ("cnn", 0.2)))) if r.metric == "selection_confirmed"]

    assert [(r.model, r.bin) for r in rows] == [("gbt", 0.0), ("gbt", 1.0)]
    assert all(r.value is not None and r.value > 0.7 for r in rows)


def test_one_model_confirms_nothing() -> None:
    assert [r.metric for r in rows_of(Shape(skill=(("gbt", 0.9),)))] == ["variants_tried"]
