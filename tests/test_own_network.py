"""A user's own network: trained, shipped, sampled without dkdm, loaded again."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import dkdm
import own_networks
import programs
from dkdm.cli import main
from dkdm.core.saving.checkpoint import read_tensors, save_network
from dkdm.errors import DkdmError, UsageError
from dkdm.models import LoadOptions, sketch_teacher
from dkdm.models.custom_network import origin_of, read_origin
from dkdm.shipping.custom_network import shipment, shipping_note
from dkdm.shipping.pipeline_folder import usage_snippet, write_pipeline
from dkdm.students import given_student, student_of
from factories import denoiser, some_batch
from programs import SAMPLED
from small_runs import SMALL

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = replace(SMALL, max_train_steps=5, checkpointing_steps=3, evaluation_samples=0)


def distil(folder, student="own_networks:make", **changes):
    return dkdm.distill(denoiser(), student, replace(TINY, output_dir=folder, **changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("own") / "run", evaluation_samples=8)


OUTPUTS = """
import sys
sys.modules["own_networks"] = None  # the user's module is not there either
SAMPLED
import torch
from safetensors.torch import load_file, save_file
network = pipeline.unet
assert not network.training and not network.made.training
given = load_file(sys.argv[2])
t = given.pop("t")
with torch.no_grad():
    save_file({"output": network(given.pop("x"), t, **given)}, sys.argv[3])
network.save_pretrained(sys.argv[1] + "-again")
""".replace("SAMPLED", SAMPLED)


def test_without_dkdm_the_folder_samples_and_its_network_is_the_student(run, tmp_path):
    from safetensors.torch import save_file

    student = dkdm.load_student(run)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 7.0, 49.0])
    given = {"x": x, "t": t, "class_labels": torch.tensor([0, 1, 3])}
    save_file(given, tmp_path / "given")
    done = programs.run(OUTPUTS, run, tmp_path / "given", tmp_path / "output")
    assert "sampled" in done.stdout, done.stderr
    found = read_tensors(tmp_path / "output")["output"]
    assert torch.equal(found, student(x, t, given["class_labels"]))
    again, first = (
        read_tensors(path / WEIGHTS) for path in (run.with_name("run-again"), run / "unet")
    )
    assert again.keys() == first.keys() == student.state_dict().keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_load_student_is_the_users_class_with_the_averaged_weights(run):
    student = dkdm.load_student(run)
    assert type(student) is own_networks.Small
    assert not student.training
    expected = read_tensors(run / "checkpoint-5" / "unet_ema" / WEIGHTS)
    for folder in (run, run / "unet", run / "checkpoint-5", run / "checkpoint-5" / "unet_ema"):
        found = dkdm.load_student(folder).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    plain = dkdm.load_student(run / "checkpoint-5" / "unet").state_dict()
    assert not torch.equal(plain["first.weight"], expected["first.weight"])


def test_a_run_without_average_has_its_plain_weights_in_checkpoints(tmp_path):
    folder = distil(tmp_path / "run", use_ema=False)
    expected = read_tensors(folder / "checkpoint-3" / "unet" / WEIGHTS)
    found = dkdm.load_student(folder / "checkpoint-3").state_dict()
    assert torch.equal(found["first.weight"], expected["first.weight"])


def test_load_student_into_a_network_that_the_user_made(run):
    mine = own_networks.Small(1, 1, 4)
    assert dkdm.load_student(run, network=mine) is mine
    assert torch.equal(mine.first.weight, dkdm.load_student(run).first.weight)
    with pytest.raises(
        DkdmError, match=r"do not belong to this Small: 1 with another shape .first"
    ):
        dkdm.load_student(run, network=own_networks.Small(2, 1, 4))


def test_load_student_of_diffusers_networks(tmp_path):
    model = denoiser()
    write_pipeline(tmp_path, model)
    found = dkdm.load_student(tmp_path)
    assert type(found) is type(model.network)
    assert all(p.requires_grad for p in found.parameters())


def test_folders_without_a_network_are_refused(run, tmp_path):
    with pytest.raises(UsageError, match="no folder .*absent"):
        dkdm.load_student(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"has no unet/diffusion.*safetensors$"):
        dkdm.load_student(tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(UsageError, match="not finished: take a checkpoint-N"):
        dkdm.load_student(tmp_path)
    shutil.copytree(run / "unet", tmp_path / "unet")
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(UsageError, match="network=..."):
        dkdm.load_student(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_shape": ["8", 8]}, "sample_shape is a list, each a whole number of 0 or more"),
        ({"sample_shape": 8}, "sample_shape is a list"),
        ({"out_channels": True}, "out_channels is a whole number"),
        (
            {"embeddings": {"encoder_hidden_states": [-1]}},
            "embeddings is an object, each a list, each a whole number of 0",
        ),
        ({"num_classes": 1.5}, "num_classes is a whole number of 0 or more, or null"),
        ({"factory": "no_such_module:make"}, "--student-factory no_such_module:make .*network=..."),
        ({"factory": "os:getcwd"}, "If you trust that code, name it: --student-factory os:getcwd"),
        ({"factory": "os.system"}, "factory is 'os.system': give module:name"),
        ({"factory": ["os", "system"]}, "factory is a text, or null"),
        ({"arguments": ["exit 7"]}, "arguments is an object, or null"),
    ],
)
def test_a_config_that_dkdm_did_not_write_is_refused(run, tmp_path, changes, said):
    shutil.copytree(run / "unet", tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=said):
        dkdm.load_student(tmp_path)


def test_code_in_the_folder_is_never_run(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    evil = tmp_path / "run" / "unet" / "evil_nets.py"
    evil.write_text("raise SystemExit('was run')")
    config = tmp_path / "run" / "unet" / "config.json"
    config.write_text(config.read_text().replace("own_networks:make", "evil_nets:make"))
    monkeypatch.chdir(evil.parent)
    for load in (dkdm.load_student, lambda folder: dkdm.load_teacher(str(folder))):
        with pytest.raises(UsageError, match="code in a model's folder is not run"):
            load(tmp_path / "run")


def test_the_run_is_a_teacher_with_the_same_shape_and_classes(run):
    teacher = dkdm.load_teacher(str(run))
    assert teacher.sample_shape == (1, 8, 8)
    assert teacher.conditioning == dkdm.ClassLabels(3, null_class=3)
    batch = some_batch(teacher)
    expected = replace(teacher, network=dkdm.load_student(run), call=None).predict(batch).output
    assert torch.equal(teacher.predict(batch).output, expected)
    half = dkdm.load_teacher(str(run), options=LoadOptions(dtype="bfloat16"))
    assert half.dtype == torch.bfloat16
    sketch = sketch_teacher(str(run), LoadOptions())
    assert sketch.num_parameters == teacher.num_parameters
    assert sketch.device.type == "meta"


def test_commands_on_such_a_run(run, tmp_path, capsys):
    picture = tmp_path / "a.png"
    assert (
        main(["sample", str(run), "--num-samples", "4", "--steps", "2", "--output", str(picture)])
        == 0
    )
    assert main(["inspect", str(run), "--num-samples", "2", "--steps", "2", "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") :])["network"] == "Small"
    assert main(["report", str(run)]) == 0


def test_resume_is_exact(tmp_path):
    whole = distil(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "part")
    for name in ("checkpoint-5", "unet"):
        shutil.rmtree(tmp_path / "part" / name)
    part = distil(tmp_path / "part", resume_from_checkpoint="latest")
    manifests = [
        (folder / "checkpoint-5" / "manifest.json").read_text() for folder in (whole, part)
    ]
    assert manifests[0] == manifests[1]
    assert "unet/config.json" in manifests[0]
    assert (part / "unet" / WEIGHTS).read_bytes() == (whole / "unet" / WEIGHTS).read_bytes()


# --- what can be shipped -------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of modules as a user has them, importable here and forgotten afterwards."""
    (tmp_path / "project").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "project"))
    before = set(sys.modules)
    yield tmp_path / "project"
    for name in set(sys.modules) - before:
        del sys.modules[name]


SOURCE = (
    "import torch\nfrom torch import nn\n{more}\n"
    "class Net(nn.Module):\n"
    "    def __init__(self, channels, out_channels):\n"
    "        super().__init__()\n"
    "        self.layer = nn.Conv2d(channels, out_channels, 1)\n"
    "    def forward(self, x, t, class_labels=None):\n"
    "        return (self.layer(x) + t.reshape(-1, 1, 1, 1) / 50,)\n"
    "def make(sample_shape, out_channels, conditioning):\n"
    "    return Net(sample_shape[0], out_channels)\n"
)


def write(folder, name, more=""):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(SOURCE.format(more=more))


def shipped_by(spec):
    return shipment(origin_of(student_of(spec, denoiser()).network))


def test_a_module_alone_is_shipped_as_it_is(project):
    write(project, "alone.py", "import math")
    shipped = shipped_by("alone:make")
    assert shipped.text.startswith((project / "alone.py").read_text().rstrip())
    assert (shipped.package, shipped.requires) == (None, ())


def test_a_module_that_fails_is_told_by_name(project):
    write(project, "broken.py", "no_such_name")
    with pytest.raises(
        UsageError, match="cannot import broken:make: NameError: name 'no_such_name'"
    ):
        student_of("broken:make", denoiser())


