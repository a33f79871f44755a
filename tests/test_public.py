"""The public face: every name is there, and help does not wait for torch."""

import subprocess
import sys

import pytest

import dkdm


@pytest.mark.parametrize("name", dkdm.__all__)
def test_public_name(name):
    assert getattr(dkdm, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dkdm.nothing


def test_help_does_not_import_torch():
    code = "import sys, dkdm.cli; dkdm.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
