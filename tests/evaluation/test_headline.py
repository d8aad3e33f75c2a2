"""The headline: which rows it quotes, its form, its file, and what an audit that failed leaves of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from scipy.stats import t as student

from phasewatch.artifacts import HEADLINE_FILE
from phasewatch.errors import RunError
from phasewatch.evaluation.headline import (
    HeadlineVerdict,
    build_headline,
    read_headline,
    render_headline,
    write_headline,
)
from phasewatch.evaluation.leaderboard import compute_host_interval
from phasewatch.evaluation.metric_table import MetricRow, MetricTable, NoteCode, select_headline

BOTH, HOST = "held_out_both", "held_out_host"
VALUES = {
    "macro_f1": 0.50,
    "macro_f1_3class": 0.70,
    "macro_f1_3class_new_host": 0.69,
    "macro_f1_3class_mean_of_hosts": 0.69,
    "infection_recall_30s": 0.90,
    "infection_delay_s": 11.0,
    "infection_soak_false_alarms_per_vm_hour": 0.25,
    "idle_called_clean": 0.86,
}


def row(metric: str, value: float | None, **more: object) -> MetricRow:
    place = {
        "recipe": BOTH,
        "fold": "pooled",
        "channel_set": "realistic",
        "model": "gbt",
        "input": "raw",
        "smoothing": "none",
        "agent": "off",
        "seed": "mean",
        "n_episodes": 104,
        "n_hosts": 6,
        "n_profiles_tested": 5,
        "n_profiles": 6,
        "low": None if value is None else value - 0.05,
        "high": None if value is None else value + 0.05,
    }
    return MetricRow(**(place | {"metric": metric, "value": value} | more))  # type: ignore[arg-type]


def rows(recipe: str = BOTH, **values: float) -> list[MetricRow]:
    found = [row(name, value, recipe=recipe) for name, value in (VALUES | values).items()]
    found.append(row("infection_soak_vm_hours", 3.97, recipe=recipe))
    found.append(row("macro_f1", 0.50, recipe=recipe, seed=0))
    found.append(row("macro_f1", 0.22, recipe=recipe, model="elapsed_time"))
    found.append(row("macro_f1", 0.21, recipe=recipe, model="load_only"))
    return found


def table(*found: MetricRow) -> MetricTable:
    return MetricTable(inputs={}, metrics=found)


def test_line_quotes_the_hardest_recipe_in_its_form() -> None:
    line = render_headline(build_headline(table(*rows(), *rows(HOST, macro_f1=0.6))))

    number = r"\d\.\d\d \[-?\d\.\d\d, \d\.\d\d\]"
    assert re.fullmatch(
        rf"infections alarmed within 30 s, unseen host and sample: {number} at {number} false alarms per VM-hour; "
        rf"macro-F1 3 classes {number}, 5 phases {number}; a new host \d\.\d\d to \d\.\d\d; "
        r"idle called clean 0\.86; time alone 0\.22, load alone 0\.21 "
        r"\(104 episodes, 6 hosts, 5 of 6 profiles, 1 seed\)",
        line,
    )
    assert "5 phases 0.50" in line


def test_unseen_host_stands_beside_it_with_the_same_keys() -> None:
    found = build_headline(table(*rows(), *rows(HOST, macro_f1=0.6)), corpus="lab-v1")

    assert (found.recipe, found.corpus, found.macro_f1.value, found.n_onsets) == (BOTH, "lab-v1", 0.5, 104)
    assert found.unseen_host is not None
    assert (found.unseen_host.recipe, found.unseen_host.macro_f1.value) == (HOST, 0.6)
    assert found.soak_hours == 3.97


def test_a_run_without_the_hardest_recipe_falls_back_and_says_so() -> None:
    found = build_headline(table(*rows(HOST)))

    assert found.recipe == HOST
    assert "unseen host (unseen host and sample not tested)" in render_headline(found)


def test_numbers_that_were_not_measured_are_null_with_a_coded_note() -> None:
    found = build_headline(table(row("macro_f1", 0.5)))

    assert found.infection_recall_30s.value is None
    assert found.infection_recall_30s.code is NoteCode.NOT_SCORED
    assert "untested" in render_headline(found)


def test_a_number_of_the_training_stride_is_marked() -> None:
    found = build_headline(table(row("macro_f1", 0.5), row("infection_recall_30s_at_5s", 0.8)))

    assert found.infection_recall_30s.value == 0.8
    assert found.infection_recall_30s.code is NoteCode.OTHER_STRIDE


def test_a_baseline_of_another_recipe_is_marked() -> None:
    found = build_headline(table(row("macro_f1", 0.5), row("macro_f1", 0.2, recipe=HOST, model="elapsed_time")))

    assert (found.time_only.value, found.time_only.code) == (0.2, NoteCode.OTHER_RECIPE)


def test_a_run_that_failed_its_audit_has_no_numbers_in_its_line() -> None:
    headline = build_headline(table(*rows()))
    failed = HeadlineVerdict(passes=False, failed=("splices", "load"))

    line = render_headline(headline, failed)

    assert "splices, load" in line
    assert not re.search(r"\d\.\d", line)
    assert render_headline(headline, HeadlineVerdict(passes=True)) == render_headline(headline)


def test_file_holds_an_object_of_value_low_and_high_per_number_and_no_verdict_before_an_audit(tmp_path: Path) -> None:
    headline = build_headline(table(*rows(), *rows(HOST)))
    write_headline(tmp_path, headline)
    raw = json.loads((tmp_path / HEADLINE_FILE).read_bytes())

    assert read_headline(tmp_path) == headline
    assert raw["audit"] is None
    for block in (raw, raw["unseen_host"]):
        for name in (
            "infection_recall_30s",
            "false_alarms_per_vm_hour",
            "macro_f1_3class",
            "macro_f1",
            "new_host_macro_f1_3class",
            "idle_called_clean",
            "time_only",
            "load_only",
            "median_delay_s",
        ):
            assert {"value", "low", "high", "note"} <= set(block[name])
        assert {"n_episodes", "n_hosts", "n_onsets", "soak_hours"} <= set(block)
    assert {"model", "channels", "recipe", "corpus"} <= set(raw)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"model": 1}', b"\xff"])
def test_a_broken_file_is_refused_with_the_command_that_helps(tmp_path: Path, data: bytes) -> None:
    (tmp_path / HEADLINE_FILE).write_bytes(data)

    with pytest.raises(RunError, match="phasewatch evaluate"):
        read_headline(tmp_path)


def test_model_is_chosen_on_the_hardest_recipe_that_was_validated() -> None:
    def chosen(model: str, recipe: str, value: float) -> MetricRow:
        return row("val_b_macro_f1", value, model=model, recipe=recipe, agent=None)

    host = [chosen("minirocket", HOST, 0.9), chosen("gbt", HOST, 0.5)]
    assert select_headline([*host, chosen("gbt", BOTH, 0.4)]).model == "gbt"
    assert select_headline(host).model == "minirocket"


def test_range_of_a_new_host_is_students_prediction_interval() -> None:
    scores = [0.39, 0.58, 0.53, 0.57, 0.56, 0.55]
    mean, sd = sum(scores) / 6, (sum((s - sum(scores) / 6) ** 2 for s in scores) / 5) ** 0.5
    new, average = compute_host_interval(scores, is_new_host=True), compute_host_interval(scores, is_new_host=False)

    assert (new["low"], new["high"]) == pytest.approx(student.interval(0.95, 5, mean, sd * (1 + 1 / 6) ** 0.5))
    assert (average["low"], average["high"]) == pytest.approx(student.interval(0.95, 5, mean, sd / 6**0.5))


def test_range_of_a_new_host_stays_between_zero_and_one_and_needs_three_hosts() -> None:
    wide = compute_host_interval([0.1, 0.9, 0.5], is_new_host=True)

    assert (wide["low"], wide["high"]) == (0.0, 1.0)
    note = compute_host_interval([0.5, 0.6], is_new_host=True)["note"]
    assert note is not None
    assert note.code is NoteCode.TOO_FEW_HOSTS
