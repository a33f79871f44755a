"""Train the autoencoder that the latent teachers on Fashion-MNIST work behind.

    python scripts/train_fashion_autoencoder.py --output-dir runs/fashion-autoencoder

28x28 images to 4x7x7 latents, diffusers' AutoencoderKL of 0.68 M parameters; the folder it writes
loads with `AutoencoderKL.from_pretrained`. About 17 minutes on one CPU core.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import mse_loss

from dkdm.core.saving.progress import track
from dkdm.data.fashion import load_fashion_mnist
from dkdm.data.fashion.text_base import make_autoencoder
from dkdm.data.named import load_reference
from dkdm.evaluation.metrics import evaluate_images
from dkdm.report.grids import grid

KL_WEIGHT = 1e-3


def loss_of(autoencoder: AutoencoderKL, images: Tensor, random: torch.Generator) -> Tensor:
    """Squared error and a weak pull of the latents towards N(0, 1), per image."""
    latents = autoencoder.encode(images).latent_dist
    decoded = autoencoder.decode(latents.sample(random)).sample
    per_image = images[0].numel()
    return mse_loss(decoded, images) + KL_WEIGHT * latents.kl().mean() / per_image


def train(autoencoder: AutoencoderKL, images: Tensor, args: argparse.Namespace) -> None:
    """AdamW with a one-cycle learning rate over random batches."""
    random = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), args.learning_rate)
    course = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.05
    )
    with track(args.steps, 0, "autoencoder") as progress:
        for step in range(args.steps):
            rows = torch.randint(len(images), (args.batch_size,), generator=random)
            loss = loss_of(autoencoder, images[rows], random)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            optimizer.step()
            course.step()
            progress(step + 1, loss.detach())


@torch.no_grad()
def standardize(autoencoder: AutoencoderKL, images: Tensor) -> None:
    """The scale, in the config, that brings the latents' mean square to 1.

    The shift is 0: SD3's pipeline wants a number, and others know none.
    """
    latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in images.split(500)])
    scale = 1 / latents.square().mean().sqrt().item()
    autoencoder.register_to_config(scaling_factor=round(scale, 6), shift_factor=0.0)


@torch.no_grad()
def measure(autoencoder: AutoencoderKL, output_dir: Path) -> dict[str, float]:
    """What reconstructions of the test images lose; beside it a picture, originals above."""
    images, labels = load_fashion_mnist("test", size=28)
    decoded = torch.cat(
        [
            autoencoder.decode(autoencoder.encode(x).latent_dist.mean).sample
            for x in images.split(500)
        ]
    ).clamp(-1, 1)
    rows = [part[i : i + 10] for i in (0, 10) for part in (images, decoded)]
    grid(torch.cat(rows), 10, scale=4).save(output_dir / "reconstructions.png")
    metrics = evaluate_images(decoded, labels, load_reference("fashion-test"))
    return {
        "mean_squared_error": (decoded - images).square().mean().item(),
        "frechet_distance": metrics["fd"],
        "class_accuracy": metrics["class_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/fashion-autoencoder"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images, _ = load_fashion_mnist("train", size=28)
    autoencoder = make_autoencoder()
    started = time.monotonic()
    train(autoencoder, images, args)
    standardize(autoencoder, images[:10_000])
    autoencoder.eval().save_pretrained(args.output_dir)
    results = measure(autoencoder, args.output_dir)
    results["minutes"] = round((time.monotonic() - started) / 60, 1)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
