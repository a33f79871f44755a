"""Rounding and resizing of images, against formulas computed by hand and against PIL."""

import numpy as np
import pytest
import torch
from PIL import Image

from dkdm.data.resizing import eight_bits, resized

PIXELS = torch.randint(0, 256, (2, 3, 12, 9), generator=torch.Generator().manual_seed(0)).float()


def interpolated(pixels, height, width, place):
    """Bilinear, pixel by pixel; `place` gives the source of an output pixel."""
    before = pixels.shape[-2:]
    out = np.zeros((*pixels.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            y, x = (
                min(max(place(n, old, new), 0), old - 1)
                for n, old, new in zip((i, j), before, (height, width), strict=True)
            )
            top, left = int(y), int(x)
            bottom, right = min(top + 1, before[0] - 1), min(left + 1, before[1] - 1)
            a, b = y - top, x - left
            out[..., i, j] = (1 - a) * (1 - b) * pixels[..., top, left]
            out[..., i, j] += (1 - a) * b * pixels[..., top, right]
            out[..., i, j] += a * (1 - b) * pixels[..., bottom, left]
            out[..., i, j] += a * b * pixels[..., bottom, right]
    return torch.from_numpy(out).float()


@pytest.mark.parametrize("size", [(17, 23), (7, 5)])
@pytest.mark.parametrize(
    ("how", "place"),
    [
        ("bilinear", lambda n, old, new: (n + 0.5) * old / new - 0.5),
        ("tensorflow", lambda n, old, new: n * old / new),
    ],
)
def test_bilinear_by_hand(how, place, size):
    expected = interpolated(PIXELS.numpy(), *size, place)
    torch.testing.assert_close(resized(PIXELS, how, *size), expected, rtol=0, atol=1e-4)


def test_tensorflow_keeps_the_first_corner_and_repeats_the_last():
    row = torch.tensor([[[[0.0, 100.0]]]])
    assert resized(row, "tensorflow", 1, 4).flatten().tolist() == [0, 50, 100, 100]
    assert resized(row, "bilinear", 1, 4).flatten().tolist() == [0, 25, 75, 100]


@pytest.mark.parametrize("size", [(31, 20), (5, 4)])
def test_bicubic_is_that_of_pil(size):
    found = resized(PIXELS, "bicubic", *size)
    for image, of_image in zip(PIXELS, found, strict=True):
        for channel, of_channel in zip(image, of_image, strict=True):
            picture = Image.fromarray(channel.numpy())  # float32 pixels
            expected = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
            np.testing.assert_allclose(of_channel, expected, atol=2e-3)


@pytest.mark.parametrize("how", ["bilinear", "tensorflow", "bicubic"])
def test_equal_sizes_change_nothing(how):
    torch.testing.assert_close(resized(PIXELS, how, 12, 9), PIXELS, rtol=0, atol=1e-4)


def test_pixels_are_whole_and_grey_becomes_rgb():
    images = torch.tensor([-1.5, -1, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.9999, 1, 7])
    pixels = eight_bits(images.reshape(1, 1, 1, 7))
    assert pixels.shape == (1, 3, 1, 7)
    assert pixels[0].tolist() == [[[0, 0, 0, 1, 255, 255, 255]]] * 3


def test_every_8_bit_image_is_kept():
    values = torch.arange(256.0)
    assert torch.equal(
        eight_bits((values / 127.5 - 1).reshape(1, 1, 16, 16))[0, 0].flatten(), values
    )
