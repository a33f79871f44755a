"""The authors' code beside ours, on the same weights: a step, and the preparation of a pool.

    python benchmarks/against_reference.py --reference PATH          # the paper's pair
    python benchmarks/against_reference.py --reference PATH --quick  # tiny networks

PATH is the folder `guided-diffusion` of https://github.com/qianlong0502/DKDM, which you fetch
yourself: it has no licence, and nothing of it is in this repository. It runs as it is: its own
training loop, loss, optimizer, averages, log and pool, with what its YAML files say. Names that it
imports and does not need here (mpi4py, blobfile, timm) are given stand-ins. On a CPU it runs in
float32; on CUDA in float16 as shipped too, in DDP of one process.

First both networks are compared on one batch. Steps take turns, block by block; seconds on a CPU
are those of the process. A pool of theirs takes T/2 evaluations an entry, one level after the
other: some levels of one batch are timed, and the rest follows. Ours is --fill few-step, timed as
it is.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, distributed, nn

from dkdm.config import DistillConfig
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.sources.fill import empty_pool, fill_few_step
from dkdm.models import load_teacher
from dkdm.models.options import LoadOptions
from dkdm.runs.arms import prepare_source
from dkdm.runs.distill import prepared

CUDA = torch.cuda.is_available()
TEACHER_BF16 = "teacher-bf16"
NAMES = {"no": "float32", TEACHER_BF16: "float32, --teacher-dtype bfloat16"}
DEVICE = torch.device("cuda" if CUDA else "cpu")
WORK = Path(tempfile.mkdtemp(prefix="against-reference-"))
FLAGS = (  # what a checkpoint of theirs is read by, of what their YAML files hold
    *("image_size", "num_channels", "num_res_blocks", "num_heads", "num_head_channels"),
    *("attention_resolutions", "channel_mult", "dropout", "class_cond", "use_scale_shift_norm"),
    *("resblock_updown", "use_new_attention_order", "learn_sigma", "diffusion_steps"),
    *("noise_schedule", "timestep_respacing", "predict_xstart", "rescale_timesteps"),
)


class Reference:
    """The authors' modules and settings.

    teacher, student: arguments of their networks. pair: their experiment. levels: T.
    """

    def __init__(self, folder: Path, quick: bool, levels: int | None = None) -> None:
        self.modules = imported(folder)
        read = lambda name: yaml.safe_load((folder / "yaml" / name).read_text())  # noqa: E731
        self.diffusion = read("cifar10_32/diffusion.yaml")
        self.pair = read("cifar10_32/exp/CIFAR10-14M-Dynamic-0.4.yaml")
        self.networks = {
            "teacher": read("arch/57M-CNN.yaml"),
            "student": read("arch/14M-CNN.yaml"),
        }
        if quick:
            self.diffusion |= {"diffusion_steps": 100, "timestep_respacing": "100"}
            for arch in self.networks.values():
                arch |= {"num_channels": 32, "num_res_blocks": 1}
        if levels is not None:
            self.diffusion |= {"diffusion_steps": levels, "timestep_respacing": str(levels)}
        self.levels = self.diffusion["diffusion_steps"]
        self.size = self.networks["teacher"]["image_size"]
        self.weights = {name: self._random_weights(name) for name in self.networks}

    def network(self, which: str, half: bool = False) -> tuple[nn.Module, Any]:
        """Their network and its diffusion, with the weights that ours has too."""
        model, diffusion = self._new(which, half)
        model.load_state_dict(self.weights[which])
        model.to(DEVICE)
        return model, diffusion

    def _new(self, which: str, half: bool) -> tuple[nn.Module, Any]:
        known = self.modules.script_util.model_and_diffusion_defaults()
        given = {**self.networks[which], **self.diffusion, "use_fp16": half}
        chosen = {key: given[key] for key in known if key in given}
        make = self.modules.script_util.create_model_and_diffusion
        return make(**{**known, **chosen}, kd=which == "teacher")

    def _random_weights(self, which: str) -> dict[str, Tensor]:
        """Layers that begin at zero are random too: their outputs would be all zero."""
        torch.manual_seed(len(which))
        model, _ = self._new(which, half=False)
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight, std=0.3 / weight[0].numel() ** 0.5)
        return {key: value.clone() for key, value in model.state_dict().items()}

    def ours(self, which: str, dtype: str = "float32") -> Denoiser:
        """The same network, read by dkdm as a checkpoint of theirs, with weights in this type."""
        given = {**self.networks[which], **self.diffusion}
        words = [f"--{key} {given[key]}" for key in FLAGS if given.get(key, "") != ""]
        torch.save(self.weights[which], WORK / f"{which}.pt")
        return load_teacher(
            WORK / f"{which}.pt", options=LoadOptions(dtype=dtype, flags=" ".join(words))
        )


def imported(folder: Path) -> SimpleNamespace:
    """Their modules, with stand-ins for what they import and a step does not use."""
    world = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, rank=0, size=1)
    paths = {"BlobFile": open, "join": os.path.join, "dirname": os.path.dirname}
    blocks = dict.fromkeys(("PatchEmbed", "Attention", "Mlp"), nn.Module)
    stand_ins = {
        "mpi4py": {"MPI": SimpleNamespace(COMM_WORLD=world)},
        "blobfile": {**paths, "exists": os.path.exists},
        "timm": {},
        "timm.models": {},
        "timm.models.vision_transformer": blocks,
    }
    for name, content in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    sys.path.insert(0, str(folder))
    try:
        from guided_diffusion import denoise_fn, dist_util, logger, resample, script_util
        from guided_diffusion import train_util_kd as train
    finally:
        sys.path.remove(str(folder))
        for name in stand_ins:
            del sys.modules[name]
    dist_util.dev = lambda: DEVICE
    logger.configure(str(WORK / "log"), format_strs=["log", "csv"])
    if not distributed.is_initialized():
        where = {"rank": 0, "world_size": 1, "init_method": f"file://{WORK}/rendezvous"}
        distributed.init_process_group("nccl" if CUDA else "gloo", **where)
    return SimpleNamespace(
        denoise_fn=denoise_fn,
        logger=logger,
        resample=resample,
        script_util=script_util,
        train=train,
    )


def their_step(reference: Reference, batch: int, size: int, half: bool) -> Callable[[], object]:
    """A turn of their training loop, of a pool of noise at levels spread evenly."""
    modules, pair = reference.modules, reference.pair
    teacher, over_levels = reference.network("teacher", half)
    student, learns_over = reference.network("student", half)
    if half:
        teacher.convert_to_fp16()  # type: ignore[operator]
    loader = modules.train.KDTeacherLoader(
        over_levels,
        teacher.eval(),
        learns_over,
        class_cond=False,
        batch=batch,
        microbatch=pair["student"]["microbatch"],
        teacher_batch=pair["teacher"]["batch_size"],
        teacher_image_size=reference.size,
        clip_denoised=reference.diffusion["clip_denoised"],
        rank=0,
        world_size=1,
        tempfile=str(_their_pool(reference, batch, size)),
        BATCH=size / batch / reference.levels,
    )
    chosen = pair["student"]
    loop = modules.train.KDTrainLoop(
        teacher,
        over_levels,
        pair["teacher"]["batch_size"],
        False,
        reference.diffusion["clip_denoised"],
        reference.size,
        reference.size,
        loader,
        USE_LOG=False,  # saves nothing
        model=student,
        diffusion=learns_over,
        batch_size=batch,
        use_fp16=half,
        schedule_sampler=modules.resample.create_named_schedule_sampler(
            chosen["schedule_sampler"], learns_over
        ),
        **{key: chosen[key] for key in ("microbatch", "lr", "ema_rate", "log_interval")},
        **{key: chosen[key] for key in ("save_interval", "resume_checkpoint", "weight_decay")},
        **{key: chosen[key] for key in ("fp16_scale_growth", "lr_anneal_steps")},
    )
    batches = loader.iter

    def step() -> None:
        loop.run_step(*next(batches))
        if loop.step % loop.log_interval == 0:
            modules.logger.dumpkvs()
        loop.step += 1

    return step


def _their_pool(reference: Reference, batch: int, size: int) -> Path:
    """A file of theirs with a pool of noise; they want whole batches."""
    drawn = torch.Generator().manual_seed(0)
    t = torch.randint(0, reference.levels, (size,), generator=drawn)
    x = torch.randn(size, 3, reference.size, reference.size, generator=drawn)
    path = WORK / f"pool-{batch}-{size}.cache"
    path.write_bytes(pickle.dumps({"total_t": t.numpy(), "total_x_t_1": x.numpy()}, protocol=4))
    return path


def our_step(reference: Reference, batch: int, size: int, precision: str) -> Callable[[], object]:
    """A step of our trainer, with the settings of theirs."""
    dtype = "bfloat16" if precision == TEACHER_BF16 else "float32"
    config = DistillConfig(
        output_dir=WORK / "run",
        train_batch_size=batch,
        pool_size=size,
        fill="none",
        learning_rate=1e-4,
        optimizer="adamw",
        mixed_precision="no" if precision == TEACHER_BF16 else precision,
        check=False,
        evaluation_samples=0,
        validation_steps=0,
        report_to="none",
    )
    ready = prepared(config, [reference.ours("teacher", dtype)], reference.ours("student"))
    source: Any = ready.trainer.source
    prepare_source(source, ready.teacher, ready.config)
    source.t.copy_(torch.randint(0, reference.levels, source.t.shape))
    ready.teacher.network.eval().requires_grad_(False)  # type: ignore[union-attr]
    return ready.trainer.step


@torch.no_grad()
def agreement(reference: Reference) -> dict[str, float]:
    """Largest difference of both implementations' outputs on one batch, float32."""
    x = torch.randn(4, 3, reference.size, reference.size, device=DEVICE)
    t = torch.linspace(0, reference.levels - 1, 4, device=DEVICE).round()
    found = {}
    for which in reference.networks:
        theirs, ours = reference.network(which)[0].eval(), reference.ours(which).network
        assert isinstance(ours, nn.Module)
        apart = (theirs(x, t) - ours.to(DEVICE).eval()(x, t)).abs().max()
        found[which] = float(apart)
        if not found[which] < 1e-4:
            raise SystemExit(f"the {which}'s two implementations differ by {found[which]:.3g}")
    return found


