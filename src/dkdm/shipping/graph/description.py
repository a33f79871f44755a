"""What a sampler must know of a graph file besides its network, as JSON."""

from __future__ import annotations

from typing import Any

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import Condition, kind_of, rows_of
from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.prediction import EDM
from dkdm.core.few_steps.model import FewStep
from dkdm.shipping.pipeline_folder import scheduler_config
from dkdm.version import __version__


def describe_graph(
    denoiser: Denoiser, inputs: Condition, batch: tuple[int, int | None]
) -> dict[str, Any]:
    """Inputs, output and meaning of a graph, small enough to lie inside the file.

    inputs: examples, which give shapes and types. batch: smallest and largest.
    """
    own, coder = denoiser.parameterization, denoiser.bundle.autoencoder
    few = min(denoiser.intervals.steps) if isinstance(denoiser, FewStep) else None
    channels = denoiser.sample_shape[0] if few else denoiser.out_channels
    output = {"name": "output", "shape": ["batch", channels, *denoiser.sample_shape[1:]]}
    return {
        "made_with": f"dkdm {__version__}",
        "network": type(denoiser.network).__name__,
        "parameters": denoiser.num_parameters,
        "precision": str(denoiser.dtype).removeprefix("torch."),
        "batch": {"min": batch[0], "max": batch[1]},
        "inputs": [
            {"name": name, "shape": ["batch", *row.shape], "dtype": row.dtype}
            for name, row in rows_of(inputs).items()
        ],
        "outputs": [{**output, "dtype": "float32"}],
        "sampling_steps": few,
        "prediction_type": own.prediction,
        "variance_type": own.variance,
        "sigma_data": own.sigma_data if own.prediction in EDM else None,
        "value_range": list(denoiser.value_range),
        "classes": _classes(denoiser),
        "latents": dict(zip(("shift", "scale"), coder.standard(), strict=True)) if coder else None,
        "scheduler": scheduler_config(denoiser),
    }


def sampling_tables(denoiser: Denoiser) -> dict[str, Any]:
    """The noise process in numbers, for samplers without a scheduler; see `Process`."""
    process = denoiser.process
    return {
        "alpha": process.alpha.tolist(),
        "sigma": process.sigma.tolist(),
        "timestep": denoiser.network_time.tolist(),
        "final": list(process.final),
        "start_std": process.start_std,
        "spacing": process.spacing,
        "steps_offset": process.steps_offset,
        "clipping": _clipping(process.clipping),
    }


_CLASSES = {
    "num_classes": "count",
    "null_class": "null",
    "class_names": "names",
    "classes": "learnt",
}


def _classes(denoiser: Denoiser) -> dict[str, Any] | None:
    facts = kind_of(denoiser.conditioning).facts().items()
    return {_CLASSES[k]: list(v) if isinstance(v, tuple) else v for k, v in facts} or None


def _clipping(clipping: Clipping) -> dict[str, Any] | None:
    if clipping.range is None:
        return None
    low, high = clipping.center - clipping.range, clipping.center + clipping.range
    eps = clipping.rederive_eps
    return {"low": low, "high": high, "quantile": clipping.quantile, "rederive_eps": eps}
