"""What one step of distillation costs beside its bare networks, in the same precision and mode.

    python benchmarks/step.py --json step.json     # the paper's pair, 57 M into 14 M, 32x32
    python benchmarks/step.py --batches 16 128 1024 --pool-sizes 1000 51200 1000000
    python benchmarks/step.py --quick              # a small pair at batch 16, for a CPU

full: draw, target, loss, backward, clipping, optimizer, average, move of the pool. bare: the
teacher's forward, the student's forward and backward, clipping, optimizer and average, on one
batch. Both take turns, block by block, so that other work slows them alike; bare / full is the
median over the blocks. On a CPU, seconds are those of the process, which other processes do not
lengthen (--clock wall: those of the clock). Parts are timed in a run of their own, waiting for the
device after each. On CUDA, launches of kernels and graphs, and waits of the host for the device,
are counted. Memory is the allocator's peak: on CUDA that of torch, on a CPU that of torch's
profiler, from an empty process to the end of a step. Weights are random: speed does not depend on
them.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dkdm.config import DistillConfig
from dkdm.core.captured.step import WholeStep
from dkdm.core.denoisers.calls import Call
from dkdm.core.denoisers.conditioning import Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.training.trainer import Trainer
from dkdm.evaluation.memory import peak_allocated
from dkdm.models.schedulers import from_scheduler_config, named_config
from dkdm.runs.arms import prepare_source
from dkdm.runs.distill import prepared
from dkdm.students import student_of

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
MODES: dict[str, dict[str, Any]] = {
    "eager": {"accelerate": "off"},
    "graphs": {"accelerate": "networks"},
    "graph": {"accelerate": "graph"},
}
CUDA = torch.cuda.is_available()
Step = Callable[[], object]


def teacher_of(preset: str) -> Denoiser:
    """An untrained eps teacher of 3x32x32 on DDPM's linear betas."""
    process = from_scheduler_config(dict(named_config("ddpm-linear", 1.0)))
    shape, meaning = (3, 32, 32), Parameterization("epsilon")
    like = Denoiser(lambda x, *_, **__: x, process, meaning, shape, Unconditional())
    return student_of(preset, like)


def trainer_of(args: argparse.Namespace, **options: Any) -> Trainer:
    """A run just before its first step, its pool pure noise at levels spread evenly."""
    config = DistillConfig(
        output_dir=Path(tempfile.mkdtemp()) / "run",
        student=args.student,
        fill="none",
        stride=args.stride,
        optimizer=args.optimizer,
        pool_device=args.pool_device,
        pool_dtype=args.pool_dtype,
        check=False,
        evaluation_samples=0,
        validation_steps=0,
        report_to="none",
        **options,
    )
    ready = prepared(config, [teacher_of(args.teacher)])
    source = ready.trainer.source
    prepare_source(source, ready.teacher, ready.config)
    levels = torch.randint(source.process.num_levels, source.t.shape)  # type: ignore[attr-defined]
    source.t.copy_(levels)  # type: ignore[attr-defined]
    ready.teacher.network.eval().requires_grad_(False)  # type: ignore[union-attr]
    return ready.trainer


def bare(trainer: Trainer) -> Step:
    """The networks of a trainer, its optimizer and its average, on one batch.

    In one CUDA graph, if that is how the trainer's own steps are made.
    """
    student, source = trainer.student_on_teacher_levels, trainer.source
    teacher: Denoiser = source.teacher  # type: ignore[attr-defined]
    batch = source.draw(trainer.training.train_batch_size)
    x, time_fed = batch.x, teacher.network_time[batch.t].to(batch.x.device, torch.float32)
    assert teacher.call is not None and student.call is not None
    teach, learn = teacher.call, student.call

    def loss_of(teach: Call, learn: Call) -> Tensor:
        with torch.no_grad():
            wanted = teach(teacher.network, x, time_fed, {})
        return (learn(student.network, x, time_fed, {}) - wanted).square().mean()

    whole = trainer.replay
    if isinstance(whole, WholeStep):
        part = whole.part
        alone = partial(loss_of, part.teacher.call, part.student.call)
        return whole.make({"bare": [lambda: alone().backward(), part.update]})["bare"]

    def step() -> Tensor:
        loss = loss_of(teach, learn)
        trainer.accelerator.backward(loss)
        trainer._update(loss.detach())
        trainer.step_number += 1
        if trainer.ema is not None:
            trainer.ema.update(trainer.network, trainer.step_number)
        return loss

    return step


def seconds(step: Step, count: int, wall: bool) -> float:
    """Of a step, on average over `count`."""
    clock = time.perf_counter if wall else time.process_time
    _wait()
    started = clock()
    for _ in range(count):
        step()
    _wait()
    return (clock() - started) / count


@contextmanager
def timed(owner: Any, method: str, name: str, found: dict[str, float]) -> Iterator[None]:
    """While inside, add the seconds that a method takes to those of `name`."""
    kept, clock = getattr(owner, method), time.perf_counter if CUDA else time.process_time

    def measured(*args: Any, **kwargs: Any) -> Any:
        _wait()
        started = clock()
        result = kept(*args, **kwargs)
        _wait()
        found[name] = found.get(name, 0.0) + clock() - started
        return result

    setattr(owner, method, measured)
    try:
        yield
    finally:
        setattr(owner, method, kept)


