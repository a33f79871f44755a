"""What distilling SDXL- and Flux-sized teachers into a 1 B student takes, on 1 to 1,024 devices.

    python benchmarks/scaling.py                  # prints the tables of docs/scaling.md
    python benchmarks/scaling.py --write          # writes them there

Each line is `dkdm plan FOLDER STUDENT --gpus N ...`, of folders that hold configs alone: nothing is
allocated, nothing is measured. The command of each line can be had by --folders DIR, which keeps
the folders.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from dkdm.checks.memory_plan import GIB, MemoryPlan, PlannedRun, plan_of_sizes, sizes
from dkdm.config import PlanOptions
from dkdm.models.options import LoadOptions
from dkdm.models.sketch import sketch_teacher
from dkdm.runs.scale import Scale, scale_of_work, work_of

DOC = Path(__file__).parents[1] / "docs" / "scaling.md"
DEVICES = (1, 8, 64, 256, 1024)
STEPS = 100_000
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
EPS = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
CLIP, T5 = ["transformers", "CLIPTextModel"], ["transformers", "T5EncoderModel"]


class Case(NamedTuple):
    """A teacher's folder, a student's config, and what a device does.

    each: samples of a batch for each device.
    """

    name: str
    pipeline: str
    component: str
    network: dict[str, Any]
    student: dict[str, Any]
    scheduler: dict[str, Any]
    autoencoder: dict[str, Any]
    parts: dict[str, list[str]]
    each: int
    size: tuple[int, int]


CASES = {
    "sdxl": Case(
        "SDXL-sized teacher",
        "StableDiffusionXLPipeline",
        "unet",
        UNET,
        {
            **UNET,
            "attention_head_dim": [3, 7, 13],
            "block_out_channels": [192, 448, 832],
            "transformer_layers_per_block": [1, 2, 9],
        },
        EPS,
        {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]},
        {
            "text_encoder": CLIP,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        },
        8,
        (128, 128),
    ),
    "flux": Case(
        "Flux-sized teacher",
        "FluxPipeline",
        "transformer",
        TRANSFORMER,
        {**TRANSFORMER, "num_layers": 6, "num_single_layers": 13, "num_attention_heads": 12},
        FLOW,
        {"latent_channels": 16, "block_out_channels": [128, 256, 512, 512]},
        {
            "text_encoder": CLIP,
            "text_encoder_2": T5,
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
        },
        8,
        (128, 128),
    ),
}


def written(case: Case, folder: Path) -> Path:
    """The folder of a teacher, without weights, and beside it the student's config.json."""
    blocks = len(case.autoencoder["block_out_channels"])
    autoencoder = {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        **case.autoencoder,
    }
    index = {
        "_class_name": case.pipeline,
        case.component: ["diffusers", case.network["_class_name"]],
        "scheduler": ["diffusers", case.scheduler["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
        **case.parts,
    }
    files = {
        "model_index.json": index,
        f"{case.component}/config.json": case.network,
        "scheduler/scheduler_config.json": case.scheduler,
        "vae/config.json": autoencoder,
        "student.json": case.student,
        **{f"{part}/config.json": {} for part in case.parts},  # not read
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def planned(case: Case, folder: Path, devices: tuple[int, ...]) -> list[tuple[MemoryPlan, Scale]]:
    """What `dkdm plan` says of it for each number of devices; both networks are measured once."""
    teacher = sketch_teacher(str(folder), LoadOptions(sample_size=case.size, dtype="bfloat16"))
    assert teacher is not None
    runs = [run_of(case, folder, gpus) for gpus in devices]
    measured, counted = sizes(teacher, runs[0], case.each), work_of(teacher, runs[0])
    found = []
    for gpus, run in zip(devices, runs, strict=True):
        memory = plan_of_sizes(measured, teacher, run, gpus)
        found.append((memory, scale_of_work(counted, teacher, memory, PlanOptions())))
    return found


def run_of(case: Case, folder: Path, gpus: int) -> PlannedRun:
    """The options of a line."""
    return PlannedRun(
        student=str(folder / "student.json"),
        teacher_dtype="bfloat16",
        mixed_precision="bf16",
        gradient_checkpointing=True,
        train_batch_size=case.each * gpus,
        max_train_steps=STEPS,
        pool_device="cpu",
        pool_dtype="float16",
        pool_size=4096 * gpus,
        fill_entries=1,
        optimizer="adamw",
    )


def command(case: Case, gpus: int) -> str:
    """The same on the command line."""
    size = " ".join(map(str, case.size))
    return (
        f"dkdm plan {case.pipeline} {case.pipeline}/student.json --gpus {gpus} --teacher-size "
        f"{size} --teacher-dtype bfloat16 --mixed-precision bf16 --gradient-checkpointing "
        f"--train-batch-size {case.each * gpus} --max-train-steps {STEPS} --pool-device cpu "
        f"--pool-dtype float16 --pool-size {4096 * gpus} --fill-entries 1 "
        "--optimizer adamw"
    )


def row(found: MemoryPlan, work: Scale) -> str:
    """A line of the table."""
    low, high = work.hours
    return (
        f"| {work.gpus:,} | {found.run.training.train_batch_size:,} "
        f"| {found.device_total / GIB:,.1f} | {sum(found.host.values()) / GIB:,.1f} "
        f"| {work.entries:,} | {work.preparing / 1e6:,.1f} + {work.training / 1e6:,.1f} "
        f"| {work.sent / 2**30:,.2f} | {work.checkpoint / 2**30:,.1f} "
        f"| {low:,.0f} to {high:,.0f} |"
    )


HEAD = (
    "| devices | batch | GiB a device | GiB on its host | entries of the pool "
    "| teacher evaluations, M: prepare + train | GiB sent by a device in a step "
    "| checkpoint, GiB | hours |\n" + "|---" * 9 + "|"
)


def table(case: Case, folder: Path, devices: tuple[int, ...] = DEVICES) -> str:
    """The Markdown table of a case."""
    found = planned(case, written(case, folder), devices)
    return "\n".join([HEAD, *(row(*each) for each in found)])


def in_document(text: str, name: str) -> str:
    """The table that stands in the document between its marks."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found is not None, f"docs/scaling.md has no marks for {name}"
    return found[1]


def main() -> None:
    """Print the tables, or write them into the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folders", type=Path, help="keep the folders of configs there")
    args = parser.parse_args()
    kept = args.folders or Path(tempfile.mkdtemp())
    text = DOC.read_text() if args.write else ""
    for name, case in CASES.items():
        found = table(case, kept / case.pipeline)
        print(f"{case.name}\n\n    {command(case, DEVICES[1])}\n\n{found}\n", flush=True)
        if args.write:
            before = in_document(text, name)
            text = text.replace(f"<!-- {name} -->\n{before}", f"<!-- {name} -->\n{found}")
    if args.write:
        DOC.write_text(text)


if __name__ == "__main__":
    main()
