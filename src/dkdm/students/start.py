"""What a student starts from: random weights, the teacher's or a checkpoint's; and LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from dkdm.config import StudentOptions
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.few_steps.grid import GRID
from dkdm.core.objectives.positions import counterparts
from dkdm.core.saving import checkpoint
from dkdm.core.saving.folders import MANIFEST, verify_folder
from dkdm.errors import UsageError
from dkdm.models.architectures import architecture_of
from dkdm.models.formats.state_dict import read_weights
from dkdm.models.locate import INDEX, locate
from dkdm.reading.fields import read_json
from dkdm.reading.places import check_folder
from dkdm.students.loading import denoiser_folder
from dkdm.students.lora import add_lora, inherited_names, merged_weights
from dkdm.students.slices import LAYOUTS, Pair, taken


@dataclass(frozen=True)
class Start:
    """Where a student's parameters come from.

    whole, sliced, random: names of the parameters that were copied whole, copied in part, and left
    random. share: how many of all their numbers were copied. frozen: names of the parameters that
    are not trained. lora_rank: None without adapters.
    """

    origin: str
    whole: tuple[str, ...] = ()
    sliced: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    share: float = 0.0
    frozen: frozenset[str] = frozenset()
    lora_rank: int | None = None

    def __str__(self) -> str:
        if not self.whole and not self.sliced:
            return self.origin
        names = ", ".join(self.random[:3]) + (", ..." if len(self.random) > 3 else "")
        first = f" ({names})" if names else ""
        total = len(self.whole) + len(self.sliced) + len(self.random)
        return (
            f"{self.origin}: of {total} tensors {len(self.whole)} whole, "
            f"{len(self.sliced)} sliced, {len(self.random)} left random{first}; "
            f"{self.share:.1%} of the parameters"
            + (f"; LoRA of rank {self.lora_rank} on them" if self.lora_rank else "")
        )


def start_student(
    student: Denoiser, teacher: Denoiser, options: StudentOptions, resumed: Path | None = None
) -> Start:
    """Give the student's network its first weights, and the adapters that the options ask for.

    resumed: the checkpoint that the run goes on from, if any; nothing else is read then. Raises
    UsageError if `student_init` names nothing, or nothing that fits; DkdmError for damaged files.
    """
    origin, rank = options.student_init, options.lora_rank
    if rank is not None and origin == "random":
        raise UsageError(
            "--lora-rank adapts weights that stay fixed: add --student-init teacher, or the path "
            "of a checkpoint"
        )
    network: nn.Module = student.network  # type: ignore[assignment]
    if resumed:
        start, inherited = Start(str(resumed)), _inherited(resumed) if rank else set()
    elif origin == "random":
        return Start("random weights")
    else:
        weights = _teacher_weights(teacher) if origin == "teacher" else read_checkpoint(origin)
        start = inherit(network, weights, origin)
        inherited = {*start.whole, *start.sliced}
    frozen = frozenset[str]() if rank is None else add_lora(network, inherited, rank)
    return replace(start, frozen=frozen, lora_rank=rank)


def _inherited(folder: Path) -> set[str]:
    """What a run with adapters inherited when it started, according to its checkpoint."""
    frozen = read_json(folder / "state.json", "a checkpoint's state").get("frozen")
    if not frozen or not all(isinstance(name, str) for name in frozen):
        raise UsageError(f"{folder} was trained without LoRA: resume without --lora-rank")
    return inherited_names(frozenset(frozen))


def inherit(network: nn.Module, source: Mapping[str, Tensor], origin: str) -> Start:
    """Copy what fits from the weights of another network, and say what was copied.

    Tensors correspond by their names and positions (`counterparts`); those of a wider network are
    sliced if the layout of the network's class is known. Raises UsageError if nothing fits.
    """
    state, parameters = network.state_dict(), dict(network.named_parameters())
    pairs = [Pair(*names, state, source) for names in counterparts(state, source).items()]
    whole = {pair.name: source[pair.other] for pair in pairs if pair.is_whole}
    layout = LAYOUTS.get(architecture_of(network).layout)
    wider = [pair for pair in pairs if pair.name in parameters and not pair.is_whole]
    parts = {pair.name: taken(pair, layout) for pair in wider}
    sliced = {name: part for name, part in parts.items() if part is not None}
    copied = [name for name in parameters if name in whole or name in sliced]
    if not copied:
        names = [", ".join(list(each)[:3]) for each in (source, state)]
        raise UsageError(
            f"--student-init {origin}: nothing in it fits this {type(network).__name__}: its "
            f"tensors have other names or shapes ({names[0]}, ... instead of {names[1]}, ...); use "
            "a network of the same kind, or --student-init random"
        )
    network.load_state_dict(whole | sliced, strict=False)
    numbers = {name: parameter.numel() for name, parameter in parameters.items()}
    return Start(
        origin,
        tuple(name for name in copied if name in whole),
        tuple(name for name in copied if name in sliced),
        tuple(name for name in parameters if name not in copied),
        sum(numbers[name] for name in copied) / sum(numbers.values()),
    )


def _teacher_weights(teacher: Denoiser) -> dict[str, Tensor]:
    network = teacher.network
    if not isinstance(network, nn.Module):
        raise UsageError("--student-init teacher: the teacher is a function and has no weights")
    weights = network.state_dict()
    if any(type(weight) is not Tensor or weight.is_meta for weight in weights.values()):
        raise UsageError(
            "--student-init teacher: the teacher's weights are in int8 or offloaded; give the "
            "teacher's folder to --student-init instead"
        )
    return weights


def _refuse_few_steps(path: Path, spec: str) -> None:
    index = path / INDEX
    if index.is_file() and GRID in read_json(index, "a pipeline's index"):
        raise UsageError(
            f"--student-init {spec} is a few-step model, whose weights know no levels between its "
            "steps: give the run's folder plain/ or many-steps/"
        )


def read_checkpoint(spec: str) -> dict[str, Tensor]:
    """The weights of a denoiser, adapters merged; the averaged ones if a run has them.

    spec: a run, one of its `checkpoint-N`, a pipeline folder or the component in it, a hub id, or a
    file of weights. Raises UsageError if there are none, DkdmError if they are damaged.
    """
    path = locate(spec)
    if path.is_file():
        return merged_weights(read_weights(path).tensors)
    _refuse_few_steps(path, spec)
    last = None if (path / INDEX).is_file() else checkpoint.newest(path)
    path_of_run = last or path
    if last is None and (path / MANIFEST).is_file():
        verify_folder(path)
    folder = check_folder(denoiser_folder(path_of_run), path)
    whole = folder / checkpoint.WEIGHTS
    parts = sorted(folder.glob(f"{whole.stem}-*-of-*{whole.suffix}"))
    files = [whole] if whole.is_file() else parts
    if not files:
        raise UsageError(
            f"--student-init {spec}: no {whole.name} in {folder}; give a run, a checkpoint-N, a "
            "diffusers pipeline or its denoiser's folder, or a file of weights"
        )
    return merged_weights(
        {k: v for file in files for k, v in checkpoint.read_tensors(file).items()}
    )
