"""Plots of vectors and signals: every value at its height, on one scale, and nothing for NaN."""

import pytest
import torch

from dkdm.report.grids import as_images, comparison_strip, sample_grid, to_uint8
from dkdm.report.images import PLOT_SCALE, pairs
from dkdm.report.plots import COLOURS, HEIGHT, MARGIN, RULE, WIDTH, is_plotted, plots, value_range

WITHIN = (-1.0, 1.0)


def ink(samples: torch.Tensor, colour=COLOURS[0], within=WITHIN) -> torch.Tensor:
    """Where the first plot has a colour, bool [HEIGHT, WIDTH]."""
    pixels = torch.from_numpy(to_uint8(plots(samples, within))[0]).float()
    return (pixels - torch.tensor(colour, dtype=torch.float32)).abs().amax(2) < 40


def height_of(value: float) -> float:
    """Pixels from the upper edge, of a value in -1..1."""
    return MARGIN + (1 - value) / 2 * (HEIGHT - 2 * MARGIN)


@pytest.mark.parametrize("value", [-1.0, -0.5, 0.25, 1.0])
def test_a_bar_reaches_from_zero_to_its_value(value):
    rows = ink(torch.tensor([[value, 0.0]]))[:, : WIDTH // 2].any(1).nonzero()
    low, high = sorted((height_of(0.0), height_of(value)))
    assert abs(float(rows.min()) - low) <= 1
    assert abs(float(rows.max()) + 1 - high) <= 1


def test_a_line_goes_through_its_values():
    values = torch.linspace(-1, 1, 50)[None, None]
    marked = ink(values)
    for column in (10, WIDTH // 2, WIDTH - 10):
        share = (column - 2) / (WIDTH - 4)
        middle = marked[:, column].nonzero().float().mean()
        assert abs(float(middle) - height_of(2 * share - 1)) < 2


@pytest.mark.parametrize("length", [2, 50, 5000])
def test_each_channel_has_its_colour_and_nothing_is_drawn_of_nan(length):
    values = torch.stack([torch.full((length,), v) for v in (0.5, -0.5, float("nan"))])[None]
    assert ink(values, COLOURS[0])[: HEIGHT // 2].any()
    assert ink(values, COLOURS[1])[HEIGHT // 2 :].any()
    assert not ink(values, COLOURS[2]).any()


def test_a_long_signal_is_a_band_between_its_extremes():
    values = torch.zeros(1, 1, 16_000)
    values[..., 8_000], values[..., 8_001] = 1.0, -1.0
    tallest = ink(values).sum(0)
    assert int(tallest.argmax()) in (WIDTH // 2 - 1, WIDTH // 2)
    assert tallest.max() > HEIGHT - 2 * MARGIN - 3
    assert tallest.median() <= 2


def test_outliers_do_not_set_the_scale_and_zero_is_always_on_it():
    values = torch.linspace(1, 2, 10_000)
    values[0], values[1], values[2] = 1e6, torch.nan, torch.inf
    low, high = value_range(values[:, None])
    assert low == 0
    assert high == pytest.approx(2, rel=0.01)
    assert value_range(torch.full((3, 2), torch.nan)) == (-1, 1)
    assert value_range(torch.zeros(3, 2)) == (-1, 1)


@pytest.mark.parametrize(
    ("shape", "plotted"),
    [((8,), True), ((2, 30), True), ((1, 1, 30), True), ((3, 1, 1), True), ((3, 8, 8), False)],
    ids=str,
)
def test_what_is_plotted_and_what_is_a_picture(shape, plotted):
    samples = torch.randn(3, *shape)
    assert is_plotted(samples) == plotted
    sizes = (3, 3, HEIGHT, WIDTH) if plotted else samples.shape
    assert as_images(samples).shape == sizes


def test_videos_show_their_middle_frame_and_other_samples_nothing():
    videos = torch.randn(2, 3, 5, 8, 8)
    assert torch.equal(as_images(videos), videos[:, :, 2])
    assert sample_grid(torch.randn(2, 3, 2, 2, 2, 2), 10) is None


@pytest.mark.parametrize("shape", [(8,), (2, 30)], ids=str)
def test_a_strip_has_teacher_student_and_their_difference_on_one_scale(shape):
    teacher = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    same = comparison_strip(teacher, teacher)
    assert same.size == (4 * (WIDTH + 1) - 1, 3 * (HEIGHT + 1) - 1)
    rows = [same.crop((0, k * (HEIGHT + 1), same.width, k * (HEIGHT + 1) + HEIGHT)) for k in (0, 1)]
    assert rows[0].tobytes() == rows[1].tobytes()
    last = same.crop((0, 2 * (HEIGHT + 1), WIDTH, same.height)).convert("RGB")
    coloured = {
        y for y in range(HEIGHT) if last.getpixel((WIDTH // 2, y)) not in (RULE, (255,) * 3)
    }
    assert all(abs(y - HEIGHT / 2) < 4 for y in coloured)


def test_a_larger_plot_is_the_same_with_more_pixels():
    samples = torch.linspace(-1, 1, 40).sin()[None, None]
    small, large = plots(samples, WITHIN), plots(samples, WITHIN, scale=2)
    assert large.shape == (1, 3, 2 * HEIGHT, 2 * WIDTH)
    assert torch.nn.functional.avg_pool2d(large, 2).sub(small).abs().max() < 0.02


def test_plots_of_pairs_are_not_averaged_down():
    drawn = torch.linspace(-1, 1, 60)[None, None]
    (pair,) = pairs(drawn, -drawn, [""])
    assert {(each.width, each.height) for each in (pair.first, pair.second)} == {
        (PLOT_SCALE * WIDTH, PLOT_SCALE * HEIGHT)
    }
