"""report.html is self-contained and deterministic, handles unfinished runs, and escapes strings from data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.factories.report_runs import HOSTILE, Recipe, make_run

from phasewatch.artifacts import ACCOUNTING_FILE, FEATURE_SCHEMA_FILE, METRICS_FILE, PREDICTIONS_FILE
from phasewatch.errors import RunError
from phasewatch.evaluation.evaluate import evaluate_run
from phasewatch.report.html import (
    MAX_REPORT_BYTES,
    read_report_data,
    write_report,
)

SECTIONS = ["rings", "fails", "sure", "inflation", "trust", "looks", "grounds", "repeat"]
SMALL = Recipe(hosts=("a-host", "b-host", "c-host"), profiles=("benign", "cryptomine", "beacon-c2"), n_windows=12)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_of(make_run(tmp_path_factory.mktemp("run"), SMALL))


def text_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def figures_of(text: str) -> dict[str, str]:
    """Return the wide picture of each figure, by the key of its block."""
    found = re.findall(r'id="figure-([^"]+)"[^>]*>(<svg class="wide-figure".*?</svg>)', text, re.DOTALL)
    return dict(found)


def words_of(text: str) -> str:
    body = re.sub(r"<(script|style).*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_report_is_written_to_the_run_and_fits_a_mail(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", SMALL))

    assert path == tmp_path / "run" / "report.html"
    assert path.stat().st_size <= MAX_REPORT_BYTES


def test_same_run_gives_the_same_bytes_in_any_folder(tmp_path: Path) -> None:
    first = write_report(make_run(tmp_path / "one", SMALL)).read_bytes()
    again = write_report(tmp_path / "one").read_bytes()
    elsewhere = write_report(make_run(tmp_path / "two", SMALL)).read_bytes()

    assert first == again == elsewhere
    assert str(tmp_path).encode() not in first
    assert b"2026-11-24" not in first


def test_intervals_do_not_break_across_lines(page: str) -> None:
    cells = re.findall(
        r"\[-?\d[^\[\]<]*\]",
        re.sub(r"<script.*?</script>|<svg.*?</svg>|<p class=\"quote\">.*?</p>", "", page, flags=re.DOTALL),
    )

    assert len(cells) > 10
    assert not [cell for cell in cells if " " in cell]


def test_page_makes_no_network_requests(page: str) -> None:
    assert not re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?(?:https?:)?//""", page)
    assert "default-src 'none'" in page


def test_page_has_the_headline_and_all_sections(page: str) -> None:
    words = words_of(page)

    assert "infections alarmed within 30 s, unseen host" in words
    assert "elapsed time alone" in words
    assert "Untested profiles: dropper-persist" in words
    assert re.findall(r'<section id="([^"]+)">', page) == SECTIONS


def test_coverage_counts_benign_profiles_and_the_headline_does_not(page: str) -> None:
    words = words_of(page)

    assert "2 of 6 profiles, 1 seed)" in words
    assert "3 of 7 profiles tested, including benign ones" in words


def test_every_figure_has_a_table_and_a_command(page: str) -> None:
    articles = re.findall(r'<article id="block-([^"]+)">(.*?)</article>', page, re.DOTALL)

    drawn = [(key, body) for key, body in articles if 'class="figure"' in body]

    assert {key for key, _ in drawn} == set(figures_of(page))
    assert len(drawn) >= 8
    for key, body in drawn:
        assert "<details" in body, key
        assert "phasewatch " in body, key


def test_every_figure_is_drawn_for_desktops_and_for_phones(page: str) -> None:
    assert page.count('<svg class="wide-figure"') == page.count('<svg class="narrow-figure"') == len(figures_of(page))


def test_page_needs_no_script_for_its_figures(page: str) -> None:
    assert page.count("<script") == 1
    assert "Plotly" not in page


