"""A run that goes on: what has changed since it was started, and whether that may be.

Options that say what a run means must be as they were, and the teacher must be the same, unless
the user insists. All others take effect from the next step on. Each start is a line in
history.jsonl.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from dkdm.config import RunConfig
from dkdm.core.saving.checkpoint import RUN
from dkdm.errors import UsageError
from dkdm.evaluation.parts import WHOLE, read_whole
from dkdm.reading.fields import read_json
from dkdm.reading.files import atomic
from dkdm.reading.options import flag, places
from dkdm.runs.earlier import run_of
from dkdm.version import __version__

HISTORY = "history.jsonl"
# groups whose options take effect whenever they change
FREE_GROUPS = {"optimizing", "checkpoints", "evaluation", "hub"}
FREE = {
    *("output_dir", "max_train_steps", "gradient_checkpointing", "mixed_precision", "check"),
    *("accelerate", "allow_tf32", "cuda_graphs", "deterministic", "fill_batch_size", "fsdp"),
    *("teacher_device", "teacher_offload", "teacher_prefetch", "student_factory"),
    *("pool_device", "pool_dir", "pool_pinned"),
}
# says nothing about the run
UNSAID = {"output_dir", "resume_from_checkpoint", "accept_changes"}
# how the teacher is found and read: what is read decides, its identity
OF_THE_TEACHER = {
    *("teacher", "teacher_subfolder", "teacher_revision", "teacher_variant", "teacher_format"),
    *("teacher_config", "teacher_flags", "teacher_lora", "teacher_dtype", "teacher_size"),
    *("teacher_scheduler", "more_teachers"),
}
DECIDED = {
    *("student_prediction", "loss_weighting", "optimizer", "learning_rate", "pool_size"),
    *("teacher_pool_size", "rho", "fill_entries", "lr_scheduler"),
}
LEFT_OPEN = (None, "auto")  # values of these, which are then as before


class Change(NamedTuple):
    """An option that is not as it was. takes_effect: whether it may change."""

    option: str
    then: Any
    now: Any
    takes_effect: bool

    def in_words(self) -> str:
        """The change as a part of a sentence."""
        return f"{flag(self.option)} was {self.then} and is {self.now}"


def changes_of(
    config: RunConfig, found: Path | None, asked: RunConfig | None = None
) -> list[Change]:
    """What has changed since the last start of the run that a checkpoint, or a fill, belongs to.

    asked: what all parts of the run are asked for, if config is of the last one.
    """
    begun = None if found is None else run_of(found.parent)
    if found is not None and begun is None:
        print(
            f"warning: {found.parent} has no config.json, so changed options cannot be seen",
            file=sys.stderr,
        )
    if begun is None or type(begun) is not type(config):
        return []
    before: RunConfig = begun
    if found is not None and asked is not None and (found.parent / WHOLE).is_file():
        before, config = read_whole(found.parent, begun), asked
    then, now = plain(before), plain(config)
    groups = places(type(config))
    return [
        Change(name, then[name], value, groups[name][0] in FREE_GROUPS or name in FREE)
        for name, value in now.items()
        if value != then[name] and not (name in DECIDED and value in LEFT_OPEN)
    ]


def plain(config: RunConfig) -> dict[str, Any]:
    """The options that say something about a run, as JSON values."""
    values = {name: value for name, value in config.flat().items() if name not in UNSAID}
    known: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return known


def check_changes(
    config: RunConfig, found: Path | None, asked: RunConfig | None = None
) -> list[Change]:
    """Show what has changed; returns it. Raises UsageError if that changes what the run means.

    asked: as in `changes_of`.
    """
    changes = changes_of(config, found, asked)
    known = [change for change in changes if change.option not in OF_THE_TEACHER]
    if not config.checkpoints.accept_changes:
        refused = [change.in_words() for change in known if not change.takes_effect]
        if refused:
            raise UsageError(
                f"{'; '.join(refused)}: this changes what the run means. Resume with the options "
                "it was started with, give another --output-dir, or insist with --accept-changes"
            )
    if changes:
        _show(changes)
    return changes


def _show(changes: list[Change]) -> None:
    table = Table("option", "then", "now", title="changed since the last start")
    for change in changes:
        table.add_row(flag(change.option), str(change.then), str(change.now))
    Console(stderr=True).print(table)


def check_same(
    what: str, identity: Mapping[str, str], found: Path | None, accept_changes: bool
) -> None:
    """Raise UsageError if a checkpoint, or a fill, was made with another teacher or student.

    what: which of them. identity: what it is, by the names of its parts. Former checkpoints do not
    say.
    """
    if found is None or accept_changes:
        return
    facts = found / RUN
    before = read_json(facts, "what made a checkpoint").get(what) if facts.is_file() else None
    known = before if isinstance(before, dict) else {}
    other = sorted(name for name in known if identity.get(name) != known[name])
    if other:
        raise UsageError(
            f"{found} was made with another {what}: its {', '.join(other)} differ. Give the "
            f"{what} that the run was started with, or insist with --accept-changes"
        )


def facts_of(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint repeats of its run: options and versions."""
    versions = {name: version(name) for name in ("torch", "diffusers", "accelerate")}
    return {"versions": {"dkdm": __version__, **versions}, "config": plain(config)}


def start_of(step: int, changes: Sequence[Change]) -> dict[str, Any]:
    """A start of the run, now, as its history has it."""
    changed = {change.option: [change.then, change.now] for change in changes}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "step": step, "dkdm": __version__, "changed": changed}


def note_start(folder: Path, start: Mapping[str, Any]) -> None:
    """Add a start of the run to its history, unless it is the last there; whole or not at all."""
    path, line = folder / HISTORY, json.dumps(start).encode()
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if lines[-1:] != [line]:
        with atomic(path) as partial:
            partial.write_bytes(b"".join(each + b"\n" for each in (*lines, line)))
