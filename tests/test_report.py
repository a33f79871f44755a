"""The page of a run: complete or not, self-contained, escaped, and true to the files."""

import base64
import hashlib
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from dkdm.cli import repeated
from dkdm.config import DistillConfig, TrainConfig, to_json
from dkdm.errors import UsageError
from dkdm.evaluation.numbers import compared, count, number, percent, ratio
from dkdm.evaluation.results import EVALUATION, SAMPLES
from dkdm.evaluation.rows import comparison_rows, metric_rows
from dkdm.reading.command_line import parse
from dkdm.report import write_report
from dkdm.report.page import command_line
from finished_run import (
    CONFIG,
    alone,
    comparison,
    write_metrics,
    write_stages,
    write_validation,
)
from page_reader import Page

HOSTILE = "\"><script>alert('x')</script>"
IMAGES = 2 * 10 + 3 + 2  # pairs at the top, a strip for each of three classes, two grids


@pytest.fixture
def run(tmp_path):
    """A finished run."""
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    write_metrics(tmp_path, last=200)
    write_stages(tmp_path, 100, 200)
    comparison().save(tmp_path)
    return tmp_path


def test_the_page_of_a_finished_run_is_complete(run):
    page = Page(write_report(run))
    assert "A transformer learned from a convolutional UNet. No image was read." in page.text
    assert "incomplete" not in page.text
    assert "90.0\N{NO-BREAK SPACE}% · teacher 90.0\N{NO-BREAK SPACE}%; higher" in page.source
    for part in ("1.50 ×", "1.5 × higher", "Class accuracy", "90.0 %", "20.0 %", "Trouser"):
        assert part in page.text
    assert "4.5 × lower" in page.text
    assert ("12.8 k" in page.text, "1.7 min" in page.text) == (True, True)
    assert page.tags.count("svg") == 4
    assert page.tags.count("img") == IMAGES
    assert not list(run.glob(".*"))


def test_the_page_asks_for_nothing_from_outside(run):
    page = Page(write_report(run))
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert links
    anchors = {link[1:] for link in links if link.startswith("#")}
    assert anchors == {value for name, value in page.attributes if name == "id"}
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"https?://|@import|url\(", page.source)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_only_the_script_of_the_package_may_run(run):
    page = Page(write_report(run))
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [value for _, value in page.attributes if value.startswith("default-src 'none'")]
    sources = dict(part.split(maxsplit=1) for part in policy.split("; "))
    assert sources.pop("script-src") == f"'sha256-{digest}'"
    assert sources == {"default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'"}


def test_the_curve_of_the_validation_shows_its_best(run):
    config = replace(CONFIG, validation_metric="fd", ship_best=True)
    (run / "config.json").write_text(to_json(config))
    write_validation(run, "fd", {50: 8.0, 100: 2.5, 150: 4.0, 200: math.nan})
    (run / "best").mkdir()
    how = {"num_samples": 50, "sampler": "ddim", "num_steps": 25, "guidance_scale": 1.5, "seed": 7}
    (run / "best/best.json").write_text(json.dumps(how | {"reference": "birds"}))
    page = Page(write_report(run))
    assert page.tags.count("svg") == 5
    said = "every time: 50 samples, DDIM, 25 steps, guidance 1.5, seed 7, against birds"
    assert said in page.text
    assert (
        "Validation: fd" in page.text
        and "the best, 2.50 at step 100, which is shipped" in page.text
    )
    assert "not drawn" not in page.text
    for said in ("measured: 8 at optimizer step 50", "best: 2.5 at optimizer step 100"):
        assert said in page.text
    assert "best: 8" not in page.text
    assert "1.7 min" in page.text  # the last line with a speed, after one without


def test_values_that_a_logarithm_lacks_are_said(run):
    (run / "config.json").write_text(to_json(replace(CONFIG, validation_metric="kid")))
    write_validation(run, "kid", {100: 0.5, 200: -0.001})
    text = Page(write_report(run)).text
    assert "the best, -0.00100 at step 200, kept in best/; values of 0 and below are not" in text


def test_every_number_says_how_it_came_about(run):
    weights = "of step 150, EMA, decay 0.9999; the best by fd"
    replace(comparison(), weights=weights).save(run)
    text = Page(write_report(run)).text
    for said in (
        "Samples 1,000 of each model, in pairs from the same noise",
        "Sampler DDIM, 25 steps",
        "Guidance none",
        f"Weights {weights}",
        "Seed 0",
        "Reference fashion-test, 10,000 images",
        "Features 64 features",
        "Floor what 60,000 real images are given; Frechet distance 0.0123",
        "Frechet distance real images 0.0123 2.00 3.00",
    ):
        assert said in text


