"""What --deterministic costs: the same steps with and without it, by turns in one process.

    python benchmarks/deterministic.py [--students dit-tiny unet-mini] [--batch-size 64]

Each of `--turns` takes `--steps` steps each way. CPU seconds of this process are compared, which
other work on the machine hardly changes; on a CUDA device seconds between two synchronizations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dkdm import DistillConfig
from dkdm.core.training.trainer import Trainer
from dkdm.runs.distill import prepared


def trainer_of(student: str, batch_size: int, folder: Path) -> Trainer:
    """A trainer of the embedded teacher, its pool unfilled."""
    config = DistillConfig(
        output_dir=folder / "run",
        student=student,
        train_batch_size=batch_size,
        fill="none",
        evaluation_samples=0,
        validation_steps=0,
        report_to="none",
        max_train_steps=10_000,
    )
    return prepared(config).trainer


def seconds(trainer: Trainer, steps: int) -> float:
    """Of one step, over so many."""
    on_cuda = trainer.accelerator.device.type == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time
    if on_cuda:
        torch.cuda.synchronize()
    started = clock()
    for _ in range(steps):
        trainer.step()
    if on_cuda:
        torch.cuda.synchronize()
    return (clock() - started) / steps


def main() -> None:
    """Print a row of a table for each student."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", nargs="+", default=["dit-tiny", "unet-mini"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {given.batch_size}")
    for student in given.students:
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(student, given.batch_size, Path(folder))
            seconds(trainer, given.steps)
            found: dict[bool, list[float]] = {False: [], True: []}
            for turn in range(given.turns):
                for mode in (False, True) if turn % 2 else (True, False):
                    torch.use_deterministic_algorithms(mode)
                    found[mode].append(seconds(trainer, given.steps))
            torch.use_deterministic_algorithms(False)
        ratios = sorted(on / off for off, on in zip(found[False], found[True], strict=True))
        off, on = (1000 * statistics.median(found[mode]) for mode in (False, True))
        middle = statistics.median(ratios)
        low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
        print(
            f"| {student} | {off:.1f} ms | {on:.1f} ms | {middle:.3f} ({low:.3f} to {high:.3f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
