"""Charts: what lies where, and that nothing in them can be mistaken for markup."""

import xml.etree.ElementTree as ElementTree

import pytest

from dkdm.report.charts import (
    Series,
    bin_means,
    line_chart,
    linear_ticks,
    log_ticks,
)


def drawn(*series: Series):
    chart = line_chart("A title", series, "x", "y")
    assert chart is not None
    return ElementTree.fromstring(chart)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (10, 3000, [1000, 2000, 3000]),
        (0.05, 0.95, [0.2, 0.4, 0.6, 0.8]),
        (7, 7, [7]),
    ],
)
def test_ticks_are_round_and_inside(low, high, ticks):
    assert linear_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.012, 0.6, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]),
        (1, 1, [1, 1.5]),
        (3e-5, 0.9, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]),
        (0.2, 0.8, [0.2, 0.5, 1]),
        (25, 37.5, [20, 30, 40]),
    ],
)
def test_logarithmic_ticks_enclose_the_values(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_a_smaller_value_lies_lower_and_a_later_one_further_right():
    chart = drawn(Series("loss", [(0, 1.0), (5, 0.1), (10, 0.01)], "student", markers=True))
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in chart.iter("circle")]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert places[1][1] - places[0][1] == pytest.approx(places[2][1] - places[1][1])
    assert places[0][1] < places[2][1]
    assert next(chart.iter("circle")).find("title").text == "loss: 1 at x 0"


def test_values_without_a_logarithm_are_left_out():
    bad = [(1, 0.0), (2, -1.0), (3, float("nan")), (4, float("inf"))]
    chart = drawn(Series("a", [*bad, (5, 2.0)], "student", markers=True))
    assert len(list(chart.iter("circle"))) == 1
    assert line_chart("A title", [Series("a", bad, "student")], "x", "y") is None


def test_texts_are_escaped():
    series = Series("<b>&", [(0, 1.0), (1, 2.0)], "student", markers=True)
    chart = line_chart('"><script>', [series], "<x>", "<y>")
    assert not list(ElementTree.fromstring(chart).iter("script"))
    assert "<b>" not in chart


def test_neighbours_are_averaged():
    assert bin_means([(0, 1.0), (2, 3.0), (4, 10.0)], bins=2) == [(1, 2.0), (4, 10.0)]
    assert bin_means([(0, 1.0)], bins=5) == [(0, 1.0)]
    assert bin_means([], bins=5) == []


def test_a_chart_of_its_own_has_size_colours_and_legend():
    series = [Series("a & b", [(1, 1), (2, 3)], "first"), Series("c", [(1, 2)], "second")]
    colours = {"first": "#123", "second": "#456"}
    text = line_chart("A title", series, "x", "y", colours)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width") == "824"
    assert {"a & b", "c"} <= {node.text for node in root.iter()}
    assert ".line.first{stroke:#123}" in text
    assert ".line.second{stroke:#456}" in text and len(list(drawn(*series).iter("style"))) == 0