def shares_of_parts(trainer: Trainer, steps: int) -> dict[str, float]:
    """Share of a step that each of its parts takes; the rest is what lies between them."""
    found: dict[str, float] = {}
    parts = {
        "draw": (trainer.source, "draw"),
        "teacher": (trainer.source, "target"),
        "student": (trainer.learner, "objective"),
        "backward": (trainer.accelerator, "backward"),
        "optimizer": (trainer, "_update"),
        "move": (trainer.source, "advance"),
    }
    parts |= {} if trainer.ema is None else {"average": (trainer.ema, "update")}
    with ExitStack() as stack:
        for name, (owner, method) in parts.items():
            stack.enter_context(timed(owner, method, name, found))
        total = seconds(trainer.step, steps, wall=CUDA) * steps
    shares = {name: value / total for name, value in found.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def counted(step: Step, steps: int = 5) -> dict[str, float]:
    """Launches, and waits of the host, in a step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        _wait()
    events = {event.key: event.count for event in seen.key_averages()}
    launches = sum(events.get(name, 0) for name in LAUNCHES)
    waits = sum(events.get(name, 0) for name in WAITS) - 1  # the last is ours
    return {"launches": launches / steps, "waits": waits / steps}


def peak_mib(args: argparse.Namespace, options: dict[str, Any]) -> float:
    """Largest memory that the allocator gave out, from before the models until after a step."""

    def begin_and_step() -> None:
        trainer_of(args, **options).step()

    return peak_allocated(begin_and_step) / 2**20


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def row_of(args: argparse.Namespace, precision: str, mode: str, batch: int, size: int) -> dict:
    """One setting."""
    options = {"mixed_precision": precision, "train_batch_size": batch, "pool_size": size}
    options |= MODES[mode]
    found: dict[str, Any] = {"precision": precision, "mode": mode, "batch": batch, "pool": size}
    if args.memory:
        found["mib"] = peak_mib(args, options)
    trainer, wall = trainer_of(args, **options), CUDA or args.clock == "wall"
    trainer.step()  # makes its graph
    found["captured"] = isinstance(trainer.replay, WholeStep)  # which stderr says why not
    full, alone = trainer.step, bare(trainer)
    blocks: dict[str, list[float]] = {"full": [], "bare": []}
    for step in (full, alone):
        seconds(step, args.warmup, wall)
    for _ in range(args.repeats):
        for name, step in (("full", full), ("bare", alone)):
            blocks[name].append(seconds(step, args.steps, wall))
    ratios = [b / f for f, b in zip(blocks["full"], blocks["bare"], strict=True)]
    found |= {f"{name}_ms": 1000 * statistics.median(each) for name, each in blocks.items()}
    found |= {"ratio": statistics.median(ratios), "images_per_second": batch * 1000}
    found["images_per_second"] /= found["full_ms"]
    found["shares"] = shares_of_parts(trainer, args.steps)
    return found | (counted(full) if CUDA else {})


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a setting."""
    columns = {
        "precision": "precision",
        "mode": "mode",
        "batch": "batch",
        "pool": "pool",
        "full_ms": "full, ms",
        "images_per_second": "images/s",
        "bare_ms": "bare, ms",
        "ratio": "bare / full",
        "mib": "peak, MiB",
        "launches": "launches",
        "waits": "waits",
    }
    shown = [key for key in columns if any(key in row for row in rows)]
    lines = [f"| {' | '.join(columns[key] for key in shown)} |", "|---" * len(shown) + "|"]
    lines += [f"| {' | '.join(_in_words(row.get(key, '')) for key in shown)} |" for row in rows]
    parts = list(rows[0]["shares"])
    lines += ["", f"| batch | pool | {' | '.join(parts)} |", "|---" * (len(parts) + 2) + "|"]
    for row in rows:
        each = " | ".join(f"{row['shares'].get(part, 0):.1%}" for part in parts)
        lines.append(f"| {row['batch']} | {row['pool']:,} | {each} |")
    return "\n".join(lines)


def _in_words(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def options() -> argparse.Namespace:
    """What is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small pair, few steps")
    parser.add_argument("--teacher", default="unet-57m")
    parser.add_argument("--student", default="unet-14m")
    parser.add_argument("--batches", type=int, nargs="+", default=[128])
    parser.add_argument("--pool-sizes", type=int, nargs="+", default=[51_200])
    parser.add_argument("--pool-device", default="device", choices=("device", "cpu", "disk"))
    parser.add_argument("--pool-dtype", default="float32", choices=("float32", "float16"))
    parser.add_argument("--stride", default="1")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"])
    parser.add_argument("--modes", nargs="+", default=list(MODES) if CUDA else ["eager"])
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="in a block")
    parser.add_argument("--repeats", type=int, default=9, help="blocks of each, in turns")
    parser.add_argument("--clock", default="process", choices=("process", "wall"), help="on a CPU")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.teacher, args.student, args.precisions = "unet-tiny", "unet-mini", ["no"]
        args.batches, args.pool_sizes, args.warmup, args.steps = [16], [1000], 2, 3
    return args


def main() -> None:
    """Measure and print tables."""
    args, rows = options(), []
    settings = itertools.product(args.precisions, args.modes, args.batches, args.pool_sizes)
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    about = {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    about |= {"torch": str(torch.__version__), "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    about |= {"teacher": args.teacher, "student": args.student, "optimizer": args.optimizer}
    for setting in settings:
        rows.append(row_of(args, *setting))
        print(json.dumps(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()) + f"\n\n{table(rows)}")


if __name__ == "__main__":
    main()
