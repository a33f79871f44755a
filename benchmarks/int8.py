"""What int8 weights cost: the same noise through a model in float32, in bfloat16, and as shipped.

    python benchmarks/int8.py builtin:fashion runs/fashion-latent-dit

Prints, for each model and precision, the size of the network's weights on disk and in memory, the
Frechet distance, the class accuracy, and how far the samples are from those in
float32 (root mean square, in [-1, 1]). Needs torchao.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch

from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.data.named import load_reference
from dkdm.evaluation.metrics import evaluate_images
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.models import LoadOptions, load_teacher
from dkdm.shipping.int8 import write_int8_folder
from dkdm.shipping.pipeline_folder import component_name, write_pipeline

PRECISIONS = ("float32", "bfloat16", "int8")


def ship(model, precision, folder):
    """Write the folder in this precision, load it again; the model and the bytes of its weights."""
    if precision == "int8":
        write_int8_folder(load_teacher(model), folder)
    else:
        write_pipeline(folder, load_teacher(model, options=LoadOptions(dtype=precision)))
    kept = "float32" if precision == "float32" else "bfloat16"
    loaded = load_teacher(str(folder), options=LoadOptions(dtype=kept))
    files = (folder / component_name(loaded.network)).glob("*.safetensors")
    return loaded, sum(file.stat().st_size for file in files)


def bytes_of(tensor):
    """Memory of a tensor, or of the tensors that a quantized one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="of models with classes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # torchao's, about its CUDA kernels
    reference = load_reference("fashion-test")
    sampling = Sampling(args.num_samples, args.steps, seed=0)
    print(f"{'model':34s}{'precision':10s}{'disk':>10s}{'memory':>10s}", end="")
    print(f"{'distance':>10s}{'class':>8s}{'rms':>8s}{'seconds':>9s}")
    for model in args.models:
        exact = None
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                loaded, disk = ship(model, precision, Path(folder) / "shipped")
                memory = sum(map(bytes_of, loaded.network.parameters()))
                cond = loaded.conditioning.in_turns(args.num_samples)
                labelled = isinstance(loaded.conditioning, ClassLabels)
                started = time.monotonic()
                samples = draw(loaded, cond, sampling, args.guidance_scale if labelled else 1.0)
                seconds = time.monotonic() - started
                images = decoded(loaded, samples).float().clamp(-1, 1)
            exact = images if exact is None else exact
            found = evaluate_images(images, cond.get("class_labels"), reference)
            accuracy = "" if found.class_accuracy is None else f"{found.class_accuracy:.1%}"
            rms = (images - exact).square().mean().sqrt().item()
            print(f"{model[-32:]:34s}{precision:10s}{disk:10,}{memory:10,}", end="")
            print(f"{found.fd:10.3f}{accuracy:>8s}{rms:8.4f}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
