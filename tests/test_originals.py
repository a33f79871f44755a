"""Checkpoint files of different repositories are told apart by their keys."""

import pytest

import test_dit_original
import test_edm
import test_lucidrains
from dkdm.teachers import FORMATS

FILES = {
    "dit": [test_dit_original.checkpoint()],
    "sit": [test_dit_original.sit_checkpoint()],
    "edm": [test_edm.checkpoint(kind) for kind in ("ddpmpp", "ncsnpp", "adm")],
    "edm2": [test_edm.checkpoint(kind) for kind in ("edm2", "edm2-pixels")],
    "lucidrains": [test_lucidrains.checkpoint()],
}


@pytest.mark.parametrize("name", FILES)
def test_only_its_own_format_recognizes_a_file(name):
    for state in FILES[name]:
        assert [key for key, one in FORMATS.items() if one.recognizes(state)] == [name]
