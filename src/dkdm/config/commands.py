"""The options of every other command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from dkdm.config.conditions import GivenConditions
from dkdm.config.evaluation import (
    EvaluationFiles,
    FeatureOptions,
    JudgedTeacher,
    MeasuredSamples,
    MeasurementOptions,
)
from dkdm.config.models import ExportedModel, GivenModel, StudentChoice, TeacherChoice
from dkdm.config.pool import PlannedPool
from dkdm.config.sampling import DrawOptions, SamplingOptions
from dkdm.config.training import OptimizerChoice, TrainingOptions
from dkdm.config.values import EXPORTED, ClassId, Count, Scale, parse_utilization
from dkdm.errors import UsageError
from dkdm.reading.options import Grouped, Options
from dkdm.reading.values import Range


class PrintOptions(Options, title="Print"):
    """What is printed."""

    json: bool = False
    """Print JSON for machines."""


class GivenRun(Options, title="Run", positional=("run",)):
    """Which run."""

    run: Path
    """The run's output folder."""


class SampleCommand(Grouped, command="sample"):
    """Draw samples from a model.

    examples:
      dkdm sample runs/mine --num-samples 40 --output samples.png
      dkdm sample builtin:fashion --classes 7 --guidance-scale 1.5 --steps 20
    """

    model_choice: GivenModel
    conditions: GivenConditions
    sampling: SamplingOptions


class EvaluateCommand(Grouped, command="evaluate"):
    """Measure samples against real images, a model, or the teacher.

    examples:
      dkdm evaluate runs/mine --reference path/to/images --json mine.json
      dkdm evaluate runs/mine --reference teacher --metrics all
    """

    model_choice: GivenModel
    teacher_choice: JudgedTeacher
    conditions: GivenConditions
    sampling: MeasuredSamples
    measurement: MeasurementOptions
    files: EvaluationFiles


class ComparedOptions(Options, title="Runs", positional=("runs",)):
    """What is compared."""

    runs: tuple[str, ...] = ()
    """Two or more, each a run's output folder, the JSON of dkdm evaluate --json, or a model."""
    draw: bool = True
    """Draw ten samples from each model that is not a run, from the noise of the runs' samples."""


class ComparisonFiles(PrintOptions):
    """What is printed, and where the page lies."""

    output: Path | None = None
    """Page to write (.html), or the table as Markdown (.md). Default: the table is printed only."""
    overwrite: bool = False
    """Replace a file that exists."""


class CompareCommand(Grouped, command="compare"):
    """Put runs, evaluations and models side by side.

    examples:
      dkdm compare runs/a runs/b
      dkdm compare runs/a runs/b mine.json --output both.html
    """

    compared: ComparedOptions
    files: ComparisonFiles


class PageOptions(Options, title="Page"):
    """Where the page is shown: on this machine alone."""

    port: Annotated[int, Range(1, 65535)] = 7860
    """Port of 127.0.0.1 that a browser on this machine opens."""


class UiCommand(Grouped, command="ui"):
    """Draw with student and teacher side by side, in a browser.

    examples:
      dkdm ui runs/mine
    """

    model_choice: GivenModel
    teacher_choice: JudgedTeacher
    page: PageOptions


class SampleSet(Options):
    """What is written."""

    output: Path = Path("harvest")
    """Folder to write. The same command continues an unfinished one."""
    format: Literal["png", "webdataset", "safetensors"] = "png"
    """png: images in one folder for each class, prompts beside them. webdataset: tar files.
    safetensors: tensors as the network has them, latents for a latent model."""


