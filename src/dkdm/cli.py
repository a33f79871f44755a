"""The command line: `dkdm COMMAND ...`, nothing but parsing, calling and printing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro
from rich.console import Console

from dkdm.config import (
    DistillConfig,
    RunConfig,
    StudentChoice,
    TeacherChoice,
    TrainConfig,
    from_mapping,
)
from dkdm.errors import DkdmError, UsageError
from dkdm.reading.fields import read_json
from dkdm.reading.made_here import was_made_here
from dkdm.reading.plugins import named_code, split
from dkdm.runs.recipes import RECIPES, recipe
from dkdm.version import __version__

if TYPE_CHECKING:
    from dkdm.core.denoiser import Denoiser

Config = TypeVar("Config", bound=RunConfig)
INSPECTED_PROMPT = "a photograph of a house"
Labels = tuple[int, ...] | None
EXPORTED = {"onnx": "student.onnx", "torch-export": "student.pt2", "int8": "student-int8"}


@dataclass(frozen=True)
class TeacherOptions:
    """Which pretrained model."""

    model: Annotated[str, tyro.conf.Positional] = "builtin:fashion"
    """A run, a diffusers folder, a hub id, builtin:NAME, or module:factory."""
    subfolder: str | None = None
    """Subfolder of the pipeline inside the folder or repository."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Weight variant such as fp16."""
    dtype: str = "float32"
    """Precision of the weights: float32, float16, bfloat16 or int8 (linear layers, by torchao)."""
    format: str | None = None
    """Format of a checkpoint file (guided-diffusion, ...); None tells it from its keys."""
    config: Path | None = None
    """Config file of the original repository, for formats that have one."""
    flags: str = ""
    """Flags of the original repository's scripts, as one string."""
    size: Labels = None
    """Height and width (frames, height, width; or length) as the network sees a sample."""
    scheduler: str | None = None
    """Scheduler of a network alone, such as a trainer's checkpoint-500/unet_ema: ddpm-linear,
    ddpm-cosine, flow, edm, or a scheduler_config.json or its folder."""
    lora: tuple[str, ...] = ()
    """LoRA files merged into the network: FILE, or FILE:WEIGHT such as style.safetensors:0.8."""
    null_class: int | Literal["none"] | None = None
    """Class id that means "no class", for guidance; "none" if there is no such id."""
    prompts: str | None = None
    """Text file of one prompt a line, or a pattern, for text models; or the prompt itself."""
    negative_prompt: str = ""
    """The prompt that guidance leads away from."""
    student_factory: str | None = None
    """Code that makes the custom network of a run, module:factory. Not needed for runs that this
    machine made; the name that a folder gives is not trusted."""
    cond: Path | None = None
    """Conditions for a model with a custom conditioning: .safetensors or .npz with a tensor
    [N, ...] for each name, and null.NAME [1, ...] for guidance."""


@dataclass(frozen=True)
class SampleOptions(TeacherOptions):
    """Draw samples and save them as a grid."""

    output: Path = Path("samples.png")
    """Picture to write; .safetensors writes the tensor [N, C, ...] as it was drawn instead."""
    num_samples: int = 40
    """How many."""
    steps: int = 25
    """Sampler steps, each one network evaluation a sample."""
    sampler: str = "ddim"
    """ddim (deterministic) or ddpm (ancestral)."""
    seed: int = 0
    """Sample i depends on (seed, i)."""
    classes: Labels = None
    """Class ids, repeated in turns; None takes all classes in turns."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    guidance_interval: str | None = None
    """LOW:HIGH, the shares of noise (0 clean, 1 noise) between which guidance acts; None is
    everywhere."""
    overwrite: bool = False
    """Replace a file that exists."""


@dataclass(frozen=True)
class ExportOptions(TeacherOptions):
    """Write the network as one file, or the model in int8, and check what was written."""

    output: Path | None = None
    """File to write (a description goes beside it, as FILE.json), or the folder for int8; None is
    student.onnx, student.pt2 or student-int8."""
    to: Annotated[Literal["onnx", "torch-export", "int8"], tyro.conf.arg(name="format")] = "onnx"
    """onnx; torch-export, a .pt2 file; or int8, a diffusers folder with linear layers in int8."""
    format: Annotated[str | None, tyro.conf.arg(name="teacher-format")] = None
    """Format of a checkpoint file (guided-diffusion, ...); None tells it from its keys."""
    opset: int | None = None
    """ONNX operator set, 18 or newer; None is the exporter's own choice."""
    overwrite: bool = False
    """Replace what exists."""


