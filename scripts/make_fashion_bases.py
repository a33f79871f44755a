"""Make the folders that the latent and the text teacher on Fashion-MNIST are trained upon.

    python scripts/make_fashion_bases.py --autoencoder runs/fashion-autoencoder --output-dir runs

Writes two diffusers pipeline folders without a denoiser: `fashion-latent-base`, an LDMPipeline with
the autoencoder, and `fashion-text-base`, a StableDiffusion3Pipeline with the autoencoder, two tiny
CLIP text encoders and a flow-matching scheduler. The text encoders are trained here, to tell which
caption belongs to which image (CLIP, arXiv 2103.00020); three minutes on one CPU core.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPTextModelWithProjection

from dkdm.core.saving.progress import track
from dkdm.data.fashion import fashion_captions, load_fashion_mnist
from dkdm.data.fashion.text_base import (
    LENGTH,
    make_encoder,
    make_tokenizer,
    write_json,
    write_text_base,
)

TEMPERATURE = 0.07
LATENT_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": False,
}


def image_tower() -> nn.Module:
    """28x28 images to 64 numbers; thrown away after training."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3),
        nn.SiLU(),
        nn.Flatten(),
        nn.LazyLinear(64),
    )


def train(
    encoder: CLIPTextModelWithProjection,
    tokens: Tensor,
    which: Tensor,
    images: Tensor,
    args: argparse.Namespace,
) -> None:
    """Each image picks its caption among all different ones; tokens [captions, LENGTH]."""
    tower = image_tower()
    tower(images[:1])
    parameters = [*encoder.parameters(), *tower.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    random = torch.Generator().manual_seed(args.seed)
    with track(args.steps, 0, "text encoder") as progress:
        for step in range(args.steps):
            rows = torch.randint(len(images), (128,), generator=random)
            texts = normalize(encoder(tokens).text_embeds, dim=-1)
            logits = normalize(tower(images[rows]), dim=-1) @ texts.T / TEMPERATURE
            loss = nn.functional.cross_entropy(logits, which[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress(step + 1, loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/fashion-autoencoder"))
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    latent, text = args.output_dir / "fashion-latent-base", args.output_dir / "fashion-text-base"
    autoencoder = AutoencoderKL.from_pretrained(args.autoencoder)
    autoencoder.save_pretrained(latent / "vqvae")
    write_json(latent / "scheduler" / "scheduler_config.json", LATENT_SCHEDULER)
    write_json(
        latent / "model_index.json",
        {
            "_class_name": "LDMPipeline",
            "scheduler": ["diffusers", LATENT_SCHEDULER["_class_name"]],
            "unet": [None, None],
            "vqvae": ["diffusers", "AutoencoderKL"],
        },
    )

    images, labels = load_fashion_mnist("train", size=28)
    captions = fashion_captions(images, labels)
    different = sorted(set(captions))
    which = torch.tensor([different.index(caption) for caption in captions])
    tokenizer = make_tokenizer()
    encoded = tokenizer(different, padding="max_length", max_length=LENGTH, return_tensors="pt")
    encoders = []
    for number in range(2):
        encoders.append(make_encoder(len(tokenizer), args.seed + number))
        train(encoders[-1], encoded.input_ids, which, images, args)
    write_text_base(text, autoencoder, tokenizer, encoders)
    (args.output_dir / "fashion-prompts.txt").write_text("".join(f"{c}\n" for c in different))


if __name__ == "__main__":
    main()
