"""The experiments of the paper (DKDM, section 4 and supplement), and a short one on CIFAR-10."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dkdm.config import DistillConfig, RunConfig, TrainConfig

Settings = dict[str, Any]

# What a recipe cannot have by itself: a name that is no path, and what to give instead.
TO_BE_GIVEN: dict[str, str] = {
    "(CIFAR-10 teacher)": "--teacher FILE.pt, a CIFAR-10 checkpoint of DDPM-IP",
    "(CelebA-64 teacher)": "--teacher FILE.pt, a CelebA 64x64 checkpoint of DDPM-IP",
    "(ImageNet-32 teacher)": "--teacher FILE.pt, an ImageNet 32x32 checkpoint of DDPM-IP",
    "(CelebA-HQ teacher)": "--teacher FILE.ckpt and --teacher-config FILE.yaml, LDM-VQ-4 of "
    "CompVis/latent-diffusion on CelebA-HQ",
    "(FFHQ teacher)": "--teacher FILE.ckpt and --teacher-config FILE.yaml, LDM-VQ-4 of "
    "CompVis/latent-diffusion on FFHQ",
    "(CIFAR-10 images)": "--images FOLDER, the training images of CIFAR-10",
}

# Algorithm 1 as published: exact chains fill the pool, every state moves one level at a time.
PUBLISHED: Settings = {
    "student_prediction": "epsilon",
    "loss_weighting": "uniform",
    "vlb_weight": 1.0,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",
    "ema_decay": 0.9999,
    "mixed_precision": "fp16",
    "rho": 0.4,
    "fill": "ancestral",
    "stride": "1",
    "eta": 1.0,
    "checkpointing_steps": 5000,
    "validation_steps": 10_000,
    "validation_sampling_steps": 50,
    "evaluation_samples": 1000,
}
ADM_FLAGS = (
    "--num_res_blocks 3 --resblock_updown True --use_new_attention_order True --learn_sigma True "
    "--use_scale_shift_norm True --diffusion_steps 1000 --noise_schedule cosine"
)
SMALL_IMAGES = (
    "--image_size 32 --num_channels 128 --num_head_channels 32 --attention_resolutions 16,8 "
    f"--dropout 0.3 {ADM_FLAGS}"
)
LATENT: Settings = PUBLISHED | {
    "student": "ldm-128",
    "learning_rate": 9.6e-5,
    "validation_sampling_steps": 200,
    "max_train_steps": 500_000,
    "rho": None,  # each says how many entries
}
TEN_MINUTES: Settings = {
    "train_batch_size": 256,
    "mixed_precision": "bf16",
    "lr_scheduler": "cosine",
    "checkpointing_steps": 2000,
    "validation_steps": 2000,
    "validation_sampling_steps": 50,
    "evaluation_samples": 0,
}

PAPER_RECIPES: dict[str, tuple[type[RunConfig], Settings]] = {
    # CNN of 57 M into one of 14 M. Filling the pool exactly costs 25.6 M evaluations of the
    # teacher; `--fill few-step` costs 1 M.
    "paper-cifar10": (
        DistillConfig,
        PUBLISHED
        | {
            "output_dir": Path("runs/paper-cifar10"),
            "teacher": "(CIFAR-10 teacher)",
            "teacher_flags": SMALL_IMAGES,
            "student": "adm-14m",
            "train_batch_size": 128,
            "max_train_steps": 200_000,
        },
    ),
    # CNN of 295 M into one of 57 M. The paper does not say for how long.
    "paper-celeba64": (
        DistillConfig,
        PUBLISHED
        | {
            "output_dir": Path("runs/paper-celeba64"),
            "teacher": "(CelebA-64 teacher)",
            "teacher_flags": "--image_size 64 --num_channels 192 --num_head_channels 64 "
            f"--attention_resolutions 32,16,8 --dropout 0.1 {ADM_FLAGS}",
            "student": "adm-57m",
            "train_batch_size": 256,
            "max_train_steps": 200_000,
        },
    ),
    # The same networks, longer.
    "paper-imagenet32": (
        DistillConfig,
        PUBLISHED
        | {
            "output_dir": Path("runs/paper-imagenet32"),
            "teacher": "(ImageNet-32 teacher)",
            "teacher_flags": SMALL_IMAGES,
            "student": "adm-14m",
            "train_batch_size": 512,
            "max_train_steps": 500_000,
        },
    ),
    # LDM-VQ-4 of 224 channels into one of 128, both on 64x64x3 latents; L_simple alone, as the
    # teacher learned no variance. The pool holds 4 batches. The paper does not say for how long.
    "paper-celebahq": (
        DistillConfig,
        LATENT
        | {
            "output_dir": Path("runs/paper-celebahq"),
            "teacher": "(CelebA-HQ teacher)",
            "train_batch_size": 48,
            "pool_size": 4 * 48,
        },
    ),
    "paper-ffhq": (
        DistillConfig,
        LATENT
        | {
            "output_dir": Path("runs/paper-ffhq"),
            "teacher": "(FFHQ teacher)",
            "train_batch_size": 42,
            "pool_size": 4 * 42,
        },
    ),
    # An unconditional CNN of 14 M that predicts eps on DDPM's linear betas. Ten minutes of an H200.
    "cifar10-teacher": (
        TrainConfig,
        TEN_MINUTES
        | {
            "output_dir": Path("runs/cifar10-teacher"),
            "images": "(CIFAR-10 images)",
            "sample_shape": (3, 32, 32),
            "class_conditional": False,
            "network": "unet-14m",
            "scheduler": "ddpm-linear",
            "optimizer": "adamw",
            "learning_rate": 4e-4,
            "lr_warmup_steps": 500,
            "ema_decay": 0.9995,
            "max_train_steps": 7_500,
        },
    ),
    # That teacher into the same network of half the width, 3.6 M, with dkdm's own defaults and
    # about 1.18 M teacher evaluations. Six minutes of an H200.
    "cifar10-student": (
        DistillConfig,
        TEN_MINUTES
        | {
            "output_dir": Path("runs/cifar10-student"),
            "teacher": "runs/cifar10-teacher",
            "student": "thin-50",
            "lr_warmup_steps": 200,
            "ema_decay": 0.999,
            "pool_size": 7680,
            "fill_steps": 20,
            "fill_entries": 1,
            "max_train_steps": 4000,
        },
    ),
}