@dataclass(frozen=True)
class InspectOptions(TeacherOptions):
    """Show what a model is and check that it denoises."""

    output: Path | None = None
    """Picture to write with a grid of its samples."""
    num_samples: int = 8
    """Samples of the check."""
    steps: int = 50
    """Sampler steps of the check."""
    samples: Path | None = None
    """Real samples to judge the model by, instead of its own: an array [N, C, ...] in the range it
    was trained on (.npy, .npz, .safetensors, .pt), or a folder of images."""
    json: bool = False
    """Print JSON for machines."""


@dataclass(frozen=True)
class StudentsOptions(TeacherChoice):
    """List the named students at a teacher's sample shape; of a pipeline only configs are read."""

    measure: bool = True
    """Time the students, with random weights, in turns with the teacher."""
    measure_batch_size: int = 8
    """Samples at once when they are timed."""
    measure_below: float = 60.0
    """Networks with more parameters, in millions, are not timed; nor, on a CPU, very slow ones."""
    steps: int = 50
    """Sampler steps of one sample, each one network evaluation."""
    json: bool = False
    """Print JSON for machines."""


@dataclass(frozen=True)
class CheckOptions(StudentChoice, TeacherChoice):
    """Try all that a student will go through, before its first step."""

    prompts: str | None = None
    """Text file of one prompt a line, or a pattern, for text models; or the prompt itself."""
    compile: bool = True
    """Try torch.compile; --no-compile leaves it out."""
    compile_backend: str = "aot_eager"
    """aot_eager traces only, which is quick; inductor is the one that makes networks faster."""
    export: bool = True
    """Try torch.export; --no-export leaves it out."""
    json: bool = False
    """Print JSON for machines."""


@dataclass(frozen=True)
class PlanOptions:
    """Say what a distillation takes in memory, whether it fits, and what to change."""

    teacher: Annotated[str, tyro.conf.Positional]
    """A diffusers folder, a hub id (only its configs are read), builtin:NAME, a checkpoint file, or
    module:factory."""
    student: Annotated[str, tyro.conf.Positional]
    """A preset, a diffusers config.json, or module:factory."""
    gpus: int = 1
    """Devices the batch is divided among."""
    train_batch_size: int = 128
    """Samples a step sees, over all devices."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the student's arithmetic."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    guidance: bool = False
    """Whether the teacher is guided, which doubles its batch."""
    pool_size: int | None = None
    """Pool entries; None is 0.4 T batches."""
    pool_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the pool."""
    pool_device: Literal["device", "cpu"] = "device"
    """Where the pool is stored."""
    teacher_dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """Precision of the teacher's weights."""
    teacher_offload: Literal["none", "layers"] = "none"
    """Keep the teacher in host memory and move a layer at a time."""
    teacher_size: Labels = None
    """Height and width (frames, height, width; or length) as the teacher sees a sample."""
    memory: float | None = None
    """Memory of a device in GiB; None is that of this machine's GPU, or 24."""
    student_factory: str | None = None
    """Code that makes the custom network of a run, module:factory; several with commas."""
    json: bool = False
    """Print JSON for machines."""


@dataclass(frozen=True)
class DoctorOptions:
    """Check the environment."""

    json: bool = False
    """Print JSON for machines."""


@dataclass(frozen=True)
class ReportOptions:
    """Write a run's report.html anew."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's output folder."""


