"""Make the folders that the latent and the text teacher on Fashion-MNIST are trained upon.

    python scripts/make_fashion_bases.py --autoencoder runs/fashion-autoencoder --output-dir runs

Writes two diffusers pipeline folders without a denoiser: `fashion-latent-base`, an LDMPipeline with
the autoencoder, and `fashion-text-base`, a StableDiffusion3Pipeline with the autoencoder, two tiny
CLIP text encoders and a flow-matching scheduler. The text encoders are trained here, to tell which
caption belongs to which image (CLIP, arXiv 2103.00020); three minutes on one CPU core.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from dkdm.core.saving.progress import track
from dkdm.data.fashion import TONES, WORDS, fashion_captions, load_fashion_mnist

LENGTH = 8
TEMPERATURE = 0.07
LATENT_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": False,
}
FLOW_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, between a beginning and an end."""
    words = ["<pad>", "<start>", "<end>", "<unknown>", "a", *TONES, *WORDS]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_max_length=LENGTH,
    )


def make_encoder(vocabulary: int, seed: int) -> CLIPTextModelWithProjection:
    """Two layers of width 64."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=64,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config)


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


def write_json(path: Path, values: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/fashion-autoencoder"))
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    latent, text = args.output_dir / "fashion-latent-base", args.output_dir / "fashion-text-base"
    kind = json.loads((args.autoencoder / "config.json").read_text())["_class_name"]
    for folder, name in ((latent, "vqvae"), (text, "vae")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            shutil.copy(args.autoencoder / file, folder / name / file)
    write_json(latent / "scheduler" / "scheduler_config.json", LATENT_SCHEDULER)
    write_json(
        latent / "model_index.json",
        {
            "_class_name": "LDMPipeline",
            "scheduler": ["diffusers", LATENT_SCHEDULER["_class_name"]],
            "unet": [None, None],
            "vqvae": ["diffusers", kind],
        },
    )

    images, labels = load_fashion_mnist("train", size=28)
    captions = fashion_captions(images, labels)
    different = sorted(set(captions))
    which = torch.tensor([different.index(caption) for caption in captions])
    tokenizer = make_tokenizer()
    encoded = tokenizer(different, padding="max_length", max_length=LENGTH, return_tensors="pt")
    for number, suffix in enumerate(("", "_2")):
        encoder = make_encoder(len(tokenizer), args.seed + number)
        train(encoder, encoded.input_ids, which, images, args)
        encoder.eval().save_pretrained(text / f"text_encoder{suffix}")
        tokenizer.save_pretrained(text / f"tokenizer{suffix}")
    write_json(text / "scheduler" / "scheduler_config.json", FLOW_SCHEDULER)
    write_json(
        text / "model_index.json",
        {
            "_class_name": "StableDiffusion3Pipeline",
            "max_sequence_length": LENGTH,
            "scheduler": ["diffusers", FLOW_SCHEDULER["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_3": [None, None],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
            "tokenizer_3": [None, None],
            "transformer": [None, None],
            "vae": ["diffusers", kind],
        },
    )
    (args.output_dir / "fashion-prompts.txt").write_text("".join(f"{c}\n" for c in different))


if __name__ == "__main__":
    main()