def test_first_page_says_what_was_tested(page: str) -> None:
    facts = words_of(page.partition('<dl class="facts">')[2].partition("</dl>")[0])

    assert "3 hosts: a-host, b-host, c-host" in facts
    assert "VM-hours, recorded" in facts
    assert "digest of metrics_v3.json" in facts


def test_every_table_is_accessible_to_screen_readers(page: str) -> None:
    tables = re.findall(r'<div class="wide"([^>]*)>\s*<table>(.*?)</table>', page, re.DOTALL)

    assert len(tables) == page.count("<table>") > 10
    for place, body in tables:
        assert re.search(
            r'role="region" aria-label="[^"]+" tabindex="0"', place
        )  # a scrolling region needs a focus stop and a name
        rows = re.findall(r"<tr>(.*?)</tr>", body.partition("<tbody>")[2], re.DOTALL)
        assert all(re.match(r'<th[^>]* scope="row">', row) and row.count("<th") == 1 for row in rows)


def test_every_figure_and_table_shows_the_origin(tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path / "run", replace(SMALL, origin="simulated")))

    assert "test episodes are simulated" in text
    assert text.count('<span class="badge">simulated</span>') >= text.count("<details")
    assert all("simulated" in figure for figure in figures_of(text).values())


def test_headline_of_a_bad_model_is_not_above_elapsed_time(tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path / "run", replace(SMALL, skill=0.05)))

    assert "The model is not above the elapsed-time baseline" in text
    assert 'class="verdict doubt"' in text


def test_strings_from_data_are_escaped_in_html_and_in_scripts(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", replace(SMALL, profiles=("benign", HOSTILE), hosts=(HOSTILE, "b", "c"), sample=HOSTILE)
    )

    text = text_of(run)

    assert "<img" not in text
    assert "&lt;/script&gt;&lt;img src=x onerror" in text
    assert text.count("</script>") == text.count("<script")


@pytest.mark.parametrize(
    ("recipe", "notice"),
    [
        pytest.param(
            Recipe(hosts=("one",), profiles=("cryptomine",), per_cell=1, agents=("off",)),
            "one host (one)",
            id="one episode on one host",
        ),
        pytest.param(replace(SMALL, profiles=("cryptomine", "beacon-c2")), "No score for", id="no benign episode"),
        pytest.param(
            replace(SMALL, phases=(0, 3)), "No score for armed, infecting and dormant", id="phases without windows"
        ),
        pytest.param(
            replace(SMALL, agents=("on",)), "All test episodes ran with the guest agent", id="agent always on"
        ),
        pytest.param(replace(SMALL, n_windows=1), "Model comparison", id="one window per episode"),
    ],
)
def test_page_reports_thin_data_and_shows_the_rest(tmp_path: Path, recipe: Recipe, notice: str) -> None:
    text = text_of(make_run(tmp_path / "run", recipe))

    assert notice in words_of(text)
    assert '<section id="repeat">' in text


def truncate_predictions(run: Path) -> None:
    file = run / "predictions_v1.parquet"
    file.write_bytes(file.read_bytes()[:1000])


def drop_a_column(run: Path) -> None:
    file = run / "validation_v1.parquet"
    pq.write_table(pq.read_table(file).drop(["reasons"]), file)


@pytest.mark.parametrize(
    ("damage", "notice"),
    [
        pytest.param(lambda r: (r / METRICS_FILE).unlink(), f"{METRICS_FILE} is missing", id="not evaluated"),
        pytest.param(lambda r: (r / METRICS_FILE).write_text("{"), f"{METRICS_FILE} could not", id="broken metrics"),
        pytest.param(lambda r: (r / PREDICTIONS_FILE).unlink(), f"{PREDICTIONS_FILE} is missing", id="not trained"),
        pytest.param(truncate_predictions, f"{PREDICTIONS_FILE} could not", id="truncated predictions"),
        pytest.param(drop_a_column, "missing column reasons", id="validation without a column"),
        pytest.param(lambda r: (r / ACCOUNTING_FILE).write_text("[]"), f"{ACCOUNTING_FILE} could not", id="accounting"),
        pytest.param(lambda r: (r / FEATURE_SCHEMA_FILE).unlink(), f"{FEATURE_SCHEMA_FILE} is missing", id="no schema"),
        pytest.param(lambda r: next((r / "splits").iterdir()).write_text("{}"), "not a split", id="broken split"),
    ],
)
def test_page_of_an_unfinished_run_lists_what_is_missing_and_shows_the_rest(
    tmp_path: Path, damage: Callable[[Path], object], notice: str
) -> None:
    run = make_run(tmp_path / "run", SMALL)
    damage(run)

    text = text_of(run)

    assert notice in words_of(text)
    assert re.findall(r'<section id="([^"]+)">', text) == SECTIONS


