"""Sections of the report, built from metric rows, bundle counts and audit results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.report.test_summary import CLOCK, GBT, THREE, row

from phasewatch.audit.checks import REPORT_ONLY_SUFFIX, AuditCheck, AuditReport, AuditRow, CheckOutcome, LimitKind
from phasewatch.evaluation.metric_table import SELECTION_METRIC, MetricRow, MetricTable, NoteCode
from phasewatch.report.audit import NOT_AUDITED
from phasewatch.report.data import BundleCounts, ReportData
from phasewatch.report.layout import ReportBlock, ReportPage
from phasewatch.report.leaderboard import NOT_TRAINED
from phasewatch.report.markdown import render_json, render_markdown
from phasewatch.report.summary import build_page, describe_inversion

EVIDENCE = ReportData(
    metrics=None,
    predictions=None,
    bundles=None,
    stages=(),
    folds=(),
    schema=None,
    digests={},
    notes=(),
)


def page_of(rows: Sequence[MetricRow], **more: object) -> ReportPage:
    return build_page(replace(EVIDENCE, metrics=MetricTable(inputs={}, metrics=tuple(rows)), **more))  # type: ignore[arg-type]


def block(page: ReportPage, key: str) -> ReportBlock:
    return next(b for s in page.sections for b in s.blocks if b.key == key)


LEAKY = row("macro_f1", "gbt", 0.8, recipe="random_windows", low=0.78, high=0.82)
BOTH = row("macro_f1", "gbt", 0.6, recipe="held_out_both", low=0.56, high=0.65)


def test_headline_gives_the_scores_on_unseen_hosts_before_the_leaky_score() -> None:
    page = page_of([GBT, THREE, CLOCK, LEAKY, BOTH])

    scores = [page.claim.words.index(score) for score in ("0.69 [0.64, 0.73]", "0.60 [0.56, 0.65]", "0.80")]
    assert scores == sorted(scores)
    assert page.sections[0].key == "rings"  # what an operator asks first


def test_headline_names_the_model_of_its_scores() -> None:
    cnn = row("macro_f1", "cnn", 0.71, low=0.6, high=0.8)
    liked = [row(SELECTION_METRIC, model, value, agent=None) for model, value in (("cnn", 0.9), ("gbt", 0.8))]

    page = page_of([GBT, cnn, THREE, CLOCK, LEAKY, *liked])

    assert "macro-F1 of gbt: 0.69" in page.claim.words


@pytest.mark.parametrize(
    ("rows", "present", "missing"),
    [
        pytest.param([GBT, LEAKY], ["0.69 [0.64, 0.73]", "0.80"], "samples", id="unseen hosts only"),
        pytest.param([GBT], ["0.69 [0.64, 0.73]"], "For comparison", id="no leaky split"),
        pytest.param([LEAKY], ["No score"], "0.80", id="leaky split only"),
    ],
)
def test_headline_has_only_scores_that_were_measured(rows: list[MetricRow], present: list[str], missing: str) -> None:
    words = page_of(rows).claim.words

    assert all(part in words for part in present)
    assert missing not in words


def test_protocol_table_lists_untrained_splits_and_paired_differences() -> None:
    gap = row(
        "macro_f1_recipe_gap",
        "gbt",
        0.11,
        recipe="random_windows",
        compared_to="held_out_host",
        low=0.07,
        high=0.16,
    )
    size = row("train_windows", "gbt", 1234.0, recipe="random_windows", agent=None)

    protocols = block(page_of([GBT, LEAKY, gap, size]), "inflation")

    assert protocols.sentences[-1].endswith(": random episodes, unseen sample, unseen host and sample.")
    assert protocols.table is not None
    assert protocols.table.rows[0][0].startswith("random windows: ")
    assert protocols.table.rows[0][1:5] == ("0.80", "[0.78, 0.82]", "+0.11 [+0.07, +0.16]", "1,234")
    assert protocols.table.rows[1][1:3] == ("–", NOT_TRAINED)


def test_score_on_random_episodes_below_unseen_hosts_is_explained() -> None:
    below, above = (row("macro_f1", "gbt", v, recipe="in_distribution", low=0.5, high=0.9) for v in (0.6, 0.8))
    sizes = [
        row("train_windows", "gbt", n, recipe=r, agent=None)
        for r, n in (("in_distribution", 1610.0), ("held_out_host", 1600.0))
    ]

    explained, plain = (block(page_of([GBT, r, *sizes]), "inflation").sentences for r in (below, above))

    assert describe_inversion([GBT, below, *sizes]) in explained
    assert describe_inversion([GBT, above, *sizes]) is None
    assert len(plain) == len(explained) - 1


def test_untrained_baselines_are_listed() -> None:
    board = block(page_of([GBT, CLOCK]), "leaderboard")

    assert any(f"{NOT_TRAINED}: majority (baseline)" in s for s in board.sentences)
    assert not any("minirocket" in s for s in board.sentences)


def test_models_not_above_elapsed_time_are_listed() -> None:
    below = row(
        "note",
        "gbt",
        None,
        compared_to="elapsed_time",
        note="gbt is not above elapsed time alone: gap +0.01",
        code=NoteCode.NOT_ABOVE_ELAPSED_TIME,
    )

    sentences = block(page_of([GBT, CLOCK, below]), "leaderboard").sentences

    assert "Not above the elapsed-time baseline (95 % interval of the difference): gbt." in sentences


def test_model_without_an_interval_is_not_listed_as_below_elapsed_time() -> None:
    gap = row("macro_f1_gap", "gbt", 0.3, compared_to="elapsed_time", low=None, high=None, note="4 sessions")
    note = row(
        "note",
        "gbt",
        None,
        compared_to="elapsed_time",
        note="gbt cannot be said to be above elapsed time alone",
        code=NoteCode.NOT_ABOVE_ELAPSED_TIME,
    )

    sentences = block(page_of([GBT, CLOCK, gap, note]), "leaderboard").sentences

    assert "No interval for the difference to the elapsed-time baseline: gbt." in sentences
    assert not any(s.startswith("Not above") for s in sentences)


def test_pairwise_tests_have_p_values_before_and_after_holm_correction() -> None:
    gap = row("macro_f1_gap", "gbt", 0.47, compared_to="elapsed_time", low=0.4, high=0.5, p=0.0002, p_holm=0.0006)
    even = row("macro_f1_gap", "gbt", 0.01, compared_to="minirocket", low=-0.1, high=0.1, p=0.8, p_holm=0.8)

    tests = block(page_of([GBT, gap, even]), "significance")

    assert any(sentence.startswith("1 of 2 differences") for sentence in tests.sentences)
    assert tests.table is not None
    assert tests.table.rows[0] == ("gbt − elapsed_time", "+0.470", "[+0.40, +0.50]", "0.0002", "0.0006")


def test_models_tested_on_one_host_have_a_separate_block() -> None:
    of_one = row("macro_f1", "cnn", 0.9, fold="pc", n_hosts=1)
    here = row("macro_f1", "gbt", 0.5, fold="pc", n_hosts=1)

    page = page_of([GBT, of_one, here])

    assert block(page, "one-host").title == "All models on one host: pc"
    assert "cnn" not in str(block(page, "leaderboard").table)


def operator(metric: str, value: float | None, **more: object) -> MetricRow:
    return row(metric, "gbt", value, n_episodes=14, **more)


def test_alarm_block_lists_infections_first_and_quotes_false_alarms_and_base_rates() -> None:
    rows = [
        operator("activity_miss_rate", 0.3, low=0.1, high=0.5),
        operator("infection_recall_30s", 11 / 14, low=0.5, high=0.9),
        operator("infection_miss_rate", 3 / 14, low=0.07, high=0.36),
        operator("infection_delay_s", 14.0, unit="s", low=9.8, high=22.9),
        operator(
            "infection_soak_false_alarms_per_vm_hour",
            0.25,
            low=0.01,
            high=1.4,
            unit="1/h",
            note="1 in 3.97 VM-hours",
            code=NoteCode.FALSE_ALARM_COUNT,
        ),
        operator("infection_precision_at_base_rate", 0.004, bin=30.0, low=0.001, high=0.1),
    ]

    found = block(page_of([GBT, *rows]), "operator")

    assert found.table is not None
    assert [r[0] for r in found.table.rows] == ["infection"] * 4 + ["activity"] * 2
    announced, base_rate = found.sentences
    assert "11 of 14 episodes" not in announced
    assert "11 of 14 infections" in announced
    assert "0.25 [0.01, 1.40]" in announced
    assert "0.40% [0.10%, 10.00%]" in base_rate


def test_numbers_of_the_training_stride_stand_in_and_are_marked() -> None:
    found = block(page_of([GBT, operator("infection_miss_rate_at_5s", 0.2, low=0.1, high=0.4)]), "operator")

    assert found.table is not None
    assert any("training stride" in s for s in found.sentences)


def test_budget_curve_has_a_line_per_alarm_and_the_rates_that_were_measured() -> None:
    rows = [
        operator(f"{kind}_recall_30s_at_budget", value, bin=budget, low=0.1, high=1.0)
        for kind, budget, value in (("infection", 0.25, 0.8), ("infection", 6.0, 0.9), ("activity", 0.25, 0.5))
    ]
    rows.append(operator("infection_soak_false_alarms_per_vm_hour_at_budget", 0.5, bin=0.25, low=0.1, high=2.0))

    curve = block(page_of([GBT, *rows]), "delay-curve")

    assert curve.figure is not None
    assert curve.figure.wide.count("<title>") == 3  # of the activity alarm one value is unknown
    assert curve.table is not None
    assert curve.table.rows[0][5] == "0.50 [0.10, 2.00]"


def test_precision_curve_has_a_line_per_ranking() -> None:
    rows = [
        operator(f"{name}_precision_curve", value, bin=recall)
        for name in ("infecting", "hot")
        for recall, value in ((0.5, 1.0), (1.0, 0.4))
    ]

    curve = block(page_of([GBT, *rows]), "precision-curve")

    assert curve.figure is not None
    assert curve.figure.wide.count("<title>") == 4


def test_idle_machines_and_load_strata_have_their_own_block() -> None:
    rows = [operator("idle_called_clean", 0.86, low=0.7, high=0.9), operator("macro_f1_with_load", 0.4)]

    found = block(page_of([GBT, *rows]), "load")

    assert found.table is not None
    assert [r[2] for r in found.table.rows] == ["0.86 [0.70, 0.90]", "0.40"]


def test_source_subset_shows_its_own_difference_to_all_four_sources() -> None:
    four = "proc+qmp+netflow+guest"
    found = [
        row("macro_f1", "gbt", v, channel_set=t, agent="on", low=0.1, high=0.9) for t, v in (("proc", 0.3), (four, 0.6))
    ]
    gaps = [
        row(
            "macro_f1_sensor_gap",
            "gbt",
            value,
            channel_set="proc",
            compared_to=four,
            agent="on",
            low=-0.4,
            high=-0.2,
            **where,
        )
        for value, where in ((-0.3, {}), (-0.1, {"recipe": "held_out_both"}), (0.2, {"input": "context"}))
    ]

    table = block(page_of([*found, *gaps]), "sensors").table

    assert table is not None
    assert table.columns[3] == "difference to all four"  # a negative value is a loss
    assert [r[3] for r in table.rows] == ["-0.30 [-0.40, -0.20]", "–"]


def test_permutation_importance_states_the_expected_number_by_chance() -> None:
    importances = [
        row("macro_f1_permuted_gap", "gbt", 0.1, compared_to=f"proc.c{i}", low=low, high=0.2)
        for i, low in enumerate((0.05, -0.1, -0.1, -0.1))
    ]

    (sentence,) = (s for s in block(page_of([GBT, *importances]), "channels").sentences if "by chance" in s)

    assert sentence.startswith("1 of 4 channels")
    assert "about 0.1 " in sentence


def test_collection_cost_is_measured_in_the_bundles() -> None:
    bundles = BundleCounts(
        total=1, by_status=(), by_reason=(), by_origin=(), hosts=("h",), span_days=1.0, rows_per_s=(("proc", 2.0),)
    )

    costs = block(page_of([GBT], bundles=bundles), "costs")

    assert costs.table is not None
    assert costs.table.rows[0][:5] == ("proc", "13", "2.00", "15", "108,000")
    assert costs.table.rows[3][2] == "–"


def audit(fate: CheckOutcome) -> AuditReport:
    check = AuditCheck(
        name="predictions", promise="Each prediction is its checkpoint's.", fate=fate, words="edited by 0.5"
    )
    return AuditReport(inputs={}, checks=(check,))


def test_run_that_fails_its_audit_has_no_score_in_the_headline() -> None:
    page = page_of([GBT, THREE, CLOCK, LEAKY], audit=audit(CheckOutcome.BROKEN))

    assert page.claim.words == "No score: this run failed 1 audit check (predictions)."
    assert page.claim.tiles == ()
    assert page.claim.line == ""
    assert "edited by 0.5" in page.claim.verdict
    assert not page.claim.holds


def test_run_that_passes_its_audit_has_a_headline_and_no_notice() -> None:
    page = page_of([GBT], audit=audit(CheckOutcome.KEPT))

    assert "0.69" in page.claim.words
    assert page.notices == ()
    assert block(page, "audit").sentences[0] == "Audit checks: 1 passed, 0 failed and 0 not run."


def test_audit_check_without_a_limit_does_not_count_as_passed() -> None:
    leak = AuditCheck(
        name="leak-x",
        promise=f"How late it is. {REPORT_ONLY_SUFFIX}",
        fate=CheckOutcome.KEPT,
        words="0.29 rank correlation",
    )
    found = block(
        page_of([GBT], audit=AuditReport(inputs={}, checks=(leak, *audit(CheckOutcome.KEPT).checks))), "audit"
    )

    assert found.sentences[0] == "Audit checks: 1 passed, 0 failed and 0 not run."
    assert found.table is not None
    assert [r[0] for r in found.table.rows] == ["passed", "reported"]


def idle_row(model: str, clean: float, *, is_headline: bool = False) -> AuditRow:
    return AuditRow(
        recipe="held_out_host", channel_set="realistic", model=model, input="raw", metric="idle_called_clean",
        is_headline=is_headline, value=clean, low=clean - 0.05, high=clean + 0.05, limit=0.85,
        limit_kind=LimitKind.AT_LEAST, holds=clean >= 0.85,
    )  # fmt: skip


def shortcut_audit(*rows: AuditRow) -> AuditReport:
    check = AuditCheck(name="idle", promise="Idle machines are quiet.", fate=CheckOutcome.KEPT, words="", rows=rows)
    return AuditReport(inputs={}, checks=(check,))


def test_report_has_the_shortcut_checks_of_every_model_in_one_table() -> None:
    page = page_of([GBT], audit=shortcut_audit(idle_row("gbt", 0.91, is_headline=True), idle_row("gru", 0.60)))

    table = block(page, "shortcuts").table
    assert table is not None
    place = table.columns.index("idle called clean")
    assert [(row[0], row[place], row[-1]) for row in table.rows] == [
        ("gbt (headline)", "0.91 [0.86, 0.96]", "none"),
        ("gru", "0.60 [0.55, 0.65]", "idle_called_clean"),
    ]
    assert page.notices == ()


def test_report_says_that_five_phases_are_withdrawn_and_quotes_three_classes_instead() -> None:
    leaky = row("macro_f1_3class", "gbt", 0.9, recipe="random_windows", low=0.88, high=0.92)
    audit = shortcut_audit(idle_row("gbt", 0.40, is_headline=True))

    page = page_of([GBT, THREE, CLOCK, LEAKY, leaky], audit=audit)

    assert len(page.notices) == 1
    assert "five-phase scores are withdrawn" in page.notices[0]
    assert f"three classes, macro-F1 of gbt: {THREE.value:.2f}" in page.claim.words
    assert "5 phases withdrawn" in page.claim.line
    assert [tile.name for tile in page.claim.tiles if tile.name in ("five phases", "three states")] == ["three states"]


def test_page_without_an_audit_has_a_notice() -> None:
    assert NOT_AUDITED in page_of([GBT]).notices


def test_report_is_available_as_markdown_and_as_json() -> None:
    page = page_of([GBT, THREE, CLOCK, LEAKY])

    text, document = render_markdown(page), json.loads(render_json(page))["result"]

    assert text.startswith("# ")
    assert "0.69 \\[0.64, 0.73\\] on unseen hosts" in text.splitlines()[0]
    assert "(leaky; for comparison only) | 0.80 |" in text
    assert document["claim"]["words"] == page.claim.words
    assert [s["key"] for s in document["sections"]] == [s.key for s in page.sections]


def test_names_from_data_are_escaped_in_markdown() -> None:
    hostile = "<img src=x>[a](b)|c\n# d"
    page = page_of([GBT, row("macro_f1", "gbt", 0.1, sample_name=hostile, profile="p|q")])

    text = render_markdown(page)

    assert "<img" not in text.replace("\\<img", "")
    assert "p\\|q, \\<img src=x\\>\\[a\\](b)\\|c \\# d" in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("https://evil.example/x", r"https\://evil.example/x", id="URL"),
        pytest.param("see www.evil.example", r"see www\.evil.example", id="URL without a scheme"),
        pytest.param("not ~~here~~", r"not \~\~here\~\~", id="strikethrough"),
        pytest.param("at 10:15 / 5 s", "at 10:15 / 5 s", id="plain text"),
    ],
)
def test_names_from_data_become_no_links_in_markdown(name: str, shown: str) -> None:
    page = page_of([GBT, row("macro_f1", "gbt", 0.1, sample_name=name, profile="p")])

    assert f"| p, {shown} |" in render_markdown(page)
