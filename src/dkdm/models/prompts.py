"""Prompts as conditions: read from files, encoded once into a cache on disk, drawn by number.

A pool stores the number of a prompt, not its embedding. The cache is a folder of safetensors files
that are memory-mapped, so that embeddings may be larger than memory, and the text encoders are gone
when training begins. A prompt that was encoded before, in whatever run, is not encoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition, dropped
from dkdm.core.denoisers.kinds import Kind, Row, rows_of
from dkdm.core.saving.checkpoint import write_tensors
from dkdm.core.saving.checksums import are_damaged, sums_of
from dkdm.core.saving.progress import track
from dkdm.errors import DkdmError, UsageError
from dkdm.reading.files import atomic, cache_dir
from dkdm.reading.lock import locked
from dkdm.reading.notes import say

ENCODED_AT_ONCE = 32
INDEX = "index.jsonl"
ROWS_A_FILE = 1024
MAX_PROMPT = 100_000  # characters


@dataclass(frozen=True)
class TextEncoders:
    """What turns prompts into embeddings.

    encode: prompts -> tensors with one row each, named as the network is fed them; loads the
        encoders when first called. release: drops them. fingerprint: changes whenever they do.
    """

    encode: Callable[[Sequence[str]], Condition]
    release: Callable[[], None]
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Prompts(Kind):
    """Text conditions: numbers of prompts, `prompt` int64 [B], 0 for the negative prompt.

    texts: the prompts that are drawn, number i + 1 for texts[i]; empty if none were given yet.
    negative: the prompt that stands for "nothing asked".
    cache: the embeddings of all of them, in the order of their numbers.
    """

    asks = "prompt"
    label = "prompts"
    encoders: TextEncoders
    texts: tuple[str, ...] = ()
    negative: str = ""
    cache: EmbeddingCache | BlankEmbeddings | None = field(default=None, repr=False)

    def draw(self, count: int, generator: torch.Generator, dropout: float = 0.0) -> Condition:
        """Uniform prompts. Raises UsageError if none were given."""
        self._check()
        chosen = torch.randint(1, len(self.texts) + 1, (count,), generator=generator)
        return dropped(self, {"prompt": chosen}, generator, dropout)

    def null(self, count: int) -> Condition:
        return {"prompt": torch.zeros(count, dtype=torch.int64)}

    def of(self, texts: Sequence[str]) -> Condition:
        """The conditions that ask for these prompts. Raises UsageError for one not given."""
        numbers = {text: i + 1 for i, text in enumerate(self.texts)}
        unknown = next((text for text in texts if text not in numbers), None)
        if unknown is not None:
            raise UsageError(f"the prompt '{unknown}' is not among the {len(numbers):,} given")
        return {"prompt": torch.tensor([numbers[text] for text in texts])}

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of one embedding of this name; None if the encoders give none."""
        row = self.fed().get(name)
        return None if row is None else row.shape

    def summary(self) -> str:
        return f"text; trained with {len(self.texts):,} prompts"

    def shown_names(self, most: int) -> tuple[str, ...]:
        """As `Kind.shown_names`; number 0 is the negative prompt."""
        return (self.negative, *self.texts[:most])

    def example(self, count: int) -> Condition | None:
        return None if self.cache is None else self.null(count)

    def fed(self) -> dict[str, Row]:
        """As `Kind.fed`. Raises UsageError if no prompts were given."""
        with torch.device("cpu"):  # networks are built on meta, and ask for widths
            return rows_of(self.embed(self.null(1)))

    def usage(self) -> str:
        return repr(self.texts[0])

    def in_turns(self, count: int) -> Condition:
        self._check()
        return {"prompt": torch.arange(count) % len(self.texts) + 1}

    def embed(self, cond: Condition) -> Condition:
        """Read the embeddings of the numbers in `cond`; other conditions stay as they are."""
        if self.cache is None:
            raise UsageError(NO_PROMPTS)
        rest = {key: value for key, value in cond.items() if key != "prompt"}
        return {**rest, **self.cache.rows(cond["prompt"].cpu())}

    def _check(self) -> None:
        if not self.texts:
            raise UsageError(NO_PROMPTS)