@pytest.mark.parametrize(
    ("column", "value"),
    [
        pytest.param("p_clean", float("nan"), id="non-finite probability"),
        pytest.param("y_pred", 7, id="invalid predicted phase"),
        pytest.param("y_true", -1, id="unknown true phase"),
    ],
)
def test_page_is_written_for_a_model_without_scores(tmp_path: Path, column: str, value: float) -> None:
    run = make_run(tmp_path / "run", SMALL)
    table = pq.read_table(run / "predictions_v1.parquet")
    values = pc.if_else(
        pc.equal(table["model"], "gbt"), pa.scalar(value, table.schema.field(column).type), table[column]
    )
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, column, values), run / "predictions_v1.parquet")
    evaluate_run(run, resamples=50)

    text = text_of(run)

    assert "(seed 0, fold a-host)" in words_of(text)  # the note of the evaluation
    assert re.findall(r'<section id="([^"]+)">', text) == SECTIONS


def test_without_metrics_no_performance_number_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    (run / "metrics_v3.json").unlink()

    text = text_of(run)

    assert set(figures_of(text)) == {"host-profile", "ribbon-best", "ribbon-median", "ribbon-worst", "ledger"}
    assert 'class="tile' not in text


def test_heat_map_cell_shows_the_score_of_its_host_and_profile(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    document = json.loads((run / "metrics_v3.json").read_text())
    (row,) = (
        r
        for r in document["metrics"]
        if (r["host_id"], r["profile"], r["model"], r["agent"]) == ("a-host", "benign", "gbt", "off")
        and r["metric"] == "macro_f1"
        and r["fold"] == "pooled"
    )
    row["value"] = 0.42
    (run / "metrics_v3.json").write_text(json.dumps(document))

    figure = figures_of(text_of(run))["host-profile"]

    assert "<title>benign on a-host: 0.42 " in figure
    assert ">0.42</text>" in figure


def test_metrics_of_other_predictions_are_reported_as_stale(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    table = pq.read_table(run / "predictions_v1.parquet")
    pq.write_table(table.slice(0, table.num_rows - 1), run / "predictions_v1.parquet")

    assert "metrics_v3.json was computed from another version of predictions_v1.parquet" in text_of(run)


def test_metrics_of_other_splits_are_reported_as_stale(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    assert "was computed from" not in text_of(run)
    first, second, *_ = sorted((run / "splits").iterdir())
    first.write_bytes(second.read_bytes())

    assert f"metrics_v3.json was computed from other versions of 1 split (first: splits/{first.name})" in text_of(run)


def test_accounting_that_does_not_balance_is_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    (run / "ledger.json").write_text(json.dumps({"stages": {"validate": {"in": 9, "accepted": 5, "errored": 1}}}))

    assert "validate does not balance: 9 bundles in, 6 counted (5 accepted + 1 errored)." in text_of(run)


def test_error_for_a_folder_without_a_run_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="phasewatch run STORE --out") as caught:
        write_report(tmp_path)
    with pytest.raises(RunError, match="there is no such folder"):
        read_report_data(tmp_path / "absent")

    assert caught.value.exit_code == 3
    assert not (tmp_path / "report.html").exists()
