"""Images and references by the names of options: a new one is a folder of code and a line here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dkdm.config import Resize
from dkdm.data import fashion
from dkdm.data.array_files import IMAGES as ADM_IMAGES
from dkdm.data.array_files import array_images, array_names
from dkdm.data.fashion.reference import SPLITS, fashion_reference, feature_extractor
from dkdm.data.image_folder import image_folder
from dkdm.data.images import ImageSet, load_image_folder
from dkdm.data.inception_features import inception_extractor
from dkdm.data.real_images import Look, summarized
from dkdm.data.reference import FeatureExtractor, Reference
from dkdm.data.statistics_file import holds_statistics, statistics_reference, with_images
from dkdm.errors import UsageError
from dkdm.reading.places import expanded

FASHION = "fashion"
ARRAYS = (".npz", ".npy", ".safetensors")
IMAGES = {fashion.NAME: fashion.image_set}
REFERENCES = dict.fromkeys(SPLITS, fashion_reference)
REFERENCE_OF_CLASSES: dict[tuple[str, ...], str] = {fashion.CLASS_NAMES: "fashion-test"}


def load_images(spec: str | Path, shape: tuple[int, ...]) -> ImageSet:
    """Return the images that `--images` names: "fashion-mnist" or a folder.

    Raises `DkdmError` for a shape they cannot have, and for files that cannot be read.
    """
    known = IMAGES.get(str(spec))
    return known(shape) if known else load_image_folder(Path(spec), shape)


def load_reference(
    spec: str | Path,
    extractor: FeatureExtractor | None = None,
    *,
    skip_bad: bool = False,
    cache: bool = True,
    shape: Sequence[int] | None = None,
    look: Look = summarized,
) -> Reference:
    """Return real images, or what is known of them, as a reference.

    - spec: "fashion-test" or "fashion-train"; a folder of images, or of one folder for each class;
      an .npz of images (`arr_0`) or of statistics (`mu`, `sigma`); a .npy or .safetensors of
      samples [N, C, H, W] in [-1, 1].
    - extractor: the network that sees them. Default: the packaged one for Fashion-MNIST, otherwise
      the Inception network of the cache folder.
    - skip_bad: leave out images that cannot be read.
    - cache: keep what the network saw in the cache folder, under the hash of the images.
    - shape: (C, H, W) of the samples to be measured. What cannot be compared with them is refused
      before a network sees it, and Fashion-MNIST is seen at their size.
    - look: shows the images to the network; `summarized_by_all` shares them with other processes.

    Raises `UsageError` for anything else, `DkdmError` for images that cannot be measured.
    """
    if str(spec) in REFERENCES:
        return REFERENCES[str(spec)](str(spec), extractor, shape, cache, look)
    path = reference_path(spec)
    network = extractor or inception_extractor()
    source = image_folder(path, skip_bad) if path.is_dir() else array_images(path)
    if path.suffix.lower() != ".npz" or path.is_dir() or not holds_statistics(path):
        found = look(source, network, cache, shape).reference(source.name, network)
        for warning in found.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return found
    known = statistics_reference(path, network)
    if ADM_IMAGES not in array_names(path):
        return known
    seen_later = partial(summarized, source, network, cache, shape)
    return with_images(known, source.open(network), seen_later)


def reference_path(spec: str | Path) -> Path:
    """The folder or file that a reference of no other name is. Raises UsageError for none."""
    path = expanded(spec)
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() in ARRAYS):
        raise UsageError(
            f"there is no reference {spec}: use {' or '.join(REFERENCES)}, or give a folder of "
            f"images or a file ({', '.join(ARRAYS)})"
        )
    return path


def chosen_extractor(
    network: str | None, resize: Resize = "bilinear", device: str = "cpu"
) -> FeatureExtractor:
    """What `--feature-network` chooses: "fashion" is the packaged one, see `inception_extractor`.

    Raises `UsageError` if it cannot be had.
    """
    if network == FASHION:
        return feature_extractor()
    return inception_extractor(network, resize, device)


def chosen_reference(choice: str, class_names: tuple[str, ...] | None) -> str | None:
    """What `--evaluation-reference` chooses: "auto" knows what a model draws by its class names."""
    if choice == "auto":
        return REFERENCE_OF_CLASSES.get(class_names or ())
    return None if choice == "none" else choice
