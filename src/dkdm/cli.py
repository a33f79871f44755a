"""The command line: `dkdm COMMAND ...`, nothing but parsing, calling and printing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from dkdm.config import (
    CheckStudentCommand,
    CompareCommand,
    DistillConfig,
    DoctorCommand,
    EvaluateCommand,
    ExportCommand,
    GivenConditions,
    HarvestCommand,
    InspectCommand,
    PlanCommand,
    PrintOptions,
    PushCommand,
    ReportCommand,
    RunConfig,
    SampleCommand,
    SamplingOptions,
    StudentsCommand,
    TrainConfig,
    UiCommand,
)
from dkdm.core.saving.stopping import RESUMABLE, Stopped, answering_signals
from dkdm.errors import DkdmError, UsageError, in_a_line
from dkdm.reading.command_line import parse, summary
from dkdm.reading.files import check_output
from dkdm.reading.options import Grouped, flag, places
from dkdm.reading.places import expanded
from dkdm.runs.config_file import config_file
from dkdm.runs.recipes import check_given, recipe, recipes
from dkdm.version import __version__

if TYPE_CHECKING:
    from dkdm.core.denoisers.denoiser import Denoiser
    from dkdm.evaluation.evaluated import Evaluation

Config = TypeVar("Config", bound=RunConfig)
AFTER_INTERRUPT = {
    **dict.fromkeys(("distill", "train"), "; go on with --resume-from-checkpoint latest"),
    **dict.fromkeys(("evaluate", "harvest"), "; the same command goes on"),
}
# what makes a command smaller before a run can measure its parts
SMALLER = {
    "distill": "--teacher-dtype bfloat16 or int8, --teacher-offload layers, or a smaller --student",
    "train": "a smaller --student or --train-batch-size",
    "sample": "fewer --num-samples, or --dtype bfloat16",
    "evaluate": "a smaller --batch-size, or --dtype bfloat16",
    "harvest": "a smaller --batch-size, or --dtype bfloat16",
}
INSPECTED_PROMPT = "a photograph of a house"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 75 for a run
    that a signal stopped and that goes on from there, 130 for another command that Ctrl-C ended."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return _dispatch(args) if debug else _with_one_voice(args)
    except DkdmError as error:
        if debug:
            raise
        return _ended(f"dkdm: {error}", error.exit_code)
    except Stopped as stopped:
        return _ended(f"\ndkdm: {stopped}", RESUMABLE)
    except KeyboardInterrupt:
        hint = AFTER_INTERRUPT.get("".join(args[:1]), "")
        return _ended(f"\ndkdm: interrupted{hint}", 130)


def _with_one_voice(args: list[str]) -> int:
    """Of several processes whose connection breaks, the one that broke it shows its traceback."""
    try:
        return _dispatch(args)
    except Exception as error:
        if (used_up := _memory_used_up(error, "".join(args[:1]))) is not None:
            raise used_up from error
        if isinstance(error, DkdmError) or _speaks():
            raise
        return 1


def _memory_used_up(error: Exception, command: str) -> DkdmError | None:
    """One line in place of torch's error, where no run says more; None for any other error."""
    if isinstance(error, DkdmError) or not isinstance(error, (RuntimeError, MemoryError)):
        return None
    from dkdm.runs.memory import is_out_of_memory  # imports torch

    if not is_out_of_memory(error):
        return None
    helps = f": give {SMALLER[command]}" if command in SMALLER else ""
    return DkdmError(f"memory is used up ({in_a_line(error, 120)}){helps}")


def _ended(message: str, code: int) -> int:
    if _speaks():
        print(message, file=sys.stderr, flush=True)
    return code


