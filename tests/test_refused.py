"""A command that is refused leaves the disk as it was: no folder, no file, nothing overwritten."""

import pytest
from PIL import Image

from dkdm.cli import main

MODELS = ("--teacher", "factories:teacher", "--student", "factories:student")
QUICK = (*("--max-train-steps", "2", "--train-batch-size", "4", "--pool-size", "8"), "--no-check")
DISTILL = ("distill", *MODELS, *QUICK)
TRAIN = ("train", "--images", "images", "--network", "dit-xs", "--sample-shape", "1", "8", "8")
REFUSED = {
    "a range for a set": (*DISTILL, "--source", "synthetic", "--guidance-scale", "2:8"),
    "features of a set": (*DISTILL, "--source", "synthetic", "--feature-weight", "1"),
    "features that do not fit": (*DISTILL, "--feature-weight", "1", "--feature-layers", "a=b"),
    "a stride of all levels": (*DISTILL, "--stride", "50"),
    "a small pool": (*DISTILL, "--pool-size", "3"),
    "a class that is none": (*DISTILL, "--classes", "7"),
    "sources of several": (*DISTILL, "--teacher", "factories:teacher", "--source", "synthetic"),
    "offsets of one": (*DISTILL, "--label-offset", "0", "4"),
    "an unknown student": (*DISTILL, "--student", "unet-gigantic"),
    "a wide student": (*DISTILL, "--student", "factories:wide_student"),
    "adapters on nothing": (*DISTILL, "--lora-rank", "2"),
    "an unknown tracker": (*DISTILL, "--report-to", "stone"),
    "a checkpoint that is none": (*DISTILL, "--resume-from-checkpoint", "checkpoint-7"),
    "an output that is a file": (*DISTILL, "--output-dir", "file/run"),
    "no images": TRAIN,
    "no such network": (*TRAIN, "--images", "file"),
}


def tree(folder):
    """Every path below a folder, with the time and the content of the files."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("args", REFUSED.values(), ids=REFUSED)
def test_a_refused_command_leaves_the_disk_as_it_was(args, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("here before")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    output = () if "--output-dir" in args else ("--output-dir", "run")
    assert main([*args, *output]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "args", [DISTILL, (*TRAIN, "--images", "pictures")], ids=["distill", "train"]
)
def test_a_reference_of_another_shape_is_refused_before_the_run(
    args, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "a.png")
    before = tree(tmp_path)
    assert main([*args, "--output-dir", "run", "--evaluation-reference", "fashion-test"]) == 2
    shapes = "is for samples of shape (1, 16, 16) or (1, 28, 28), not (1, 8, 8)"
    said = f"{shapes}: give another, or use auto or none"
    assert f"--evaluation-reference fashion-test {said}" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_distance_of_one_sample_is_refused_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    embedded = ("--teacher", "builtin:fashion", "--student", "dit-tiny")
    assert main(["distill", *embedded, *QUICK, "--evaluation-samples", "1"]) == 2
    said = "too few for a distance to fashion-test: give 2 or more, or --evaluation-reference none"
    assert f"--evaluation-samples 1 is {said}" in capsys.readouterr().err
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "changes",
    [("--pool-size", "12"), ("--shards", "3"), ("--feature-weight", "1"), ("--stride", "60")],
    ids=lambda changes: changes[0],
)
def test_a_refused_resumption_leaves_the_run_as_it_was(changes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = (*DISTILL, "--output-dir", "run", "--evaluation-samples", "0", "--validation-steps", "0")
    assert main([*run, "--fill-steps", "1"]) == 0
    before = tree(tmp_path)
    assert main([*run, "--resume-from-checkpoint", "latest", *changes]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert tree(tmp_path) == before
