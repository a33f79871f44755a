"""The best of the weights that a run has validated, in a folder of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.saving import checkpoint
from dkdm.core.saving.folders import restore_folder, verify_folder, write_folder
from dkdm.errors import DkdmError
from dkdm.reading.fields import Fields, read_json

FOLDER = "best"
RECORD = "best.json"


class Best(NamedTuple):
    """The step after which the weights were best, and how good they were."""

    step: int
    value: float


@dataclass(eq=False)
class Selection:
    """Keeps the best weights by one number, written as the finished model is.

    - `output_dir`: of the run; the weights lie in `best/` there, beside `best.json`, and the folder
      is renamed into place when whole. Nothing but better weights replaces it.
    - `better`: which values are better. Of equal ones the first is kept.
    - `how`: what is measured and how, as JSON; values of another `how` are not compared.
    - `write`: writes a model into a folder; given the folder of the former best, it need not copy
      what both have.
    - `best`: None before the first.
    """

    output_dir: Path
    better: Literal["lower", "higher"]
    how: Mapping[str, Any]
    write: Callable[[Path, Denoiser, Path | None], None]
    best: Best | None = None

    def offer(self, step: int, value: float, model: Denoiser) -> None:
        """Keep the model of this step if its value is the best so far."""
        if not self._is_best(value):
            return
        found = Best(step, value)

        def fill(folder: Path) -> None:
            self.write(folder, model, self.output_dir / FOLDER if self.best else None)
            text = json.dumps({**found._asdict(), **self.how}, indent=2) + "\n"
            (folder / RECORD).write_text(text, encoding="utf-8")

        write_folder(self.output_dir / FOLDER, fill)
        self.best = found

    def _is_best(self, value: float) -> bool:
        if value != value or self.best is None:
            return value == value
        return value < self.best.value if self.better == "lower" else value > self.best.value

    def restored(self, student: Denoiser, name: str) -> Denoiser:
        """The student with the best weights, whose network has this name; as it is before any."""
        if self.best is not None:
            network: nn.Module = student.network  # type: ignore[assignment]
            checkpoint.load_network_weights(network, self.output_dir / FOLDER / name)
        return student

    def state_dict(self) -> dict[str, Any]:
        """Step and value of the best, and how it was measured; empty before the first."""
        return {} if self.best is None else {**self.best._asdict(), **self.how}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what lies in the folder, which a killed run may have replaced since.

        state: of the checkpoint. A folder that is missing, damaged or chosen in another way is
        given up, and stderr says so.
        """
        try:
            self.best = self._found()
        except DkdmError as error:
            if state:
                print(f"note: {error}; the next validation starts anew", file=sys.stderr)

    def _found(self) -> Best:
        folder = self.output_dir / FOLDER
        restore_folder(folder)
        verify_folder(folder, RECORD)
        record = read_best(folder)
        known = {key: record.get(key, value) for key, value in self.how.items()}
        if known != dict(self.how):  # earlier versions said less
            raise DkdmError(f"{folder} was chosen by another measurement")
        fields = Fields(record, str(folder / RECORD))
        return Best(fields.whole("step"), fields.number("value"))


def read_best(folder: Path) -> dict[str, Any]:
    """What `best.json` says. Raises UsageError if it is missing or damaged."""
    return read_json(folder / RECORD, "how the best weights of a run were chosen")
