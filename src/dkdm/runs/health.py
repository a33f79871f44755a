"""Whether a run is whole: its files, every checkpoint, the finished model, its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dkdm.checks.findings import Finding
from dkdm.core.saving.checkpoint import RUN, STATE, checkpoints, read_tensors, verify_checkpoint
from dkdm.core.saving.folders import SUMS, damaged_by_sums, verify_folder
from dkdm.core.saving.progress import read_metrics
from dkdm.core.sources.finished import SampleShards
from dkdm.core.training.selection import FOLDER as BEST
from dkdm.core.training.selection import RECORD
from dkdm.errors import DkdmError, UsageError, in_a_line
from dkdm.evaluation.few_steps import FEW_STEPS, read_steps_table
from dkdm.evaluation.parts import read_whole
from dkdm.evaluation.pool_state import POOL, read_pool_state
from dkdm.evaluation.results import EVALUATION, SAMPLES, read_evaluation, read_samples
from dkdm.evaluation.trajectories import TRAJECTORIES, read_trajectories
from dkdm.models.identity import identity_of
from dkdm.reading.fields import Fields, read_json, read_text
from dkdm.reading.lock import holder
from dkdm.report.page import REPORT
from dkdm.runs.arms import FINISHED, SYNTHETIC
from dkdm.runs.earlier import Run, run_of, teacher_of
from dkdm.runs.few_steps import PLAIN
from dkdm.runs.launch import is_finished
from dkdm.runs.resume import HISTORY
from dkdm.runs.source import FILL
from dkdm.students.loading import denoiser_folder

MAX_PAGE = 2**30  # bytes


def read_page(folder: Path) -> str:
    """The page of a run. Raises DkdmError if it is cut off."""
    text = read_text(folder / REPORT, "the page of a run", MAX_PAGE)
    if not (text.startswith("<!") and text.rstrip().endswith("</html>")):
        raise DkdmError(f"{folder / REPORT} is cut off")
    return text


MEASUREMENTS: dict[str, Callable[[Path], object]] = {
    EVALUATION: read_evaluation,
    SAMPLES: read_samples,
    FEW_STEPS: read_steps_table,
    POOL: read_pool_state,
    TRAJECTORIES: read_trajectories,
    REPORT: read_page,
}
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
    yield from (config, *_parts(folder), _metrics(folder), *_history(folder))
    yield from (*_samples(folder), _model(folder), *_measured(folder))
    if config.status == "ok":
        yield from _teacher(folder)


def _config(folder: Path) -> Finding:
    try:
        run = run_of(folder)
        if run is not None:
            read_whole(folder, run)
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
        yield _fill(folder / FILL)
    whole = []
    for path in every:
        found = _checkpoint(path)
        whole += [path] if found.status == "ok" else []
        yield found
    if every and not whole:
        yield Finding("resume", "problem", "no checkpoint is whole", "start the run anew")
    if (folder / BEST).is_dir():
        yield _whole(folder / BEST, RECORD)


def _fill(folder: Path) -> Finding:
    try:
        read_json(folder / RUN, "what a pool is filled for")
        for each in filter(Path.is_dir, folder.glob("[!.]*")):
            verify_folder(each, STATE)
    except DkdmError as error:
        return Finding("fill", "problem", str(error), f"delete {folder}; it is filled anew")
    return Finding("fill", "ok", f"not done; {LATEST} goes on with it")


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
    path, wanted = folder / "metrics.jsonl", _last_line(folder)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines, entries = text.splitlines(), read_metrics(path)
    if not lines and not wanted:
        return Finding("metrics.jsonl", "ok", "not written yet")
    if len(entries) < len(lines):
        what = f"{len(lines) - len(entries)} of {len(lines)} lines cannot be read"
        return Finding("metrics.jsonl", "warning", what, f"{LATEST} leaves them out")
    last = entries[-1]["step"] if entries else 0
    if last < wanted:
        what = f"ends at step {last:,}, and the newest checkpoint is of step {wanted:,} or later"
        return Finding("metrics.jsonl", "warning", what, "the run does not need what is missing")
    return Finding("metrics.jsonl", "ok", f"{len(entries)} lines, to step {last:,}")


def _last_line(folder: Path) -> int:
    """The step of the last line of metrics before the newest checkpoint; 0 if nothing tells."""
    with suppress(DkdmError):
        run, every = run_of(folder), checkpoints(folder)
        logging = 0 if run is None else run.checkpoints.logging_steps
        if every and logging:
            state = Fields(read_json(every[-1] / STATE, "a state"), str(every[-1] / STATE))
            step = state.whole("step")
            return 0 if "waiting_metrics" in state.values else step - step % logging
    return 0


def _history(folder: Path) -> Iterator[Finding]:
    """What cannot be read of the history of starts, which nothing but a reader needs."""
    path = folder / HISTORY
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if bad := sum(not _is_start(line) for line in lines or [""]):
            what = f"{bad} of {len(lines)} lines cannot be read"
            yield Finding(HISTORY, "warning", what, "the run does not need them")


def _is_start(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _samples(folder: Path) -> Iterator[Finding]:
    """Shards of samples that cannot be read: of a synthetic set, and of kept samples."""
    for name, remedy in ((FINISHED, "delete it"), (SYNTHETIC, f"{LATEST} draws it again")):
        shards = SampleShards(folder / name)
        for number in shards.numbers():
            try:
                shards.read(number)
            except DkdmError as error:
                yield Finding(f"{name}/{shards.path(number).name}", "problem", str(error), remedy)


def _measured(folder: Path) -> Iterator[Finding]:
    """What was measured at the end, where it is damaged."""
    for name, read in MEASUREMENTS.items():
        if (folder / name).exists():
            try:
                read(folder)
            except DkdmError as error:
                yield Finding(name, "problem", str(error), f"{LATEST} measures again")


def _damaged(folder: Path) -> list[str]:
    """Files of a finished model, and of those beside it, that are not as they were written."""
    places = [path.parent for path in (folder / SUMS, *folder.glob(f"*/{SUMS}")) if path.is_file()]
    return [
        (place / name).relative_to(folder).as_posix()
        for place in places
        if place not in (folder / BEST, folder / PLAIN)  # which are looked at by themselves
        for name in damaged_by_sums(place)
    ]


def _model(folder: Path) -> Finding:
    """The finished model: it is as it was written, and its weights are finite."""
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
        damaged = _damaged(folder)
    except DkdmError as error:
        return Finding("model", "problem", str(error), f"{LATEST} writes it again")
    if bad or not files:
        what = f"not finite: {', '.join(bad[:3])}" if bad else f"no weights in {place}"
        return Finding("model", "problem", what, f"{LATEST} writes it again")
    if damaged:
        what = f"missing or not as it was written: {', '.join(damaged[:3])}"
        return Finding("model", "problem", what, f"{LATEST} writes it again")
    return Finding("model", "ok", f"finished, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")


def _teacher(folder: Path) -> Iterator[Finding]:
    """Whether the teacher is still the one of the newest checkpoint, or of a fill before any."""
    run, places = run_of(folder), (*reversed(checkpoints(folder)), folder / FILL)
    facts = [path / RUN for path in places if (path / RUN).is_file()]
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
