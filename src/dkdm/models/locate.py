"""From what the user typed to a folder on this machine.

Of a hub repository, the files are downloaded that a pipeline needs, and no others.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from dkdm.errors import DkdmError, UsageError, in_a_line, raised_as
from dkdm.models.effective import listed
from dkdm.models.pipelines import LEFT_OUT
from dkdm.reading.fields import read_json
from dkdm.reading.places import expanded

BUILTIN = Path(str(resources.files("dkdm"))) / "models" / "builtin"
INDEX = "model_index.json"
CARD = "README.md"
_CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl", ".gguf")
_OTHER = (".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".xml", ".tflite", ".flashpack", ".py")
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4")
_STEMS = "diffusion_pytorch_model|pytorch_model|model"
_SHARD = r"-\d{5}-of-\d{5}"
_ANY = (
    "*.json", "*.txt", "*.model", CARD,
    "*diffusion_pytorch_model*.safetensors", "*diffusion_pytorch_model*.bin",
    "*/model*.safetensors", "*/pytorch_model*.bin", "*/model*.bin",
)  # fmt: skip


def builtin_names() -> list[str]:
    """The models shipped with the package."""
    return sorted(path.parent.name for path in BUILTIN.glob(f"*/{INDEX}"))


def locate(
    spec: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    weights: bool = True,
    subfolder: str | None = None,
) -> Path:
    """The folder of a builtin, a path or a hub id (downloaded into the hub's cache).

    weights: whether they are needed too, or JSON files are enough. subfolder: of a repository, if
    only that is needed. Raises UsageError if there is nothing of that name.
    """
    if spec.startswith("builtin:"):
        return _builtin(spec.removeprefix("builtin:"))
    path = expanded(spec)
    if path.exists():
        return path
    if is_hub_id(spec):
        return download(spec, revision, variant, weights, subfolder)
    raise UsageError(
        f"no model at '{spec}': give a diffusers folder, a hub id (owner/name), a run's output "
        f"folder, module:factory, or one of {', '.join(f'builtin:{n}' for n in builtin_names())}"
    )


def is_hub_id(spec: str) -> bool:
    """Whether this reads as owner/name on the hub, and nothing of that name lies here."""
    shaped = re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith((".", "runs/"))
    return bool(shaped) and not Path(spec).exists()


def _builtin(name: str) -> Path:
    if name not in builtin_names():
        raise UsageError(
            f"no builtin model '{name}': use one of {', '.join(builtin_names()) or 'none'}"
        )
    return BUILTIN / name


def download(
    repo_id: str,
    revision: str | None = None,
    variant: str | None = None,
    weights: bool = True,
    subfolder: str | None = None,
) -> Path:
    """A hub repository's folder in the cache, with the files that a pipeline in it needs.

    weights: whether these are needed too, or JSON files are enough. If the hub cannot list the
    repository, everything that may be needed is taken: offline, from the cache. Raises UsageError
    for a repository without a pipeline, DkdmError if the hub does not give it.
    """
    names = _listing(repo_id, revision)
    if names is None:
        return _snapshot(repo_id, revision, _ANY if weights else ("*.json",))
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    index = {}
    if INDEX in inside:
        folder = _snapshot(repo_id, revision, [f"{prefix}{INDEX}"])
        index = read_json(folder / f"{prefix}{INDEX}", "a diffusers pipeline")
    elif "config.json" not in inside:
        raise _no_pipeline(repo_id, names, subfolder)
    needed = needed_files(inside, index, variant)
    chosen = [name for name in needed if weights or name.endswith(".json")]
    return _snapshot(repo_id, revision, [glob.escape(f"{prefix}{name}") for name in chosen])


def _listing(repo_id: str, revision: str | None) -> list[str] | None:
    """The names of all files, offline as they were last seen; None if they cannot be listed."""
    try:
        found = huggingface_hub.HfApi().model_info(repo_id, revision=revision, timeout=20)
        return [file.rfilename for file in found.siblings or ()]
    except Exception:  # offline, unknown or private: what the download says tells the reason
        cached: Any = getattr(huggingface_hub, "get_cached_repo_tree", None)
    try:
        return [file.path for file in cached(repo_id, revision=revision)]
    except Exception:  # never seen, or by an older huggingface_hub
        return None


def _snapshot(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    fetch, at = huggingface_hub.snapshot_download, f" at revision {revision}" if revision else ""
    said = f"'{repo_id}' is no folder here, and the hub did not give it{at}"
    with raised_as(lambda error: DkdmError(f"{said}: {in_a_line(error, 1000)}")):
        return Path(fetch(repo_id, revision=revision, allow_patterns=list(patterns)))


def needed_files(
    names: Iterable[str], index: Mapping[str, Any], variant: str | None = None
) -> list[str]:
    """The files that diffusers would load for the parts that an index lists.

    names: all files, with slashes. index: of `model_index.json`; empty for a network alone.
    variant: of weights, such as fp16; a part without it gives its plain ones. Safetensors come
    before .bin files; a part without a folder of its own lies beside the index.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        place, _, file = name.rpartition("/")
        folders.setdefault(place, []).append(file)
    needed = {name for name in (INDEX, CARD) if name in folders.get("", ())}
    for part in _parts(index):
        if part and part in folders:
            needed |= {f"{part}/{file}" for file in _of_part(folders[part], variant)}
        else:
            beside = _of_part(folders.get("", []), variant)
            needed |= {file for file in beside if file.endswith((".json", ".safetensors", ".bin"))}
    return sorted(needed)


def _parts(index: Mapping[str, Any]) -> Iterator[str]:
    """The components that an index lists; without an index, the network in the root."""
    if not index:
        yield ""
    for name in listed(index):
        if not name.startswith("_") and name not in LEFT_OUT:
            yield name


def _of_part(files: Sequence[str], variant: str | None) -> set[str]:
    """Configs and vocabularies of a component's folder, and its weights in one kind."""
    passed = (*_CHECKPOINTS, *_OTHER, *_PICTURES, CARD, ".gitattributes")
    plain = {file for file in files if not file.endswith(passed) and ".index." not in file}
    return plain | _weights(files, variant)


def _weights(files: Sequence[str], variant: str | None) -> set[str]:
    """The weights of one kind: the variant's before plain ones, safetensors before .bin."""
    for asked in dict.fromkeys((variant, None)):
        for suffix in ("safetensors", "bin"):
            pattern = re.compile(_pattern(suffix, asked))
            found = {file for file in files if pattern.fullmatch(file)}
            if any(file.endswith(suffix) for file in found):
                return found
    return set()


def _pattern(suffix: str, variant: str | None) -> str:
    """Weights, their shards and the index of these, by today's names and by older ones."""
    mark = rf"\.{re.escape(variant)}" if variant else ""
    files = rf"({_STEMS})({_SHARD})?{mark}({_SHARD})?\.{suffix}"
    return rf"{files}|({_STEMS})\.{suffix}(\.index{mark}|{mark}\.index)\.json"


def _no_pipeline(repo_id: str, names: Sequence[str], subfolder: str | None) -> UsageError:
    """What a repository without a pipeline holds, and how that is used."""
    elsewhere = sorted({str(PurePosixPath(n).parent) for n in names if n.endswith(f"/{INDEX}")})
    start = f"'{repo_id}'{f' has no pipeline in {subfolder}' if subfolder else ''}"
    if elsewhere:
        found = ", ".join(elsewhere[:5])
        return UsageError(f"{start}: its pipelines lie in {found}: give --teacher-subfolder")
    files = [name for name in names if "/" not in name and name.endswith(_CHECKPOINTS)]
    if not files:
        return UsageError(f"{start}: no {INDEX} and no checkpoint file in it: no diffusion model")
    lora = "lora" in files[0].lower()
    way = f"--teacher MODEL --teacher-lora {files[0]}" if lora else f"--teacher {files[0]}"
    return UsageError(
        f"{start} is no diffusers pipeline, but holds {', '.join(files[:5])}: fetch the file by "
        f"`hf download {repo_id} {files[0]} --local-dir .` and give {way}"
    )
