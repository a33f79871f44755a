"""Real images: what is read is what was written, and what cannot be read is named."""

import gzip
from pathlib import Path

import pytest
import torch
from PIL import Image

from dkdm.config import DataOptions, NetworkOptions
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.data.fashion import ROOT, load_fashion_mnist
from dkdm.data.images import load_image_folder
from dkdm.data.named import load_images
from dkdm.data.training_set import training_data
from dkdm.errors import DkdmError, UsageError

needs_data = pytest.mark.skipif(not ROOT.is_dir(), reason="Fashion-MNIST is not installed")


def save_grey(file: Path, level: int, size: tuple[int, int] = (4, 4)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(file)


@needs_data
def test_fashion_mnist_is_scaled_and_balanced() -> None:
    images, labels = load_fashion_mnist("test")
    assert images.shape == (10_000, 1, 16, 16)
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert labels.bincount().tolist() == [1000] * 10


@needs_data
def test_pooling_keeps_the_mean_of_the_published_training_images() -> None:
    images, labels, *_ = load_images("fashion-mnist", (1, 16, 16))
    assert labels is not None
    assert len(images) == len(labels) == 60_000
    brightness = ((images + 1) / 2).double().mean().item()
    assert brightness * 32**2 / 28**2 == pytest.approx(0.2860, abs=1e-4)


def test_images_of_some_classes_are_numbered_anew(tmp_path: Path) -> None:
    for level, name in enumerate(("a", "b", "c")):
        save_grey(tmp_path / name / "one.png", 100 * level)
        save_grey(tmp_path / name / "two.png", 100 * level)
    options = DataOptions(str(tmp_path), (1, 4, 4), classes=(2, 0))
    data, like = training_data(options, NetworkOptions())
    assert data.conditions["class_labels"].tolist() == [1, 1, 0, 0]
    assert data.images[:, 0, 0, 0].tolist() == pytest.approx([-1, -1, 0.5686, 0.5686], abs=1e-3)
    assert like.conditioning == ClassLabels(2, null_class=2)
    for wrong in ((3,), (0, 0)):
        with pytest.raises(UsageError, match="give each id once, from 0 to 2"):
            training_data(DataOptions(str(tmp_path), (1, 4, 4), classes=wrong), NetworkOptions())
    with pytest.raises(UsageError, match="the images have no classes"):
        training_data(DataOptions(str(tmp_path / "a"), (1, 4, 4), classes=(0,)), NetworkOptions())


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DkdmError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist("test", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no gzip", "cannot be read"), (gzip.compress(b"other"), "not the published")],
    ids=["no gzip", "other content"],  # a compressed file has the time in it: no id for a test
)
def test_another_file_in_its_place_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DkdmError, match=message):
        load_fashion_mnist("test", root=tmp_path)


def test_fashion_mnist_in_another_shape_or_split_is_refused() -> None:
    with pytest.raises(DkdmError, match=r"\(1, 16, 16\)"):
        load_images("fashion-mnist", (3, 32, 32))
    with pytest.raises(DkdmError, match="use train or test"):
        load_fashion_mnist("validation")  # type: ignore[arg-type]


def test_flat_folder_is_read_in_order_and_averaged_by_area(tmp_path: Path) -> None:
    save_grey(tmp_path / "b.png", 255)
    checker = Image.new("L", (2, 2), 0)
    checker.putpixel((0, 0), 255)
    checker.putpixel((1, 1), 255)
    checker.save(tmp_path / "a.PNG")
    images, labels, *_ = load_images(str(tmp_path), (3, 1, 1))
    assert labels is None
    assert images.shape == (2, 3, 1, 1)
    assert images[0].tolist() == [[[pytest.approx(0, abs=1 / 127)]]] * 3
    assert (images[1] == 1).all()


def test_colours_stay_in_their_channels_and_rows_in_their_places(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), (255, 0, 0))
    image.putpixel((2, 1), (0, 0, 255))
    image.save(tmp_path / "a.png")
    images, *_ = load_image_folder(tmp_path, (3, 2, 3))
    expected = torch.full((3, 2, 3), -1.0)
    expected[0] = 1
    expected[:, 1, 2] = torch.tensor([-1.0, -1.0, 1.0])
    assert torch.equal(images[0], expected)


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, level in (("shoe/1.png", 255), ("bag/1.png", 0), ("shoe/0.webp", 255)):
        save_grey(tmp_path / name, level)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "bag" / "._1.png").write_bytes(b"what macOS keeps beside a file")
    images, labels, *_ = load_image_folder(tmp_path, (1, 4, 4))
    assert labels is not None
    assert labels.tolist() == [0, 1, 1]
    assert images.mean(dim=(1, 2, 3)).tolist() == pytest.approx([-1, 1, 1], abs=0.02)


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DkdmError, match="not a folder"):
        load_image_folder(tmp_path / "absent", (1, 4, 4))
    with pytest.raises(DkdmError, match="holds no images"):
        load_image_folder(tmp_path, (1, 4, 4))
    with pytest.raises(DkdmError, match="1 or 3 channels"):
        load_image_folder(tmp_path, (4, 4, 4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DkdmError, match=r"empty holds no images"):
        load_image_folder(tmp_path, (1, 4, 4))
    save_grey(tmp_path / "a.png", 0)
    with pytest.raises(DkdmError, match="holds images and folders"):
        load_image_folder(tmp_path, (1, 4, 4))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DkdmError, match=r"broken\.png"):
        load_image_folder(tmp_path, (1, 4, 4))
    Image.new("I;16", (4, 4)).save(tmp_path / "broken.png")
    with pytest.raises(DkdmError, match="8 bits"):
        load_image_folder(tmp_path, (1, 4, 4))
