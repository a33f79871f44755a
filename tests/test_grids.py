"""Pixels, grids and differences against values worked out by hand."""

import base64
import io

import pytest
import torch
from PIL import Image

from dkdm.report.grids import HEAT, comparison_strip, difference, grid, png_data_uri, to_uint8


def constant(value: float, channels: int = 1, count: int = 1, size: int = 2) -> torch.Tensor:
    return torch.full((count, channels, size, size), value)


@pytest.mark.parametrize(
    ("value", "pixel"), [(-1, 0), (0, 128), (1, 255), (-7, 0), (7, 255), (float("nan"), 0)]
)
def test_the_range_maps_to_bytes(value, pixel):
    assert to_uint8(constant(value)).flatten().tolist() == [pixel] * 4


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (16, 3)])
def test_the_first_channels_are_shown(channels, shown):
    values = torch.linspace(-1, 1, channels).reshape(1, channels, 1, 1)
    pixels = to_uint8(values.expand(2, -1, 4, 5))
    assert pixels.shape == (2, 4, 5, shown)
    assert (pixels[0, 0, 0] == to_uint8(values)[0, 0, 0]).all()


def test_a_grid_places_each_image_and_leaves_the_gaps_transparent():
    images = torch.stack([constant(v)[0] for v in (-1.0, 0.0, 1.0)])
    picture = grid(images, columns=2, gap=1)
    assert (picture.mode, picture.size) == ("LA", (5, 5))
    assert [picture.getpixel(place) for place in [(0, 0), (3, 1), (1, 4)]] == [
        (0, 255),
        (128, 255),
        (255, 255),
    ]
    assert [picture.getpixel(place)[1] for place in [(2, 0), (0, 2), (4, 4)]] == [0, 0, 0]


def test_a_grid_is_enlarged_without_blurring():
    picture = grid(torch.tensor([[[[-1.0, 1.0]]]]), columns=4, scale=3)
    assert picture.size == (6, 3)
    assert {picture.getpixel((x, y)) for x in range(3) for y in range(3)} == {(0, 255)}
    assert {picture.getpixel((x, y)) for x in range(3, 6) for y in range(3)} == {(255, 255)}


def test_a_difference_is_black_where_equal_and_white_across_the_range():
    black, grey, white = constant(-1.0), constant(0.0), constant(1.0)
    assert to_uint8(difference(grey, grey)).max() == 0
    assert tuple(to_uint8(difference(black, white))[0, 0, 0]) == HEAT[-1]
    assert (difference(white, grey) < difference(white, black)).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_strip_has_a_row_for_teacher_student_and_difference(channels):
    teacher, student = constant(1.0, channels, count=3), constant(1.0, channels, count=3)
    student[1] = -1
    picture = comparison_strip(teacher, student)
    assert (picture.mode, picture.size) == ("RGBA", (8, 8))
    white, black = (255, 255, 255, 255), (0, 0, 0, 255)
    assert [picture.getpixel((0, y)) for y in (0, 3, 6)] == [white, white, black]
    assert [picture.getpixel((3, y)) for y in (0, 3, 6)] == [white, black, (*HEAT[-1], 255)]


def test_a_data_uri_holds_the_picture():
    picture = grid(torch.rand(4, 3, 5, 5) * 2 - 1, columns=2)
    head, _, body = png_data_uri(picture).partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as read:
        assert read.format == "PNG"
        assert read.tobytes() == picture.tobytes()
