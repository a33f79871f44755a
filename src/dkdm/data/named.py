"""Images and references by the names of options: a new one is a folder of code and a line here.

A reference's name is also a choice of `--evaluation-reference` in `dkdm.config`.
"""

from __future__ import annotations

from pathlib import Path

from dkdm.data import fashion
from dkdm.data.fashion.reference import SPLITS, fashion_reference
from dkdm.data.images import ImageSet, load_image_folder
from dkdm.data.reference import Reference
from dkdm.errors import DkdmError

IMAGES = {fashion.NAME: fashion.image_set}
REFERENCES = dict.fromkeys(SPLITS, fashion_reference)
REFERENCE_OF_CLASSES: dict[tuple[str, ...], str] = {fashion.CLASS_NAMES: "fashion-test"}


def load_images(spec: str | Path, shape: tuple[int, ...]) -> ImageSet:
    """Return the images that `--images` names: "fashion-mnist" or a folder.

    Raises `DkdmError` for a shape they cannot have, and for files that cannot be read.
    """
    known = IMAGES.get(str(spec))
    return known(shape) if known else load_image_folder(Path(spec), shape)


def load_reference(name: str) -> Reference:
    """Return a reference by its name. Raises `DkdmError` for an unknown one."""
    if name not in REFERENCES:
        raise DkdmError(f"there is no reference {name!r}: use {' or '.join(REFERENCES)}")
    return REFERENCES[name](name)


def chosen_reference(choice: str, class_names: tuple[str, ...] | None) -> Reference | None:
    """What `--evaluation-reference` chooses: "auto" knows what a model draws by its class names."""
    if choice == "auto":
        choice = REFERENCE_OF_CLASSES.get(class_names or (), "none")
    return None if choice == "none" else load_reference(choice)
