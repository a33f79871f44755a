"""The components of a pipeline as they lie on disk, the autoencoder among them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.core.diffusion.process import per_sample
from dkdm.errors import DkdmError
from dkdm.models.effective import class_config
from dkdm.models.pipelines import PIPELINES
from dkdm.reading.allowed import component_class
from dkdm.reading.fields import read_json
from dkdm.reading.places import check_folder
from dkdm.reading.sizes import building

TILED_FROM = 128  # latents this wide or wider are decoded in tiles, where diffusers can


@dataclass(frozen=True)
class Component:
    """A component of a diffusers pipeline as it lies on disk: folder, library and class name.

    variant: of its weight files, if they have one.
    """

    folder: Path
    library: str
    class_name: str
    variant: str | None = None

    @property
    def in_root(self) -> bool:
        """Whether its files lie in the pipeline's own folder, among those of other components."""
        return (self.folder / "model_index.json").is_file()

    @property
    def root(self) -> Path:
        """The pipeline's folder."""
        return self.folder if self.in_root else self.folder.resolve().parent

    def owns(self, file: Path) -> bool:
        """Whether a file below its folder is its own."""
        if not self.in_root:
            return True
        return file.parent == self.folder and _IN_ROOT.fullmatch(file.name) is not None

    def load(self, **options: Any) -> Any:
        """The component itself.

        Raises UsageError for a class that a file may not name, DkdmError if it cannot be loaded.
        """
        cls = component_class(self.folder, self.library, self.class_name)
        variant = weight_variant(self.folder, self.variant)
        options |= {"variant": variant} if variant else {}
        options |= {"trust_remote_code": False} if self.library == "transformers" else {}
        file = check_folder(self.folder, self.root) / "config.json"
        config = read_json(file, "its config") if file.is_file() else {}  # tokenizers have none
        if not config:
            self._check_tokenizer()
        with building(config, str(file if config else self.folder), self.class_name, self.folder):
            if not issubclass(cls, nn.Module):
                return cls.from_pretrained(self.folder, **options)
            part, info = cls.from_pretrained(self.folder, output_loading_info=True, **options)
        absent = sorted(map(str, info["missing_keys"]))
        if absent:
            raise DkdmError(
                f"{self.folder}: the weights of this {self.class_name} are not whole: "
                f"{len(absent)} missing ({', '.join(absent[:3])}): download the folder again"
            )
        return part

    def _check_tokenizer(self) -> None:
        pieces = next(iter(sorted(self.folder.glob("*.model"))), None)
        lacks = find_spec("sentencepiece") is None
        if pieces is not None and lacks and not (self.folder / "tokenizer.json").is_file():
            raise DkdmError(
                f"{pieces} needs the package sentencepiece: pip install sentencepiece protobuf"
            )


_IN_ROOT = re.compile(r"config\.json|diffusion_pytorch_model(?:[.-].+)?\.(?:safetensors|bin|json)")


_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?"
    r"(?:\.(?P<variant>[A-Za-z]\w*?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def weight_variant(folder: Path, asked: str | None) -> str | None:
    """The variant by which diffusers finds the weights in a component's folder.

    asked: for the whole pipeline; a component that does not have it is loaded without, as diffusers
    does. Raises DkdmError if there are weights of variants only, and none was asked for.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = {match["variant"] for name in names if (match := _WEIGHTS.fullmatch(name))}
    if asked in found or not found or None in found:
        return asked if asked in found else None
    others = ", ".join(sorted(map(str, found)))
    raise DkdmError(
        f"{folder} has only weights of the variant {others}: say --teacher-variant "
        f"{sorted(map(str, found))[0]}"
    )


@dataclass(eq=False)
class Autoencoder:
    """A `Coder` that is loaded when it is first used: latents = (encoded - shift) * scale.

    The factors are those of its config: one for all channels (`scaling_factor`, `shift_factor`) or
    one each (`latents_mean`, `latents_std`). pipeline: the one of diffusers it belongs to, which
    may read only some of them; None reads all.
    """

    component: Component
    network: nn.Module | None = field(default=None, repr=False)
    pipeline: str | None = None

    def _loaded(self, device: torch.device) -> Any:
        if self.network is None:
            self.network = self.component.load().eval().requires_grad_(False)
        return self.network.to(device)

    @property
    def config(self) -> dict[str, Any]:
        file = self.component.folder / "config.json"
        raw = read_json(file, "an autoencoder's config")
        return class_config(raw, self.component.class_name, str(file))

    @property
    def latent_channels(self) -> int | None:
        config = self.config
        found = config.get("latent_channels") or config.get("z_dim")
        return None if found is None else int(found)

    def standard(self, pipeline: str | None = None) -> tuple[list[float], list[float]]:
        config = self.config
        known = PIPELINES.get(str(pipeline or self.pipeline))
        if known and known.factors is not None:
            config = {key: value for key, value in config.items() if key in known.factors}
        means, stds = config.get("latents_mean"), config.get("latents_std")
        if means is None or stds is None:
            means, stds = [config.get("shift_factor") or 0.0], [1.0]
        scale = config.get("scaling_factor", 1.0)
        return list(map(float, means)), [scale / std for std in stds]

    def _standard(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The same, each [1 or C, 1, ...]."""
        shift, scale = (per_sample(torch.tensor(v), like[0]) for v in self.standard())
        return shift, scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        network = self._loaded(latents.device)
        if latents.shape[-1] >= TILED_FROM and hasattr(network, "enable_tiling"):
            network.enable_tiling()
        shift, scale = self._standard(latents)
        raw = (latents / scale + shift).to(next(network.parameters()).dtype)
        return network.decode(raw).sample.float().contiguous()

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        network = self._loaded(images.device)
        encoded = network.encode(images.to(next(network.parameters()).dtype))
        raw = _latents_of(encoded, generator).float()
        shift, scale = self._standard(raw)
        return (raw - shift) * scale

    def idle(self) -> None:
        if self.network is not None:
            self.network.to("cpu")


def _latents_of(encoded: Any, generator: torch.Generator | None) -> Tensor:
    """KL autoencoders give a distribution, VQ ones `latents`, AutoencoderDC `latent`."""
    if hasattr(encoded, "latent_dist"):
        spread = encoded.latent_dist
        found: Tensor = spread.mode() if generator is None else spread.sample(generator)
        return found
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent
