"""The model card: front matter that the hub can read, code that runs, nothing that is not true."""

import ast
import re
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

import dkdm
import pipelines
from dkdm import load_teacher
from dkdm.config import DistillConfig, TrainConfig
from dkdm.data.named import load_reference
from dkdm.errors import UsageError
from dkdm.evaluation.circumstances import Circumstances, measurement_of
from dkdm.evaluation.metrics import Metrics
from dkdm.evaluation.numbers import count
from dkdm.evaluation.results import Measurement
from dkdm.evaluation.rows import floors_in, metric_rows
from dkdm.models import with_texts
from dkdm.shipping.card import Measured, write_card
from dkdm.shipping.licence import front_matter, licence_of_student, origin_of
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import student_of
from factories import denoiser

PAPER = "Xiang, Qianlong"
FASHION = measurement_of(load_reference("fashion-test"), 400)
OTHER = {
    "license": "other",
    "license_name": "house-licence",
    "license_link": "LICENSE.md",
}


def card_of(folder, model, config, **given):
    """The card as huggingface_hub reads it."""
    write_card(folder, model, replace(config, output_dir=folder), **given)
    return ModelCard.load(folder / "README.md")


def teacher_folder(folder, **matter):
    """A local teacher whose own card has this front matter."""
    write_pipeline(folder, denoiser(None))
    lines = [f"{key}: {value}" for key, value in matter.items()]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", "# mine", ""]))
    return folder


def in_cache(monkeypatch, root, repo_id, **matter):
    """A hub's model as a download leaves it in the cache; returns its folder."""
    repo = root / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    folder = teacher_folder(repo / "snapshots" / "abc123", **matter)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    return folder


def test_a_distilled_model_says_what_it_is(tmp_path):
    teacher, student = denoiser(3), student_of("dit-xs", denoiser(3))
    config = DistillConfig(teacher="builtin:fashion", guidance_scale="2", classes=(0, 2))
    card = card_of(tmp_path, student, config, teacher=teacher)
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["license"] == "apache-2.0"
    assert {"diffusion", "distillation", "dkdm", "data-free", "class-conditional"} <= {
        *data["tags"]
    }
    assert "base_model" not in data
    assert "model-index" not in data
    sizes = [f"{count(model.num_parameters)} parameters" for model in (teacher, student)]
    assert all(size in card.text for size in sizes)
    assert "No image was read" in card.text
    assert "`apache-2.0`, which is the teacher's." in card.text
    assert "Guidance of 2 is baked in" in card.text
    assert "learned the classes 0, 2 only" in card.text
    assert PAPER in card.text
    assert dkdm.__version__ in card.text


def test_options_that_were_given_come_before_those_at_their_defaults(tmp_path):
    card = card_of(tmp_path, denoiser(None), DistillConfig(teacher="builtin:fashion", seed=7))
    given, others = card.text.split("The others, at their defaults: ")
    assert given.endswith("## Hyper-parameters\n\n- `seed`: 7\n\n")
    others = others.partition("\n\n## Citation")[0]
    assert "`train_batch_size` 128, " in others and "`seed`" not in others
    assert "\n" not in others and others.endswith(".")


def test_measurements_are_the_hubs_index(tmp_path):
    metrics = Metrics(
        {"fd": 1.25, "class_accuracy": 0.9, "variance_ratio_mean": 0.8}, 400, "fashion-test"
    )
    rows = metric_rows(metrics)
    measured = Measured(1.0, rows, (), metrics, FASHION)
    card = card_of(tmp_path, denoiser(3), DistillConfig(), measured=measured)
    found = {result.metric_name: result for result in card.data.eval_results}
    distance = found[
        "Frechet distance (64 features of dkdm's packaged 16x16 Fashion-MNIST classifier)"
    ]
    assert distance.metric_value == 1.25
    assert distance.metric_args == {"samples": 400}
    assert distance.dataset_split == "test"
    assert len(found) == 3
    assert not re.search(r"\bfid\b", str(card.data), re.IGNORECASE)
    assert "not the FID of the literature" in card.text
    assert (
        "| | value |\n|---|---|\n| Frechet distance | 1.25 |\n| class accuracy | 90.0 % |"
        in card.text
    )


def test_an_fid_is_named_so_with_its_images_and_their_floor(tmp_path):
    metrics = Metrics({"fid": 7.5}, 5000, "birds")
    network, about = "inception-2015-12-05/bilinear", {"type": "birds", "name": "birds"}
    birds = Measurement("2,048 features", "birds", 6000, 5000, 5.25, network, about)
    rows = metric_rows(metrics, floors=floors_in(birds))
    how = Circumstances(5000, 50, 3, {"": 1.5}, "of step 9", birds).in_words()
    measured = Measured(1.0, rows, how, metrics, birds)
    card = card_of(tmp_path, denoiser(3), DistillConfig(), measured=measured)
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value) == ("FID (2,048 features)", 7.5)
    assert (result.dataset_name, result.dataset_split) == ("birds", None)
    assert "| | value | floor |\n|---|---|---|\n| FID | 7.50 | 5.25 |" in card.text
    for name, words in {
        "samples": "5,000",
        "sampler": "DDIM, 50 steps",
        "guidance": "1.5",
        "weights": "of step 9",
        "seed": "3",
        "reference": "birds, 6,000 images",
        "features": "2,048 features",
        "floor": "what 5,000 real images are given; Frechet distance 5.25",
    }.items():
        assert f"| {name} | {words} |" in card.text
    assert "not the FID" not in card.text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("dynamic", "No image was read"),
        ("shuffled", "No image was read"),
        ("iterative", "No image was read"),
        ("synthetic", "trained on samples of the teacher"),
    ],
)
def test_what_was_read_is_said_by_the_source(tmp_path, source, said):
    write_card(tmp_path, denoiser(None), DistillConfig(output_dir=tmp_path, source=source))
    card = ModelCard.load(tmp_path / "README.md")
    assert said in card.text
    assert "data-free" in card.data.tags
    assert "no image was read" in card.text.lower()


@pytest.mark.parametrize(
    ("target", "init", "taught"),
    [("noise", "random", False), ("teacher", "random", True), ("noise", "teacher", True)],
)
def test_a_student_of_images_alone_claims_no_distillation(tmp_path, target, init, taught):
    config = DistillConfig(source="images", images_target=target, student_init=init)
    card = card_of(tmp_path, denoiser(None), config)
    assert ("distillation" in card.data.tags) is taught
    assert ("which taught it nothing" in card.text) is not taught
    assert (PAPER in card.text) is taught
    assert "data-free" not in card.data.tags


def test_a_model_trained_on_images_claims_no_distillation(tmp_path):
    card = card_of(tmp_path, denoiser(None), TrainConfig(images=str(tmp_path / "my-cats")))
    assert "trained on my-cats." in card.text
    assert str(tmp_path) not in card.content
    assert "distillation" not in card.data.tags
    assert "No image" not in card.text
    assert PAPER not in card.text
    assert "Unknown: none was given." in card.text
    assert card.data.license is None


def test_no_path_of_this_machine_is_told(tmp_path):
    config = DistillConfig(
        teacher=str(tmp_path / "teachers" / "mine"),
        student=str(tmp_path / "student.json"),
        prompts=str(tmp_path / "prompts.txt"),
        teacher_lora=(f"{tmp_path / 'a.safetensors'}:0.8",),
        teacher_scheduler=str(tmp_path / "scheduler_config.json"),
        teacher_config=tmp_path / "config.yaml",
        teacher_flags=f"--vae {tmp_path / 'vae'}",
        student_init=str(tmp_path / "earlier"),
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
        hub_model_id="someone/secret-name",
    )
    card = card_of(tmp_path / ".", denoiser(None), config)
    assert str(tmp_path) not in card.content
    assert "secret-name" not in card.content
    assert "distilled from `mine`" in card.text
    assert "`student`: student.json" in card.text
    assert "`student_init`: earlier" in card.text


@pytest.mark.parametrize(("scale", "on"), [("1.0", "target"), ("4", "chain")])
def test_guidance_that_the_student_does_not_imitate_is_not_baked_in(tmp_path, scale, on):
    config = DistillConfig(guidance_scale=scale, guidance_on=on)
    assert "baked in" not in card_of(tmp_path, denoiser(3), config).text


def test_a_folder_may_have_any_name(tmp_path):
    name = 'it\'s "mine"'
    (tmp_path / name).mkdir()
    code = ast.parse(code_of(card_of(tmp_path / name, denoiser(None), DistillConfig())))
    assert name in [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]


def test_licence_is_inherited_from_a_local_teacher(tmp_path):
    folder = teacher_folder(tmp_path / "teacher", **OTHER, base_model="owner/first")
    config = DistillConfig(teacher=str(folder))
    card = card_of(tmp_path, denoiser(None), config)
    assert card.data.license == "other"
    assert card.data.license_name == "house-licence"
    assert card.data.license_link is None  # it led to a file that is not here
    assert card.data.base_model == "owner/first"
    assert "`house-licence`, which is the teacher's" in card.text


HOSTILE = "mit](x) <img src=x onerror=alert(1)> `code` | ![p](//e.v/p.png) **b** </script>"


@pytest.mark.parametrize(
    ("link", "is_link"),
    [
        ("javascript:alert(1)", False),
        ("https://a.b/c) [more](//e.v", True),
        ('https://a.b/"><script>alert(1)</script>', True),
        ("data:text/html,<script>", False),
        ("https://[", False),
    ],
)
def test_words_of_others_are_only_words_in_the_card(tmp_path, link, is_link):
    """Rendered, the card has the links, pictures and tags of a harmless one."""
    matter = {"license": HOSTILE, "license_link": link}
    folder = teacher_folder(tmp_path / f"<b>{'`'}[x](y)", **{k: repr(v) for k, v in matter.items()})
    config = DistillConfig(teacher=str(folder), student_init="<i>[a](b)</i>/`<u>`")
    model = replace(denoiser(None), name="x")
    text = card_of(tmp_path, model, config).text
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)|\\.|```.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"<\w|</|!\[", outside)
    links = re.findall(r"\]\(([^)]*)\)", outside)
    assert len(links) == 1 + is_link and all(re.fullmatch(r"https://\S+", each) for each in links)


def test_licence_and_name_of_a_hub_teacher(tmp_path, monkeypatch):
    folder = in_cache(monkeypatch, tmp_path / "hub", "owner/big", **OTHER, base_model="owner/first")
    for teacher in ("owner/big", str(folder)):
        card = card_of(tmp_path, denoiser(None), DistillConfig(teacher=teacher))
        assert card.data.base_model == "owner/big"
        assert card.data.license_name == "house-licence"
        assert card.data.license_link.endswith("/owner/big/blob/main/LICENSE.md")
        assert "[owner/big](https://" in card.text


def test_another_licence_names_the_teachers_too(tmp_path):
    folder = teacher_folder(tmp_path / "teacher", license="openrail++")
    config = DistillConfig(teacher=str(folder), license="mit")
    card = card_of(tmp_path, denoiser(None), config)
    assert card.data.license == "mit"
    assert "`mit`. The teacher's is another, `openrail++`" in card.text


def test_an_unknown_licence_is_said_and_asked_for(tmp_path, capsys):
    (tmp_path / "teacher.pt").touch()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")  # not the file's own
    config = DistillConfig(teacher=str(tmp_path / "teacher.pt"))
    card = card_of(tmp_path, denoiser(None), config)
    assert card.data.license is None
    assert "Unknown: none was given" in card.text
    assert "The teacher's licence applies" in card.text
    small = DistillConfig(
        output_dir=tmp_path / "run",
        max_train_steps=1,
        train_batch_size=2,
        pool_size=2,
        fill="none",
        validation_steps=0,
        evaluation_samples=0,
    )
    dkdm.distill(denoiser(None), denoiser(None), small)
    notes = [line for line in capsys.readouterr().err.splitlines() if "licence" in line]
    assert len(notes) == 1
    assert "--license" in notes[0]
    licensed = replace(small, output_dir=tmp_path / "again", license="mit")
    dkdm.distill(denoiser(None), denoiser(None), licensed)
    assert "licence" not in capsys.readouterr().err


@pytest.mark.parametrize("given", ["Apache 2.0", "MIT", ""])
def test_licences_by_no_name_of_the_hub_are_refused(given):
    with pytest.raises(UsageError, match="in lower case"):
        DistillConfig(license=given)


def test_a_given_licence_that_is_the_teachers_keeps_its_name_and_link():
    theirs = {"license": "other", "license_name": "house-licence", "license_link": "https://x.y"}
    assert licence_of_student("house-licence", theirs) == theirs
    assert licence_of_student("mit", theirs) == {"license": "mit"}
    assert licence_of_student(None, {}) == {}


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\n: [\n---\n", "---\n- a list\n---\n", "---\nopen: end\n"]
)
def test_cards_without_readable_front_matter_say_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path / "README.md") == {}


def test_a_model_that_only_sounds_like_one_of_the_hub_is_none(tmp_path, monkeypatch):
    """Names of models built in Python: nothing of these names was loaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("own/thing", "builtin:mine"):
        origin = origin_of(DistillConfig(teacher=name).teacher_choice)
        assert origin.base_model is None
        assert not origin.licence


def test_a_factory_has_no_card():
    origin = origin_of(DistillConfig(teacher="factories:teacher").teacher_choice)
    assert (origin.name, origin.hub_id, origin.base_model) == ("factories:teacher", None, None)
    assert not origin.licence


@pytest.mark.parametrize("shape", [(1, 64), (1, 4, 8, 8)], ids=["sound", "video"])
def test_what_the_hub_has_no_task_for_has_no_tag(tmp_path, shape):
    model = replace(denoiser(None), sample_shape=shape)
    assert card_of(tmp_path, model, DistillConfig()).data.pipeline_tag is None


def code_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return code.replace("num_inference_steps=50", "num_inference_steps=2")


def unconditional():
    return denoiser(None)


def class_conditional():
    return student_of("dit-xs", denoiser(3))


def of_two_classes():
    model = class_conditional()
    return replace(model, conditioning=replace(model.conditioning, classes=(0, 2)))


@pytest.mark.parametrize(
    ("make", "count"), [(unconditional, 4), (class_conditional, 3), (of_two_classes, 2)]
)
def test_code_of_the_card_draws_images(tmp_path, monkeypatch, make, count):
    monkeypatch.chdir(tmp_path)
    folder, model = tmp_path / "run", make()
    write_pipeline(folder, model)
    made = {}
    exec(code_of(card_of(folder, model, DistillConfig())), made)
    assert [image.size for image in made["images"]] == [(8, 8)] * count


@pytest.mark.parametrize("student", [None, "text-unet-tiny"], ids=["stock", "shipped code"])
def test_code_of_the_card_draws_from_a_prompt(tmp_path, monkeypatch, student):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    made = pipelines.stable_diffusion() if student is None else pipelines.sd3()
    made.save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    model = with_texts(load_teacher(str(tmp_path / "teacher")), str(tmp_path / "prompts.txt"))
    model = model if student is None else student_of(student, model)
    write_pipeline(tmp_path / "run", model)
    card = card_of(tmp_path / "run", model, DistillConfig(prompts="prompts.txt"))
    assert card.data.pipeline_tag == "text-to-image"
    assert "trained with 2 prompts" in card.text
    stock = student is None
    assert ("guidance_scale=1.0" in card.text) == stock  # a stock pipeline guides by itself
    drawn = {}
    exec(code_of(card), drawn)
    assert drawn["images"][0].size == (16, 16)


def test_a_network_without_scheduler_is_loaded_alone(tmp_path, monkeypatch):
    """A process that no scheduler of diffusers stands for ends its run like any other."""
    monkeypatch.chdir(tmp_path)
    model = denoiser(None)
    model = replace(model, process=replace(model.process, scheduler={}))
    write_pipeline(tmp_path / "run", model)
    made = {}
    exec(code_of(card_of(tmp_path / "run", model, DistillConfig())), made)
    weights, expected = made["network"].state_dict(), model.network.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
