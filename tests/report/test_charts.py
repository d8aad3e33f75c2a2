"""Figures of the report, read back from their SVG."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from xml.etree import ElementTree

import pytest

from phasewatch.evaluation.metric_table import ConfusionMatrix
from phasewatch.report import charts
from phasewatch.report.charts import (
    DARK_TEXT_FROM,
    LIGHT_TEXT_FROM,
    NARROW,
    WIDE,
    HeatMapCell,
    RibbonWindow,
    ScoreMark,
    ScoreSeries,
    StageCounts,
    SvgFigure,
)
from phasewatch.report.svg import SvgCanvas, clip_text, measure_text, wrap_text

SCORES = (
    ScoreMark(label="gbt", value=0.7, low=0.6, high=0.8, words="12 windows"),
    ScoreMark(label="majority", value=0.1),
    ScoreMark(label="never run", value=None),
)
WINDOWS = tuple(
    RibbonWindow(t_s=5.0 + 5 * i, truth=i // 3, decided=(i + 1) // 3 % 5, p=(0.2, 0.2, 0.2, 0.2, 0.2)) for i in range(9)
)
HOSTILE = '<script>"&\u202e'


def draw_board(*names: str) -> SvgFigure:
    series = [ScoreSeries(name=name, scores=SCORES) for name in names or ("five phases",)]
    return charts.draw_intervals(series, title="macro-F1", origin="recorded")


def draw_heat(value: float | None = 0.5, name: str = "x") -> SvgFigure:
    cells = [HeatMapCell(host_id="a", profile=name, n_episodes=3, value=value)]
    return charts.draw_heat_map(cells, hosts=["a", "b"], profiles=[name], title="macro-F1", origin="recorded")


def draw_matrix() -> SvgFigure:
    matrix = ConfusionMatrix(labels=("clean", "active"), counts=((3, 1), (0, 0)))
    return charts.draw_confusion(matrix, origin="recorded")


def draw_bands() -> SvgFigure:
    return charts.draw_ribbon(WINDOWS, stride_s=5.0, origin="recorded")


def draw_bars() -> SvgFigure:
    stages = [StageCounts(stage="validate", counts=(("accepted", 8), ("errored", 2)))]
    return charts.draw_accounting(stages, origin="recorded")


def draw_line() -> SvgFigure:
    line = charts.CurveLine(
        name="infection", points=((0.25, 0.5, "a"), (0.5, None, "b"), (1.0, 0.8, "c"), (2.0, 0.9, "d"))
    )
    return charts.draw_curve([line], x="budget", y="recall", origin="recorded")


def draw_diagonal() -> SvgFigure:
    return charts.draw_reliability(SCORES, [0.3, 0.6, 0.9], origin="recorded")


ALL = pytest.mark.parametrize(
    "draw", [draw_board, draw_heat, draw_matrix, draw_bands, draw_bars, draw_line, draw_diagonal]
)


def parse(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in parse(picture).iter("text")]


def titles(picture: str) -> list[str]:
    return [element.text or "" for element in parse(picture).iter("title")]


def find(picture: str, tag: str, name: str) -> list[ElementTree.Element]:
    """Return the elements of a tag that have a class."""
    return [e for e in parse(picture).iter(tag) if name in (e.get("class") or "").split()]


@ALL
@pytest.mark.parametrize(("width", "of"), [(WIDE, "wide"), (NARROW, "narrow")])
def test_texts_and_shapes_stay_inside_the_picture(draw: Callable[[], SvgFigure], width: int, of: str) -> None:
    picture = parse(getattr(draw(), of))
    height = float((picture.get("viewBox") or "").split()[3])

    for text in picture.iter("text"):
        x, size = float(text.get("x") or 0), measure_text(text.text or "", 11)
        left = x - {"start": 0, "middle": size / 2, "end": size}[text.get("text-anchor") or "start"]
        assert left >= -4 or text.get("transform"), text.text
        assert left + size <= width + 4 or text.get("transform"), text.text
        assert 0 < float(text.get("y") or 0) <= height
    for shape in picture.iter("rect"):
        assert float(shape.get("x") or 0) + float(shape.get("width") or 0) <= width
        assert float(shape.get("y") or 0) + float(shape.get("height") or 0) <= height


@ALL
def test_figure_contains_the_origin_of_the_data(draw: Callable[[], SvgFigure]) -> None:
    figure = draw()

    assert any("recorded" in text for text in texts(figure.wide))
    assert any("recorded" in text for text in texts(figure.narrow))


@ALL
def test_figure_has_the_same_bytes_each_time(draw: Callable[[], SvgFigure]) -> None:
    assert draw() == draw()


def test_score_without_interval_has_no_whisker() -> None:
    gbt, majority = (find(draw_one(mark).wide, "polyline", "line") for mark in SCORES[:2])

    assert (len(gbt), len(majority)) == (3, 0)  # interval and its two ends


def draw_one(mark: ScoreMark) -> SvgFigure:
    return charts.draw_intervals([ScoreSeries(name="a", scores=(mark,))], title="macro-F1", origin="")


def test_interval_is_drawn_to_scale() -> None:
    (interval, *_) = find(draw_one(SCORES[0]).wide, "polyline", "line")
    low, high = (float(point.split(",")[0]) for point in (interval.get("points") or "").split())
    rules = [r.get("points") or "" for r in find(draw_one(SCORES[0]).wide, "polyline", "rule")]
    zero, one = (float(rules[i].split(",")[0]) for i in (0, -1))

    assert (low - zero) / (one - zero) == pytest.approx(0.6, abs=0.002)
    assert (high - zero) / (one - zero) == pytest.approx(0.8, abs=0.002)


def test_numbers_stand_beside_the_marks_and_a_missing_one_is_named() -> None:
    shown = texts(draw_board().wide)

    assert "0.70 [0.60, 0.80]" in shown
    assert "0.10" in shown
    assert "no value" in shown
    assert len(find(draw_board().wide, "circle", "mark")) == 2


@pytest.mark.parametrize("ends", [(0.01, 0.1), (-0.3, -0.1), (-0.2, 0.4)])
def test_axis_of_differences_covers_zero_and_the_interval(ends: tuple[float, float]) -> None:
    mark = ScoreMark(label="a", value=sum(ends) / 2, low=ends[0], high=ends[1])
    figure = charts.draw_intervals([ScoreSeries(name="gap", scores=(mark,))], title="", origin="", is_gap=True)

    (zero,) = find(figure.wide, "polyline", "strong")
    at = float((zero.get("points") or "").split(",")[0])
    (interval, *_) = find(figure.wide, "polyline", "line")
    low, high = (float(point.split(",")[0]) for point in (interval.get("points") or "").split())

    assert (low < at) == (ends[0] < 0)
    assert (high < at) == (ends[1] < 0)
    assert high - low > WIDE / 4


def test_gap_in_a_curve_is_not_bridged() -> None:
    lines = find(draw_line().wide, "polyline", "line")

    assert [len((line.get("points") or "").split()) for line in lines] == [2]
    assert titles(draw_line().wide) == ["infection: a", "infection: c", "infection: d"]


def test_untested_cell_is_hatched_and_has_no_shade() -> None:
    figure = draw_heat().wide

    assert len(find(figure, "rect", "hatch-slash")) == 2  # the cell and the legend
    assert "x on b: untested" in titles(figure)
    assert "x on a: 0.50 (3 episodes)" in titles(figure)


def test_heat_map_without_scores_shows_the_number_of_test_episodes() -> None:
    assert "3" in texts(draw_heat(value=None).wide)


def test_phone_has_the_longer_side_of_a_heat_map_down_the_page() -> None:
    profiles = [f"profile-{i}" for i in range(12)]
    cells = [HeatMapCell(host_id="a", profile=p, n_episodes=1, value=0.5) for p in profiles]

    figure = charts.draw_heat_map(cells, hosts=["a", "b"], profiles=profiles, title="macro-F1", origin="recorded")

    assert len({t.get("y") for t in parse(figure.narrow).iter("text") if (t.text or "").startswith("profile-")}) == 12
    assert any(text.startswith("host ·") for text in texts(figure.narrow))


def test_confusion_matrix_has_counts_and_shares_of_the_true_phase() -> None:
    figure = draw_matrix().wide

    assert [t for t in texts(figure) if t.isdigit()] == ["0", "1", "3", "1", "0", "0"]  # the scale, then the cells
    assert "true clean, predicted active: 1 of 4 windows" in titles(figure)


def test_ribbon_has_truth_prediction_and_five_probabilities() -> None:
    figure = draw_bands().wide
    names = [text for text in texts(figure) if text in ("true phase", "predicted") or text.startswith("p(")]

    assert names == ["true phase", "predicted", "p(clean)", "p(armed)", "p(infecting)", "p(active)", "p(dormant)"]
    assert "5 to 15 s, true phase: clean" in titles(figure)
    assert len(find(figure, "rect", "frame")) == 3


def test_bundle_statuses_differ_in_hatching() -> None:
    figure = draw_bars().wide

    assert titles(figure) == ["validate: 8 accepted", "validate: 2 errored", "validate: 2 errored"]
    assert len(find(figure, "rect", "hatch-dots")) == 2


@ALL
def test_names_from_data_are_escaped(draw: Callable[[], SvgFigure]) -> None:
    assert "<script" not in draw().wide
    figure = draw_heat(name=HOSTILE)

    for picture in (figure.wide, figure.narrow):
        assert '<script>"&\ufffd' in texts(picture)
        assert "&lt;script&gt;" in picture


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("beacon-c2", "beacon-c2", id="plain name"),
        pytest.param("a\u202eb\n", "a\ufffdb\ufffd", id="control characters"),
        pytest.param("x" * 50, "x" * 43 + "…", id="long name"),
    ],
)
def test_names_are_shortened_and_printable(name: str, shown: str) -> None:
    assert clip_text(name, 44) == shown


def test_text_is_wrapped_at_spaces() -> None:
    assert wrap_text("one two three", measure_text("one two")) == ["one two", "three"]


def test_classes_are_attributes_and_hidden_from_screen_readers() -> None:
    canvas = SvgCanvas(100)
    canvas.add_text(0, 10, "a<b", "ink small")

    picture = parse(canvas.render(20, "wide-figure"))

    assert picture.get("aria-hidden") == "true"
    assert [(t.get("class"), t.text) for t in picture] == [("ink small", "a<b")]


def read_theme(theme: str) -> dict[str, str]:
    """Return the colour variables of a theme from the style sheet."""
    style = (resources.files("phasewatch.report") / "templates" / "style.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    variables = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", light))
    return variables | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", dark)) if theme == "dark" else variables


def parse_colour(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def compute_luminance(colour: list[float]) -> float:
    """Return the relative luminance of red, green and blue, 0 to 255: WCAG 2.2."""
    r, g, b = (c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def compute_contrast(one: list[float], other: list[float]) -> float:
    a, b = sorted((compute_luminance(one), compute_luminance(other)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_series_have_enough_contrast_in_both_themes(theme: str) -> None:
    colours = read_theme(theme)
    paper = parse_colour(colours["paper"])

    low = {
        name: round(compute_contrast(parse_colour(colours[name]), paper), 2)
        for name in ("ink", "muted", "blue", "warn", *(f"s{k}" for k in range(6)))
        if compute_contrast(parse_colour(colours[name]), paper) < 4.5
    }

    assert low == {}  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("shade", [i / 20 for i in range(21)])
def test_cell_text_has_enough_contrast_on_every_shade(theme: str, shade: float) -> None:
    colours = {name: parse_colour(colour) for name, colour in read_theme(theme).items()}
    cell = [h * shade + p * (1 - shade) for h, p in zip(colours["heat"], colours["soft"], strict=True)]
    ink = "on-high" if shade >= LIGHT_TEXT_FROM else "on-middle" if shade >= DARK_TEXT_FROM else "ink"

    assert compute_contrast(colours[ink], cell) > 3.5