@pytest.mark.parametrize(
    ("module", "more"),
    [
        ("pack.nets", "from . import blocks"),
        ("pack.nets", "from .blocks import nothing"),
        ("pack.nets", "import pack.blocks"),
        ("beside", "import blocks"),
    ],
)
def test_a_module_of_several_is_imported_from_its_package(project, module, more):
    write(project, module.replace(".", "/") + ".py", more)
    for blocks in {
        project / "blocks.py",
        (project / module.replace(".", "/")).parent / "blocks.py",
    }:
        blocks.write_text("nothing = None\n")
    model = student_of(f"{module}:make", denoiser())
    top = module.partition(".")[0]
    shipped = shipment(origin_of(model.network))
    assert shipped.package == top
    assert shipped.text.startswith(f"from {module} import make")
    assert f"not shipped: `{top}` and what it imports must be importable" in shipping_note(
        model.network
    )


def test_its_folder_samples_where_the_package_is(project, tmp_path):
    write(project, "pack/nets.py", "from .blocks import nothing")
    (project / "pack" / "blocks.py").write_text("nothing = None\n")
    write_pipeline(tmp_path / "run", student_of("pack.nets:make", denoiser()))
    done = programs.run(SAMPLED, tmp_path / "run", path=project)
    assert "sampled" in done.stdout, done.stderr


@pytest.mark.parametrize("caught", ["ImportError", "(OSError, ModuleNotFoundError)", ""])
def test_packages_that_it_can_go_on_without_are_not_named(project, caught):
    write(
        project, "frugal.py", f"try:\n    import flash_attn\nexcept {caught}:\n    flash_attn = 0"
    )
    assert shipped_by("frugal:make").requires == ()


def test_a_package_without_which_it_gives_up_is_named(project):
    tried = "try:\n    import jinja2\nexcept ImportError as error:\n    raise OSError() from error"
    write(project, "strict.py", tried)
    assert shipped_by("strict:make").requires == ("jinja2",)


def test_other_packages_that_it_imports_are_named(project):
    write(project, "needy.py", "import packaging, json, jinja2\nimport dkdm")
    shipped = shipped_by("needy:make")
    assert (shipped.package, shipped.requires) == (None, ("dkdm", "jinja2"))
    model = student_of("needy:make", denoiser())
    assert shipping_note(model.network).endswith("imports dkdm, jinja2, which must be installed")


def test_a_factory_that_asks_for_dkdms_classes_is_told_them_where_it_is_shipped(project, tmp_path):
    write(project, "typed.py", "import dkdm")
    with open(project / "typed.py", "a") as file:
        file.write(
            "def picky(sample_shape, out_channels, conditioning):\n"
            "    assert isinstance(conditioning, dkdm.ClassLabels)\n"
            "    return make(sample_shape, out_channels, conditioning)\n"
        )
    write_pipeline(tmp_path / "run", student_of("typed:picky", denoiser()))
    code = f"import sys\ndel sys.modules['dkdm']\n{SAMPLED}"
    source = dkdm.__path__[0].removesuffix("dkdm")
    done = programs.run(code, tmp_path / "run", path=source)
    assert "sampled" in done.stdout, done.stderr


def test_two_networks_of_the_same_file_name_do_not_meet(project, tmp_path):
    """diffusers runs all shipped code under one package name."""
    import diffusers

    write(project, "alone.py")
    one = student_of("alone:make", denoiser())
    write_pipeline(tmp_path / "one", one)
    write_pipeline(tmp_path / "two", student_of("own_networks:make", denoiser()))
    loaded = [
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / name, trust_remote_code=True)
        for name in ("one", "two")
    ]
    assert [type(pipeline.unet.made).__name__ for pipeline in loaded] == ["Net", "Small"]
    files = [next((tmp_path / name / "unet").glob("*.py")).name for name in ("one", "two")]
    assert files[0] != files[1]


# --- networks that came as objects ---------------------------------------------------------------


def plain(width=8):
    return own_networks.Small(1, 1, 4, width)


class Bare(own_networks.Small):
    """Can be made without arguments; `scale` is no weight."""

    def __init__(self, scale=1.0):
        super().__init__(1, 1, 4)
        self.scale = scale

    def forward(self, *arguments, **more):
        return self.scale * super().forward(*arguments, **more)


class Configured(Bare):
    @property
    def config(self):
        return {"scale": self.scale, "_private": object()}


@pytest.mark.parametrize(
    ("network", "arguments"),
    [(Bare(), {}), (Configured(2.5), {"scale": 2.5})],
    ids=["bare", "config"],
)
def test_objects_whose_class_makes_them_again(tmp_path, network, arguments):
    folder = distil(tmp_path / "run", network, max_train_steps=1)
    origin = origin_of(dkdm.load_student(folder))
    assert origin.factory == f"{__name__}:{type(network).__name__}"
    assert origin.arguments == arguments
    again, expected = dkdm.load_teacher(str(folder)), dkdm.load_student(folder, network=network)
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([0.0, 9.0]), torch.tensor([1, 2])
    assert torch.equal(again.network(x, t, label), expected(x, t, label))


