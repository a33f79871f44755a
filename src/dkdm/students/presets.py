"""All named students, family by family; each fits itself to the teacher's interface."""

from __future__ import annotations

from dkdm.students import any_rank, cut, transformers, unets
from dkdm.students.interface import Preset

PRESETS: dict[str, Preset] = {
    each.name: each for family in (unets, transformers, any_rank, cut) for each in family.PRESETS
}