@dataclass(frozen=True)
class PushOptions:
    """Upload a finished run to the Hugging Face hub; log in with `hf auth login` or HF_TOKEN."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's output folder. Checkpoints and logs stay here."""
    hub_model_id: str | None = None
    """Repository, USER/NAME; None is the run's own, else the folder's name under your account."""
    private: bool = False
    """Make a new repository private."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failure, 2 for wrong usage."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return _dispatch(args)
    except DkdmError as error:
        if debug:
            raise
        print(f"dkdm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        hint = "go on with --resume-from-checkpoint latest"
        print(f"\ndkdm: interrupted; {hint}", file=sys.stderr)
        return 130


def _dispatch(args: list[str]) -> int:
    if args and args[0] in ("-V", "--version"):
        print(f"dkdm {__version__}")
        return 0
    if args and args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if not args or args[0] not in COMMANDS:
        print(f"{_usage()}\n\ndkdm: unknown command '{' '.join(args[:1])}'", file=sys.stderr)
        return 2
    # transformers advises to install torchvision, which beside a CPU torch breaks diffusers
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module="diffusers|accelerate|huggingface_hub")
    return COMMANDS[args[0]][1](args[1:])


def _usage() -> str:
    commands = "\n".join(f"  {name:13s} {summary}" for name, (summary, _) in COMMANDS.items())
    return (
        "usage: dkdm COMMAND [options]      dkdm COMMAND --help\n\n"
        f"{commands}\n\n  --debug shows the traceback of a failure, --version the version"
    )


def _run_config(kind: type[Config], command: str, args: list[str]) -> tuple[Config, bool]:
    """Parse a run's options on top of a recipe or a config file."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config", type=Path)
    first.add_argument("--dry-run", "--dry_run", action="store_true")
    known, rest = first.parse_known_args(args)
    default: RunConfig = kind()
    if known.recipe:
        default = recipe(known.recipe, kind)
    if known.config:
        default = _config_file(kind, known.config)
        _refuse_words_of_file(default, known.config, rest)
    recipes = [name for name, make in RECIPES.items() if isinstance(make(), kind)]
    description = (
        f"{COMMANDS[command][0]}\n\n--recipe NAME starts from one of: {', '.join(recipes)}. "
        "--config FILE starts from a config.json. --dry-run only says what would be done."
    )
    config = tyro.cli(
        kind, default=default, args=rest, prog=f"dkdm {command}", description=description
    )
    return config, known.dry_run  # type: ignore[return-value]


_NAMES_CODE = ("teacher", "student", "network", "student_factory")


def _refuse_words_of_file(config: RunConfig, path: Path, args: Sequence[str]) -> None:
    """Raise UsageError for what a config file may not decide, unless the user says it too.

    That is code, of which a run that this machine made is the user's own word; an upload; and an
    output folder that is neither below the current directory nor the file's own.
    """
    typed = {arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in args}
    if config.push_to_hub and not typed & {"push_to_hub", "no_push_to_hub"}:
        raise UsageError(
            f"--config {path} asks for an upload to {config.hub_model_id or 'the hub'}: say "
            "--push-to-hub on the command line too, or --no-push-to-hub"
        )
    output = config.output_dir.expanduser().resolve()
    if "output_dir" not in typed and not (
        output.is_relative_to(Path.cwd()) or output == path.resolve().parent
    ):
        raise UsageError(
            f"--config {path} writes to {config.output_dir}, outside of the current directory: say "
            "--output-dir on the command line too"
        )
    _refuse_code_of_file(config, path, typed)


def _refuse_code_of_file(config: RunConfig, path: Path, typed: Set[str]) -> None:
    for name in (name for name in _NAMES_CODE if name not in typed):
        option = f"--{name.replace('_', '-')}"
        for spec in named_code(getattr(config, name, None)):
            if not was_made_here({"spec": spec}, split(spec)[0]):
                raise UsageError(
                    f"--config {path} names code: {option} {spec}. If you trust that code, name it "
                    "on the command line too"
                )


def _config_file(kind: type[Config], path: Path) -> Config:
    try:
        return from_mapping(kind, read_json(path, "a config of a run"))
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error


def _distill(args: list[str]) -> int:
    config, dry_run = _run_config(DistillConfig, "distill", args)
    from dkdm.evaluation.results import read_evaluation
    from dkdm.runs.distill import distill
    from dkdm.runs.dry_run import describe
    from dkdm.runs.outputs import result_rows

    if dry_run:
        print(describe(config))
        return 0
    folder = distill(config=config)
    if config.evaluation_samples:
        for name, (teacher, student) in result_rows(read_evaluation(folder)):
            print(f"{name:42s}{teacher:>14s}{student:>14s}")
    print(f"{folder}/report.html")
    _print_url(config, folder)
    return 0


