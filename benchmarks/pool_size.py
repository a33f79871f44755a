"""What drawing from a pool and moving it costs, by its size: microseconds of the process a step.

    python benchmarks/pool_size.py --shape 3 32 32 --dtype float16 --folder /var/tmp

Pools of all sizes lie side by side and take turns. The teacher costs nothing. With --folder another
of each size lies on that folder's disk; what was written is brought to the disk before each block,
so that pages are clean, as they are after a while.
"""

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path

import torch

from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.core.sources.chains import Stride
from dkdm.core.sources.fill import empty_pool
from dkdm.core.sources.pool import Pool

LEVELS = 1000


def pool_of(size: int, folder: Path | None, args: argparse.Namespace) -> Pool:
    """A pool of noise at levels spread evenly, of ten classes."""
    process = from_betas(beta_schedule("squaredcos_cap_v2", LEVELS))
    classes, shape = ClassLabels(10, null_class=10), tuple(args.shape)
    teacher = Denoiser(lambda x, *_, **__: x, process, Parameterization("epsilon"), shape, classes)
    where, dtype = torch.device("cpu"), getattr(torch, args.dtype)
    pool = empty_pool(teacher, size, where, dtype, folder=folder, stride=Stride(1, 199))
    pool.t.copy_(torch.randint(LEVELS, (size,), generator=torch.Generator().manual_seed(0)))
    return pool


def microseconds(pool: Pool, batch_size: int, steps: int) -> float:
    """Median of the steps."""
    found = []
    for _ in range(steps):
        started = time.process_time()
        batch = pool.draw(batch_size)
        pool.advance(batch, pool.target(batch))
        found.append(time.process_time() - started)
    return 1e6 * statistics.median(found)


def main() -> None:
    """Measure and print one line a size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 200_000, 1_000_000])
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 8, 8])
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="in a block")
    parser.add_argument("--repeats", type=int, default=12, help="blocks of each size, in turns")
    args = parser.parse_args()
    places = {"memory": None} | ({"disk": args.folder} if args.folder else {})
    both = itertools.product(places, args.sizes)
    pools = {(place, size): pool_of(size, places[place], args) for place, size in both}
    for pool in pools.values():
        microseconds(pool, args.batch, args.steps)  # a warm-up
    found: dict[tuple[str, int], list[float]] = {key: [] for key in pools}
    for _ in range(args.repeats):
        for key, pool in pools.items():
            os.sync()
            found[key].append(microseconds(pool, args.batch, args.steps))
    middles = {key: statistics.median(each) for key, each in found.items()}
    print("| where | entries | us a step | times the first | times memory |\n|---|---|---|---|---|")
    for (place, size), middle in middles.items():
        ratios = middle / middles[place, args.sizes[0]], middle / middles["memory", size]
        print(f"| {place} | {size:,} | {middle:,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