def seconds(work: Callable[[], object], count: int = 1) -> float:
    """Of one call, on average over `count`."""
    clock = time.perf_counter if CUDA else time.process_time
    _wait()
    started = clock()
    for _ in range(count):
        work()
    _wait()
    return (clock() - started) / count


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def steps(reference: Reference, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every precision of theirs and ours, in turns."""
    size = args.pool_batches * args.batch
    sides = {"theirs, fp16": their_step(reference, args.batch, size, half=True)} if CUDA else {}
    sides["theirs, float32"] = their_step(reference, args.batch, size, half=False)
    for precision in args.precisions:
        name = f"ours, {NAMES.get(precision, precision)}"
        sides[name] = our_step(reference, args.batch, size, precision)
    blocks: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        seconds(step, args.warmup)
    for _ in range(args.repeats):
        for name, step in sides.items():
            blocks[name].append(seconds(step, args.steps))
    base = blocks[next(iter(blocks))]
    return [
        {
            "what": name,
            "ms": 1000 * statistics.median(each),
            "images_per_second": args.batch / statistics.median(each),
            "times_as_fast": statistics.median([b / e for b, e in zip(base, each, strict=True)]),
        }
        for name, each in blocks.items()
    ]


def preparations(reference: Reference, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per 1,000 entries of a pool."""
    half = CUDA
    model, diffusion = reference.network("teacher", half)
    if half:
        model.convert_to_fp16()  # type: ignore[operator]
    model.eval()
    batch = args.teacher_batch
    x = torch.randn(batch, 3, reference.size, reference.size, device=DEVICE)

    def walk() -> None:
        t = torch.full((batch,), reference.levels, device=DEVICE)
        end = t - args.timed_levels
        walked = reference.modules.denoise_fn.manage_denoise_fn
        walked(model, x.clone(), t, end, batch, True, diffusion)

    teacher = reference.ours("teacher")
    network = teacher.network
    assert isinstance(network, nn.Module)
    network.to(DEVICE).eval().requires_grad_(False)
    fill_steps = min(DistillConfig().pool.fill_steps, reference.levels)

    def fill() -> None:
        pool = empty_pool(teacher, args.fill_entries, DEVICE, torch.float32)
        with contextlib.redirect_stderr(io.StringIO()):
            fill_few_step(pool, fill_steps, args.batch, entries=args.entries_a_sample)

    evaluations = {"theirs": reference.levels / 2, "ours": fill_steps / args.entries_a_sample}
    fill()
    walk()
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(args.repeats):
        times["theirs"].append(seconds(walk) / args.timed_levels / batch)
        times["ours"].append(seconds(fill) / evaluations["ours"] / args.fill_entries)
    rows = []
    for name, each in times.items():
        one = statistics.median(each)
        rows.append(
            {
                "what": name,
                "evaluations_an_entry": evaluations[name],
                "ms_an_evaluation": 1000 * one,
                "seconds_per_1000": 1000 * one * evaluations[name],
            }
        )
    for row in rows:
        row["times_as_fast"] = rows[0]["seconds_per_1000"] / row["seconds_per_1000"]
    return rows


PARTS = {"steps": steps, "preparation": preparations}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(key.replace("_", " ") for key in rows[0]) + " |"]
    lines.append("|---" * len(rows[0]) + "|")
    for row in rows:
        shown = [f"{v:,.3g}" if isinstance(v, float) and v < 1000 else f"{v}" for v in row.values()]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """What is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="tiny networks, 100 levels")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--levels", type=int, help="T; None: theirs, or 100 with --quick")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pool-batches", type=int, default=400, help="batches in the pool")
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"] if CUDA else ["no"])
    parser.add_argument("--warmup", type=int, default=10 if CUDA else 1)
    parser.add_argument("--steps", type=int, default=10 if CUDA else 1, help="in a block")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--teacher-batch", type=int, default=3072, help="of their preparation")
    parser.add_argument("--timed-levels", type=int, default=6)
    parser.add_argument("--fill-entries", type=int, default=1024, help="in our pool")
    parser.add_argument("--entries-a-sample", type=int, default=1, help="--fill-entries of dkdm")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.batch, args.pool_batches, args.warmup, args.steps = 16, 40, 2, 2
        args.teacher_batch, args.timed_levels, args.fill_entries = 64, 2, 64
    if not (args.reference / "guided_diffusion").is_dir():
        parser.error(f"--reference {args.reference}: give the folder guided-diffusion of theirs")
    return args


def main() -> None:
    """Measure and print two tables."""
    args = options()
    random.seed(0)
    reference = Reference(args.reference.resolve(), args.quick, args.levels)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "batch": args.batch,
        "largest_difference": agreement(reference),
    }
    print(json.dumps(found))
    for name in args.parts:
        found[name] = PARTS[name](reference, args)
        print(f"\n{table(found[name])}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