def _train(args: list[str]) -> int:
    config, dry_run = _run_config(TrainConfig, "train", args)
    from dkdm.runs.train import train

    if dry_run:
        print(json.dumps(dataclasses.asdict(config), indent=2, default=str))
        return 0
    folder = train(config)
    print(f"{folder}/README.md")
    _print_url(config, folder)
    return 0


def _print_url(config: RunConfig, folder: Path) -> None:
    if config.push_to_hub:
        from dkdm.shipping.hub import url_of

        print(url_of(folder))


def _sample(args: list[str]) -> int:
    options = tyro.cli(SampleOptions, args=args, prog="dkdm sample")
    from dkdm.runs.outputs import sample_to_file

    sample_to_file(
        _load(options),
        options.output,
        num_samples=options.num_samples,
        num_steps=options.steps,
        sampler=options.sampler,
        seed=options.seed,
        classes=options.classes,
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
        overwrite=options.overwrite,
    )
    print(options.output)
    return 0


def _load(options: TeacherOptions, default_prompt: str | None = None) -> Denoiser:
    from dkdm.core.inputs import with_rows
    from dkdm.models import LoadOptions, load_teacher

    denoiser = load_teacher(
        options.model,
        format=options.format,
        subfolder=options.subfolder,
        revision=options.revision,
        options=LoadOptions(
            variant=options.variant,
            dtype=options.dtype,
            sample_size=options.size,
            config=options.config,
            flags=options.flags,
            scheduler=options.scheduler,
            lora=options.lora,
            factory=options.student_factory,
            null_class=options.null_class,
        ),
    )
    conditioning = with_rows(denoiser.conditioning, options.cond)
    denoiser = dataclasses.replace(denoiser, conditioning=conditioning)
    return _told(denoiser, options.prompts, options.negative_prompt, default_prompt)


def _told(
    denoiser: Denoiser, prompts: str | None, negative: str = "", default: str | None = None
) -> Denoiser:
    """A text model with the prompts, or with one that will do; any other as it is."""
    from dkdm.models import with_texts
    from dkdm.models.prompts import Prompts

    if prompts is None and isinstance(denoiser.conditioning, Prompts):
        prompts = default
    return with_texts(denoiser, prompts, negative)


def _export(args: list[str]) -> int:
    options = tyro.cli(ExportOptions, args=args, prog="dkdm export")
    from dkdm.shipping.graph import export_graph
    from dkdm.shipping.int8 import write_int8_folder

    if options.dtype == "int8":
        raise UsageError("--dtype int8: expected --format int8, which quantizes by itself")
    if options.to == "int8" and options.opset is not None:
        raise UsageError(f"--opset {options.opset}: only --format onnx has opsets; leave it out")
    output = options.output or Path(EXPORTED[options.to])
    denoiser = _load(options, default_prompt=INSPECTED_PROMPT)
    if options.to == "int8":
        write_int8_folder(denoiser, output, options.overwrite)
        print(output)
        return 0
    facts = export_graph(
        denoiser, output, format=options.to, opset=options.opset, overwrite=options.overwrite
    )
    difference, size = facts["check"]["largest_difference"], output.stat().st_size / 1e6
    print(f"{output}  {size:.2f} MB, differs from PyTorch by {difference:.1e} of the largest value")
    return 0


def _inspect(args: list[str]) -> int:
    options = tyro.cli(InspectOptions, args=args, prog="dkdm inspect")
    from dkdm.checks.inspection import inspect_denoiser, print_inspection, read_samples
    from dkdm.runs.outputs import sample_to_file

    denoiser = _load(options, default_prompt=INSPECTED_PROMPT)
    found = inspect_denoiser(
        denoiser,
        num_samples=options.num_samples,
        num_steps=options.steps,
        images=None if options.samples is None else read_samples(options.samples, denoiser),
    )
    if options.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print_inspection(found, Console())
    if options.output:
        sample_to_file(
            denoiser, options.output, num_samples=options.num_samples, num_steps=options.steps
        )
    return int(found.check.denoises is False)


def _students(args: list[str]) -> int:
    options = tyro.cli(StudentsOptions, args=args, prog="dkdm students")
    from dkdm.checks.student_table import Measuring, list_students, print_students
    from dkdm.models import chosen_teacher

    teacher = chosen_teacher(options, sketched=True)
    size, below = options.measure_batch_size, options.measure_below * 1e6
    measuring = Measuring(size, below, options.steps) if options.measure else None
    rows = list_students(teacher, measuring)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        print_students(rows, teacher, Console(), measuring)
    return 0