def _speaks() -> bool:
    """Whether this process says why it ends: the first of several that do."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from dkdm.core.processes import speaks_of_failure

    return speaks_of_failure()


def _dispatch(args: list[str]) -> int:
    if args and args[0] in ("-V", "--version"):
        print(f"dkdm {__version__}")
        return 0
    if args and args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if not args or args[0] not in COMMANDS:
        wrong = f"unknown command '{args[0]}'" if args else "name a command"
        print(f"{_usage()}\n\ndkdm: {wrong}", file=sys.stderr)
        return 2
    # transformers advises to install torchvision, which beside a CPU torch breaks diffusers
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module="diffusers|accelerate|huggingface_hub")
    kind, run = COMMANDS[args[0]]
    if not issubclass(kind, RunConfig):
        return run(parse(kind, args[1:]))
    config, instead = _run_config(kind, args[1:])
    with answering_signals():
        return instead(config) if instead else run(config)


def _usage() -> str:
    commands = "\n".join(f"  {name:13s} {summary(kind)}" for name, (kind, _) in COMMANDS.items())
    return (
        "usage: dkdm COMMAND [options]      dkdm COMMAND --help\n\n"
        f"{commands}\n\n  --debug shows the traceback of a failure, --version the version\n\n"
        "start with: dkdm distill --recipe demo"
    )


def _run_config(
    kind: type[Config], args: list[str]
) -> tuple[Config, Callable[[RunConfig], int] | None]:
    """Parse a run's options on top of a recipe or a config file; what to do instead of it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config", type=Path)
    first.add_argument("--dry-run", "--dry_run", action="store_true")
    first.add_argument("--smoke", action="store_true")
    known, rest = first.parse_known_args(repeated(args) if kind is DistillConfig else args)
    for one, other in (("recipe", "config"), ("dry_run", "smoke")):
        if getattr(known, one) and getattr(known, other):
            raise UsageError(f"{flag(one)} and {flag(other)} exclude each other: remove one")
    start: type[Config] | Config = kind
    if known.recipe:
        start = recipe(known.recipe, kind)
    if known.config:
        start = config_file(kind, known.config, rest)
    first_of_all = {
        "recipe": f"Start from the options of one of: {', '.join(recipes(kind))}.",
        "config": "Start from the options of a config.json.",
        "dry_run": "Say what would be done, and stop.",
        "smoke": "Try the whole pipeline, and stop: two steps of a tiny batch, and stand-ins for a "
        "recipe's teacher and images if they are not there.",
    }
    config = parse(start, rest, also=first_of_all)
    if known.smoke:
        return config, _smoke
    check_given(config)
    return config, _describe if known.dry_run else None


def repeated(args: Sequence[str]) -> list[str]:
    """--teacher A --teacher B, and prompts of each, as --teacher A --more-teachers B."""
    found = list(args)
    for one, more in (("--teacher", "--more-teachers"), ("--prompts", "--more-prompts")):
        places = [i for i, arg in enumerate(found) if arg == one or arg.startswith(f"{one}=")]
        others: list[str] = []
        for i in reversed(places[1:]):
            name, equals, value = found[i].partition("=")
            values = [value] if equals else found[i + 1 : i + 2]
            if not values or values[0].startswith("--"):
                raise UsageError(f"{one} was given without a value: name one, or remove it")
            others[:0] = values
            del found[i : i + (1 if equals else 2)]
        found += [more, *others] if others else []
    return found


def _describe(config: RunConfig) -> int:
    if isinstance(config, DistillConfig):
        from dkdm.runs.distill import describe

        print(describe(config))
    else:
        _print_json(config.flat())
    return 0


def _smoke(config: RunConfig) -> int:
    from dkdm.runs.smoke import smoke

    print(smoke(config))
    return 0


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, default=str))


def _show(how: PrintOptions, values: Any, table: Callable[[Console], None]) -> None:
    if how.json:
        _print_json(values)
    else:
        table(Console())


def _distill(config: DistillConfig) -> int:
    from dkdm.runs.distill import distill

    return _print_run(config, distill(config=config))


def _print_run(config: RunConfig, folder: Path) -> int:
    """What a run measured of its models at its end, and where its page lies."""
    from dkdm.core.processes import leave
    from dkdm.evaluation.results import read_evaluation
    from dkdm.evaluation.rows import comparison_rows

    if not leave():
        return 0
    if config.evaluation.evaluation_samples:
        found = read_evaluation(folder)
        heads = ["teacher", "student"] if found.teacher else ["model"]
        print(f"{'':43s}" + "".join(f"{head:>14s}" for head in heads))
        for row in comparison_rows(found):
            print(f"{row.label:43s}" + "".join(f"{text:>14s}" for text in row.texts))
    print(f"{folder}/report.html")
    _print_url(config, folder)
    return 0


def _train(config: TrainConfig) -> int:
    from dkdm.runs.train import train

    return _print_run(config, train(config))


def _print_url(config: RunConfig, folder: Path) -> None:
    if config.hub.push_to_hub:
        from dkdm.shipping.hub import url_of

        print(url_of(folder))


