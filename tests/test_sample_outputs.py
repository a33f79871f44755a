"""Where samples may be written is checked before they are drawn, and they are written whole."""

import pytest
import torch

from dkdm.config import SamplingOptions
from dkdm.core.saving.checkpoint import read_tensors
from dkdm.errors import UsageError
from dkdm.runs.outputs import sample_to_file
from factories import counting, denoiser


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.xyz", r"give a name that ends in \.png, "),
        ("x", r"give a name that ends in \.png, "),
        ("here.png", "exists: give another name, or --overwrite"),
        ("here.png/x.png", r"here\.png is not a folder: give another path"),
        ("folder.png", "is a folder: give the name of a file"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(name, message, tmp_path):
    (tmp_path / "here.png").write_text("before")
    (tmp_path / "folder.png").mkdir()
    model, counts = counting(denoiser())
    with pytest.raises(UsageError, match=f"--output .*{message}"):
        sample_to_file(model, SamplingOptions(tmp_path / name, num_samples=2, steps=2))
    assert not counts
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder.png", "here.png"]
    assert (tmp_path / "here.png").read_text() == "before"


@pytest.mark.parametrize("name", ["new/x.png", "x.JPG", "x.safetensors"])
def test_samples_are_written_whole_and_readable_by_all(name, tmp_path):
    output = tmp_path / name
    sample_to_file(denoiser(), SamplingOptions(output=output, num_samples=3, steps=2))
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.stat().st_mode & 0o444 == 0o444
    if output.suffix == ".safetensors":
        assert read_tensors(output)["samples"].shape == torch.Size((3, 1, 8, 8))
