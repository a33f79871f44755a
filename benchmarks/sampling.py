"""Sampling beside the stock pipelines of diffusers: the same network, steps, batch and threads.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py [--rounds 5] [--networks small nothing]

Both sides draw in turns, each round in another order. A ratio is the time of diffusers divided by
that of dkdm, of the medians and of the fastest rounds: 1 or more is not slower. `nothing` is a
network that costs nothing, so that what surrounds it is left. One step of a few-step student stands
beside its bare network, to which dkdm adds the reading of the output. One thread on a CPU is timed
by the clock of the process, which other processes do not stretch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.few_steps.grid import grid_levels, grid_of
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.models.place import place, ready_to_draw
from dkdm.models.schedulers import from_scheduler_config
from dkdm.students.heads import with_heads

ROUNDS = 5
SIZES = {
    "nothing": {"block_out_channels": (32, 64, 96), "layers_per_block": 1, "sample_size": 16},
    "small": {"block_out_channels": (32, 64, 96), "layers_per_block": 1, "sample_size": 16},
    "paper": {"block_out_channels": (64, 128, 192), "layers_per_block": 3, "sample_size": 32},
}


class Nothing(UNet2DModel):
    """A network that answers with half of its input."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Half of the input."""
        del timestep, class_labels
        found = 0.5 * sample
        return UNet2DOutput(sample=found) if return_dict else (found,)


class Times(NamedTuple):
    """Seconds of a round: the median and the least."""

    median: float
    least: float


def network(size: str) -> UNet2DModel:
    """A UNet2DModel with attention at its lower resolutions, of random weights."""
    kind = Nothing if size == "nothing" else UNet2DModel
    return kind(
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


def in_turns(works: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, Times]:
    """The seconds of each after one round that warms up."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works)[:: (-1) ** number]:
            started = clock()
            works[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times[name].append(clock() - started)
    return {name: Times(median(each[1:]), min(each[1:])) for name, each in times.items()}


@torch.no_grad()
def bare(unet: torch.nn.Module, batch: int, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Noise, one evaluation of a network in evaluation mode, and the result on the CPU."""
    x = torch.randn(batch, *shape).to(device)
    return unet(x, torch.full((batch,), 999.0, device=device), return_dict=False)[0].cpu()


def rows(size: str, batch: int, rounds: int, device: str) -> list[tuple[str, Times, Times]]:
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
        seconds = in_turns(works, rounds, device)
        label = f"{name}, {steps} step{'s' if steps > 1 else ''}"
        found.append((label, seconds["diffusers"], seconds["dkdm"]))
    if size == "nothing":  # whose last layer says nothing, so that heads cannot be told apart
        return found
    plain = denoiser(network(size), DDIMScheduler())
    grid = grid_of(plain, plain.process, grid_levels(plain.process, 8), (1, 8))
    student = with_heads(plain, grid)
    place(student, torch.device(device))
    student.network.eval()
    once = Sampling(batch, 1, 0, "ddim", batch)
    own = ready_to_draw(student, True)
    seconds = in_turns(
        {
            "bare": partial(bare, student.network, batch, student.sample_shape, device),
            "dkdm": lambda: draw(own, {}, once),
        },
        rounds,
        device,
    )
    return [*found, ("few-step student, 1 step", seconds["bare"], seconds["dkdm"])]


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    print(f"{options.device}, {torch.get_num_threads()} thread(s), batch {options.batch_size}\n")
    print("| network | what | diffusers, ms | dkdm, ms | of medians | of the fastest |")
    print("|---|---|---|---|---|---|")
    for size in options.networks:
        for what, stock, own in rows(size, options.batch_size, options.rounds, options.device):
            seconds = f"{1e3 * stock.median:.2f} | {1e3 * own.median:.2f}"
            ratios = f"{stock.median / own.median:.3f} | {stock.least / own.least:.3f}"
            print(f"| {size} | {what} | {seconds} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
