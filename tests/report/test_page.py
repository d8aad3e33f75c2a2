"""report.html: one file, the same bytes each time, nothing lost when a run is half done, nothing from data run as code."""

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

from phasewatch.errors import RunError
from phasewatch.evaluation.evaluate import evaluate_run
from phasewatch.report.html import (
    MAX_REPORT_BYTES,
    load_plotly_script,
    read_report_data,
    render_script_json,
    write_report,
)

SMALL = Recipe(hosts=("a-host", "b-host", "c-host"), profiles=("benign", "cryptomine", "beacon-c2"), n_windows=12)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_of(make_run(tmp_path_factory.mktemp("run"), SMALL))


def text_of(run: Path) -> str:
    """The page without Plotly's own 4.8 MB."""
    return write_report(run).read_text(encoding="utf-8").replace(load_plotly_script(), "")


def figures_of(text: str) -> dict[str, object]:
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    loaded: dict[str, object] = json.loads(match[1])
    return loaded


def words_of(text: str) -> str:
    body = re.sub(r"<(script|style).*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_the_page_lies_in_the_run_and_is_small_enough_to_mail(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", SMALL))

    assert path == tmp_path / "run" / "report.html"
    assert path.stat().st_size <= MAX_REPORT_BYTES


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    first = write_report(make_run(tmp_path / "one", SMALL)).read_bytes()
    again = write_report(tmp_path / "one").read_bytes()
    elsewhere = write_report(make_run(tmp_path / "two", SMALL)).read_bytes()

    assert first == again == elsewhere
    assert str(tmp_path).encode() not in first
    assert b"2026-11-24" not in first


def test_no_line_ends_inside_an_interval(page: str) -> None:
    cells = re.findall(
        r"\[-?\d[^\[\]<]*\]", re.sub(r"<script.*?</script>|<p class=\"quote\">.*?</p>", "", page, flags=re.DOTALL)
    )

    assert len(cells) > 10
    assert not [cell for cell in cells if " " in cell]


def test_nothing_is_asked_of_any_network(page: str) -> None:
    assert not re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?(?:https?:)?//""", page)
    assert "default-src 'none'" in page


def test_the_headline_and_all_parts_of_the_argument_are_there(page: str) -> None:
    words = words_of(page)

    for part in ("macro-F1 of phase, unseen host, realistic, gbt:", "elapsed time alone", "How sure", "Where it fails",
                 "What it rests on", "How to repeat it", "Untested profiles: dropper-persist"):  # fmt: skip
        assert part in words


def test_coverage_says_why_it_counts_other_profiles_than_the_headline(page: str) -> None:
    words = words_of(page)

    assert "2 of 6 profiles tested, 1 seed)" in words
    assert "3 of 7 profiles tested, benign ones counted too, where the headline counts the malicious ones" in words


def test_every_picture_has_its_numbers_and_its_command(page: str) -> None:
    articles = re.findall(r'<article id="block-([^"]+)">(.*?)</article>', page, re.DOTALL)

    drawn = [(key, body) for key, body in articles if "data-figure" in body]

    assert {key for key, _ in drawn} == set(figures_of(page))
    assert len(drawn) >= 8
    for key, body in drawn:
        assert "<details" in body, key
        assert "phasewatch " in body, key


def test_every_table_can_be_read_without_seeing_it(page: str) -> None:
    tables = re.findall(r'<div class="wide"([^>]*)>\s*<table>(.*?)</table>', page, re.DOTALL)

    assert len(tables) == page.count("<table>") > 10
    for place, body in tables:
        assert re.search(
            r'role="region" aria-label="[^"]+" tabindex="0"', place
        )  # it scrolls, so it is a stop with a name
        rows = re.findall(r"<tr>(.*?)</tr>", body.partition("<tbody>")[2], re.DOTALL)
        assert all(re.match(r'<th[^>]* scope="row">', row) and row.count("<th") == 1 for row in rows)


def test_the_origin_is_said_in_every_picture_and_table(tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path / "run", replace(SMALL, origin="simulated")))

    assert "test episodes are simulated" in text
    assert text.count('<span class="badge">simulated</span>') >= text.count("<details")
    assert all("simulated" in json.dumps(figure) for figure in figures_of(text).values())


def test_the_page_says_so_when_the_model_is_not_above_the_clock(tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path / "run", replace(SMALL, skill=0.05)))

    assert "The model is not above elapsed time" in text


def test_strings_from_data_are_text_in_html_and_in_scripts(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", replace(SMALL, profiles=("benign", HOSTILE), hosts=(HOSTILE, "b", "c"), sample=HOSTILE)
    )

    text = text_of(run)

    assert "<img" not in text
    assert "&lt;/script&gt;&lt;img src=x onerror" in text
    assert text.count("</script>") == text.count("<script")