@pytest.mark.parametrize(
    "network", [Bare(scale=2.0), plain()], ids=["other scale", "needs arguments"]
)
def test_objects_that_only_the_user_can_make(tmp_path, capsys, network):
    """The first has the weights of one made without arguments, and another output."""
    folder = distil(tmp_path / "run", network, max_train_steps=1)
    assert origin_of(network).factory is None
    assert "was given as an object" in capsys.readouterr().err
    assert "load_student(folder, network=...)" in (folder / "README.md").read_text()
    assert (
        json.loads((folder / "unet" / "config.json").read_text())["_class_name"]
        == type(network).__name__
    )
    for load in (dkdm.load_student, lambda path: dkdm.load_teacher(str(path))):
        with pytest.raises(UsageError, match="network=..."):
            load(folder)
    other = plain()
    dkdm.load_student(folder, network=other)
    assert not torch.equal(other.first.weight, plain().first.weight)


def test_an_object_with_another_call_is_not_made_by_its_class():
    model = replace(denoiser(), network=Bare(), call=lambda n, x, t, cond: n(x, t, **cond))
    student = given_student(model, model)
    assert origin_of(student.network).factory is None


def test_an_object_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UsageError, match="returned .*must return"):
        distil(tmp_path / "run", own_networks.Small(1, 3, 4))


# --- factories -----------------------------------------------------------------------------------


def two_arguments(shape, channels):
    return shape, channels


def with_a_keyword(shape, channels, conditioning, *, width):
    return shape, channels, conditioning, width


@pytest.mark.parametrize("name", ["two_arguments", "with_a_keyword"])
def test_a_signature_that_does_not_fit_is_told_the_call(name):
    said = rf"cannot be called as {name}\(\(1, 8, 8\), 1, ClassLabels\): .*three positional"
    with pytest.raises(UsageError, match=said):
        student_of(f"{__name__}:{name}", denoiser())


def test_the_architecture_of_a_run_may_be_a_student_again(run):
    again = student_of(str(run), denoiser())
    assert type(again.network) is own_networks.Small
    trained = dkdm.load_student(run).first.weight
    assert not torch.equal(again.network.first.weight, trained)
    assert student_of(str(run / "unet" / "config.json"), denoiser()).num_parameters


def test_another_prediction_and_fewer_classes_come_back(tmp_path):
    teacher = replace(denoiser(), conditioning=dkdm.ClassLabels(3, 3, classes=(0, 2)))
    config = replace(TINY, output_dir=tmp_path / "run", student_prediction="epsilon")
    again = dkdm.load_teacher(str(dkdm.distill(teacher, Bare(), config)))
    assert again.parameterization.prediction == "epsilon"
    assert again.conditioning == dkdm.ClassLabels(3, 3, classes=(0, 2))


def test_the_origin_reads_back_what_was_written(tmp_path):
    network = student_of("own_networks:make", denoiser()).network
    save_network(network, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert read_origin(config, tmp_path) == origin_of(network)


class Tied(nn.Module):
    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__()
        del sample_shape, out_channels, conditioning
        self.one = nn.Conv2d(1, 1, 3, padding=1)
        self.two = nn.Conv2d(1, 1, 3, padding=1)
        self.two.weight = self.one.weight

    def forward(self, x, t, class_labels=None):
        del class_labels
        return self.two(self.one(x)) + t.reshape(-1, 1, 1, 1) / 50


def test_shared_weights_are_saved_under_both_names(tmp_path):
    folder = distil(tmp_path / "run", f"{__name__}:Tied", max_train_steps=2, use_ema=False)
    student = dkdm.load_student(folder)
    assert student.one.weight is student.two.weight
    saved = read_tensors(folder / "unet" / WEIGHTS)
    assert torch.equal(saved["one.weight"], saved["two.weight"])


def test_the_card_says_how_it_is_loaded(run):
    card = (run / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "Note:" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert usage_snippet("run", dkdm.load_teacher(str(run))) in code


def test_text_conditioning_is_described_to_the_factory(tmp_path):
    """By the shapes of its embeddings, without encoders."""
    from dkdm.models.custom_network import Origin

    shapes = {"encoder_hidden_states": (7, 12), "pooled_projections": (5,)}
    origin = Origin("Net", "a:b", (1, 8, 8), 1, embeddings=shapes)
    origin.save_config(tmp_path)
    again = read_origin(json.loads((tmp_path / "config.json").read_text()), tmp_path)
    assert again.conditioning.shape_of("encoder_hidden_states") == (7, 12)
    assert again.conditioning.shape_of("pooled_projections") == (5,)
    assert again.conditioning.shape_of("image_embeds") is None