def _check_student(args: list[str]) -> int:
    options = tyro.cli(CheckOptions, args=args, prog="dkdm check-student")
    from dkdm.checks.findings import print_findings
    from dkdm.checks.student import check_student
    from dkdm.models import chosen_teacher

    teacher = _told(chosen_teacher(options), options.prompts, default=INSPECTED_PROMPT)
    checkup = check_student(
        options.student,
        teacher,
        prediction=options.student_prediction,
        process=options.student_process,
        compile_backend=options.compile_backend if options.compile else None,
        export=options.export,
        factory=options.student_factory,
    )
    if options.json:
        print(json.dumps([each.as_dict() for each in checkup.findings], indent=2))
    else:
        print_findings(checkup.findings, Console())
    if checkup.failure is not None:
        raise DkdmError(
            f"nothing more could be tried: {checkup.failure}. --debug shows the traceback"
        ) from checkup.failure
    return int(not checkup.passed)


def _plan(args: list[str]) -> int:
    options = tyro.cli(PlanOptions, args=args, prog="dkdm plan")
    from dkdm.checks.memory_plan import GIB, Choices, changes, device_memory_mib, plan, print_plan
    from dkdm.models import LoadOptions, load_teacher, sketch_teacher

    factory = options.student_factory
    how = LoadOptions(
        dtype=options.teacher_dtype, sample_size=options.teacher_size, factory=factory
    )
    teacher = sketch_teacher(options.teacher, how) or load_teacher(options.teacher, options=how)
    entries = round(0.4 * teacher.process.num_levels * options.train_batch_size)
    choices = Choices(
        gpus=options.gpus,
        train_batch_size=options.train_batch_size,
        mixed_precision=options.mixed_precision,
        gradient_checkpointing=options.gradient_checkpointing,
        guided=options.guidance,
        teacher_dtype=options.teacher_dtype,
        teacher_offload=options.teacher_offload,
        pool_size=options.pool_size or entries,
        pool_dtype=options.pool_dtype,
        pool_device=options.pool_device,
        student_factory=factory,
    )
    found = plan(teacher, options.student, choices)
    limit = device_memory_mib() if options.memory is None else options.memory * GIB
    advice = changes(teacher, options.student, found, limit)
    if options.json:
        values = dataclasses.asdict(found) | {"device_total": found.device_total, "limit": limit}
        values["changes"] = [dataclasses.asdict(change) for change in advice]
        print(json.dumps(values, indent=2))
    else:
        print_plan(found, advice, limit, Console())
    return int(found.device_total > limit)


def _doctor(args: list[str]) -> int:
    options = tyro.cli(DoctorOptions, args=args, prog="dkdm doctor")
    from dkdm.checks.doctor import examine
    from dkdm.checks.findings import print_findings

    findings = examine()
    if options.json:
        print(json.dumps([each.as_dict() for each in findings], indent=2))
    else:
        print_findings(findings, Console())
    return int(any(each.status == "problem" for each in findings))


def _report(args: list[str]) -> int:
    options = tyro.cli(ReportOptions, args=args, prog="dkdm report")
    from dkdm.report import write_report

    print(write_report(options.run))
    return 0


def _push(args: list[str]) -> int:
    options = tyro.cli(PushOptions, args=args, prog="dkdm push")
    from dkdm.shipping.hub import push

    print(push(options.run, options.hub_model_id, options.private))
    return 0


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "distill": ("Distil a teacher into a student of any architecture, without images.", _distill),
    "train": ("Train a model on images: a teacher, or a baseline.", _train),
    "inspect": ("Show what a model is, and check that it really denoises.", _inspect),
    "students": ("List the named students at a teacher's sample shape.", _students),
    "check-student": (
        "Try all that a student will go through, before its first step.",
        _check_student,
    ),
    "plan": ("Say what a distillation takes in memory, and what to change.", _plan),
    "sample": ("Draw samples from a model.", _sample),
    "export": ("Write a model as ONNX, as an exported program, or in int8.", _export),
    "report": ("Write a run's report.html anew.", _report),
    "push": ("Upload a finished run to the Hugging Face hub.", _push),
    "doctor": ("Check the environment.", _doctor),
}