def _sample(options: SampleCommand) -> int:
    from dkdm.runs.outputs import check_sample_file, sample_to_file

    how = options.sampling
    check_sample_file(how.output, how.overwrite)
    sample_to_file(_load(options), how)
    print(how.output)
    return 0


def _harvest(options: HarvestCommand) -> int:
    from dkdm.runs.harvest import harvest_of

    found = harvest_of(options.model_choice, options.conditions, options.harvest)
    kept = f"{found.kept:,} samples that the run kept, " if found.kept else ""
    drawn = f"{found.drawn:,} drawn with {found.evaluations:,} teacher evaluations"
    print(f"{found.folder}: {kept}{drawn}")
    if found.measured is not None:
        _print_with_floors(found.measured)
    print(f"to train on it: {found.usage}")
    return 0


def _print_with_floors(found: Evaluation) -> None:
    from dkdm.evaluation.metrics import METRICS
    from dkdm.evaluation.rows import evaluation_in_words, evaluation_rows

    print(f"{'':47s}{'value':>14s}{'floor':>14s}")
    for row in evaluation_rows(found):
        print(f"{row.label:47s}{row.texts[0]:>14s}{row.floor_text:>14s}")
    for name, each in found.metrics.items():
        if (count := each.floor_samples or found.num_samples) != found.num_samples:
            label = METRICS[name].label
            print(f"{label}: floor of {count:,} samples, not {found.num_samples:,}")
    how = "; ".join(f"{name} {text}" for name, text in evaluation_in_words(found))
    print(textwrap.fill(how, 75, break_on_hyphens=False))


def _load(
    options: SampleCommand | ExportCommand | InspectCommand, prompt: str | None = None
) -> Denoiser:
    """The model that was named, with the conditions that were given; prompt: if none was."""
    from dkdm.models import chosen_teacher
    from dkdm.runs.models import given_conditions

    return given_conditions(chosen_teacher(options.model_choice), options.conditions, prompt)


def _evaluate(options: EvaluateCommand) -> int:
    from accelerate import PartialState

    from dkdm.runs.evaluate import run_evaluation

    found = run_evaluation(options)
    if PartialState().is_main_process:
        _print_with_floors(found)
    PartialState().destroy_process_group()
    return 0


def _export(options: ExportCommand) -> int:
    what, output = options.export, options.export.path
    if options.model_choice.dtype == "int8":
        raise UsageError("--dtype int8: use --format int8 instead, which quantizes by itself")
    if what.to == "int8":
        from dkdm.shipping.int8 import write_int8_folder

        check_output("--output", output, folder=True, overwrite=what.overwrite)
        write_int8_folder(_load(options, INSPECTED_PROMPT), output, what.overwrite)
        print(output)
        return 0
    from dkdm.shipping.graph import check_files, export_graph

    check_files(output, what.to, what.overwrite)
    denoiser = _load(options, INSPECTED_PROMPT)
    facts = export_graph(
        denoiser, output, format=what.to, opset=what.opset, overwrite=what.overwrite
    )
    difference, size = facts["check"]["largest_difference"], output.stat().st_size / 1e6
    print(f"{output}  {size:.2f} MB, differs from PyTorch by {difference:.1e} of the largest value")
    return 0


def _inspect(options: InspectCommand) -> int:
    from dkdm.checks.inspection import inspect_denoiser, print_inspection, read_samples
    from dkdm.core.few_steps.model import usual_steps
    from dkdm.runs.outputs import check_sample_file, sample_to_file

    how = options.check
    if how.output:
        check_sample_file(how.output)
    denoiser = _load(options, INSPECTED_PROMPT)
    found = inspect_denoiser(
        denoiser,
        num_samples=how.num_samples,
        num_steps=how.steps or 50,
        images=None if how.samples is None else read_samples(how.samples, denoiser),
    )
    _show(options.printing, found.as_dict(), partial(print_inspection, found))
    if how.output:
        steps = how.steps or usual_steps(denoiser, 50)
        drawn = SamplingOptions(how.output, num_samples=how.num_samples, steps=steps)
        sample_to_file(denoiser, drawn)
    return int(found.check.denoises is False)


def _students(options: StudentsCommand) -> int:
    from dkdm.checks.student_table import list_students, print_students
    from dkdm.models import chosen_teacher

    teacher = chosen_teacher(options.teacher_choice, sketched=True)
    measuring = options.measuring if options.measuring.measure else None
    rows = list_students(teacher, measuring)
    as_dicts = [dataclasses.asdict(row) for row in rows]
    table = partial(print_students, rows, teacher, measuring=measuring)
    _show(options.printing, as_dicts, table)
    return 0


