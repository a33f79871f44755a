"""What one step of distillation costs beside its bare networks, in the same precision and mode.

    python benchmarks/step.py --json step.json    # the paper's pair, 57 M into 14 M, 32x32
    python benchmarks/step.py --quick             # a small pair at batch 16, for a CPU

full: draw, target, loss, backward, clipping, optimizer, average, move of the pool. bare: the
teacher's forward, the student's forward and backward, optimizer and average, on one batch. Rows
with graphs replay both networks as CUDA graphs. On CUDA, launches of kernels and graphs, and waits
of the host for the device, are counted too. Weights are random: speed does not depend on them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dkdm.config import DistillConfig
from dkdm.core.conditioning import Unconditional
from dkdm.core.denoiser import Denoiser
from dkdm.core.prediction import Parameterization
from dkdm.core.trainer import Trainer
from dkdm.models.schedulers import from_scheduler_config, named_config
from dkdm.runs.arms import prepare_source
from dkdm.runs.distill import prepared
from dkdm.students import student_of

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
MODES = {"eager": False, "graphs": True}


def teacher_of(preset: str) -> Denoiser:
    """An untrained eps teacher of 3x32x32 on DDPM's linear betas."""
    process = from_scheduler_config(dict(named_config("ddpm-linear", 1.0)))
    shape, meaning = (3, 32, 32), Parameterization("epsilon")
    like = Denoiser(lambda x, *_, **__: x, process, meaning, shape, Unconditional())
    return student_of(preset, like)


def trainer_of(args: argparse.Namespace, precision: str, graphs: bool) -> Trainer:
    """A run just before its first step, its pool pure noise."""
    config = DistillConfig(
        output_dir=Path(tempfile.mkdtemp()) / "run",
        student=args.student,
        train_batch_size=args.batch,
        pool_size=args.pool_size,
        fill="none",
        stride=args.stride,
        optimizer=args.optimizer,
        mixed_precision=precision,
        cuda_graphs=graphs,
        check=False,
        evaluation_samples=0,
        validation_steps=0,
        report_to="none",
    )
    ready = prepared(config, [teacher_of(args.teacher)])
    prepare_source(ready.trainer.source, ready.teacher, ready.config)
    ready.teacher.network.eval().requires_grad_(False)  # type: ignore[union-attr]
    return ready.trainer


def bare(trainer: Trainer) -> Callable[[], Tensor]:
    """The networks of a trainer, its optimizer and its average, on one batch."""
    student, source = trainer.student_on_teacher_levels, trainer.source
    teacher: Denoiser = source.teacher  # type: ignore[attr-defined]
    batch = source.draw(trainer.training.train_batch_size)
    x, time_fed = batch.x, teacher.network_time[batch.t].to(batch.x.device, torch.float32)
    assert teacher.call is not None and student.call is not None
    teach, learn = teacher.call, student.call

    def step() -> Tensor:
        with torch.no_grad():
            wanted = teach(teacher.network, x, time_fed, {})
        loss = (learn(student.network, x, time_fed, {}) - wanted).square().mean()
        trainer.accelerator.backward(loss)
        trainer._update()
        trainer.step_number += 1
        if trainer.ema is not None:
            trainer.ema.update(trainer.network, trainer.step_number)
        return loss

    return step


def seconds_a_step(step: Callable[[], object], args: argparse.Namespace) -> list[float]:
    """Of each repeat, after the warm-up."""
    found = []
    for count in (args.warmup, *[args.steps] * args.repeats):
        _wait()
        started = time.perf_counter()
        for _ in range(count):
            step()
        _wait()
        found.append((time.perf_counter() - started) / count)
    return found[1:]


def counted(step: Callable[[], object], steps: int = 5) -> dict[str, float]:
    """Launches, and waits of the host, in a step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        _wait()
    events = {event.key: event.count for event in seen.key_averages()}
    launches = sum(events.get(name, 0) for name in LAUNCHES)
    waits = sum(events.get(name, 0) for name in WAITS) - 1  # the last is ours
    return {"launches": launches / steps, "waits": waits / steps}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every precision and mode; full and bare alternate, so that they share the machine's noise."""
    cuda, rows = torch.cuda.is_available(), []
    for precision in args.precisions:
        for mode in MODES if cuda else ("eager",):
            trainer = trainer_of(args, precision, MODES[mode])
            named = {"precision": precision, "mode": mode, "batch": args.batch}
            for what, step in (("full", trainer.step), ("bare", bare(trainer))):
                found = seconds_a_step(step, args)
                row = {**named, "what": what, "ms": 1000 * statistics.median(found)}
                row["images_per_second"] = args.batch / statistics.median(found)
                if cuda:
                    row |= counted(step)
                    row["gib"] = torch.cuda.max_memory_allocated() / 2**30
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
                rows.append(row)
            del trainer, step
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a precision and mode."""
    lines = [
        "| precision | mode | full, ms | images/s | bare, ms | bare / full | launches | waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for full, alone in zip(rows[::2], rows[1::2], strict=True):
        counts = [f"{full[key]:.0f}" if key in full else "" for key in ("launches", "waits")]
        lines.append(
            f"| {full['precision']} | {full['mode']} | {full['ms']:.1f} | "
            f"{full['images_per_second']:.0f} | {alone['ms']:.1f} | "
            f"{alone['ms'] / full['ms']:.2f} | {' | '.join(counts)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small pair, few steps")
    parser.add_argument("--teacher", default="unet-57m")
    parser.add_argument("--student", default="unet-14m")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pool-size", type=int, default=51_200)
    parser.add_argument("--stride", default="1")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"])
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.teacher, args.student, args.precisions = "unet-tiny", "unet-mini", ["no"]
        args.batch, args.pool_size, args.warmup, args.steps = 16, 256, 2, 5
    rows = rows_of(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    threads = torch.get_num_threads()
    print(f"\n{device}, torch {torch.__version__}, {threads} threads\n\n{table(rows)}")
    if args.json:
        about = {"device": device, "torch": torch.__version__, "threads": threads}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
