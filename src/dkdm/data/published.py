"""Published files of weights, recognized by their hash: fetched once, kept in the cache folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError

from dkdm.errors import DkdmError, UsageError, in_a_line
from dkdm.reading.files import atomic, cache_dir
from dkdm.reading.lock import locked
from dkdm.reading.places import expanded

DOWNLOAD = "download"
TIMEOUT = 60.0
PIECE = 2**20


@dataclass(frozen=True)
class Published:
    """A file of weights, perhaps in several forms.

    - `name`: what it is, for messages.
    - `option`: the command-line option that names it.
    - `forms`: SHA-256 of a form, or the first digits that its authors give, and its name; the last
      is the one at `address`, and is taken before the others.
    - `address`: where `download` fetches it.
    """

    name: str
    option: str
    forms: Mapping[str, str]
    address: str

    def find(self, given: str | Path | None = None) -> tuple[Path, str]:
        """The file, and which form it is.

        given: the file itself, or a folder that holds it under any name, which is then kept in the
        cache folder; "download", which fetches it there unless it is; None takes what is there.
        Raises `UsageError` if it is not there or is another file, `DkdmError` if it cannot be
        fetched.
        """
        if given is None:
            return self._cached(reversed([*self.forms])) or self._absent()
        if str(given) == DOWNLOAD:
            return self._cached([*self.forms][-1:]) or self._fetched()
        path = expanded(given)
        if path.is_dir():
            return self._in_folder(path)
        if not path.is_file():
            raise UsageError(f"{self.option} {given}: there is no such file")
        return self._kept(path, f"{self.option} {given}")

    def _cached(self, digests: Iterable[str]) -> tuple[Path, str] | None:
        for digest in digests:
            for path in sorted(cache_dir("features").glob(f"{digest}*")):
                if _sha256(path) == path.name:
                    return path, self.forms[digest]
        return None

    def _absent(self) -> NoReturn:
        raise UsageError(
            f"{self.name} is not in {cache_dir('features')}: give {self.option} {DOWNLOAD}, which "
            f"fetches it from {self.address}, or {self.option} FOLDER, which holds it"
        )

    def _in_folder(self, folder: Path) -> tuple[Path, str]:
        for path in sorted(folder.iterdir()):
            if path.is_file() and self._form(_sha256(path)):
                return self._kept(path, str(path))
        raise UsageError(
            f"{self.option} {folder}: {self.name} is not in it; fetch {self.address} into it"
        )

    def _fetched(self) -> tuple[Path, str]:
        folder = cache_dir("features")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder, f"fetching {self.name}", wait=True):
                return self._cached([*self.forms][-1:]) or self._from_network(folder)
        except (OSError, HTTPException) as error:
            if isinstance(error, HTTPError):
                error.close()
            raise DkdmError(
                f"{self.address} cannot be fetched ({in_a_line(error)}): fetch it on a machine "
                f"with a network and give {self.option} FOLDER, which holds it"
            ) from error

    def _from_network(self, folder: Path) -> tuple[Path, str]:
        with (
            urllib.request.urlopen(self.address, timeout=TIMEOUT) as answer,
            tempfile.NamedTemporaryFile(dir=folder) as file,
        ):
            shutil.copyfileobj(answer, file, PIECE)
            file.flush()
            return self._kept(Path(file.name), self.address)

    def _kept(self, path: Path, shown: str) -> tuple[Path, str]:
        """A copy of the file in the cache folder, under its hash."""
        found = _sha256(path)
        form = self._form(found)
        if form is None:
            raise UsageError(
                f"{shown} is not {self.name}: its SHA-256 is {found}, not "
                f"{' or '.join(self.forms)}; give the published file"
            )
        kept = cache_dir("features") / found
        try:
            if not kept.is_file() or _sha256(kept) != found:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with atomic(kept) as partial:
                    shutil.copyfile(path, partial)
        except OSError as error:
            raise DkdmError(
                f"{self.name} cannot be kept in {kept.parent} ({in_a_line(error)}): set DKDM_CACHE "
                "to a folder with room"
            ) from error
        return kept, form

    def _form(self, digest: str) -> str | None:
        return next((form for known, form in self.forms.items() if digest.startswith(known)), None)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DkdmError(f"{path} cannot be read ({in_a_line(error)}): check its mode") from error