@pytest.mark.parametrize("hostile", ["</script>", "<!--", "\u2028", "&amp;", "é"])
def test_no_markup_survives_in_the_scripts_data(hostile: str) -> None:
    encoded = render_script_json({"name": hostile})

    assert not re.search(r"[<>&]|[^\x00-\x7f]", encoded)
    assert json.loads(encoded) == {"name": hostile}


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        pytest.param(
            Recipe(hosts=("one",), profiles=("cryptomine",), per_cell=1, agents=("off",)), "There is one host", id="one episode on one host"
        ),
        pytest.param(replace(SMALL, profiles=("cryptomine", "beacon-c2")), "Nothing can be said of", id="no benign episode"),
        pytest.param(replace(SMALL, phases=(0, 3)), "Nothing can be said of armed, infecting and dormant", id="phases never seen"),
        pytest.param(replace(SMALL, agents=("on",)), "No test episode ran without the guest agent", id="agent always on"),
        pytest.param(replace(SMALL, n_windows=1), "How sure", id="one window an episode"),
    ],
)  # fmt: skip
def test_thin_data_is_said_and_the_rest_is_shown(tmp_path: Path, recipe: Recipe, says: str) -> None:
    words = words_of(text_of(make_run(tmp_path / "run", recipe)))

    assert says in words
    assert "How to repeat it" in words


def cut(run: Path) -> None:
    file = run / "predictions_v1.parquet"
    file.write_bytes(file.read_bytes()[:1000])


def forget_a_column(run: Path) -> None:
    file = run / "validation_v1.parquet"
    pq.write_table(pq.read_table(file).drop(["reasons"]), file)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        pytest.param(lambda r: (r / "metrics_v2.json").unlink(), "No claim can be made", id="not evaluated"),
        pytest.param(lambda r: (r / "metrics_v2.json").write_text("{"), "metrics_v2.json could not be read", id="broken metrics"),
        pytest.param(lambda r: (r / "predictions_v1.parquet").unlink(), "predictions_v1.parquet is absent", id="not trained"),
        pytest.param(cut, "predictions_v1.parquet could not be read", id="predictions cut off"),
        pytest.param(forget_a_column, "lacks the column reasons", id="another version's validation"),
        pytest.param(lambda r: (r / "ledger.json").write_text("[]"), "ledger.json could not be read", id="another ledger"),
        pytest.param(lambda r: (r / "feature_schema_v1.json").unlink(), "feature_schema_v1.json is absent", id="no schema"),
        pytest.param(lambda r: next((r / "splits").iterdir()).write_text("{}"), "not a split", id="a broken split"),
    ],
)  # fmt: skip
def test_a_half_done_run_says_what_is_missing_and_shows_the_rest(
    tmp_path: Path, harm: Callable[[Path], object], says: str
) -> None:
    run = make_run(tmp_path / "run", SMALL)
    harm(run)

    words = words_of(text_of(run))

    assert says in words
    assert "What it rests on" in words


@pytest.mark.parametrize(
    ("column", "value"),
    [
        pytest.param("p_clean", float("nan"), id="a probability that is no number"),
        pytest.param("y_pred", 7, id="a decision for a sixth phase"),
        pytest.param("y_true", -1, id="a truth that nobody knows"),
    ],
)
def test_a_model_that_cannot_be_scored_is_said_and_the_page_is_written(
    tmp_path: Path, column: str, value: float
) -> None:
    run = make_run(tmp_path / "run", SMALL)
    table = pq.read_table(run / "predictions_v1.parquet")
    values = pc.if_else(
        pc.equal(table["model"], "gbt"), pa.scalar(value, table.schema.field(column).type), table[column]
    )
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, column, values), run / "predictions_v1.parquet")
    evaluate_run(run, resamples=50)

    words = words_of(text_of(run))

    assert "Gbt (seed 0, fold a-host) is not scored" in words
    assert "What it rests on" in words


def test_without_metrics_no_performance_number_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    (run / "metrics_v2.json").unlink()

    text = text_of(run)

    assert set(figures_of(text)) == {"host-profile", "ribbon-best", "ribbon-median", "ribbon-worst", "ledger"}
    assert 'class="tile' not in text


def test_a_score_of_host_and_profile_goes_into_its_cell(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    document = json.loads((run / "metrics_v2.json").read_text())
    (row,) = (
        r for r in document["metrics"]
        if (r["host_id"], r["profile"], r["model"], r["agent"]) == ("a-host", "benign", "gbt", "off")
        and r["metric"] == "macro_f1" and r["fold"] == "pooled"
    )  # fmt: skip
    row["value"] = 0.42
    (run / "metrics_v2.json").write_text(json.dumps(document))

    cells = figures_of(text_of(run))["host-profile"]["data"][-1]  # type: ignore[index]

    assert "0.42" in cells["text"]


def test_metrics_of_other_predictions_are_called_stale(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    table = pq.read_table(run / "predictions_v1.parquet")
    pq.write_table(table.slice(0, table.num_rows - 1), run / "predictions_v1.parquet")

    assert "metrics_v2.json was computed from another predictions_v1.parquet" in text_of(run)


def test_metrics_of_other_splits_are_called_stale(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    assert "was computed from" not in text_of(run)
    first, second, *_ = sorted((run / "splits").iterdir())
    first.write_bytes(second.read_bytes())

    assert f"metrics_v2.json was computed from other splits (1, splits/{first.name} is the first)" in text_of(run)


def test_a_ledger_that_does_not_balance_is_called_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SMALL)
    (run / "ledger.json").write_text(json.dumps({"stages": {"validate": {"in": 9, "accepted": 5, "errored": 1}}}))

    assert "validate does not balance: 9 went in, 6 = 5 accepted + 1 errored came out." in text_of(run)


def test_where_there_is_nothing_at_all_the_error_says_how_to_make_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="phasewatch run STORE --out") as caught:
        write_report(tmp_path)
    with pytest.raises(RunError, match="no such run"):
        read_report_data(tmp_path / "absent")

    assert caught.value.exit_code == 3
    assert not (tmp_path / "report.html").exists()
