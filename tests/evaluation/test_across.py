"""One model in two places: the gap is paired over the windows that both tested, and corrected within its family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from tests.factories.predictions import Shape, write_predictions

from phasewatch.artifacts import PREDICTIONS_FILE
from phasewatch.channels import BASE_CHANNELS, build_channel_mask, list_source_subsets
from phasewatch.evaluation.evaluate import evaluate_run
from phasewatch.evaluation.metric_table import MetricRow, MetricTable
from phasewatch.training.predictions import write_prediction_table

GBT = (("gbt", 0.5),)
GOOD = (("gbt", 0.9),)


def gaps(metrics: MetricTable, kind: str) -> list[MetricRow]:
    return list(metrics.select(f"macro_f1_{kind}_gap"))


def value(metrics: MetricTable, agent: str | None, **where: str) -> float:
    (found,) = [
        r.value
        for r in metrics.metrics
        if r.metric == "macro_f1"
        and r.fold == "pooled"
        and r.agent == agent
        and r.seed == "mean"
        and r.profile is r.host_id is r.sample_name is None
        and all(getattr(r, k) == v for k, v in where.items())
    ]
    assert found is not None
    return found


def test_the_inflation_is_what_a_leaky_split_would_have_claimed_less_what_an_unseen_host_gives(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(skill=GBT), Shape(skill=GOOD, recipe="random_windows"))

    metrics = evaluate_run(tmp_path, resamples=200)
    (gap,) = gaps(metrics, "recipe")

    assert (gap.recipe, gap.compared_to, gap.model, gap.agent) == ("random_windows", "held_out_host", "gbt", "off")
    claimed, expected = (value(metrics, "off", recipe=r) for r in ("random_windows", "held_out_host"))
    assert gap.value == pytest.approx(claimed - expected)
    assert 0 < gap.low < gap.value < gap.high


def test_oracle_is_held_against_realistic_on_episodes_whose_agent_ran(tmp_path: Path) -> None:
    write_predictions(
        tmp_path, Shape(skill=GBT), Shape(skill=GOOD, threat="oracle"), Shape(skill=GBT, threat="portable")
    )

    found = {r.channel_set: r for r in gaps(evaluate_run(tmp_path, resamples=200), "threat")}

    assert (found["oracle"].agent, found["oracle"].compared_to) == ("on", "realistic")
    assert (found["portable"].agent, found["portable"].compared_to) == ("off", "realistic")
    assert found["oracle"].value > 0.2
    assert found["portable"].value == 0.0
    assert found["oracle"].p_holm == pytest.approx(2 * found["oracle"].p)  # two gaps are one family


@pytest.mark.parametrize(
    ("other", "kind", "vs"),
    [
        pytest.param({"table": "context"}, "table", "raw", id="a table of context against the raw one"),
        pytest.param({"filter": "phase"}, "filter", "none", id="filtered against not filtered"),
    ],
)
def test_tables_and_filters_are_paired_too(tmp_path: Path, other: dict[str, str], kind: str, vs: str) -> None:
    write_predictions(tmp_path, Shape(skill=GBT), Shape(skill=GOOD, **other))

    (gap,) = gaps(evaluate_run(tmp_path, resamples=200), kind)

    assert gap.compared_to == vs
    assert gap.value > 0.2


def test_only_windows_that_both_tested_are_compared(tmp_path: Path) -> None:
    table = write_predictions(tmp_path, Shape(skill=GBT), Shape(skill=GOOD, recipe="random_windows"))
    lost = pc.and_(pc.equal(table["recipe"], "random_windows"), pc.equal(table["host_id"], "host-0"))
    write_prediction_table(tmp_path / PREDICTIONS_FILE, [table.filter(pc.invert(lost))])

    (gap,) = gaps(evaluate_run(tmp_path, resamples=200), "recipe")

    assert (gap.n_hosts, gap.n_windows) == (2, 90)


def test_seeds_that_only_one_side_has_are_left_out(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(skill=GBT, seeds=(0, 1)), Shape(skill=GBT, recipe="random_windows"))

    (gap,) = gaps(evaluate_run(tmp_path, resamples=200), "recipe")

    assert gap.value == 0.0


def test_each_subset_of_sources_is_held_against_all_of_them_on_the_same_episodes(tmp_path: Path) -> None:
    threats = ("realistic", "proc", "netflow", "proc+qmp+netflow+guest", "guest")
    write_predictions(tmp_path, *(Shape(skill=GBT, threat=t) for t in threats))

    found = {(r.channel_set, r.compared_to, r.agent) for r in gaps(evaluate_run(tmp_path, resamples=50), "sensor")}

    everything = "proc+qmp+netflow+guest"
    assert found == {
        ("proc", everything, "on"),
        ("netflow", everything, "on"),
        ("guest", everything, "on"),
        ("realistic", everything, "on"),
        ("proc", "realistic", "off"),
        ("netflow", "realistic", "off"),
    }


def test_the_subsets_of_sources_are_fifteen_masks_of_which_one_is_all_that_the_host_has() -> None:
    masks = {build_channel_mask(name) for name in list_source_subsets()}

    assert len(masks) == 15
    assert build_channel_mask("realistic") in masks
    assert (
        np.array(build_channel_mask(list_source_subsets()[-1])).sum() == len(BASE_CHANNELS) - 3
    )  # the balloon's word is the guest's
