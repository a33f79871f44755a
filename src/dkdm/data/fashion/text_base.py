"""The folder that the text teacher on Fashion-MNIST is trained upon: a pipeline without a denoiser.

`scripts/make_fashion_bases.py` writes it with trained encoders, `dkdm train --smoke` with random
ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL

from dkdm.data.fashion import TONES, WORDS

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

LENGTH = 8
LATENT_CHANNELS = 4
FLOW_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}


def make_autoencoder() -> AutoencoderKL:
    """Three levels, so 28x28 -> 7x7."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=28,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, between a beginning and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

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
    """Two layers of width 64, with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

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


def write_text_base(
    folder: Path,
    autoencoder: AutoencoderKL,
    tokenizer: PreTrainedTokenizerFast,
    encoders: Sequence[CLIPTextModelWithProjection],
) -> None:
    """Write a StableDiffusion3Pipeline without its transformer.

    encoders: two, which both read the tokenizer's words.
    """
    autoencoder.save_pretrained(folder / "vae")
    for encoder, suffix in zip(encoders, ("", "_2"), strict=True):
        encoder.eval().save_pretrained(folder / f"text_encoder{suffix}")
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    write_json(folder / "scheduler" / "scheduler_config.json", FLOW_SCHEDULER)
    write_json(
        folder / "model_index.json",
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
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
