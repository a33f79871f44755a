"""The kinds of few-step models, as a folder says them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.few_steps.jumps import Jumps
from dkdm.core.few_steps.model import FewStep
from dkdm.reading.fields import Fields

KINDS: tuple[type[FewStep], ...] = (ParallelHeads, Jumps)


def kind_saved(values: Mapping[str, Any], where: str) -> type[FewStep]:
    """The kind of a model that `FewStep.saved` described; heads, if it does not say.

    Raises UsageError, naming `where`, for a wrong value.
    """
    renoises = Fields(values, where).flag("renoises", False)
    return next(kind for kind in KINDS if kind.renoises == renoises)