def test_hostile_names_are_text(run):
    (run / "config.json").write_text(to_json(replace(CONFIG, teacher=HOSTILE, student=HOSTILE)))
    found = comparison()
    result = replace(found.student, name=HOSTILE, network=HOSTILE)
    names = (HOSTILE, "Trouser", "Pullover")
    replace(found, student=result, class_names=names, device=HOSTILE).save(run)
    page = Page(write_report(run))
    assert page.tags.count("script") == page.source.count("<script") == 1
    assert HOSTILE in page.text


def renamed(value, word):
    """The same JSON with a word in place of every text."""
    if isinstance(value, dict):
        return {key: renamed(inner, word) for key, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner, word) for inner in value]
    return word if isinstance(value, str) and "/" not in value else value


@pytest.mark.parametrize("word", ['"><script>alert(1)</script>', "' onload=x", "</svg><img src=x>"])
def test_no_text_of_a_run_becomes_a_tag(run, word):
    evaluation = run / "evaluation.json"
    measured = json.loads(evaluation.read_text())
    texts = ("teacher", "student", "prompts", "negative_prompt", "hub_model_id", "feature_layers")
    pages = []
    for each in ("word", word):
        evaluation.write_text(json.dumps(renamed(measured, each)))
        config = replace(CONFIG, **dict.fromkeys(texts, each), teacher_lora=(each,))
        (run / "config.json").write_text(to_json(config))
        pages.append(Page(write_report(run)))
    harmless, page = pages
    assert page.tags == harmless.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in harmless.attributes]
    assert word in page.text


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    page = Page(write_report(tmp_path))
    for text in (
        "no training step was logged",
        "evaluation.json is missing",
        "samples/comparison.safetensors is missing",
        "no sample grid was drawn",
        "dit-xs is learning from builtin:fashion. No image is read.",
    ):
        assert text in page.text
    assert "svg" not in page.tags


def test_an_unfinished_run_shows_what_it_has(tmp_path):
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    write_metrics(tmp_path, last=50)
    write_stages(tmp_path, 50)
    page = Page(write_report(tmp_path))
    assert "The run is not finished: 50 of 200 steps." in page.text
    assert page.tags.count("svg") == 3
    assert page.tags.count("img") == 1


def test_damaged_files_are_named_and_the_rest_is_shown(run):
    (run / SAMPLES).write_bytes(b"x" * 100)
    (run / "samples" / "step-000100.png").write_bytes(b"no image")
    page = Page(write_report(run))
    assert f"{SAMPLES} cannot be read" in page.text
    assert "samples/step-000100.png cannot be read as an image." in page.text
    assert "1.50 ×" in page.text
    (run / EVALUATION).write_text('{"teacher": 3}')
    assert f"{EVALUATION} cannot be read" in Page(write_report(run)).text


def test_samples_that_cannot_be_drawn_are_said_to_be_such(run):
    comparison(shape=(2, 1, 1, 1, 2)).save(run)
    page = Page(write_report(run))
    assert "Samples of shape (2, 1, 1, 1, 2) cannot be drawn." in page.text


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8,), "Bars are the components of a vector"),
        ((2, 32), "lines the channels of a signal"),
        ((3, 4, 8, 8), "shown by its middle frame"),
    ],
    ids=["vector", "signal", "video"],
)
def test_vectors_signals_and_videos_are_shown(run, shape, words):
    comparison(shape=shape).save(run)
    page = Page(write_report(run))
    assert words in page.text
    assert f"No {'video' if len(shape) == 4 else 'data'} was read." in page.text
    assert "incomplete" not in page.text
    assert page.tags.count("img") == IMAGES
    assert not re.search("No image|Images (read|a second)", page.text)
    assert ("black" in page.text) == (len(shape) > 2)


@pytest.mark.parametrize("shape", [(3, 32, 32), (4, 64, 64), (3, 150, 150)])
def test_images_of_any_size_are_shown(run, shape):
    found = comparison(samples=6, shape=shape)
    without = {
        model: replace(getattr(found, model), metrics=None) for model in ("teacher", "student")
    }
    replace(found, class_names=None, measurement=None, **without).save(run)
    page = Page(write_report(run))
    assert "No distance to real images was measured." in page.text
    assert ("are latents" in page.text) == (shape[0] == 4)
    assert len(page.source) < 300_000


@pytest.mark.parametrize("asked_for", ["class", "prompt"])
def test_what_samples_were_drawn_for_is_named(run, asked_for):
    replace(comparison(), asked_for=asked_for, class_names=None).save(run)
    text = Page(write_report(run)).text
    for said in (f"for the same {asked_for}.", f"teacher of the same {asked_for} ("):
        assert said in text
    assert f"More samples by {asked_for}" in text and f"{asked_for} 2" in text


