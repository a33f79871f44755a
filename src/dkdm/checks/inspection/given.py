"""Real samples that a user gives to judge a model by."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.data.images import load_image_folder
from dkdm.errors import DkdmError, UsageError
from dkdm.reading.arrays import read_arrays

MOST = 64


def read_samples(path: Path, denoiser: Denoiser) -> Tensor:
    """Samples [N, C, ...] of a file, or of a folder of images, at most 64 of them.

    Arrays are taken as they are, in the model's range (latents for a latent model); images are
    brought to it. The first array of the model's shape is taken. Raises UsageError without one.
    """
    if path.is_dir():
        return _images(path, denoiser)
    if not path.is_file():
        raise UsageError(f"--samples {path}: there is no such file or folder")
    arrays = read_arrays(f"--samples {path}", path, ", or a folder of images").values()
    rows = [array for array in arrays if array.ndim > 1 and not array.is_complex()]
    shape = tuple(denoiser.sample_shape)
    fitting = [array for array in rows if tuple(array.shape[1:]) == shape and len(array) > 1]
    if not fitting:
        found = ", ".join(str(tuple(array.shape)) for array in rows[:4]) or "no arrays"
        raise UsageError(
            f"--samples {path}: the model takes samples of shape {shape}, found {found}; give an "
            f"array of shape (N, {', '.join(map(str, shape))}) with at least 2 samples"
        )
    samples = fitting[0][:MOST].float()
    if not samples.isfinite().all():
        raise UsageError(f"--samples {path}: some values are not finite; give finite samples")
    return samples


def _images(path: Path, denoiser: Denoiser) -> Tensor:
    if denoiser.bundle.autoencoder is not None or len(denoiser.sample_shape) != 3:
        raise UsageError(
            f"--samples {path}: the model works on latents or signals of shape "
            f"{tuple(denoiser.sample_shape)}; give an array of these as .npy or .safetensors"
        )
    channels, height, width = denoiser.sample_shape
    try:
        images = load_image_folder(path, (channels, height, width)).images
    except DkdmError as error:
        raise UsageError(f"--samples: {error}") from error
    if len(images) < 2:
        raise UsageError(f"--samples {path}: give at least 2 images")
    low, high = denoiser.value_range
    return low + (images[:MOST] + 1) / 2 * (high - low)
