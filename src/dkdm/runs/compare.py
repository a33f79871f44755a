"""Put runs, evaluations and models side by side: `dkdm compare`."""

from __future__ import annotations

from collections.abc import Sequence

from dkdm.config import CompareCommand, ComparedOptions
from dkdm.core.denoisers.conditioning import ClassLabels, Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import kind_of, null_or_none
from dkdm.errors import UsageError
from dkdm.evaluation.comparison import SPEED_BATCH, describe
from dkdm.evaluation.cost import count_macs, evaluations_per_second, undisturbed
from dkdm.evaluation.figures import memories, sizes, speed
from dkdm.evaluation.memory import evaluation_mib, weights_mib
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.models.locate import INDEX, is_hub_id
from dkdm.models.place import device_of_run, place
from dkdm.reading.fields import read_json
from dkdm.reading.files import atomic, check_output
from dkdm.reading.places import expanded
from dkdm.report.comparison_page import comparison_page
from dkdm.report.entries import SHOWN, Entry, Samples, entry_of_evaluation, entry_of_run, how_drawn
from dkdm.report.side_by_side import Table, side_by_side
from dkdm.report.tables import markdown
from dkdm.runs.earlier import run_folder, run_of, weights_of

KINDS = "a run's folder, the JSON of dkdm evaluate --json, or a model"
SUFFIXES = (".html", ".md")
STEPS = 25  # of samples, if no run says how many


def compare_runs(command: CompareCommand) -> Table:
    """Read what the options name, write the page or the Markdown that they ask for.

    Raises UsageError for fewer than two, and for what is neither a run, an evaluation nor a model.
    """
    how, files = command.compared, command.files
    if len(how.runs) < 2:
        raise UsageError(f"nothing to compare: give two or more, each {KINDS}")
    if files.output is not None:
        check_output("--output", files.output, suffixes=SUFFIXES, overwrite=files.overwrite)
    entries = opened(how)
    table = side_by_side(entries)
    if files.output is not None:
        is_page = files.output.suffix == ".html"
        text = comparison_page(entries, table) if is_page else markdown(table)
        files.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic(files.output) as partial:
            partial.write_text(text, encoding="utf-8")
    return table


def opened(how: ComparedOptions) -> list[Entry]:
    """All that is compared, in the order it was named; models are opened last: they take longest.

    A model draws samples from the noise of the first run that has some.
    """
    found = [_written(spec) for spec in how.runs]
    beside = next((entry for entry in found if entry and entry.samples), None)
    return [
        entry or entry_of_model(spec, how.draw, beside)
        for spec, entry in zip(how.runs, found, strict=True)
    ]


def _written(spec: str) -> Entry | None:
    """A run or an evaluation; None for a model. Raises UsageError for anything else."""
    path = expanded(spec)
    if path.suffix == ".json" and not path.is_dir():
        return entry_of_evaluation(path)
    config = path / "config.json"
    if config.is_file() and "kind" in read_json(config, "the config.json of a run or a model"):
        return entry_of_run(path)
    known = config.is_file() or (path / INDEX).is_file() or run_folder(path) != path
    if path.is_dir() and not known:
        raise UsageError(f"{spec} is neither a run nor a model: give {KINDS}")
    if not path.exists() and ":" not in spec and not is_hub_id(spec):
        raise UsageError(f"{spec} does not exist: give {KINDS}")
    return None


def entry_of_model(spec: str, draws: bool = True, beside: Entry | None = None) -> Entry:
    """A model that is opened: its size and speed, and samples.

    draws: whether there are any. beside: a run, from whose noise and with whose steps they are
    drawn; None draws others.
    """
    from dkdm.models import load_teacher  # diffusers, which runs and evaluations do not need

    model, run = load_teacher(spec), run_of(spec)
    place(model, device_of_run())
    rate = evaluations_per_second(model, SPEED_BATCH)
    figures = [
        *sizes(model.num_parameters, count_macs(model)),
        *memories(weights_mib(model), evaluation_mib(model, 1)),
        speed(rate, describe(model.device)),
    ]
    samples, how = _drawn(model, beside) if draws else (None, "")
    return Entry(
        spec,
        "model",
        {
            "network": type(model.network).__name__,
            "weights": weights_of(spec, run) if run else "",
            "samples shown": how,
        },
        figures,
        samples=samples,
        missing=[f"only size and speed were measured: dkdm evaluate {spec} --json measures more"],
    )


def _drawn(model: Denoiser, beside: Entry | None) -> tuple[Samples | None, str]:
    """Samples, and how they were drawn; none of models that ask for more than a class.

    They are guided as the run beside them is, if the model can be.
    """
    if kind_of(model.conditioning).asks not in (None, "class_labels"):
        return None, ""
    found = beside.run.comparison if beside and beside.run else None
    wanted = beside.samples.names[:SHOWN] if beside and beside.samples else ("",) * SHOWN
    sampling = Sampling(len(wanted), *((found.num_steps, found.seed) if found else (STEPS, 0)))
    cond, null = conditions(model, wanted), null_or_none(model.conditioning, 1)
    scale = found.student.guidance_scale if found and null is not None else 1.0
    with undisturbed(model):
        images = decoded(model, draw(model, cond, sampling, scale))
    if not 2 <= images.ndim <= 5:
        return None, ""
    known = kind_of(model.conditioning).shown_names(0) or ()
    labels = [int(label) for label in cond.get("class_labels", ())]
    names = [known[i] if i < len(known) else f"class {i}" for i in labels]
    noise = sampling.seed, tuple(model.sample_shape)
    samples = Samples(images, None, noise, tuple(names) or ("",) * len(wanted))
    return samples, how_drawn(sampling.num_steps, scale)


def conditions(model: Denoiser, wanted: Sequence[str]) -> Condition:
    """The classes of these names; if the model has others, its own in turns."""
    conditioning = model.conditioning
    known = kind_of(conditioning).shown_names(0) or ()
    if isinstance(conditioning, ClassLabels) and set(wanted) <= set(known):
        return conditioning.of([known.index(name) for name in wanted])
    return conditioning.in_turns(len(wanted))
