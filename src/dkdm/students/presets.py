"""All named students, family by family; each fits itself to the teacher's interface."""

from __future__ import annotations

from dkdm.students import any_rank as other
from dkdm.students import cut, transformers, unets
from dkdm.students.interface import Preset

PRESETS: dict[str, Preset] = {
    preset.name: preset for family in (unets, transformers, other, cut) for preset in family.PRESETS
}