def test_a_perfect_student_has_no_gap_to_draw(run):
    found = comparison()
    gaps = tuple(replace(gap, gap=1e-16, relative=1e-16) for gap in found.gaps)
    replace(found, gaps=gaps, same_noise_difference=0.0).save(run)
    page = Page(write_report(run))
    assert "output equals the teacher's" in page.text
    assert page.tags.count("svg") == 3


@pytest.fixture
def training(tmp_path):
    """A finished run on images."""
    (tmp_path / "config.json").write_text(to_json(TrainConfig(max_train_steps=200)))
    write_metrics(tmp_path, last=200)
    write_stages(tmp_path, 100, 200)
    alone().save(tmp_path)
    return tmp_path


def test_the_page_of_a_training_has_all_but_the_teachers_half(training):
    config = TrainConfig(max_train_steps=200, validation_metric="fd")
    (training / "config.json").write_text(to_json(config))
    write_validation(training, "fd", {100: 8.0, 200: 2.5})
    page = Page(write_report(training))
    for said in (
        "unet-tiny was trained on fashion-mnist.",
        "DiTTransformer2DModel, 400 k parameters.",
        "The first 10 samples, not selected.",
        "Trouser",
        "Frechet distance 3.00 real images 0.0123; lower is better",
        "Class accuracy 90.0 % higher is better",
        "More samples by class The next 15 samples.",
        "Loss at each noise level over the training",
        "the best, 2.50 at step 200, kept in best/",
        "The model Network DiTTransformer2DModel",
        "Samples 1,000 Sampler DDIM, 25 steps Guidance none",
        "dkdm train",
        "config.json, every option",
    ):
        assert said in page.text.replace("\N{NO-BREAK SPACE}", " "), said
    assert page.tags.count("img") == 10 + 3 + 2  # at the top, a strip for each class, two grids
    assert page.tags.count("svg") == 4
    for absent in ("incomplete", "Student compared", "teacher's", "ratio", "No image", "never saw"):
        assert absent not in page.text


@pytest.mark.parametrize("shape", [(8,), (2, 32), (3, 4, 8, 8), (4, 200, 200)])
def test_samples_of_any_shape_of_a_training_are_shown(training, shape):
    alone(shape=shape).save(training)
    page = Page(write_report(training))
    assert page.tags.count("img") == 10 + 3 + 2 and "incomplete" not in page.text


def test_measurements_of_the_other_kind_of_run_are_not_shown(training):
    comparison().save(training)
    text = Page(write_report(training)).text
    assert f"{EVALUATION} is that of another run." in text
    assert f"{SAMPLES} is that of another run." in text
    (training / "config.json").write_text(to_json(CONFIG))
    alone().save(training)
    assert f"{EVALUATION} is that of another run." in Page(write_report(training)).text


def test_a_run_that_was_not_to_be_measured_is_not_incomplete(tmp_path):
    config = replace(CONFIG, evaluation_samples=0, validation_steps=0)
    (tmp_path / "config.json").write_text(to_json(config))
    write_metrics(tmp_path, last=200)
    assert "incomplete" not in Page(write_report(tmp_path)).text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "images"}, "dit-xs was trained on fashion-mnist. The student dit-xs"),
        ({"source": "images"}, "builtin:fashion (1.80 M), and learned from fashion-mnist, noised"),
        (
            {"source": "images", "images_target": "teacher"},
            "from how it denoises noisy images made of fashion-mnist.",
        ),
        ({"source": "mixed"}, "noisy images of its own making and from fashion-mnist."),
    ],
)
def test_a_distillation_that_reads_images_does_not_claim_otherwise(run, changes, said):
    config = replace(CONFIG, images="fashion-mnist", student="dit-xs", **changes)
    (run / "config.json").write_text(to_json(config))
    text = Page(write_report(run)).text
    assert said in text
    for claim in ("No image was read", "Images read", "alone", "data-free", "never saw them"):
        assert claim not in text


def test_samples_of_data_free_training_are_called_finished(run):
    (run / "config.json").write_text(to_json(replace(CONFIG, source="synthetic")))
    text = Page(write_report(run)).text
    assert "from its finished images, noised afresh." in text and "No image was read." in text