class HarvestOptions(FeatureOptions, DrawOptions, SampleSet, title="Harvest"):
    """What to write, and how samples beyond those that a run kept are drawn."""

    num_samples: Annotated[int, Range(1, 10**8)] = 1000
    """Number of samples."""
    steps: Count = 50
    """Sampler steps of each sample that is drawn."""
    classes: tuple[ClassId, ...] | None = None
    """Class ids, repeated in turn. Default: those that the run's student learned, or all."""
    guidance_interval: str | None = None
    """LOW:HIGH, the shares of noise (0 clean, 1 noise) between which guidance acts. Default: as in
    the run, or everywhere."""
    guidance_scale: Scale | None = None
    """Scale of classifier-free guidance. Default: the run's (the middle of its range), or 1."""
    batch_size: Count = 64
    """Samples drawn at once. It does not change them."""
    reference: str | None = None
    """Real images to measure the set against: fashion-test, fashion-train, a folder of images, or
    an .npz of images or statistics. Default: the set is not measured."""


class HarvestCommand(Grouped, command="harvest"):
    """Write finished samples of a teacher or model as a data set.

    examples:
      dkdm harvest runs/mine --num-samples 5000 --output set
      dkdm harvest path/to/model --format webdataset --output set
    """

    model_choice: ExportedModel
    conditions: GivenConditions
    harvest: HarvestOptions


class ExportOptions(Options, title="Export", renamed={"to": "format"}):
    """What to write."""

    output: Path | None = None
    """File to write (its description goes beside it, as FILE.json), or the folder for int8.
    Default: student.onnx, student.pt2 or student-int8."""
    to: Literal["onnx", "torch-export", "int8"] = "onnx"
    """onnx; torch-export, a .pt2 file; or int8, a diffusers folder with linear layers in int8."""
    opset: Annotated[int, Range(18, 99)] | None = None
    """ONNX operator set. Default: the exporter's own choice."""
    overwrite: bool = False
    """Replace what exists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to != "onnx" and self.opset is not None:
            raise UsageError(f"--opset {self.opset}: only --format onnx has opsets; remove --opset")

    @property
    def path(self) -> Path:
        """Where it is written."""
        return self.output or Path(EXPORTED[self.to])


class ExportCommand(Grouped, command="export"):
    """Write a model as one file, or in int8, and check it.

    examples:
      dkdm export runs/mine --output mine.onnx
      dkdm export runs/mine --format int8
    """

    model_choice: ExportedModel
    conditions: GivenConditions
    export: ExportOptions


class InspectOptions(Options, title="Check"):
    """How the model is checked, and what is written."""

    output: Path | None = None
    """Image to write with a grid of the model's samples. Default: no image."""
    num_samples: Annotated[int, Range(1, 10**6)] = 8
    """Number of samples drawn for the check."""
    steps: Count | None = None
    """Sampler steps of the check. Default: 50."""
    samples: Path | None = None
    """Real samples to judge the model by, instead of its own: an array [N, C, ...] in the range it
    was trained on (.npy, .npz, .safetensors, .pt), or a folder of images."""


class InspectCommand(Grouped, command="inspect"):
    """Show what a model is, and check whether it denoises.

    examples:
      dkdm inspect builtin:fashion --output samples.png
      dkdm inspect path/to/model.pt --format guided-diffusion
    """

    model_choice: GivenModel
    conditions: GivenConditions
    check: InspectOptions
    printing: PrintOptions


class MeasureOptions(Options, title="Measurement"):
    """How the students are timed."""

    measure: bool = True
    """Time the students, with random weights, in turns with the teacher."""
    measure_batch_size: Count = 8
    """Batch size used for timing."""
    measure_below: Annotated[float, Range(0)] = 60.0
    """Do not time networks with more parameters than this, in millions. On a CPU, very slow
    networks are not timed either."""
    steps: Count = 50
    """Sampler steps per sample, each one network evaluation."""


class StudentsCommand(Grouped, command="students"):
    """List the presets that fit a teacher, with size and speed.

    examples:
      dkdm students --teacher builtin:fashion
    """

    teacher_choice: TeacherChoice
    measuring: MeasureOptions
    printing: PrintOptions