NO_PROMPTS = (
    "this model is conditioned on text: give --prompts, a text file with one prompt a line or a "
    "pattern such as 'prompts/*.txt'"
)


def with_prompts(
    prompts: Prompts, texts: Sequence[str], negative: str = "", root: Path | None = None
) -> Prompts:
    """The same conditioning, drawing from these prompts; encodes those not in the cache yet.

    root: folder of all caches; None is $DKDM_CACHE or ~/.cache/dkdm.
    """
    folder = root / "prompts" if root else cache_dir("prompts")
    cache = EmbeddingCache.open(folder / prompts.encoders.fingerprint)
    cache.encode([negative, *texts], prompts.encoders)
    found = cache.of([negative, *texts])
    return replace(prompts, texts=tuple(texts), negative=negative, cache=found)


def read_prompts(spec: str, limit: int, seed: int) -> tuple[str, ...]:
    """The prompts of a text file, or of all files a pattern matches, one a line.

    Blank lines are skipped and repeated prompts taken once. Files are streamed: a uniform sample
    of `limit` lines is kept of longer files; it depends on `seed` alone. Raises UsageError
    if no file matches, if they hold no prompt, or if one is not UTF-8 text.
    """
    path = os.path.expanduser(spec)
    files = [path] if os.path.isfile(path) else sorted(glob(path, recursive=True))
    if not files:
        raise UsageError(f"--prompts {spec}: no such file")
    kept: list[str] = []
    chooser = random.Random(seed)
    count = 0
    for count, line in enumerate(_lines(files), start=1):
        if len(kept) < limit:
            kept.append(line)
        elif (place := chooser.randrange(count)) < limit:
            kept[place] = line
    if not kept:
        raise UsageError(f"--prompts {spec}: no prompts in it; write one prompt a line")
    if count > limit:
        drawn = f"{limit:,} of {count:,} prompts, drawn at random (--max-prompts)"
        say(f"--prompts {spec}: {drawn}")
    return tuple(dict.fromkeys(kept))


def _lines(files: Sequence[str]) -> Iterator[str]:
    for name in files:
        try:
            with open(name, encoding="utf-8-sig") as opened:
                for line in iter(lambda: opened.readline(MAX_PROMPT + 1), ""):
                    if len(line) > MAX_PROMPT:
                        raise ValueError(f"a line has more than {MAX_PROMPT:,} characters")
                    if line.strip():
                        yield line.strip()
        except (OSError, ValueError) as error:
            raise UsageError(f"--prompts {name}: cannot be read as UTF-8 text ({error})") from error


