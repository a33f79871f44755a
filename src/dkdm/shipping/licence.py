"""A teacher's name and licence, as far as its model card says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from dkdm.config import DistillConfig, TeacherOptions
from dkdm.errors import UsageError
from dkdm.models.locate import builtin_names, is_hub_id, locate
from dkdm.reading.fields import read_text, read_yaml
from dkdm.reading.places import expanded

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """What others may read of a teacher; it holds no path of this machine.

    name: hub id, `builtin:NAME`, `module:factory`, or the last part of a path. hub_id: of the
    teacher itself; None if it is not known to be on the hub. base_model: hub ids for the student's
    card. licence: the LICENCE_KEYS of the teacher's card; empty without one.
    """

    name: str
    hub_id: str | None = None
    base_model: str | list[str] | None = None
    licence: Mapping[str, Any] = field(default_factory=dict)


def origin_of(teacher: TeacherOptions) -> Origin:
    """The origin of a run's teacher. Nothing is downloaded."""
    spec = teacher.model
    found = _hub_id(spec)
    card = _card_of(spec, teacher.subfolder, teacher.revision)
    matter = front_matter(card) if card else {}
    licence = {key: matter[key] for key in LICENCE_KEYS if _is_word(matter.get(key))}
    name = found or (spec if ":" in spec else Path(spec).name)
    return Origin(name, found, found or _named(matter.get("base_model")), _linked(licence, found))


def origins_of(config: DistillConfig) -> list[Origin]:
    """The origins of all teachers of a run."""
    names = [config.teacher_choice.model, *(config.teachers.more_teachers or ())]
    return [origin_of(replace(config.teacher_choice, model=name)) for name in names]


def common_licence(origins: Sequence[Origin]) -> dict[str, Any]:
    """The licence that all teachers have; empty if one's is unknown or another."""
    first, *others = (dict(origin.licence) for origin in origins)
    return first if all(other == first for other in others) else {}


def base_models(origins: Sequence[Origin]) -> str | list[str] | None:
    """The hub ids that a student's card names as its base; None if no teacher has one."""
    if len(origins) == 1:
        return origins[0].base_model
    each = [o.base_model if isinstance(o.base_model, list) else [o.base_model] for o in origins]
    return list(dict.fromkeys(name for names in each for name in names if name)) or None


def licence_of_student(given: str | None, inherited: Mapping[str, Any]) -> dict[str, Any]:
    """The licence keys of a student's card: those given or the teacher's; empty if unknown."""
    if given in (None, inherited.get("license"), inherited.get("license_name")):
        return dict(inherited)
    return {"license": given}


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 500 and value.isprintable()


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the start of a model card; empty if none can be read."""
    try:
        text = read_text(card, "a model card").removeprefix("\ufeff")
        found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s", f"{text}\n", re.DOTALL)
        values = read_yaml(found[1], str(card)) if found else {}
    except UsageError:
        return {}
    return values if isinstance(values, dict) else {}


def _hub_id(spec: str) -> str | None:
    """The hub id that was downloaded, or whose snapshot in the hub's cache a path points into."""
    if is_hub_id(spec):
        cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=spec, repo_type="model")
        return spec if cached.is_dir() else None
    path = expanded(spec).absolute().as_posix()
    found = re.search(r"/models--([^/]+)/snapshots(?:/|$)", path)
    return found[1].replace("--", "/", 1) if found else None


def _card_of(spec: str, subfolder: str | None, revision: str | None) -> Path | None:
    if is_hub_id(spec):
        path = try_to_load_from_cache(spec, CARD, revision=revision)
        return Path(path) if isinstance(path, str) else None
    builtin = spec in [f"builtin:{name}" for name in builtin_names()]
    if ":" in spec and not builtin:
        return None
    folder = locate(spec) if builtin else expanded(spec)
    places = (folder / (subfolder or "") / CARD, folder / CARD)
    return next((path for path in places if path.is_file()), None)


def _named(base_model: Any) -> str | list[str] | None:
    """The hub ids that a local teacher's card names as its base."""
    if isinstance(base_model, list):
        return [name for name in base_model if is_hub_id(str(name))] or None
    return base_model if is_hub_id(str(base_model)) else None


def _linked(licence: dict[str, Any], repo_id: str | None) -> dict[str, Any]:
    """A link to a file beside the teacher's card, made whole; dropped if it leads nowhere."""
    link = str(licence.get("license_link", ""))
    if not link or "://" in link:
        return licence
    rest = {key: value for key, value in licence.items() if key != "license_link"}
    whole = f"{constants.HUGGINGFACE_CO_URL_HOME}{repo_id}/blob/main/{link}"
    return {**rest, "license_link": whole} if repo_id else rest
