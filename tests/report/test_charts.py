"""Figures of the report, checked as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import plotly.graph_objects as go
import pytest

from phasewatch.evaluation.metric_table import ConfusionMatrix
from phasewatch.report import charts
from phasewatch.report.charts import (
    COLOUR_SCALE,
    PHASE_COLOURS,
    HeatMapCell,
    PlotlyFigure,
    RibbonWindow,
    ScoreMark,
    ScoreSeries,
    StageCounts,
    build_cell_text_trace,
    escape_text,
)

SCORES = (
    ScoreMark(label="gbt", value=0.7, low=0.6, high=0.8, words="12 windows"),
    ScoreMark(label="majority", value=0.1),
    ScoreMark(label="never run", value=None),
)
WINDOWS = tuple(
    RibbonWindow(t_s=5.0 + 5 * i, truth=i // 3, decided=(i + 1) // 3 % 5, p=(0.2, 0.2, 0.2, 0.2, 0.2)) for i in range(9)
)


def board() -> PlotlyFigure:
    return charts.draw_intervals([ScoreSeries(name="five phases", scores=SCORES)], title="macro-F1", origin="recorded")


def heat(value: float | None = 0.5) -> PlotlyFigure:
    cells = [HeatMapCell(host_id="a", profile="x", n_episodes=3, value=value)]
    return charts.draw_heat_map(cells, hosts=["a", "b"], profiles=["x"], title="macro-F1", origin="recorded")


def matrix() -> PlotlyFigure:
    return charts.draw_confusion(
        ConfusionMatrix(labels=("clean", "active"), counts=((3, 1), (0, 0))), origin="recorded"
    )


def bands() -> PlotlyFigure:
    return charts.draw_ribbon(WINDOWS, stride_s=5.0, origin="recorded")


def bars() -> PlotlyFigure:
    stages = [StageCounts(stage="validate", counts=(("accepted", 8), ("errored", 2)))]
    return charts.draw_accounting(stages, origin="recorded")


def light(colour: Sequence[float]) -> float:
    """Relative luminance of red, green and blue, 0 to 255: WCAG 2.2."""
    r, g, b = (c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def contrast(ink: str, ground: Sequence[float]) -> float:
    a, b = sorted((light(rgb(ink)), light(ground)))
    return (b + 0.05) / (a + 0.05)


def shade(share: float) -> list[float]:
    """Interpolate the colour of a share on the colour scale."""
    (x0, low), (x1, high) = next((a, b) for a, b in pairwise(COLOUR_SCALE) if share <= float(b[0]))
    k = (share - float(x0)) / (float(x1) - float(x0))
    return [a + (b - a) * k for a, b in zip(rgb(str(low)), rgb(str(high)), strict=True)]


ALL = pytest.mark.parametrize("build", [board, heat, matrix, bands, bars])


@ALL
def test_plotly_accepts_every_property_of_a_figure(build: object) -> None:
    figure = build()  # type: ignore[operator]

    go.Figure(figure)  # raises for an unknown property or value


@ALL
def test_figure_contains_the_origin_of_the_data(build: object) -> None:
    figure = build()  # type: ignore[operator]

    assert "recorded" in figure["layout"]["xaxis"]["title"]["text"]


def test_score_without_interval_has_no_whisker() -> None:
    error = board()["data"][0]["error_x"]

    for ends in (error["array"], error["arrayminus"]):
        assert ends[0] == pytest.approx(0.1)
        with pytest.raises(ValueError):
            float(ends[1])  # Plotly draws every number, and a zero as two caps


def test_second_series_has_its_numbers_below_the_marks() -> None:
    two = [ScoreSeries(name="five phases", scores=SCORES), ScoreSeries(name="three states", scores=SCORES)]

    upper, lower, *_ = charts.draw_intervals(two, title="macro-F1", origin="recorded")["data"]

    assert (upper["textposition"], lower["textposition"]) == ("top center", "bottom center")
    assert upper["y"][0] < lower["y"][0]


@pytest.mark.parametrize("ends", [(0.01, 0.1), (-0.3, -0.1), (-0.2, 0.4)])
def test_axis_of_differences_covers_zero_and_the_interval(ends: tuple[float, float]) -> None:
    gap = ScoreMark(label="a", value=sum(ends) / 2, low=ends[0], high=ends[1])

    figure = charts.draw_intervals([ScoreSeries(name="gap", scores=(gap,))], title="", origin="", is_gap=True)
    left, right = figure["layout"]["xaxis"]["range"]

    assert left < min(0, *ends)
    assert right > max(0, *ends)
    assert right - left < 1.5 * (max(0, *ends) - min(0, *ends))


def test_missing_score_is_labelled_and_not_drawn_as_zero() -> None:
    marks, unknown = board()["data"]

    assert marks["y"] == [0, 1]
    assert (unknown["y"], unknown["text"]) == ([2], ["no value"])


def test_untested_cell_is_hatched_and_has_no_shade() -> None:
    shades, hatch, words = heat()["data"]

    assert shades["z"] == [[0.5], [None]]
    assert (words["x"], words["y"], words["text"]) == ([0], [0], ["0.50"])
    assert all(0.5 < y < 1.5 for y in hatch["y"] if y is not None)
    assert hatch["showlegend"]


def test_heat_map_without_scores_shows_the_number_of_test_episodes() -> None:
    words = heat(value=None)["data"][-1]

    assert words["text"] == ["3"]


def test_phase_without_true_windows_has_counts_but_no_share() -> None:
    squares, words = matrix()["data"]

    assert squares["z"] == [[0.75, 0.25], [None, None]]
    assert words["text"] == ["3", "1", "0", "0"]


@pytest.mark.parametrize("share", [i / 20 for i in range(21)])
def test_cell_text_has_enough_contrast_on_every_shade(share: float) -> None:
    ink = build_cell_text_trace([[share]], [["1"]])["textfont"]["color"][0]

    assert contrast(ink, shade(share)) > 4


def test_numbers_of_every_series_have_enough_contrast_on_white() -> None:
    one = ScoreMark(label="gbt", value=0.5, low=0.4, high=0.6)
    three = [ScoreSeries(name=name, scores=(one,)) for name in ("a", "b", "c")]

    inks = [t["textfont"]["color"] for t in charts.draw_intervals(three, title="macro-F1", origin="recorded")["data"]]

    assert len(inks) == 3
    assert all(contrast(ink, rgb("#ffffff")) >= 4.5 for ink in inks)  # WCAG 2.2, 1.4.3


def test_ribbon_rows_are_true_phase_then_prediction_then_probabilities() -> None:
    figure = bands()
    names = dict(zip(figure["layout"]["yaxis"]["tickvals"], figure["layout"]["yaxis"]["ticktext"], strict=True))

    assert [names[y] for y in sorted(names)][:3] == ["true phase", "predicted", "p(clean)"]
    assert figure["layout"]["yaxis"]["range"][0] > figure["layout"]["yaxis"]["range"][1]


def test_ribbon_legend_has_all_five_phases() -> None:
    shown = [t["name"] for t in bands()["data"] if t.get("showlegend", True) and t["type"] == "scatter"]

    assert shown == ["true phase", "clean", "armed", "infecting", "active", "dormant"]


def test_consecutive_windows_of_a_phase_are_one_line() -> None:
    line = next(t for t in bands()["data"] if t.get("name") == "true phase")

    assert line["x"] == [2.5, 17.5, None, 17.5, 32.5, None, 32.5, 47.5, None]


def test_bundle_statuses_differ_in_hatching() -> None:
    patterns = {t["name"]: t["marker"]["pattern"]["shape"] for t in bars()["data"]}

    assert patterns == {"accepted": "", "errored": "."}


def test_phase_colours_differ_in_lightness() -> None:
    def lightness(colour: str) -> float:
        r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return math.sqrt(0.299 * r * r + 0.587 * g * g + 0.114 * b * b)

    assert len({round(lightness(c), 2) for c in PHASE_COLOURS.values()}) == 5


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("beacon-c2", "beacon-c2", id="plain name"),
        pytest.param("<b>&amp;", "&lt;b&gt;&amp;amp;", id="markup"),
        pytest.param("a\u202eb\n", "a\ufffdb\ufffd", id="control characters"),
        pytest.param("x" * 50, "x" * 43 + "…", id="long name"),
    ],
)
def test_names_from_data_are_escaped_in_figures(name: str, shown: str) -> None:
    assert escape_text(name) == shown
