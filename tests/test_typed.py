"""Values of files by the types they are for; YAML, prompts, pictures and weights within bounds."""

import math
import zipfile

import pytest
import torch
from PIL import Image

from dkdm.config import DistillConfig, TrainConfig, from_mapping
from dkdm.core.saving.progress import read_metrics
from dkdm.data.images import load_image_folder, open_image
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.results import EVALUATION, read_evaluation
from dkdm.models.formats.state_dict import read_weights
from dkdm.models.prompts import read_prompts
from dkdm.reading.fields import read_yaml
from dkdm.shipping.licence import front_matter


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("seed", None, "^--seed None: give a whole number from 0 to 4,294,967,295"),
        ("seed", 1.5, "give a whole number"),
        ("seed", True, "give a whole number"),
        ("seed", 10**30, "give a whole number"),
        ("learning_rate", math.nan, "--learning-rate nan: give a number from 0 to 1,000"),
        ("learning_rate", "1e-4", "give a number"),
        ("use_ema", 1, "give True or False"),
        ("student", ["a"], "give a text"),
        ("student", "a\0b", "give a text"),
        ("student", "a" * 100_001, "give a text"),
        ("output_dir", None, "give a path"),
        ("lr_scheduler", "sideways", "--lr-scheduler sideways: give one of auto, "),
        ("lr_scheduler", [], "give one of"),
        ("classes", 3, "give a list"),
        ("classes", [1, "2"], "--classes .*: give a list, each a whole number of 0 or more"),
        ("classes", [0] * 100_001, "give a list"),
        ("teacher_size", {"a": 1}, "give a list"),
    ],
)
def test_options_of_a_config_file_have_their_types(option, value, message):
    with pytest.raises(UsageError, match=message):
        from_mapping(DistillConfig, {option: value})


def test_what_a_config_file_may_hold():
    config = from_mapping(
        DistillConfig, {"classes": [1, 2], "eta": 1, "checkpoints_total_limit": None}
    )
    assert config.classes == (1, 2) and type(config.eta) is float
    assert from_mapping(TrainConfig, {"sample_shape": [3, 8, 8]}).sample_shape == (3, 8, 8)
    with pytest.raises(UsageError, match="--sample-shape .*: give a list of 3"):
        from_mapping(TrainConfig, {"sample_shape": [3, 8]})


@pytest.mark.parametrize("key", ["self", "sed", "a\n\x1b[2J", "x" * 999, ""])
def test_a_config_file_of_unknown_options_is_refused_in_a_line(key):
    with pytest.raises(UsageError, match="there is no '.*: use ") as seen:
        from_mapping(DistillConfig, {key: 1})
    assert str(seen.value).isprintable() and len(str(seen.value)) < 2000


LAUGHS = "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "an alias"),
        ("[" * 70 + "]" * 70, "more than 64 levels"),
        ("[" * 100_000, "more than 64 levels"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("a: [", "cannot be read as YAML"),
        ("# " + "x" * 2**20, "give at most"),
    ],
)
def test_yaml_that_grows_or_runs_is_refused(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as seen:
        read_yaml(text, "model.yaml")
    assert "\n" not in str(seen.value)
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    assert front_matter(tmp_path / "README.md") == {}


def test_a_prompt_is_not_as_long_as_its_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n" + "x" * 200_000)
    with pytest.raises(UsageError, match="more than 100,000 characters"):
        read_prompts(str(tmp_path / "prompts.txt"), 10, 0)


def test_lines_of_metrics_that_are_none_are_left_out(tmp_path):
    lines = ['{"step": 1}', "null", "[]", '{"step": "2"}', "[" * 10_000, '{"step": 1e999}', "{"]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_an_evaluation_of_other_types_names_the_entry(tmp_path):
    (tmp_path / EVALUATION).write_text('{"teacher": null}')
    with pytest.raises(DkdmError, match="give an object in which student is an object"):
        read_evaluation(tmp_path)


def test_a_picture_that_would_fill_the_memory_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("dkdm.data.images.MAX_PIXELS", 100)
    Image.new("L", (20, 20)).save(tmp_path / "large.png")
    with pytest.raises(DkdmError, match="20x20 pixels are more than 100"):
        open_image(tmp_path / "large.png")
    with pytest.raises(DkdmError, match="20x20 pixels"):
        load_image_folder(tmp_path, (1, 8, 8))


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_a_picture_is_of_the_formats_that_are_named(tmp_path, format):
    Image.new("L", (8, 8)).save(tmp_path / "x.png", format=format)
    with pytest.raises(DkdmError, match="cannot be read as an image"):
        open_image(tmp_path / "x.png")


def test_a_tensor_that_claims_more_than_is_stored_is_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "a.pt")
    with pytest.raises(DkdmError, match=r"'a' claims shape \(1000000000000,\)"):
        read_weights(tmp_path / "a.pt")


def test_compressed_weights_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(DkdmError, match=r"compressed|cannot be read"):
        read_weights(tmp_path / "small.pt")