def _check_student(options: CheckStudentCommand) -> int:
    from dkdm.checks.findings import print_findings
    from dkdm.checks.student import check_student
    from dkdm.models import chosen_teacher
    from dkdm.runs.models import given_conditions

    student, how = options.student_choice, options.check
    teacher = chosen_teacher(options.teacher_choice)
    checkup = check_student(
        student.student,
        given_conditions(teacher, GivenConditions(how.prompts), INSPECTED_PROMPT),
        prediction=student.student_prediction,
        process=student.student_process,
        compile_backend=how.compile_backend if how.compile else None,
        export=how.export,
        factory=options.teacher_choice.factory,
    )
    as_dicts = [each.as_dict() for each in checkup.findings]
    _show(options.printing, as_dicts, partial(print_findings, checkup.findings))
    if checkup.failure is not None:
        raise DkdmError(
            f"nothing more could be tried: {checkup.failure}. --debug shows the traceback"
        ) from checkup.failure
    return int(not checkup.passed)


def _plan(options: PlanCommand) -> int:
    from dkdm.checks.memory_plan import (
        GIB,
        PlannedRun,
        changes,
        device_memory_mib,
        plan,
        print_plan,
    )
    from dkdm.models import chosen_teacher
    from dkdm.runs.scale import print_scale, scale

    teacher = chosen_teacher(options.teacher_choice, sketched=True)
    shared = {key: each for key, each in options.flat().items() if key in places(PlannedRun)}
    run = PlannedRun(guidance_scale="2" if options.plan.guidance else "1", **shared)
    found = plan(teacher, run, options.plan.gpus)
    limit = device_memory_mib() if options.plan.memory is None else options.plan.memory * GIB
    advice = changes(teacher, found, limit)
    changed = [dataclasses.asdict(change) for change in advice]
    work = scale(teacher, found, options.plan)
    values = {**found.as_dict(), "limit": limit, "changes": changed, "scale": work.as_dict()}

    def shown(console: Console) -> None:
        print_plan(found, advice, limit, console)
        print_scale(work, console)

    _show(options.printing, values, shown)
    return int(found.device_total > limit)


def _doctor(options: DoctorCommand) -> int:
    from dkdm.checks.findings import print_findings

    if options.examined.run is None:
        from dkdm.checks.doctor import examine

        findings = examine()
    else:
        from dkdm.runs.health import examine_run

        findings = examine_run(expanded(options.examined.run))
    as_dicts = [each.as_dict() for each in findings]
    _show(options.printing, as_dicts, partial(print_findings, findings))
    return int(any(each.status == "problem" for each in findings))


def _report(options: ReportCommand) -> int:
    check_output("the report", options.given.run / "report.html", overwrite=True)
    from dkdm.report import write_report

    print(write_report(options.given.run))
    return 0


def _compare(options: CompareCommand) -> int:
    from dkdm.report.tables import print_comparison
    from dkdm.runs.compare import compare_runs

    table = compare_runs(options)
    _show(options.files, table.as_dict(), partial(print_comparison, table))
    if options.files.output and not options.files.json:
        print(options.files.output)
    return 0


def _ui(options: UiCommand) -> int:
    from dkdm.runs.ui import serve

    serve(options)
    return 0


def _push(options: PushCommand) -> int:
    from dkdm.shipping.hub import push

    print(push(options.given.run, options.given.hub_model_id, options.given.private))
    return 0


COMMANDS: dict[str, tuple[type[Grouped], Callable[[Any], int]]] = {
    "distill": (DistillConfig, _distill),
    "train": (TrainConfig, _train),
    "inspect": (InspectCommand, _inspect),
    "students": (StudentsCommand, _students),
    "check-student": (CheckStudentCommand, _check_student),
    "plan": (PlanCommand, _plan),
    "sample": (SampleCommand, _sample),
    "evaluate": (EvaluateCommand, _evaluate),
    "harvest": (HarvestCommand, _harvest),
    "export": (ExportCommand, _export),
    "report": (ReportCommand, _report),
    "compare": (CompareCommand, _compare),
    "ui": (UiCommand, _ui),
    "push": (PushCommand, _push),
    "doctor": (DoctorCommand, _doctor),
}