def test_an_earlier_training_that_kept_no_numbers_has_a_page_too(tmp_path):
    (tmp_path / "config.json").write_text(to_json(TrainConfig(max_train_steps=50)))
    write_metrics(tmp_path, last=50)
    write_stages(tmp_path, 50)
    page = Page(write_report(tmp_path))
    assert "unet-tiny was trained on fashion-mnist." in page.text
    assert "No image" not in page.text
    assert "incomplete" not in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"give the config\.json of a run"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match=r"there is no folder .*none: give the output folder"):
        write_report(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_many_grids_are_thinned_out(run):
    write_stages(run, *range(0, 1000, 10))
    page = Page(write_report(run))
    shown = [
        int(n.replace(",", "")) for n in re.findall(r"<figcaption>step ([\d,]+)<", page.source)
    ]
    assert shown == sorted(shown)
    assert (len(shown), shown[0], shown[-1]) == (6, 0, 990)


def test_the_command_repeats_the_run():
    text = command_line(CONFIG)
    words = shlex.split(text.replace("\\\n", ""))
    assert words[:2] == ["dkdm", "distill"]
    again = parse(DistillConfig, words[2:])
    assert again == replace(CONFIG, output_dir=Path("runs/again"))


def test_the_command_names_every_teacher_and_the_student():
    several = {"more_teachers": ("runs/b", "c d"), "prompts": "o.txt", "more_prompts": ("p", "q")}
    config = DistillConfig(**several)
    words = shlex.split(command_line(config).replace("\\\n", ""))
    assert "more" not in " ".join(words)
    given = parse(DistillConfig, repeated(words[2:]))
    assert given == replace(config, output_dir=Path("runs/again"))
    assert words.count("--teacher") == 3 and "--student" in words


def test_several_teachers_are_all_named(run):
    more = replace(CONFIG, more_teachers=("runs/shoes",))
    (run / "config.json").write_text(to_json(more))
    text = Page(write_report(run)).text
    assert "A transformer learned from 2 teachers: builtin:fashion and shoes." in text
    names = "builtin:fashion and runs/shoes (1.80 M together)"
    assert f"learned from its teachers alone, {names}" in text
    assert "from how they denoise noisy images of their own making" in text
    (run / "config.json").write_text(to_json(replace(more, teacher="other/shoes")))
    assert "2 teachers: other/shoes and runs/shoes." in Page(write_report(run)).text


def test_the_page_of_a_training_names_the_file_of_its_options(tmp_path):
    (tmp_path / "config.json").write_text(to_json(TrainConfig(max_train_steps=200)))
    write_metrics(tmp_path, last=200)
    text = Page(write_report(tmp_path)).text
    assert "config.json, every option" in text and "whole.json" not in text


def test_numbers_read_well():
    assert [number(v) for v in (0, 0.012345, 1.5, 12.34, 1234.5)] == [
        "0",
        "0.0123",
        "1.50",
        "12.3",
        "1,234",
    ]
    assert [count(v) for v in (0, 9412, 392_900, 1_806_529, 2.1e9, 4e12)] == [
        "0",
        "9,412",
        "393 k",
        "1.81 M",
        "2.10 G",
        "4.00 T",
    ]
    assert [compared(*v) for v in ((1, 4), (9, 3), (2, 2.04), (3, 0))] == [
        "4.0 × lower",
        "3.0 × higher",
        "equal",
        "3",
    ]
    assert [ratio(3, 2), ratio(3, 0), ratio(4.26, 10_000)] == ["1.50 ×", "", "0.00043 ×"]
    assert [percent(x) for x in (0.9376, -0.0004, -0.002)] == ["93.8 %", "0.0 %", "-0.2 %"]


def test_the_page_shows_the_rows_of_the_comparison(run):
    found = comparison()
    page = Page(write_report(run))
    rows = comparison_rows(found)
    labels = [row.label for row in rows]
    assert labels[:2] == ["Frechet distance", "class accuracy"]
    assert labels[-1] == "images a second, 25 steps"
    for row in rows:
        label = row.label[0].upper() + row.label[1:]
        floor = [f"real images {row.floor_text}"] if row.floor_text else []
        assert " ".join([label, *floor, *row.texts]) in page.text
    accuracy = rows[1]
    assert (accuracy.texts, accuracy.ratio, accuracy.better) == (
        ("90.0 %",) * 2,
        "1.00 ×",
        "higher",
    )


def test_without_metrics_of_both_models_none_are_compared():
    found = comparison()
    alone = replace(found, teacher=replace(found.teacher, metrics=None))
    assert comparison_rows(alone) == comparison_rows(found)[4:]


def test_a_model_without_a_teacher_has_rows_of_one_value():
    metrics = comparison().student.metrics
    assert [row.texts for row in metric_rows(metrics)] == [
        ("3.00",),
        ("90.0 %",),
        ("0.800",),
        ("0.700",),
    ]
    unlabelled = replace(metrics, values={"fd": metrics["fd"]})
    assert [row.label for row in metric_rows(metrics, unlabelled)] == ["Frechet distance"]
