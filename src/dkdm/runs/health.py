"""Whether a run is whole: its files, every checkpoint, the finished model, its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dkdm.checks.findings import Finding
from dkdm.core.checkpoint import RUN, STATE, checkpoints, read_tensors, verify_checkpoint
from dkdm.core.folders import verify_folder
from dkdm.core.progress import read_metrics
from dkdm.core.selection import FOLDER as BEST
from dkdm.core.selection import RECORD
from dkdm.errors import DkdmError, UsageError, in_a_line
from dkdm.models.identity import identity_of
from dkdm.reading.fields import Fields, read_json
from dkdm.reading.lock import holder
from dkdm.runs.earlier import Run, run_of, teacher_of
from dkdm.runs.few_steps import PLAIN
from dkdm.runs.launch import is_finished
from dkdm.runs.source import FILL
from dkdm.students.loading import denoiser_folder

LATEST = "--resume-from-checkpoint latest"


def examine_run(folder: Path) -> list[Finding]:
    """Look at everything in the folder of a run; nothing in it is changed.

    Reads all of its files, and its teacher. Raises UsageError for what is no folder of a run.
    """
    parts = [place for place in (folder / PLAIN, folder) if _is_run(place)]
    if not parts:
        raise UsageError(f"{folder} is no run: give the --output-dir of dkdm distill or train")
    return [
        found if part == folder else replace(found, name=f"{PLAIN}/{found.name}")
        for part in parts
        for found in _examined(part)
    ]


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() or bool(checkpoints(folder))


def _examined(folder: Path) -> Iterator[Finding]:
    config = _config(folder)
    yield from (config, *_parts(folder), _metrics(folder), _model(folder))
    if config.status == "ok":
        yield from _teacher(folder)


def _config(folder: Path) -> Finding:
    try:
        run = run_of(folder)
    except DkdmError as error:
        return Finding("config.json", "problem", str(error), "restore it, or copy the options")
    if run is None:
        what = "missing: nothing tells how the run was started"
        remedy = f"copy the options from checkpoint-N/{RUN}"
        return Finding("config.json", "problem", what, remedy)
    return Finding("config.json", "ok", f"dkdm {type(run).command}")


def _parts(folder: Path) -> Iterator[Finding]:
    """The lock, what a fill left, checkpoints and the best weights."""
    if (who := holder(folder)) is not None:
        yield Finding("lock", "ok", f"{who} is writing: what it writes now may look unfinished")
    every = checkpoints(folder)
    if not every and not (folder / FILL).is_dir():
        yield Finding("checkpoints", "warning", "none", "start the run with the same command")
    if (folder / FILL).is_dir() and not every:
        yield Finding("fill", "ok", f"not done; {LATEST} goes on with it")
    whole = []
    for path in every:
        found = _checkpoint(path)
        whole += [path] if found.status == "ok" else []
        yield found
    if every and not whole:
        yield Finding("resume", "problem", "no checkpoint is whole", "start the run anew")
    if (folder / BEST).is_dir():
        yield _whole(folder / BEST, RECORD)


def _checkpoint(path: Path) -> Finding:
    try:
        verify_checkpoint(path)
        step = Fields(read_json(path / STATE, "a state"), str(path / STATE)).whole("step")
    except DkdmError as error:
        remedy = f"delete it; {LATEST} uses an earlier one"
        return Finding(path.name, "problem", str(error), remedy)
    return Finding(path.name, "ok", f"whole, after step {step:,}, {_size(path):.1f} MB")


def _whole(path: Path, needed: str) -> Finding:
    try:
        verify_folder(path, needed)
    except DkdmError as error:
        return Finding(path.name, "problem", str(error), "delete it; the run chooses anew")
    return Finding(path.name, "ok", f"whole, {_size(path):.1f} MB")


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _metrics(folder: Path) -> Finding:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return Finding("metrics.jsonl", "ok", "not written yet")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = read_metrics(path)
    if len(entries) < len(lines):
        what = f"{len(lines) - len(entries)} of {len(lines)} lines cannot be read"
        return Finding("metrics.jsonl", "warning", what, f"{LATEST} leaves them out")
    last = entries[-1]["step"] if entries else 0
    return Finding("metrics.jsonl", "ok", f"{len(entries)} lines, to step {last:,}")


def _model(folder: Path) -> Finding:
    """The finished model: its weights can be read, and are finite."""
    if not is_finished(folder):
        return Finding("model", "ok", f"the run is not finished; {LATEST} goes on with it")
    try:
        place = denoiser_folder(folder)
        files = sorted(place.glob("*.safetensors"))
        bad = [
            f"{file.name}: {name}"
            for file in files
            for name, value in read_tensors(file).items()
            if value.is_floating_point() and not bool(value.isfinite().all())
        ]
    except DkdmError as error:
        return Finding("model", "problem", str(error), f"{LATEST} writes it again")
    if bad or not files:
        what = f"not finite: {', '.join(bad[:3])}" if bad else f"no weights in {place}"
        return Finding("model", "problem", what, f"{LATEST} writes it again")
    return Finding("model", "ok", f"finished, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")


def _teacher(folder: Path) -> Iterator[Finding]:
    """Whether the teacher is still the one that the newest whole checkpoint was made with."""
    run = run_of(folder)
    facts = [path / RUN for path in reversed(checkpoints(folder)) if (path / RUN).is_file()]
    if not facts or run is None or getattr(run, "teacher_choice", None) is None:
        return
    try:
        known = read_json(facts[0], "what made a checkpoint").get("teacher")
    except DkdmError as error:
        yield Finding("teacher", "warning", str(error), "it could not be compared")
        return
    if isinstance(known, dict):
        yield _same_teacher(run, known)


def _same_teacher(run: Run, known: dict[str, str]) -> Finding:
    try:
        found = identity_of(teacher_of(run))
    except DkdmError as error:
        return Finding("teacher", "warning", f"could not be checked: {error}", "check its place")
    except Exception as error:
        what = f"could not be checked: {in_a_line(error)}"
        return Finding("teacher", "warning", what, "check its place")
    other = sorted(name for name in known if found.get(name) != known[name])
    if other:
        what = f"not the one that the run was made with: its {', '.join(other)} differ"
        return Finding("teacher", "problem", what, "give the teacher of the start")
    return Finding("teacher", "ok", "the one that the run was made with")
