"""Every `--objective` and its program: enter a new one here."""

from __future__ import annotations

from dkdm.runs.consistency import Consistency
from dkdm.runs.few_steps import FewSteps
from dkdm.runs.objectives import Program

OBJECTIVES: dict[str, Program] = {
    "dkdm": Program(),
    "few-step": FewSteps(),
    "consistency": Consistency(),
}
