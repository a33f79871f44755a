"""Complete runs as functions that return a frozen config, each with what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dkdm.config import DistillConfig, RunConfig, TrainConfig
from dkdm.errors import UsageError


def fashion_teacher() -> TrainConfig:
    """The embedded teacher: a class-conditional UNet on Fashion-MNIST at 16x16, about an hour on
    two CPU cores."""
    return TrainConfig(
        output_dir=Path("runs/fashion-teacher"),
        images="fashion-mnist",
        network="unet-tiny",
        sample_shape=(1, 16, 16),
        max_train_steps=3500,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        ema_decay=0.999,
        condition_dropout=0.1,
        checkpointing_steps=250,
        validation_steps=500,
        validation_sampling_steps=25,
        sampling_guidance_scale=1.5,
        evaluation_samples=2000,
    )


def fashion_dit_teacher() -> TrainConfig:
    """A class-conditional transformer on Fashion-MNIST at 16x16, which predicts eps on DDPM's
    linear betas, 40 minutes on a CPU core."""
    return TrainConfig(
        output_dir=Path("runs/fashion-dit-teacher"),
        images="fashion-mnist",
        network="dit-xs",
        scheduler="ddpm-linear",
        sample_shape=(1, 16, 16),
        max_train_steps=6000,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        ema_decay=0.999,
        condition_dropout=0.1,
        checkpointing_steps=500,
        validation_steps=1000,
        validation_sampling_steps=25,
        sampling_guidance_scale=1.5,
        evaluation_samples=2000,
        evaluation_reference="fashion-test",
    )


def fashion_latent_teacher() -> TrainConfig:
    """An unconditional UNet on the latents of Fashion-MNIST at 28x28, 20 minutes on a CPU core.

    Its base is made by `scripts/train_fashion_autoencoder.py` and `scripts/make_fashion_bases.py`.
    """
    return TrainConfig(
        output_dir=Path("runs/fashion-latent"),
        images="fashion-mnist",
        sample_shape=(1, 28, 28),
        base="runs/fashion-latent-base",
        class_conditional=False,
        network="unet-latent",
        max_train_steps=3000,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        ema_decay=0.999,
        checkpointing_steps=250,
        validation_steps=500,
        validation_sampling_steps=25,
        evaluation_samples=2000,
        evaluation_reference="fashion-test",
    )


def fashion_text_teacher() -> TrainConfig:
    """A text-conditional flow on the same latents, an MM-DiT as in SD3, half an hour on a CPU core.

    Captions such as "a white sneaker" are made from the labels; the base is made by the same two
    scripts.
    """
    return TrainConfig(
        output_dir=Path("runs/fashion-text"),
        images="fashion-mnist",
        sample_shape=(1, 28, 28),
        base="runs/fashion-text-base",
        network="mmdit-tiny",
        max_train_steps=3000,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        ema_decay=0.999,
        condition_dropout=0.1,
        checkpointing_steps=250,
        validation_steps=500,
        validation_sampling_steps=25,
        sampling_guidance_scale=1.5,
        evaluation_samples=2000,
        evaluation_reference="fashion-test",
    )


def demo() -> DistillConfig:
    """The embedded teacher into a transformer, in minutes on two CPU cores."""
    return DistillConfig(
        output_dir=Path("runs/demo"),
        teacher="builtin:fashion",
        student="dit-tiny",
        max_train_steps=480,
        train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=30,
        ema_decay=0.98,
        condition_dropout=0.1,
        pool_size=1024,
        fill_steps=8,
        stride="random:50",
        eta=0.0,
        checkpointing_steps=240,
        validation_steps=120,
        validation_sampling_steps=20,
        sampling_guidance_scale=1.5,
        evaluation_samples=400,
    )


def fashion_small() -> DistillConfig:
    """The embedded teacher into a narrower UNet, in less than an hour on two CPU cores."""
    return DistillConfig(
        output_dir=Path("runs/fashion-small"),
        teacher="builtin:fashion",
        student="unet-mini",
        max_train_steps=3500,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=0.998,
        condition_dropout=0.1,
        pool_size=3072,
        fill_steps=10,
        stride="random:50",
        eta=0.0,
        checkpointing_steps=250,
        validation_steps=500,
        validation_sampling_steps=20,
        sampling_guidance_scale=1.5,
        evaluation_samples=5000,
    )


def fashion_flow() -> DistillConfig:
    """The DDPM transformer into a flow-matching one, which the stock FlowMatchEuler scheduler
    samples."""
    return DistillConfig(
        output_dir=Path("runs/fashion-flow"),
        teacher="runs/fashion-dit-teacher",
        student="dit-tiny",
        student_process="flow",
        max_train_steps=2000,
        train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=0.995,
        condition_dropout=0.1,
        pool_size=3072,
        fill_steps=10,
        stride="random:50",
        eta=0.0,
        checkpointing_steps=250,
        validation_steps=500,
        validation_sampling_steps=25,
        sampling_guidance_scale=1.5,
        evaluation_samples=2000,
        evaluation_reference="fashion-test",
    )


def fashion_latent() -> DistillConfig:
    """The latent teacher into a transformer, in 20 minutes on a CPU core."""
    return DistillConfig(
        output_dir=Path("runs/fashion-latent-dit"),
        teacher="runs/fashion-latent",
        student="dit-xs",
        max_train_steps=2000,
        train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=0.995,
        pool_size=3072,
        fill_steps=10,
        stride="random:50",
        eta=0.0,
        checkpointing_steps=250,
        validation_steps=500,
        validation_sampling_steps=25,
        evaluation_samples=2000,
        evaluation_reference="fashion-test",
    )


def fashion_text() -> DistillConfig:
    """The text-conditional flow, a transformer, into a UNet, in half an hour on a CPU core.

    Its prompts are the 40 captions that `scripts/make_fashion_bases.py` writes.
    """
    return DistillConfig(
        output_dir=Path("runs/fashion-text-unet"),
        teacher="runs/fashion-text",
        prompts="runs/fashion-prompts.txt",
        student="text-unet-tiny",
        max_train_steps=1200,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=0.995,
        condition_dropout=0.1,
        pool_size=3072,
        fill_steps=10,
        stride="random:50",
        eta=0.0,
        checkpointing_steps=250,
        validation_steps=500,
        validation_sampling_steps=25,
        sampling_guidance_scale=1.5,
        evaluation_samples=2000,
        evaluation_reference="fashion-test",
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "fashion-teacher": fashion_teacher,
    "fashion-dit-teacher": fashion_dit_teacher,
    "fashion-latent-teacher": fashion_latent_teacher,
    "fashion-text-teacher": fashion_text_teacher,
    "demo": demo,
    "fashion-small": fashion_small,
    "fashion-flow": fashion_flow,
    "fashion-latent": fashion_latent,
    "fashion-text": fashion_text,
}


def recipe(name: str, kind: type[RunConfig]) -> RunConfig:
    """The config a recipe's name stands for.

    Raises UsageError for an unknown name, and for a recipe of the other command.
    """
    fitting = [key for key, make in RECIPES.items() if isinstance(make(), kind)]
    if name not in fitting:
        raise UsageError(f"unknown recipe '{name}': expected one of {', '.join(fitting)}")
    return RECIPES[name]()
