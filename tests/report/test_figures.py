"""Pictures are plain values: what a reader must see in them, whatever the numbers are."""

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
    """The colour of a share between the two stops beside it."""
    (x0, low), (x1, high) = next((a, b) for a, b in pairwise(COLOUR_SCALE) if share <= float(b[0]))
    k = (share - float(x0)) / (float(x1) - float(x0))
    return [a + (b - a) * k for a, b in zip(rgb(str(low)), rgb(str(high)), strict=True)]


ALL = pytest.mark.parametrize("build", [board, heat, matrix, bands, bars])


@ALL
def test_plotly_knows_every_property_that_a_picture_sets(build: object) -> None:
    figure = build()  # type: ignore[operator]

    go.Figure(figure)  # raises on a property or value that it does not know


@ALL
def test_a_picture_says_its_origin_wherever_it_is_copied(build: object) -> None:
    figure = build()  # type: ignore[operator]

    assert "recorded" in figure["layout"]["xaxis"]["title"]["text"]


def test_a_score_without_interval_has_no_whisker() -> None:
    error = board()["data"][0]["error_x"]

    for ends in (error["array"], error["arrayminus"]):
        assert ends[0] == pytest.approx(0.1)
        with pytest.raises(ValueError):
            float(ends[1])  # Plotly draws every number, and a zero as two caps


def test_of_two_rows_the_lower_has_its_numbers_below_where_no_whisker_runs() -> None:
    two = [ScoreSeries(name="five phases", scores=SCORES), ScoreSeries(name="three states", scores=SCORES)]

    upper, lower, *_ = charts.draw_intervals(two, title="macro-F1", origin="recorded")["data"]

    assert (upper["textposition"], lower["textposition"]) == ("top center", "bottom center")
    assert upper["y"][0] < lower["y"][0]


@pytest.mark.parametrize("ends", [(0.01, 0.1), (-0.3, -0.1), (-0.2, 0.4)])
def test_a_picture_of_gaps_shows_zero_and_every_end_and_little_else(ends: tuple[float, float]) -> None:
    gap = ScoreMark(label="a", value=sum(ends) / 2, low=ends[0], high=ends[1])

    figure = charts.draw_intervals([ScoreSeries(name="gap", scores=(gap,))], title="", origin="", is_gap=True)
    left, right = figure["layout"]["xaxis"]["range"]

    assert left < min(0, *ends)
    assert right > max(0, *ends)
    assert right - left < 1.5 * (max(0, *ends) - min(0, *ends))


def test_a_score_that_was_not_measured_is_a_line_that_says_so_not_a_zero() -> None:
    marks, unknown = board()["data"]

    assert marks["y"] == [0, 1]
    assert (unknown["y"], unknown["text"]) == ([2], ["no number"])


def test_an_untested_cell_is_hatched_and_has_no_shade() -> None:
    shades, hatch, words = heat()["data"]

    assert shades["z"] == [[0.5], [None]]
    assert (words["x"], words["y"], words["text"]) == ([0], [0], ["0.50"])
    assert all(0.5 < y < 1.5 for y in hatch["y"] if y is not None)
    assert hatch["showlegend"]


def test_without_scores_the_map_shows_how_many_episodes_were_tested() -> None:
    words = heat(value=None)["data"][-1]

    assert words["text"] == ["3"]


def test_a_phase_without_true_windows_has_counts_but_no_share() -> None:
    squares, words = matrix()["data"]

    assert squares["z"] == [[0.75, 0.25], [None, None]]
    assert words["text"] == ["3", "1", "0", "0"]


@pytest.mark.parametrize("share", [i / 20 for i in range(21)])
def test_a_number_can_be_read_on_every_shade(share: float) -> None:
    ink = build_cell_text_trace([[share]], [["1"]])["textfont"]["color"][0]

    assert contrast(ink, shade(share)) > 4


def test_the_small_numbers_of_every_series_can_be_read_on_white() -> None:
    one = ScoreMark(label="gbt", value=0.5, low=0.4, high=0.6)
    three = [ScoreSeries(name=name, scores=(one,)) for name in ("a", "b", "c")]

    inks = [t["textfont"]["color"] for t in charts.draw_intervals(three, title="macro-F1", origin="recorded")["data"]]

    assert len(inks) == 3
    assert all(contrast(ink, rgb("#ffffff")) >= 4.5 for ink in inks)  # WCAG 2.2, 1.4.3


def test_truth_stands_above_the_decision_and_both_above_the_probabilities() -> None:
    figure = bands()
    names = dict(zip(figure["layout"]["yaxis"]["tickvals"], figure["layout"]["yaxis"]["ticktext"], strict=True))

    assert [names[y] for y in sorted(names)][:3] == ["truth", "decided", "p(clean)"]
    assert figure["layout"]["yaxis"]["range"][0] > figure["layout"]["yaxis"]["range"][1]


def test_a_ribbon_names_all_five_phases_also_those_that_it_lacks() -> None:
    shown = [t["name"] for t in bands()["data"] if t.get("showlegend", True) and t["type"] == "scatter"]

    assert shown == ["truth", "clean", "armed", "infecting", "active", "dormant"]


def test_the_true_phase_is_one_line_while_it_lasts() -> None:
    line = next(t for t in bands()["data"] if t.get("name") == "truth")

    assert line["x"] == [2.5, 17.5, None, 17.5, 32.5, None, 32.5, 47.5, None]


def test_every_status_has_a_hatching_or_a_place_of_its_own() -> None:
    patterns = {t["name"]: t["marker"]["pattern"]["shape"] for t in bars()["data"]}

    assert patterns == {"accepted": "", "errored": "."}


def test_phases_differ_in_lightness_as_well_as_in_hue() -> None:
    def lightness(colour: str) -> float:
        r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return math.sqrt(0.299 * r * r + 0.587 * g * g + 0.114 * b * b)

    assert len({round(lightness(c), 2) for c in PHASE_COLOURS.values()}) == 5


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("beacon-c2", "beacon-c2", id="a plain name stays"),
        pytest.param("<b>&amp;", "&lt;b&gt;&amp;amp;", id="markup that Plotly reads becomes text"),
        pytest.param("a\u202eb\n", "a\ufffdb\ufffd", id="characters that turn or break the line are replaced"),
        pytest.param("x" * 50, "x" * 43 + "…", id="a long name is clipped"),
    ],
)
def test_names_from_data_are_harmless_in_a_picture(name: str, shown: str) -> None:
    assert escape_text(name) == shown