class CheckOptions(Options, title="Check"):
    """What is tried."""

    prompts: str | None = None
    """For text models: a text file with one prompt a line, a pattern such as 'prompts/*.txt', or
    the prompt itself."""
    compile: bool = True
    """Try torch.compile."""
    compile_backend: str = "aot_eager"
    """aot_eager only traces, which is quick; inductor is the backend that makes networks faster."""
    export: bool = True
    """Try torch.export."""


class CheckStudentCommand(Grouped, command="check-student"):
    """Try all that a student goes through, before the first step.

    examples:
      dkdm check-student --teacher builtin:fashion --student my_nets:Net
    """

    teacher_choice: TeacherChoice
    student_choice: StudentChoice
    check: CheckOptions
    printing: PrintOptions


class PlannedTeacher(TeacherChoice, positional=("model",)):
    """The pretrained model to distil. Of a pipeline, only its configs are read."""

    offload: Literal["none", "layers"] = "none"
    """layers: keep the teacher in host memory and move one layer at a time to the device."""


class PlannedStudent(Options, title="Student", positional=("student",)):
    """The model to train."""

    student: str = "dit-xs"
    """A preset, a diffusers config.json, or module:factory."""


class PlanOptions(Options, title="Plan"):
    """The devices, and what is done on them."""

    gpus: Annotated[int, Range(1, 10**6)] = 1
    """Devices the batch is divided among."""
    memory: Annotated[float, Range(0, 10**6, above=True)] | None = None
    """Memory of a device in GiB. Default: that of this machine's GPU, or 24."""
    guidance: bool = False
    """Plan for a guided teacher, which doubles its batch."""
    device_tflops: Annotated[float, Range(0, 10**6, above=True)] = 989.0
    """Peak of a device in TFLOP/s, in the precision of the run. Default: H100 SXM, dense
    bfloat16."""
    utilization: str = "0.07:0.4"
    """LOW:HIGH, the shares of that peak between which the networks run. Default: from what a
    network of 57 M parameters reached at 32x32 (measured) to what large ones may (assumed)."""
    link: Annotated[float, Range(0, 10**6, above=True)] = 50.0
    """Rate of the network of each device in GB/s. Default: 400 Gb/s InfiniBand."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_utilization(self.utilization)

    @property
    def utilizations(self) -> tuple[float, float]:
        """Lowest and highest share of the peak."""
        return parse_utilization(self.utilization)


class PlanCommand(Grouped, command="plan"):
    """Estimate memory, time and traffic of a distillation.

    examples:
      dkdm plan path/to/sdxl unet-32m --train-batch-size 16
      dkdm plan path/to/sdxl unet-32m --gpus 64 --mixed-precision bf16
    """

    teacher_choice: PlannedTeacher
    student_choice: PlannedStudent
    training: TrainingOptions
    pool: PlannedPool
    optimizing: OptimizerChoice
    plan: PlanOptions
    printing: PrintOptions


class ExaminedRun(Options, title="Run", positional=("run",)):
    """What is checked."""

    run: Path | None = None
    """The output folder of a run: its files, every checkpoint, the finished model, the teacher.
    Default: the environment."""


class DoctorCommand(Grouped, command="doctor"):
    """Check the environment, or whether a run is whole.

    examples:
      dkdm doctor
      dkdm doctor runs/mine
    """

    examined: ExaminedRun
    printing: PrintOptions


class ReportCommand(Grouped, command="report"):
    """Write a run's report.html anew, from its files.

    examples:
      dkdm report runs/mine
    """

    given: GivenRun


class PushOptions(GivenRun):
    """Which run, and where it goes."""

    hub_model_id: str | None = None
    """Repository, USER/NAME. Default: the run's own, or the folder's name under your account."""
    private: bool = False
    """Make a new repository private."""


class PushCommand(Grouped, command="push"):
    """Upload a finished run to the Hugging Face hub.

    Log in first with `hf auth login`, or set HF_TOKEN.

    examples:
      dkdm push runs/mine --hub-model-id me/mine
    """

    given: PushOptions
