"""Which classes a file may name: models, schedulers and tokenizers of diffusers and transformers.

A file can make nothing else: no function, no pipeline, no class of another package.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dkdm.errors import DkdmError, UsageError
from dkdm.reading.fields import is_name, read_json, shown

_BASES = {
    "diffusers": ("ModelMixin", "SchedulerMixin"),
    "transformers": (
        "PreTrainedModel",
        "PreTrainedTokenizerBase",
        "FeatureExtractionMixin",
        "ImageProcessingMixin",
        "ProcessorMixin",
    ),
}


def library_class(library: str, name: str) -> Any:
    """The class of a library that a file names; None if no such class may be made.

    A stand-in of a class whose packages are missing is given too: it says so when it is used.
    Raises DkdmError if the library cannot be imported.
    """
    if library not in _BASES or not is_name(name):
        return None
    try:
        module = importlib.import_module(library)
        found = getattr(module, name, None)
        bases = tuple(getattr(module, base) for base in _BASES[library])
    except (ImportError, RuntimeError) as error:
        raise DkdmError(f"{library}.{name} cannot be imported: {error}") from error
    if not isinstance(found, type):
        return None
    return found if issubclass(found, bases) or type(found).__name__ == "DummyObject" else None


def component_class(folder: Path, library: object, name: object) -> Any:
    """The class of a pipeline's component. Raises UsageError for one that may not be made."""
    known = isinstance(library, str) and isinstance(name, str)
    found = library_class(str(library), str(name)) if known else None
    if found is None:
        raise UsageError(
            f"{folder}: its class is {shown([library, name])}: give a model or tokenizer of "
            f"{' or '.join(_BASES)}. No other class is made because a file names it"
        )
    if library == "transformers":
        _refuse_fetched_code(folder)
    return found


_WHOLE = ("implementation", "auto_map")
_ATTENTION = (None, "eager", "sdpa")


def _refuse_fetched_code(folder: Path) -> None:
    """Raise UsageError for what lets transformers fetch more than the folder holds.

    An attention of another name may be code of the hub, adapters name another model, and an inner
    `auto_map` names code; that of the whole model is ignored for a class of transformers.
    """
    if (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder}: an adapter lies beside the component: merge it, or remove it")
    if not (folder / "config.json").is_file():
        return
    config = read_json(folder / "config.json", "its config")
    for key, value in _entries({key: v for key, v in config.items() if key != "auto_map"}):
        if key == "auto_map":
            raise UsageError(
                f"{folder / 'config.json'}: auto_map names code of a part of the model: remove it"
            )
        if key.strip("_").endswith("implementation") and value not in _ATTENTION:
            raise UsageError(
                f"{folder / 'config.json'}: {key} is {shown(value)}: give eager or sdpa"
            )


def _entries(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries of an object and of those inside it; not of those of an implementation."""
    for key, value in values.items():
        inner = [value] if isinstance(value, Mapping) else value
        inner = [v for v in inner if isinstance(v, Mapping)] if isinstance(inner, list) else []
        if not inner or key.strip("_").endswith(_WHOLE):
            yield key, value
            continue
        for each in inner:
            yield from _entries(each)
