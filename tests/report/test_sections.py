"""What each part of the page says of the rows: the meter's sentence, who is absent, what an audit takes away."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.report.test_claim import CLOCK, GBT, THREE, row

from phasewatch.audit.checks import REPORT_ONLY_SUFFIX, AuditCheck, AuditReport, CheckOutcome
from phasewatch.evaluation.metric_table import SELECTION_METRIC, MetricRow, MetricTable, NoteCode
from phasewatch.report.data import BundleCounts, ReportData
from phasewatch.report.layout import ReportBlock, ReportPage
from phasewatch.report.markdown import render_json, render_markdown
from phasewatch.report.summary import build_page

EVIDENCE = ReportData(
    metrics=None, predictions=None, bundles=None, stages=(), folds=(), schema=None, digests={}, notes=(),
)  # fmt: skip


def page_of(rows: Sequence[MetricRow], **more: object) -> ReportPage:
    return build_page(replace(EVIDENCE, metrics=MetricTable(inputs={}, metrics=tuple(rows)), **more))  # type: ignore[arg-type]


def block(page: ReportPage, key: str) -> ReportBlock:
    return next(b for s in page.sections for b in s.blocks if b.key == key)


LEAKY = row("macro_f1", "gbt", 0.8, recipe="random_windows", low=0.78, high=0.82)
BOTH = row("macro_f1", "gbt", 0.6, recipe="held_out_both", low=0.56, high=0.65)


def test_the_page_opens_with_what_would_have_been_claimed() -> None:
    page = page_of([GBT, THREE, CLOCK, LEAKY, BOTH])

    assert page.claim.words == (
        "You would have claimed 0.80; expect 0.69 [0.64, 0.73] on a new host, "
        "0.60 [0.56, 0.65] on a new host with a new sample."
    )
    assert "tells the five phases" not in page.claim.line  # the line to quote says it, with its number
    assert page.sections[0].key == "inflation"


def test_where_the_page_is_about_another_model_the_meter_names_its_own() -> None:
    cnn = row("macro_f1", "cnn", 0.71, low=0.6, high=0.8)
    liked = [row(SELECTION_METRIC, model, value, agent=None) for model, value in (("cnn", 0.9), ("gbt", 0.8))]

    page = page_of([GBT, cnn, THREE, CLOCK, LEAKY, *liked])

    assert page.claim.words.endswith("on a new host (gbt).")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        pytest.param([GBT, LEAKY], "expect 0.69 [0.64, 0.73] on a new host.", id="without both, the host alone"),
        pytest.param([GBT], "gbt tells the five phases", id="without a claim, the plain sentence"),
        pytest.param([LEAKY], "No claim can be made", id="without an honest number, no claim"),
    ],
)
def test_the_opening_says_no_more_than_was_trained(rows: list[MetricRow], says: str) -> None:
    assert says in page_of(rows).claim.words


def test_the_meter_names_what_was_not_trained_and_pairs_its_gaps() -> None:
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

    meter = block(page_of([GBT, LEAKY, gap, size]), "inflation")

    assert "Not trained in this grid: random episodes, unseen sample, unseen host and sample." in meter.sentences
    assert meter.table is not None
    assert meter.table.rows[0][0].startswith("random windows: neighbouring windows of one episode")
    assert meter.table.rows[0][1:5] == ("0.80", "[0.78, 0.82]", "+0.11 [+0.07, +0.16]", "1,234")
    assert meter.table.rows[1][2] == "not trained in this grid"


def test_random_episodes_below_an_unseen_host_are_called_luck_and_not_an_easier_test() -> None:
    below, above = (row("macro_f1", "gbt", v, recipe="in_distribution", low=0.5, high=0.9) for v in (0.6, 0.8))
    sizes = [
        row("train_windows", "gbt", n, recipe=r, agent=None)
        for r, n in (("in_distribution", 1610.0), ("held_out_host", 1600.0))
    ]

    (said,) = (s for s in block(page_of([GBT, below, *sizes]), "inflation").sentences if "take the two for equal" in s)

    assert said.startswith("Random episodes score below an unseen host after training on as much, ")
    sentences = block(page_of([GBT, above, *sizes]), "inflation").sentences
    assert not any("take the two for equal" in s for s in sentences)


def test_baselines_that_were_not_trained_are_named() -> None:
    board = block(page_of([GBT, CLOCK]), "leaderboard")

    assert any("not trained in this grid: minirocket (baseline)" in s for s in board.sentences)


def test_who_is_not_above_the_clock_by_its_interval_is_named() -> None:
    below = row(
        "note",
        "gbt",
        None,
        compared_to="elapsed_time",
        note="gbt is not above elapsed time alone: gap +0.01",
        code=NoteCode.NOT_ABOVE_ELAPSED_TIME,
    )

    assert (
        "Not above elapsed time by their intervals: gbt."
        in block(page_of([GBT, CLOCK, below]), "leaderboard").sentences
    )


def test_without_an_interval_nobody_is_called_below_the_clock() -> None:
    gap = row("macro_f1_gap", "gbt", 0.3, compared_to="elapsed_time", low=None, high=None, note="4 sessions")
    note = row(
        "note",
        "gbt",
        None,
        compared_to="elapsed_time",
        note="gbt cannot be said to be above elapsed time alone",
        code=NoteCode.NOT_ABOVE_ELAPSED_TIME,
    )

    said = block(page_of([GBT, CLOCK, gap, note]), "leaderboard").sentences

    assert "Without an interval it cannot be said whether they are above elapsed time: gbt." in said
    assert not any("by their intervals" in s for s in said)


def test_gaps_are_told_with_p_and_after_holm() -> None:
    gap = row("macro_f1_gap", "gbt", 0.47, compared_to="elapsed_time", low=0.4, high=0.5, p=0.0002, p_holm=0.0006)
    even = row("macro_f1_gap", "gbt", 0.01, compared_to="minirocket", low=-0.1, high=0.1, p=0.8, p_holm=0.8)

    found = block(page_of([GBT, gap, even]), "significance")

    assert any(sentence.startswith("1 of 2 gaps") for sentence in found.sentences)
    assert found.table is not None
    assert found.table.rows[0] == ("gbt − elapsed_time", "+0.470", "[+0.40, +0.50]", "0.0002", "0.0006")


def test_models_of_one_host_stand_apart_from_those_of_all() -> None:
    of_one = row("macro_f1", "cnn", 0.9, fold="pc", n_hosts=1)
    here = row("macro_f1", "gbt", 0.5, fold="pc", n_hosts=1)

    page = page_of([GBT, of_one, here])

    assert block(page, "one-host").title == "All models on one host: pc"
    assert "cnn" not in str(block(page, "leaderboard").table)


def operator(metric: str, value: float | None, **more: object) -> MetricRow:
    return row(metric, "gbt", value, n_episodes=14, **more)


def test_the_operators_view_is_told_in_words_that_an_operator_uses() -> None:
    rows = [
        operator("delay_s", 14.0, unit="s", low=9.8, high=22.9),
        operator("miss_rate", 3 / 14, low=0.07, high=0.36),
        operator(
            "false_alarms_per_vm_hour", 18.3, low=7.9, high=30.8, unit="1/h",
            note="13 in 0.71 VM-hours; nothing below 4.2 an hour is claimed",
        ),
    ]  # fmt: skip

    said = " ".join(block(page_of([GBT, *rows]), "operator").sentences)

    assert "3 of 14 episodes with an onset were missed" in said
    assert "within 14 s of their onset [10 s, 23 s]" in said
    assert "became 18.3 [7.90, 30.80] on the test: 13 in 0.71 VM-hours; nothing below 4.2 an hour is claimed" in said


def test_a_budget_at_which_most_are_missed_breaks_the_line_off() -> None:
    rows = [operator("delay_s_at_budget", v, bin=x) for x, v in ((1.0, None), (6.0, 20.0))]

    curve = block(page_of([GBT, *rows]), "delay-curve")

    assert curve.figure is not None
    assert curve.figure["data"][0]["y"] == [None, 20.0]
    assert curve.table is not None
    assert curve.table.rows[0][2] == "more than half missed"


def test_a_subset_of_sources_stands_beside_its_own_gap_to_all_four_whatever_else_was_trained() -> None:
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
    assert table.columns[3] == "against all four"  # a value below 0 is a loss
    assert [r[3] for r in table.rows] == ["-0.30 [-0.40, -0.20]", "–"]


def test_channels_above_zero_one_by_one_are_told_with_how_many_chance_would_give() -> None:
    worth = [
        row("macro_f1_permuted_gap", "gbt", 0.1, compared_to=f"proc.c{i}", low=low, high=0.2)
        for i, low in enumerate((0.05, -0.1, -0.1, -0.1))
    ]

    (said,) = (s for s in block(page_of([GBT, *worth]), "channels").sentences if "above 0" in s)

    assert said.startswith("1 of 4 are above 0 by their intervals, each taken alone")
    assert said.endswith("about 0.1 would be by chance.")


def test_what_a_source_costs_is_measured_in_the_bundles() -> None:
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


def test_a_run_that_fails_its_audit_has_no_headline() -> None:
    page = page_of([GBT, THREE, CLOCK, LEAKY], audit=audit(CheckOutcome.BROKEN))

    assert page.claim.words == "No claim: this run breaks 1 of its promises (predictions)."
    assert page.claim.tiles == ()
    assert page.claim.line == ""
    assert "edited by 0.5" in page.claim.verdict
    assert not page.claim.holds


def test_a_run_that_keeps_its_promises_claims_and_shows_them() -> None:
    page = page_of([GBT], audit=audit(CheckOutcome.KEPT))

    assert "0.69" in page.claim.words
    assert page.notices == ()
    assert block(page, "audit").sentences[0] == "1 kept, 0 broken and 0 untested."


def test_a_figure_without_a_limit_is_reported_and_no_promise_that_was_kept() -> None:
    leak = AuditCheck(
        name="leak-x",
        promise=f"How late it is. {REPORT_ONLY_SUFFIX}",
        fate=CheckOutcome.KEPT,
        words="0.29 rank correlation",
    )
    found = block(
        page_of([GBT], audit=AuditReport(inputs={}, checks=(leak, *audit(CheckOutcome.KEPT).checks))), "audit"
    )

    assert found.sentences[0] == "1 kept, 0 broken and 0 untested."
    assert "1 figure without a limit: what the recordings give away." in found.sentences
    assert found.table is not None
    assert [r[0] for r in found.table.rows] == ["kept", "reported"]


def test_without_an_audit_the_page_says_so_at_its_top() -> None:
    assert any("was not audited" in words for words in page_of([GBT]).notices)


def test_the_page_is_had_as_markdown_and_as_json_too() -> None:
    page = page_of([GBT, THREE, CLOCK, LEAKY])

    text, told = render_markdown(page), json.loads(render_json(page))["result"]

    assert text.startswith("# You would have claimed 0.80; expect 0.69 \\[0.64, 0.73\\] on a new host.")
    assert "on both sides; leaky, and common | 0.80 |" in text
    assert told["claim"]["words"] == page.claim.words
    assert [s["key"] for s in told["sections"]] == [s.key for s in page.sections]


def test_names_from_data_open_nothing_in_markdown() -> None:
    hostile = "<img src=x>[a](b)|c\n# d"
    page = page_of([GBT, row("macro_f1", "gbt", 0.1, sample_name=hostile, profile="p|q")])

    text = render_markdown(page)

    assert "<img" not in text.replace("\\<img", "")
    assert "p\\|q, \\<img src=x\\>\\[a\\](b)\\|c \\# d" in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("https://evil.example/x", r"https\://evil.example/x", id="an address"),
        pytest.param("see www.evil.example", r"see www\.evil.example", id="a place without a scheme"),
        pytest.param("not ~~here~~", r"not \~\~here\~\~", id="words crossed out"),
        pytest.param("at 10:15 / 5 s", "at 10:15 / 5 s", id="no address: left alone"),
    ],
)
def test_a_name_from_data_becomes_no_link_in_markdown(name: str, shown: str) -> None:
    page = page_of([GBT, row("macro_f1", "gbt", 0.1, sample_name=name, profile="p")])

    assert f"| p, {shown} |" in render_markdown(page)
