"""A config file as the start of a run's options: read as data, and without a say in some things."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TypeVar

from dkdm.config import RunConfig, from_mapping
from dkdm.errors import UsageError
from dkdm.reading.fields import read_json
from dkdm.reading.made_here import was_made_here
from dkdm.reading.options import flag
from dkdm.reading.places import expanded
from dkdm.reading.plugins import named_code, split

Config = TypeVar("Config", bound=RunConfig)
NAMES_CODE = ("teacher", "more_teachers", "student", "network", "student_factory")


def config_file(kind: type[Config], path: Path, args: Sequence[str]) -> Config:
    """The options that a file holds; args: the command line beside it.

    Raises UsageError for options that are wrong, and for what a file may not decide unless the user
    types it too: code, if this machine did not write the name of that code into a run itself; an
    upload; and an output folder that is neither below the current directory nor the file's folder.
    """
    try:
        config = from_mapping(kind, read_json(path, "a config of a run"))
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error
    typed = {arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in args}
    _refuse_upload(config, path, typed)
    _refuse_output_elsewhere(config, path, typed)
    _refuse_code(config, path, typed)
    return config


def _refuse_upload(config: RunConfig, path: Path, typed: Set[str]) -> None:
    if config.hub.push_to_hub and not typed & {"push_to_hub", "no_push_to_hub"}:
        raise UsageError(
            f"--config {path} asks for an upload to {config.hub.hub_model_id or 'the hub'}: say "
            "--push-to-hub on the command line too, or --no-push-to-hub"
        )


def _refuse_output_elsewhere(config: RunConfig, path: Path, typed: Set[str]) -> None:
    output = expanded(config.run.output_dir).resolve()
    inside = output.is_relative_to(Path.cwd()) or output == path.resolve().parent
    if "output_dir" not in typed and not inside:
        raise UsageError(
            f"--config {path} writes to {config.run.output_dir}, outside of the current directory: "
            "say --output-dir on the command line too"
        )


def _refuse_code(config: RunConfig, path: Path, typed: Set[str]) -> None:
    for name, spec in code_named_in(config):
        if name not in typed and not was_made_here({"spec": spec}, split(spec)[0]):
            raise UsageError(
                f"--config {path} names code: {flag(name)} {spec}. If you trust that code, name it "
                "on the command line too"
            )


def code_named_in(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The code that a config names: options, and module:factory."""
    for name in NAMES_CODE:
        value = getattr(config, name, None)
        for each in value if isinstance(value, tuple) else (value,):
            for spec in named_code(each):
                yield name, spec
