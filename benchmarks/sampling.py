"""Sampling beside the stock pipelines of diffusers: the same network, steps, batch and threads.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py [--rounds 5] [--networks small]

Both sides draw in turns. A ratio is the time of diffusers divided by that of dkdm, of the fastest
rounds: 1 or more is not slower. One step of a few-step student stands beside its bare network, to
which dkdm adds the noise and the reading of the output.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from dkdm.core.denoiser import Denoiser
from dkdm.core.few_steps.grid import grid_levels, grid_of
from dkdm.core.prediction import Parameterization
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.models.place import place, ready_to_draw
from dkdm.models.schedulers import from_scheduler_config
from dkdm.students.heads import with_heads

SIZES = {
    "small": {"block_out_channels": (32, 64, 96), "layers_per_block": 1, "sample_size": 16},
    "paper": {"block_out_channels": (64, 128, 192), "layers_per_block": 3, "sample_size": 32},
}


def network(size: str) -> UNet2DModel:
    """A UNet2DModel with attention at its lower resolutions, of random weights."""
    return UNet2DModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        **SIZES[size],
    ).eval()


def denoiser(unet: UNet2DModel, scheduler: DDIMScheduler | DDPMScheduler) -> Denoiser:
    """The same model as a Denoiser."""
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    size = unet.config.sample_size
    process = from_scheduler_config(config)
    return Denoiser(unet, process, Parameterization("epsilon"), (3, size, size))


def in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: min(each[1:]) for name, each in times.items()}


@torch.no_grad()
def bare(unet: torch.nn.Module, batch: int, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Noise, one evaluation, and the result on the CPU."""
    x = torch.randn(batch, *shape).to(device)
    return unet(x, torch.full((batch,), 999.0, device=device), return_dict=False)[0].cpu()


def rows(size: str, batch: int, rounds: int, device: str) -> list[tuple[str, float, float]]:
    """(what, seconds of diffusers, seconds of dkdm) of each case."""
    unet, found = network(size).to(device), []
    cases = [("DDIM", DDIMPipeline, DDIMScheduler(), steps, "ddim") for steps in (20, 1)]
    cases += [("DDPM", DDPMPipeline, DDPMScheduler(), 20, "ddpm")]
    for name, pipeline, scheduler, steps, sampler in cases:
        stock = pipeline(unet, scheduler)
        stock.set_progress_bar_config(disable=True)
        model = ready_to_draw(denoiser(unet, scheduler), True)
        how = Sampling(batch, steps, 0, sampler, batch)
        asked = {"batch_size": batch, "num_inference_steps": steps, "output_type": "np"}
        works: dict[str, Callable[[], object]] = {
            "diffusers": partial(stock, **asked),
            "dkdm": lambda model=model, how=how: model.to_pixels(draw(model, {}, how)),
        }
        seconds = in_turns(works, rounds)
        label = f"{name}, {steps} step{'s' if steps > 1 else ''}"
        found.append((label, seconds["diffusers"], seconds["dkdm"]))
    plain = denoiser(network(size), DDIMScheduler())
    grid = grid_of(plain, plain.process, grid_levels(plain.process, 8), (1, 8))
    student = with_heads(plain, grid)
    place(student, torch.device(device))
    once = Sampling(batch, 1, 0, "ddim", batch)
    own = ready_to_draw(student, True)
    seconds = in_turns(
        {
            "bare": partial(bare, student.network, batch, student.sample_shape, device),
            "dkdm": lambda: draw(own, {}, once),
        },
        rounds,
    )
    return [*found, ("few-step student, 1 step", seconds["bare"], seconds["dkdm"])]


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    print(f"{options.device}, {torch.get_num_threads()} thread(s), batch {options.batch_size}\n")
    print("| network | what | diffusers, s | dkdm, s | ratio |")
    print("|---|---|---|---|---|")
    for size in options.networks:
        for what, stock, own in rows(size, options.batch_size, options.rounds, options.device):
            print(f"| {size} | {what} | {stock:.3f} | {own:.3f} | {stock / own:.3f} |", flush=True)


if __name__ == "__main__":
    main()