@dataclass(eq=False)
class EmbeddingCache:
    """Embeddings on disk, memory-mapped. index.jsonl has a line for each file of rows.

    places: (file, row) of each known prompt, by its hash. order: the same by the
    prompts' numbers, int64 [N, 2].
    """

    folder: Path
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    order: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    opened: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> EmbeddingCache:
        """Open a cache, which is empty if the folder is new. Raises DkdmError if it is damaged."""
        cache = cls(folder)
        index = folder / INDEX
        if not index.is_file():
            return cache
        try:
            for number, line in enumerate(index.read_text().splitlines()):
                hashes = json.loads(line)
                if not isinstance(hashes, list) or not all(isinstance(k, str) for k in hashes):
                    raise ValueError(f"line {number + 1} of {index.name} is not a list of hashes")
                for row, key in enumerate(hashes):
                    cache.places[key] = (number, row)
                if not cache._file(number).is_file():
                    raise ValueError(f"{cache._file(number).name} is missing")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise cache._damaged(error) from error
        return cache

    def _damaged(self, error: Exception) -> DkdmError:
        return DkdmError(
            f"{self.folder}: the cache of prompts is damaged ({error}): delete this folder, "
            "and the prompts are encoded again"
        )

    def of(self, texts: Sequence[str]) -> EmbeddingCache:
        """The same cache, with numbers 0, 1, ... for these texts."""
        order = torch.tensor([self.places[_hash(text)] for text in texts])
        return replace(self, order=order, opened={})

    def encode(self, texts: Sequence[str], encoders: TextEncoders) -> None:
        """Encode the texts that are not there yet, a file at a time; what is done stays done.

        Several processes may do so at once: each file is added under a lock.
        """
        missing = list(dict.fromkeys(text for text in texts if _hash(text) not in self.places))
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with track(len(missing), 0, "encoding prompts") as progress:
            for first in range(0, len(missing), ROWS_A_FILE):
                part = missing[first : first + ROWS_A_FILE]
                rows = []
                for i in range(0, len(part), ENCODED_AT_ONCE):
                    rows.append(encoders.encode(part[i : i + ENCODED_AT_ONCE]))
                    progress(first + min(i + ENCODED_AT_ONCE, len(part)))
                self._append(part, rows)
        encoders.release()

    def _append(self, texts: Sequence[str], parts: Sequence[Condition]) -> None:
        tensors = {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}
        index, hashes = self.folder / INDEX, [_hash(text) for text in texts]
        with locked(self.folder, "prompts", wait=True):
            known = index.read_text() if index.is_file() else ""
            number = len(known.splitlines())
            write_tensors(self._file(number), tensors, sums_of(tensors))
            with atomic(index) as partial:
                partial.write_text(f"{known}{json.dumps(hashes)}\n")
        self.places |= {key: (number, row) for row, key in enumerate(hashes)}

    def _file(self, number: int) -> Path:
        return self.folder / f"embeddings-{number:05d}.safetensors"

    def rows(self, numbers: Tensor) -> Condition:
        """The embeddings of prompts by their numbers, int64 [B] -> [B, ...] each."""
        files, rows = self.order[numbers].unbind(1)
        found: Condition = {}
        for file in files.unique().tolist():
            at = (files == file).nonzero().flatten()
            for key, stored in self._tensors(file).items():
                empty = stored.new_empty(len(numbers), *stored.shape[1:])
                found.setdefault(key, empty)[at] = stored[rows[at]]
        return found

    def _tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of one file; they stay on disk until their rows are read."""
        if number not in self.opened:
            try:
                with safe_open(self._file(number), "pt") as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                    metadata = file.metadata()
            except (OSError, SafetensorError) as error:
                raise self._damaged(error) from error
            if are_damaged(tensors, metadata):
                raise self._damaged(ValueError(f"{self._file(number).name} has other checksums"))
            self.opened[number] = tensors
        return self.opened[number]


@dataclass(frozen=True, eq=False)
class BlankEmbeddings:
    """Embeddings that are all zeros. shapes: of one row, by name."""

    shapes: Mapping[str, tuple[int, ...]]

    def rows(self, numbers: Tensor) -> Condition:
        return {key: torch.zeros(len(numbers), *shape) for key, shape in self.shapes.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def folder_fingerprint(folders: Sequence[Path], *parts: str) -> str:
    """A short hash of what lies in folders: small files whole, of large ones both ends and size."""
    digest = hashlib.sha256("\0".join(parts).encode())
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}".encode())
            _add_ends(digest, file)
    return digest.hexdigest()[:16]


def files_fingerprint(files: Sequence[Path]) -> str:
    """A short hash of files by size and ends, whatever they are called."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.stat().st_size}".encode())
        _add_ends(digest, file)
    return digest.hexdigest()[:8]


def _add_ends(digest: hashlib._Hash, file: Path) -> None:
    with open(file, "rb") as opened:
        digest.update(opened.read(2**20))
        opened.seek(max(0, file.stat().st_size - 2**20))
        digest.update(opened.read(2**20))
